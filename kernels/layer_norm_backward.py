"""The gradients of layer_norm: h = x + residual, y = x_hat * weight + bias.

    x_hat = (h - mean(h)) * rstd        rstd = 1 / sqrt(var(h) + eps)
    g = dy * weight
    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))
    dweight = sum(dy * x_hat)           dbias = sum(dy)

Shapes     dy, x, residual, dx [..., N]; weight, dweight, dbias [N]; N <= 8192. The leading
           dimensions are M rows, possibly none. Means over N, sums over rows. The gradient of
           residual is that of x.
Precision  fp32 throughout, h too; dx is rounded once to the dtype of x, dweight and dbias to that
           of weight.
Batches    A row of dx has the same bits whatever the other rows. Each program sums some rows of
           dweight and dbias, then the programs' sums are added, in an order that depends only on
           the number of rows and of SMs: two runs give the same bits.
Source     Ba, Kiros, Hinton, Layer Normalization, 2016; differentiated.
"""

import math
from typing import NamedTuple

import torch

from . import launch
from .launch import DTYPES, ceil_div, next_power_of_2, show, tl, triton, wait_for_inputs
from .layer_norm import SPEC as LAYER_NORM
from .layer_norm import check_residual, check_rows, fuzz_shape, load_row, normalize, sum_of
from .spec import Spec


class LayerNormGradients(NamedTuple):
    dx: torch.Tensor  # [..., N], the gradient of the residual too
    dweight: torch.Tensor  # [N]
    dbias: torch.Tensor  # [N]


# -- reference ------------------------------------------------------------------------------
def layer_norm_backward_ref(dy, x, weight, residual=None, eps=1e-12, num_tokens=None):
    """By autograd, from the definition of the forward."""
    if num_tokens is not None:
        tokens = torch.arange(len(dy), device=dy.device) < num_tokens
        dy = dy.where(tokens.view(-1, *[1] * (dy.ndim - 1)), 0.0)
    with torch.enable_grad():
        x, weight = (t.detach().requires_grad_() for t in (x, weight))
        bias = torch.zeros_like(weight).requires_grad_()
        y = LAYER_NORM.ref(x, weight, bias, residual, eps)
        return LayerNormGradients(*torch.autograd.grad(y, (x, weight, bias), dy.to(y.dtype)))


