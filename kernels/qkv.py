"""Query, key and value of self-attention: three products with the same rows, in one launch.

    y_i = x W_i^T + b_i        i = 0, 1, 2: query, key, value

Shapes     x [T, K], each weight [N, K], each bias [N]; y [T, 3, N], in memory [3, T, N].
Precision  As linear; y has the bits that linear gives.
Batches    As linear.
CPU        Three of linear's products.
Backward   dx = sum over i of dy_i W_i, as one product over 3 N; dW_i = dy_i^T x, db_i = sum of dy_i
           over rows. Computed as linear's, on the three weights stacked.
Source     Vaswani et al., Attention Is All You Need, 2017, section 3.2.2. Checkpoints have three
           weights; one stacked tensor would be a copy, which goes stale, or parameters that share
           a storage, which tools that save them take for one.
"""

import torch
from torch.nn import functional as F

from . import launch
from .launch import (
    DTYPES,
    TensorDescriptor,
    ceil_div,
    once_differentiable,
    show,
    tl,
    triton,
    wait_for_inputs,
)
from .linear import SPEC as LINEAR
from .linear import (
    by_columns,
    config_of,
    describable,
    linear_backward,
    linear_ref,
    onednn_takes,
    places,
    plain_rows,
    product,
    product_precision,
    take_tiles,
)
from .spec import Spec


# -- reference ------------------------------------------------------------------------------
def qkv_ref(
    x, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias, num_tokens=None
):
    query = linear_ref(x, query_weight, query_bias)
    key = linear_ref(x, key_weight, key_bias)
    value = linear_ref(x, value_weight, value_bias)
    return torch.stack((query, key, value), 1)


