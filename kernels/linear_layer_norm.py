"""The end of a block of BERT: product, residual add, layer normalisation.

    h = x W^T + bias + residual
    y = (h - mean(h)) * rstd * norm_weight + norm_bias      rstd = 1 / sqrt(var(h) + eps)

Shapes     x [T, K], weight [N, K], bias [N]; residual, h, y [T, N]; norm_weight, norm_bias [N].
Precision  h is rounded once, to the dtype of x, and normalised in fp32: the numbers that
           layer_norm(linear(x, weight, bias, residual=residual)) has.
Launches   Two, of those ops' kernels, unless a table says that one is faster. The one is linear's
           with an end: the program that stores the last tile of some rows of h normalises them
           while they are in L2 and others still multiply. h crosses memory once less, and a row is
           summed at once, so there are no statistics of parts to merge.
Order      A program stores its tile; a barrier; then it adds 1 to the counter of those rows, with
           acquire and release. Who finds that all others have been there sees what they stored:
           causality order in the PTX ISA's memory consistency model. Nobody waits for anybody.
Batches    A row of y hangs on that row alone, in one launch and in two. Between the two a table may
           choose by the number of rows only where both gave the same bits, see bench/tune.py.
Backward   Of the two ops.
Source     linear.py and layer_norm.py; "the last to arrive does the rest" is threadFenceReduction
           of NVIDIA's CUDA samples.
"""

import torch

from . import launch
from .launch import DTYPES, ceil_div, next_power_of_2, show, tl, triton
from .layer_norm import MAX_N, layer_norm, layer_norm_ref
from .layer_norm import _forward as launch_layer_norm
from .layer_norm import _plain as plain_layer_norm
from .linear import _forward as launch_linear
from .linear import _plain as plain_linear
from .linear import finish_tile, linear, linear_ref, tile_config, tile_product
from .spec import Spec


# -- reference ------------------------------------------------------------------------------
def linear_layer_norm_ref(
    x, weight, bias, residual, norm_weight, norm_bias, eps=1e-12, num_tokens=None
):
    h = linear_ref(x, weight, bias, residual=residual)
    wide = torch.promote_types(h.dtype, torch.float32)  # 1e-12 is 0 in fp16
    y = layer_norm_ref(*(t.to(wide) for t in (h, norm_weight, norm_bias)), eps=eps)
    return y.to(h.dtype)