# -- kernels --------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _backward_kernel(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, N]
    weight_ptr,  # [N]
    residual_ptr,  # [M, N] or None
    num_tokens_ptr,  # [1] or None
    dx_ptr,  # [M, N], contiguous
    sums_ptr,  # [programs, 2, N] in fp32: of dweight and of dbias
    stride_dym, stride_xm, stride_rm,
    M, N,
    eps,
    STAGES: tl.constexpr,  # one more than the rows in flight to a program
    BLOCK_N: tl.constexpr,
):
    """Program i takes rows i, i + programs and so on."""
    wait_for_inputs()
    pid = tl.program_id(0).to(tl.int64)  # as are rows: row * stride may pass 2^31
    programs = tl.num_programs(0)
    rows = M
    if num_tokens_ptr is not None:
        rows = tl.minimum(tl.load(num_tokens_ptr), M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight = load_row(weight_ptr, offs_n, mask_n)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    for i in tl.range(0, tl.cdiv(rows - pid, programs), num_stages=STAGES):
        row = pid + i * programs
        dy = load_row(dy_ptr + row * stride_dym, offs_n, mask_n)
        h = load_row(x_ptr + row * stride_xm, offs_n, mask_n)
        if residual_ptr is not None:
            h += load_row(residual_ptr + row * stride_rm, offs_n, mask_n)
        x_hat, rstd = normalize(h, mask_n, N, eps)
        g = dy * weight
        mean_g = tl.sum(g, axis=0) / N
        mean_gx = tl.sum(g * x_hat, axis=0) / N
        dx = rstd * (g - mean_g - x_hat * mean_gx)
        if BLOCK_N == 1:  # as one fma, dy * weight - mean_g is g's rounding error, not zero
            dx = tl.zeros([1], tl.float32)
        dweight += dy * x_hat
        dbias += dy
        tl.store(dx_ptr + row * N + offs_n, dx, mask=mask_n)
    for i in range(tl.cdiv(M - rows - pid, programs)):
        row = rows + pid + i * programs
        tl.store(dx_ptr + row * N + offs_n, tl.zeros([BLOCK_N], tl.float32), mask=mask_n)

    sums_ptr += pid * 2 * N
    tl.store(sums_ptr + N + offs_n, dbias, mask=mask_n)
    tl.store(sums_ptr + offs_n, dweight, mask=mask_n)


@triton.jit(do_not_specialize=["programs"])
def _sum_kernel(
    sums_ptr,  # [programs, 2, N]
    dweight_ptr, dbias_ptr,  # [N]
    programs, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Program i takes the columns from i * BLOCK_N on of dweight and dbias, concatenated."""
    wait_for_inputs()
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < 2 * N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_m in tl.range(0, programs, BLOCK_M, num_stages=3):
        rows_m = start_m + offs_m
        mask = (rows_m < programs)[:, None] & mask_n[None, :]
        offsets = rows_m[:, None] * (2 * N) + offs_n[None, :]
        total += tl.load(sums_ptr + offsets, mask=mask, other=0.0)
    total = tl.sum(total, 0)
    tl.store(dweight_ptr + offs_n, total, mask=offs_n < N)
    tl.store(dbias_ptr + offs_n - N, total, mask=mask_n & (offs_n >= N))


# -- launchers ------------------------------------------------------------------------------
def _beside(N):
    """Programs per SM."""
    return max(min(8192 // next_power_of_2(N), 8), 1)


def _programs(M, beside, multiprocessors):
    """Few in the interpreter, where each program is costly, but with at most 64 rows each."""
    return min(M, max(4, M // 64) if launch.INTERPRET else beside * multiprocessors)


def _config(N):
    """More programs per SM hide more of a row's latency, of memory and of four reductions; each
    writes two rows of sums in fp32. Eight programs write 9 % of what 16,384 rows of 768 move.
    Within one warp reductions need no barrier: on an H200 that and four stages take half the time
    of four warps and two. For longer rows four fp32 stages exceed 99 KiB."""
    BLOCK_N = next_power_of_2(N)
    config = {
        "BLOCK_N": BLOCK_N, "num_warps": ceil_div(BLOCK_N, 1024),
        "STAGES": 4 if BLOCK_N <= 2048 else 2, "BESIDE": _beside(N),
    }  # fmt: skip
    return launch.configuration("layer_norm_backward", config, fixed=("BLOCK_N",), N=N)


def _backward(out, dy, x, weight, residual, eps, num_tokens):
    dx, dweight, dbias = out
    dy, stride_dym = launch.rows(dy)
    x, stride_xm = launch.rows(x)
    residual, stride_rm = launch.rows(residual)
    M, N = x.shape
    form = _config(N)
    programs = _programs(M, form["BESIDE"], launch.multiprocessors())
    sums = x.new_empty(programs, 2, N, dtype=torch.float32)
    if M:
        launch.start(
            _backward_kernel, programs,
            dy, x, weight.contiguous(), residual, num_tokens, dx, sums,
            stride_dym, stride_xm, stride_rm, M, N, eps,
            STAGES=form["STAGES"], BLOCK_N=form["BLOCK_N"], num_warps=form["num_warps"],
        )
    launch.start(
        _sum_kernel, ceil_div(2 * N, 32),
        sums, dweight, dbias, programs, N,
        # In the interpreter, few sums are several tiles.
        BLOCK_M=min(next_power_of_2(ceil_div(programs, 2)), 64) if launch.INTERPRET else 64,
        BLOCK_N=32, num_warps=4,
    )  # fmt: skip


def _plain(dy, x, weight, residual, eps, num_tokens):
    """torch's own, with two corrections for rounding: h is centred first, and so is each row of dx,
    whose sum is zero, afterwards."""
    M, shape = x.shape[0], weight.shape
    dy, x, residual = launch.head(num_tokens, dy, x, residual)
    h = sum_of(x, residual)
    h = h - h.mean(-1, keepdim=True)
    wide = weight.to(h.dtype)
    _, mean, rstd = torch.native_layer_norm(h, shape, None, None, eps)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(h.dtype), h, shape, mean, rstd, wide, wide, [True, True, True]
    )
    dx -= dx.mean(-1, keepdim=True)
    return launch.pad_rows(dx.to(x.dtype), M), *(d.to(weight.dtype) for d in (dweight, dbias))


# -- registration ---------------------------------------------------------------------------
_layer_norm_backward = launch.define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? residual, float eps,"
    " Tensor? num_tokens) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    outputs=lambda dy, x, weight, residual, eps, num_tokens: (
        x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    ),
    launch=_backward,
    plain=_plain,
)


# -- public op ------------------------------------------------------------------------------
def layer_norm_backward(dy, x, weight, residual=None, eps=1e-12, num_tokens=None):
    """The gradients of layer_norm, as autograd asks for them.

    dy          [..., N] like x: the gradient of the result
    x, weight, residual, eps   those of the forward; its bias has no effect
    num_tokens  [1] integer on the device of x [T, N]: rows past it are not read, and their
                gradients are zeros; None takes all rows

    Returns LayerNormGradients: dx [..., N] in the dtype of x, the gradient of the residual too;
    dweight and dbias [N] in the dtype of weight. Not differentiable. Raises ValueError for any
    other shape or dtype.
    """
    check_rows("layer_norm_backward", x)
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise ValueError(f"layer_norm_backward: dy must be {show(x)} like x, got {show(dy)}")
    check_residual("layer_norm_backward", x, residual)
    if weight.shape != x.shape[-1:] or weight.dtype not in DTYPES:
        want = f"fp32, fp16 or bf16 [{x.shape[-1]}]"
        raise ValueError(f"layer_norm_backward: weight must be {want}, got {show(weight)}")
    launch.check_num_tokens("layer_norm_backward", num_tokens)
    with torch.no_grad():
        return LayerNormGradients(
            *_layer_norm_backward(dy, x, weight, residual, float(eps), num_tokens)
        )


# -- spec -----------------------------------------------------------------------------------
def _inputs(
    dtype, device, shape, residual=False, eps=1e-12, weight_dtype=None, num_tokens=None,
    spread=1.0, mean=100.0,
):
    if num_tokens is not None:
        num_tokens = torch.tensor([num_tokens], dtype=torch.int32, device=device)
    return {
        "dy": torch.randn(shape, device=device).to(dtype),
        # |mean| >> std, where a one-pass variance fails
        "x": (spread * torch.randn(shape, device=device)).to(dtype) + mean,
        "weight": torch.randn(shape[-1], device=device).to(weight_dtype or dtype),
        "residual": torch.randn(shape, device=device).to(dtype) if residual else None,
        "eps": eps,
        "num_tokens": num_tokens,
    }


def _fuzz(rng):
    case = {"shape": fuzz_shape(rng), "residual": rng.random() < 0.3}
    if case["shape"][-1] == 2:  # x_hat is 1 and -1, and dx nothing but rounding error
        case["shape"][-1] = 3
    if rng.random() < 0.3:
        case["eps"] = rng.choice((1e-5, 1.0))
    if rng.random() < 0.2:
        case["weight_dtype"] = "float32"
    return case


def _cost(itemsize, shape, residual=False, **_):
    size, N = math.prod(shape), shape[-1]
    # The fp32 sums, written and read; on an H100.
    sums = 2 * N * _programs(size // N, _beside(N), 132)
    flops = (18 + residual) * size + 2 * sums
    return flops, ((3 + residual) * size + 3 * N) * itemsize + 8 * sums


SPEC = Spec(
    fn=layer_norm_backward,
    ref=layer_norm_backward_ref,
    inputs=_inputs,
    cost=_cost,
    cases=(
        {"shape": (4, 768)},
        {"shape": (7, 100), "residual": True},
        {"shape": (6, 129), "num_tokens": 4},
        {"shape": (3, 8192)},
        {"shape": (64,)},
        {"shape": (5, 1)},
        {"shape": (5, 3)},
        {"shape": (0, 64)},
        {"shape": (37, 7)},
        {"shape": (3, 100), "spread": 1e-3, "mean": 0.0},  # a 1 read past N would show
        {"shape": (3, 64), "eps": 1.0},  # large enough to matter
        {"shape": (3, 64), "weight_dtype": torch.float32},  # fp32 master weights
        {"shape": (11, 64), "num_tokens": 0},
        {"shape": (3, 64), "num_tokens": 1000},  # out of range: all rows are tokens
    ),
    fuzz=_fuzz,
    whole={"shape": (256, 1024)},
    huge=({"shape": (2**18 + 3, 8192)},),
    bench=LAYER_NORM.bench,
    rejects={
        "x must be fp32, fp16 or bf16 [..., 1 to 8192], got int64[4, 768]": {
            "x": torch.ones(4, 768).long()
        },
        "x must be fp32, fp16 or bf16 [..., 1 to 8192], got float32[]": {"x": torch.tensor(1.0)},
        "dy must be float32[4, 768] like x, got float32[768]": {"dy": torch.ones(768)},
        "residual must be [4, 768] like x, fp32, fp16 or bf16, got float32[768]": {
            "residual": torch.ones(768)
        },
        "weight must be fp32, fp16 or bf16 [768], got float32[3]": {"weight": torch.ones(3)},
        "weight must be fp32, fp16 or bf16 [768], got int64[768]": {
            "weight": torch.ones(768).long()
        },
        "num_tokens must be int32[1] or int64[1], got float32[1]": {"num_tokens": torch.ones(1)},
    },
    gradient=True,
)