# -- kernels --------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _forward_kernel(
    x_ptr,  # [T, K]
    query_weight_ptr, key_weight_ptr, value_weight_ptr,  # [N, K], or by columns
    query_bias_ptr, key_bias_ptr, value_bias_ptr,  # [N]
    num_tokens_ptr,  # [1] or None
    y_ptr,  # [3, T, N], contiguous
    stride_xt, stride_w,
    T, N, K,
    PRECISION: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    REST: tl.constexpr,  # whether K is no multiple of BLOCK_K
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Program (m, i, n) takes tile (m, n) of y_i. Neighbours differ in n, then in i: x is read
    from memory once."""
    wait_for_inputs()
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    start_m = pid // (3 * blocks_n) * BLOCK_M
    i = pid // blocks_n % 3
    start_n = pid % blocks_n * BLOCK_N
    rows = T
    if num_tokens_ptr is not None:
        rows = tl.minimum(tl.load(num_tokens_ptr), T)
        if start_m >= rows:
            return
    weight_ptr, bias_ptr = query_weight_ptr, query_bias_ptr
    if i == 1:
        weight_ptr, bias_ptr = key_weight_ptr, key_bias_ptr
    if i == 2:
        weight_ptr, bias_ptr = value_weight_ptr, value_bias_ptr

    acc = product(
        x_ptr, weight_ptr, stride_xt, stride_w,
        start_m, start_n, rows, N, K, PRECISION, BY_COLUMNS, REST, BLOCK_M, BLOCK_N, BLOCK_K,
    )
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    y = acc + tl.load(bias_ptr + offs_n, mask=mask_n)[None, :]
    rows_y = i.to(tl.int64) * T + offs_m  # row * N may pass 2^31
    mask = (offs_m < rows)[:, None] & mask_n[None, :]
    tl.store(y_ptr + rows_y[:, None] * N + offs_n[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _persistent_kernel(
    x,  # descriptor of [T, K] in tiles of [BLOCK_M, BLOCK_K]
    query_weight, key_weight, value_weight,  # descriptors of [N, K] in tiles of [BLOCK_N, BLOCK_K]
    query_bias_ptr, key_bias_ptr, value_bias_ptr, num_tokens_ptr, y_ptr,  # as above
    T, N, K,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """As many programs as the GPU holds, a third of which takes all tiles of y_i: each selects its
    descriptor once, before its loop."""
    wait_for_inputs()
    rows = T
    if num_tokens_ptr is not None:
        rows = tl.minimum(tl.load(num_tokens_ptr), T).to(tl.int32)  # as descriptors require
    i = tl.program_id(0) % 3
    first, programs = tl.program_id(0) // 3, tl.num_programs(0) // 3
    y_ptr += i.to(tl.int64) * T * N  # may pass 2^31
    weight, bias_ptr = query_weight, query_bias_ptr
    if i == 1:
        weight, bias_ptr = key_weight, key_bias_ptr
    if i == 2:
        weight, bias_ptr = value_weight, value_bias_ptr
    take_tiles(
        first, programs, x, weight, bias_ptr, None, y_ptr, 0,
        rows, N, K, None, False, PRECISION, False, BLOCK_M, BLOCK_N, BLOCK_K,
    )


# -- launchers ------------------------------------------------------------------------------
def _forward(y, x, qw, qb, kw, kb, vw, vb, num_tokens):
    x, stride_xt = launch.rows(x)
    (T, K), N = x.shape, qw.shape[0]
    precision = product_precision(x)
    gpu = launch.arch(), launch.multiprocessors()
    persistent, config = config_of("qkv", T, N, K, x.itemsize, precision, *gpu, parts=3)
    M_, N_, K_ = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    tiles = ceil_div(T, M_) * ceil_div(N, N_)  # of each y_i
    if not tiles:
        return
    weights = [w.contiguous() for w in (qw, kw, vw)]
    biases = [b.contiguous() for b in (qb, kb, vb)]
    if persistent and describable(gpu[0], precision, (x, stride_xt), *((w, K) for w in weights)):
        launch.start(
            _persistent_kernel, 3 * min(tiles, places(3, *gpu, x.itemsize, **config)),
            TensorDescriptor(x, (T, K), (stride_xt, 1), (M_, K_)),
            *(TensorDescriptor(w, (N, K), (K, 1), (N_, K_)) for w in weights),
            *biases, num_tokens, y, T, N, K, PRECISION=precision, **config,
        )  # fmt: skip
        return
    weights, stride_w, is_by_columns = by_columns(T, precision, N_, *weights)
    launch.start(
        _forward_kernel, 3 * tiles,
        x, *weights, *biases, num_tokens, y, stride_xt, stride_w, T, N, K,
        PRECISION=precision, BY_COLUMNS=is_by_columns, REST=K % K_ != 0, **config,
    )  # fmt: skip


def _plain(x, qw, qb, kw, kb, vw, vb, num_tokens):
    parts = (qw, qb), (kw, kb), (vw, vb)
    if torch.is_grad_enabled():  # the bare op of an exported program, which autograd traces into
        (tokens,) = launch.head(num_tokens, x)
        y = torch.stack([plain_rows(tokens, *part, None, None) for part in parts])
        return F.pad(y, (0, 0, 0, x.shape[0] - y.shape[1])).transpose(0, 1)
    y = _empty(x, qw)
    x, of_tokens = launch.head(num_tokens, x, y)
    for i, (weight, bias) in enumerate(parts):
        if x.itemsize == 2 or onednn_takes(x, weight, None):
            of_tokens[:, i] = plain_rows(x, weight, bias, None, None)
        else:
            torch.addmm(bias, x, weight.mT, out=of_tokens[:, i])
    return y


# -- registration ---------------------------------------------------------------------------
def _empty(x, weight, *_):
    """Each y_i is contiguous: only then do three products on a CPU take as long as one."""
    T, N = x.shape[0], weight.shape[0]
    return x.new_empty_strided((T, 3, N), (N, T * N, 1))


_qkv = launch.define(
    "qkv(Tensor x, Tensor query_weight, Tensor query_bias, Tensor key_weight, Tensor key_bias,"
    " Tensor value_weight, Tensor value_bias, Tensor? num_tokens) -> Tensor",
    outputs=_empty,
    launch=_forward,
    plain=_plain,
)


class _QKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, qw, qb, kw, kb, vw, vb, num_tokens):
        ctx.save_for_backward(x, qw, kw, vw, num_tokens)
        return _qkv(x, qw, qb, kw, kb, vw, vb, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *weights, num_tokens = ctx.saved_tensors
        needs_x, *needs_parts, _ = ctx.needs_input_grad
        dx, dweight, dbias = linear_backward(
            dy.flatten(1), x, torch.cat(weights), None, None, num_tokens, needs_x, any(needs_parts)
        )
        of_parts = [None] * 6
        if any(needs_parts):
            of_parts = [t for part in zip(dweight.chunk(3), dbias.chunk(3)) for t in part]
        grads = zip((dx, *of_parts), (needs_x, *needs_parts), strict=True)
        return *(g if needed else None for g, needed in grads), None


# -- public op ------------------------------------------------------------------------------
def qkv(
    x, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias, num_tokens=None
):
    """The products of x with three weights, stacked.

    x             [T, K], fp32, fp16 or bf16
    query_weight, key_weight, value_weight   [N, K], dtype of x
    query_bias, key_bias, value_bias         [N], dtype of x
    num_tokens    [1] integer on the device of x: rows past it do not affect the result and are not
                  written in it; None takes all rows

    Returns y [T, 3, N] in the dtype of x; y[:, i] is contiguous. Differentiable once, in all but
    num_tokens. Rows of x may have any constant stride; an input laid out otherwise is copied
    first. Raises ValueError for any other shape or dtype.
    """
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"qkv: x must be fp32, fp16 or bf16 [T, K], got {show(x)}")
    launch.check_rows("qkv", x)
    K, dtype = x.shape[1], x.dtype
    if query_weight.ndim != 2 or query_weight.shape[1] != K or query_weight.dtype != dtype:
        want = f"{show(dtype)}[N, {K}]"
        raise ValueError(f"qkv: query_weight must be {want}, got {show(query_weight)}")
    N = query_weight.shape[0]
    for name, t, shape in (
        ("query_bias", query_bias, (N,)),
        ("key_weight", key_weight, (N, K)), ("key_bias", key_bias, (N,)),
        ("value_weight", value_weight, (N, K)), ("value_bias", value_bias, (N,)),
    ):  # fmt: skip
        if t.shape != shape or t.dtype != dtype:
            raise ValueError(f"qkv: {name} must be {show(dtype)}{[*shape]}, got {show(t)}")
    launch.check_num_tokens("qkv", num_tokens)
    args = (
        x, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias, num_tokens
    )
    return _QKV.apply(*args) if launch.is_recorded() else _qkv(*args)


# -- spec -----------------------------------------------------------------------------------
PARTS = "query", "key", "value"


def _inputs(dtype, device, T, K, N, scale=1.0):
    inputs = {"x": (scale * torch.randn(T, K, device=device)).to(dtype)}
    for part in PARTS:
        weight = torch.randn(N, K, device=device) / max(K, 1) ** 0.5
        inputs[f"{part}_weight"] = weight.to(dtype)
        inputs[f"{part}_bias"] = torch.randn(N, device=device).to(dtype)
    return inputs


SIZES = (1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129)


def _fuzz(rng):
    case = {"T": rng.choice((0, *SIZES)), "K": rng.choice(SIZES), "N": rng.choice(SIZES)}
    if rng.random() < 0.3:
        case["scale"] = rng.choice((1e-6, 0.1, 100.0))
    return case


def _cost(itemsize, T, K, N, **_):
    return 3 * T * N * (2 * K + 1), (T * K + 3 * (N * K + N + T * N)) * itemsize


BASE, LARGE = 768, 1024

SPEC = Spec(
    fn=qkv,
    ref=qkv_ref,
    inputs=_inputs,
    cost=_cost,
    cases=(
        {"T": 128, "K": 130, "N": 72},
        {"T": 37, "K": 96, "N": 136},  # column indices exceed the number of rows
        {"T": 131, "K": 16, "N": 130},  # edge tiles of three rows, two columns
        {"T": 513, "K": 70, "N": 21},  # enough rows for weights by columns
        {"T": 3, "K": 1024, "N": 7},
        {"T": 1, "K": 1, "N": 1},
        {"T": 0, "K": 128, "N": 128},
        {"T": 37, "K": 128, "N": 128},  # large enough for oneDNN
    ),
    fuzz=_fuzz,
    whole={"T": 128, "K": 256, "N": 128},
    huge=(
        {"T": 2**20 + 3, "K": 2**11, "N": 64},  # x
        {"T": 2**19 + 3, "K": 64, "N": 2**11},  # y
        {"T": 64, "K": 2**12, "N": 2**20 + 3},  # weight
        {"T": 513, "K": 2**12, "N": 2**20 + 3},  # in fp32 by columns
        {"T": 2**30 + 3, "K": 1, "N": 1},  # rows of y
    ),
    bench=(
        {"T": 16384, "K": BASE, "N": BASE},
        {"T": 16384, "K": LARGE, "N": LARGE},
        {"T": 128, "K": BASE, "N": BASE},  # one sequence of 128
        {"T": 16384, "K": 384, "N": 384},
    ),
    rejects={
        "x must be fp32, fp16 or bf16 [T, K], got float32[8]": {"x": torch.ones(8)},
        "query_weight must be float32[N, 130], got float32[8, 7]": {
            "query_weight": torch.ones(8, 7)
        },
        "query_bias must be float32[72], got float32[1, 72]": {"query_bias": torch.ones(1, 72)},
        "key_weight must be float32[72, 130], got float64[72, 130]": {
            "key_weight": torch.ones(72, 130).double()
        },
        "key_bias must be float32[72], got float32[3]": {"key_bias": torch.ones(3)},
        "value_weight must be float32[72, 130], got float32[72]": {"value_weight": torch.ones(72)},
        "value_bias must be float32[72], got float32[]": {"value_bias": torch.tensor(1.0)},
        "num_tokens must be int32[1] or int64[1], got float32[1]": {"num_tokens": torch.ones(1)},
    },
    packed=("x",),
    variants=LINEAR.variants,
    rounds_backward=True,
)