# -- kernels --------------------------------------------------------------------------------
@triton.jit
def _normalize_rows(
    h_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr,
    start_m,
    rows, N,
    eps,
    BLOCK_N: tl.constexpr,  # N rounded up
    ROWS: tl.constexpr,
):
    """y of ROWS rows from start_m on."""
    offs_m = start_m + tl.arange(0, ROWS)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < rows)[:, None] & mask_n[None, :]
    offs = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]  # may pass 2^31
    h = tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(h, axis=1) / N
    centred = tl.where(mask_n[None, :], h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
    norm_weight = tl.load(norm_weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * norm_weight[None, :] + norm_bias[None, :]
    tl.store(y_ptr + offs, y, mask=mask)


@triton.jit
def _forward_kernel(
    x_ptr,  # [T, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    residual_ptr,  # [T, N]
    norm_weight_ptr, norm_bias_ptr,  # [N]
    num_tokens_ptr,  # [1] or None
    arrived_ptr,  # int32 zeros, one for each BLOCK_M rows
    h_ptr, y_ptr,  # [T, N], contiguous
    stride_xt, stride_wn, stride_rt,
    T, N, K,
    eps,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_ROW: tl.constexpr,  # N rounded up
    ROWS: tl.constexpr,  # normalised at a time
):
    """Program (m, n) takes tile (m, n) of h, and the last of some m all of y there."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    start_m = pid // blocks_n * BLOCK_M
    start_n = pid % blocks_n * BLOCK_N
    rows = T
    if num_tokens_ptr is not None:
        rows = tl.load(num_tokens_ptr)
        if start_m >= rows:
            return
    acc = tile_product(
        x_ptr, weight_ptr, stride_xt, stride_wn,
        start_m, start_n, rows, N, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )
    finish_tile(
        acc, bias_ptr, residual_ptr, h_ptr, stride_rt,
        start_m, start_n, rows, N, None, BLOCK_M, BLOCK_N,
    )
    tl.debug_barrier()  # one thread counts, for the stores of all
    before = tl.atomic_add(arrived_ptr + pid // blocks_n, 1, sem="acq_rel", scope="gpu")
    if before == blocks_n - 1:
        for row in range(start_m, tl.minimum(start_m + BLOCK_M, rows), ROWS):
            _normalize_rows(
                h_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr,
                row, rows, N, eps, BLOCK_ROW, ROWS,
            )


# -- launchers ------------------------------------------------------------------------------
def _launches(T, N, K, itemsize):
    """1 or 2: as measured, else 2. The interpreter has the one that others have no test for."""
    default = {"LAUNCHES": 1 if launch.INTERPRET else 2}
    key = {"rows": T, "N": N, "K": K, "itemsize": itemsize}
    return launch.configuration("linear_layer_norm", default, **key)["LAUNCHES"]


def _forward(y, x, weight, bias, residual, norm_weight, norm_bias, eps, num_tokens):
    (T, K), N = x.shape, weight.shape[0]
    h = torch.empty_like(y)
    if _launches(T, N, K, x.itemsize) == 2:
        launch_linear(h, x, weight, bias, None, residual, num_tokens)
        launch_layer_norm(y, h, norm_weight, norm_bias, None, eps, num_tokens)
        return
    x, stride_xt = launch.rows(x)
    weight, stride_wn = launch.rows(weight)
    residual, stride_rt = launch.rows(residual)
    config = tile_config(T, N, K, x.itemsize, launch.arch())
    blocks = ceil_div(T, config["BLOCK_M"])
    BLOCK_ROW = next_power_of_2(N)
    # 64 numbers a thread hide the way to L2 best; more would take the registers of a product.
    threads = config["num_warps"] * launch.WARP_SIZE
    ROWS = min(max(64 * threads // BLOCK_ROW, 1), config["BLOCK_M"])
    if blocks:
        _forward_kernel[(blocks * ceil_div(N, config["BLOCK_N"]),)](
            x, weight, None if bias is None else bias.contiguous(), residual,
            norm_weight.contiguous(), norm_bias.contiguous(), num_tokens,
            x.new_zeros(blocks, dtype=torch.int32), h, y,
            stride_xt, stride_wn, stride_rt, T, N, K, eps,
            PRECISION=launch.precision(x), BLOCK_ROW=BLOCK_ROW, ROWS=ROWS, **config,
        )


def _plain(x, weight, bias, residual, norm_weight, norm_bias, eps, num_tokens):
    h = plain_linear(x, weight, bias, None, residual, num_tokens)
    return plain_layer_norm(h, norm_weight, norm_bias, None, eps, num_tokens)


# -- registration ---------------------------------------------------------------------------
_linear_layer_norm = launch.define(
    "linear_layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor residual,"
    " Tensor norm_weight, Tensor norm_bias, float eps, Tensor? num_tokens) -> Tensor",
    outputs=lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
    launch=_forward,
    plain=_plain,
)


# -- public op ------------------------------------------------------------------------------
def linear_layer_norm(
    x, weight, bias, residual, norm_weight, norm_bias, eps=1e-12, num_tokens=None
):
    """Layer norm of x W^T + bias + residual over the last dimension.

    x                       [T, K], fp32, fp16 or bf16
    weight                  [N, K], dtype of x, N <= 8192
    bias                    [N], dtype of x; None adds nothing
    residual                [T, N], dtype of x
    norm_weight, norm_bias  [N], one dtype
    eps                     added to the variance, so in units of h squared; BERT's by default
    num_tokens              [1] integer on the device of x: rows past it are not read, and not
                            written in the result; None takes all rows

    Returns [T, N] in the dtype of x, contiguous. Differentiable once, in all but eps and
    num_tokens. Rows may lie any even distance apart; an input laid out otherwise is copied first.
    Raises ValueError for any other shape or dtype.
    """
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(
            f"linear_layer_norm: x must be fp32, fp16 or bf16 [T, K], got {show(x)}"
        )
    dtype = str(x.dtype).removeprefix("torch.")
    (T, K), N = x.shape, weight.shape[0]
    if weight.shape != (N, K) or weight.dtype != x.dtype or not 1 <= N <= MAX_N:
        want = f"{dtype}[1 to {MAX_N}, {K}]"
        raise ValueError(f"linear_layer_norm: weight must be {want} like x, got {show(weight)}")
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype):
        want = f"{dtype}[{N}]"
        raise ValueError(f"linear_layer_norm: bias must be {want} like weight, got {show(bias)}")
    if residual.shape != (T, N) or residual.dtype != x.dtype:
        want = f"{dtype}[{T}, {N}]"
        raise ValueError(
            f"linear_layer_norm: residual must be {want} like the result, got {show(residual)}"
        )
    if not norm_weight.shape == norm_bias.shape == (N,) or norm_weight.dtype != norm_bias.dtype:
        got = f"{show(norm_weight)} and {show(norm_bias)}"
        raise ValueError(
            f"linear_layer_norm: norm_weight and norm_bias must be [{N}] in one dtype, got {got}"
        )
    launch.check_num_tokens("linear_layer_norm", num_tokens, x)
    if torch.is_grad_enabled():
        h = linear(x, weight, bias, residual=residual, num_tokens=num_tokens)
        return layer_norm(h, norm_weight, norm_bias, eps=eps, num_tokens=num_tokens)
    return _linear_layer_norm(
        x, weight, bias, residual, norm_weight, norm_bias, eps, num_tokens
    )


# -- spec -----------------------------------------------------------------------------------
def _inputs(dtype, device, T, K, N, bias=True, eps=1e-12, norm_dtype=None, num_tokens=None):
    if num_tokens is not None:
        num_tokens = torch.tensor([num_tokens], dtype=torch.int32, device=device)
    return {
        "x": torch.randn(T, K, device=device).to(dtype),
        "weight": (torch.randn(N, K, device=device) / max(K, 1) ** 0.5).to(dtype),
        "bias": torch.randn(N, device=device).to(dtype) if bias else None,
        # |mean| >> std, where a one-pass variance fails
        "residual": (torch.randn(T, N, device=device) + 10).to(dtype),
        "norm_weight": torch.randn(N, device=device).to(norm_dtype or dtype),
        "norm_bias": torch.randn(N, device=device).to(norm_dtype or dtype),
        "eps": eps,
        "num_tokens": num_tokens,
    }


SIZES = (2, 3, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 200)


def _fuzz(rng):
    case = {"T": rng.choice((0, 1, *SIZES)), "K": rng.choice((1, *SIZES)), "N": rng.choice(SIZES)}
    case["bias"] = rng.random() < 0.7
    if rng.random() < 0.3:
        case["eps"] = rng.choice((1e-5, 1.0))
    if rng.random() < 0.2:
        case["norm_dtype"] = "float32"
    return case


def _cost(itemsize, T, K, N, bias=True, **_):
    h = T * N
    flops = 2 * h * K + (1 + bias) * h + 7 * h
    return flops, (T * K + N * K + bias * N + 4 * h + 2 * N) * itemsize


BASE, LARGE = 768, 1024

SPEC = Spec(
    fn=linear_layer_norm,
    ref=linear_layer_norm_ref,
    inputs=_inputs,
    cost=_cost,
    cases=(
        {"T": 131, "K": 40, "N": 300},  # tiles of three rows, of three columns
        {"T": 128, "K": 72, "N": 136, "bias": False},
        {"T": 37, "K": 16, "N": 1025},  # more numbers than a program takes at a time
        {"T": 3, "K": 130, "N": 64},
        {"T": 1, "K": 1, "N": 1},
        {"T": 2, "K": 8, "N": 2},
        {"T": 0, "K": 128, "N": 128},
        {"T": 21, "K": 192, "N": 128},  # enough for oneDNN
        {"T": 5, "K": 32, "N": 64, "eps": 1.0},  # large enough to show
        {"T": 5, "K": 32, "N": 64, "norm_dtype": torch.float32},  # fp32 master weights
        {"T": 2, "K": 8, "N": 8192},  # whose sum fp16 could not hold
    ),
    fuzz=_fuzz,
    whole={"T": 256, "K": 256, "N": 256},
    huge=(
        {"T": 2**20 + 3, "K": 2**11, "N": 64},  # x
        {"T": 2**24 + 3, "K": 16, "N": 128},  # h, y and residual
    ),
    bench=(
        {"T": 16384, "K": BASE, "N": BASE},
        {"T": 16384, "K": 4 * BASE, "N": BASE},
        {"T": 16384, "K": 4 * LARGE, "N": LARGE},
        {"T": 128, "K": BASE, "N": BASE},  # one sequence of 128
        {"T": 128, "K": 4 * BASE, "N": BASE},
    ),
    rejects={
        "x must be fp32, fp16 or bf16 [T, K], got float32[8]": {"x": torch.ones(8)},
        "weight must be float32[1 to 8192, 40] like x, got float32[8, 7]": {
            "weight": torch.ones(8, 7)
        },
        "bias must be float32[300] like weight, got float32[3]": {"bias": torch.ones(3)},
        "residual must be float32[131, 300] like the result, got float32[300]": {
            "residual": torch.ones(300)
        },
        "norm_weight and norm_bias must be [300] in one dtype, got float32[3]": {
            "norm_weight": torch.ones(3)
        },
        "num_tokens must be int32[1] or int64[1], got float32[1]": {"num_tokens": torch.ones(1)},
    },
    packed=("x", "residual"),
    rounds_inside=True,
    overflows_inside=True,
    rounds_backward=True,
)
