"""Layer normalisation of a sum, as BERT's post-norm blocks need it.

    h = x + residual
    y = (h - mean(h)) * rstd * weight + bias        rstd = 1 / sqrt(var(h) + eps)

Shapes     x, residual, y [..., N]; weight, bias [N]; N <= 8192. The leading dimensions are M
           rows, possibly none. Without a residual, h is x.
Precision  fp32 throughout, the sum h too. y is rounded once, to the dtype of x.
Backward   layer_norm_backward.py.
Source     Ba, Kiros, Hinton, Layer Normalization, 2016.
"""

import math

import torch
from torch.nn import functional as F

from . import launch
from .launch import DTYPES, next_power_of_2, once_differentiable, show, tl, triton, wait_for_inputs
from .spec import Spec

MAX_N = 8192  # a program holds its whole row in registers


# -- reference ------------------------------------------------------------------------------
def layer_norm_ref(x, weight, bias, residual=None, eps=1e-12, num_tokens=None):
    h = x if residual is None else x + residual
    centred = h - h.mean(-1, keepdim=True)
    var = centred.square().mean(-1, keepdim=True)
    return centred * torch.rsqrt(var + eps) * weight + bias


# -- kernels --------------------------------------------------------------------------------
@triton.jit
def load_row(ptr, offs_n, mask_n):
    return tl.load(ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)


@triton.jit
def normalize(h, mask_n, N, eps):
    """((h - mean) * rstd, rstd) of one row h [BLOCK_N], whose numbers past N are zero.

    In two passes: where |mean| >> std, mean(h^2) - mean(h)^2 is nothing but rounding error. The
    first mean has one too, which would be all that is left of a row of equal numbers; so the mean
    of what is left is taken off as well (Chan, Golub, LeVeque, 1983: the corrected algorithm). Of
    equal numbers that leaves nothing, and no variance, if / rounds correctly, as a GPU's need not.
    """
    N = tl.cast(N, tl.float32)
    centred = tl.where(mask_n, h - tl.sum(h, axis=0) / N, 0.0)
    rest = tl.div_rn(tl.sum(centred, axis=0), N)
    var = tl.div_rn(tl.sum(centred * centred, axis=0), N) - rest * rest
    rstd = tl.rsqrt(tl.maximum(var, 0.0) + eps)
    return (centred - rest) * rstd, rstd


@triton.jit(do_not_specialize_on_alignment=["num_tokens_ptr"])
def _forward_kernel(
    x_ptr,  # [M, N]
    weight_ptr,  # [N]
    bias_ptr,  # [N]
    residual_ptr,  # [M, N] or None
    num_tokens_ptr,  # [1] or None
    y_ptr,  # [M, N], contiguous
    stride_xm, stride_rm,
    N,
    eps,
    BLOCK_N: tl.constexpr,
):
    """Program m normalises row m."""
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)  # row * stride may pass 2^31
    if num_tokens_ptr is not None:
        if row >= tl.load(num_tokens_ptr):
            return
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight = load_row(weight_ptr, offs_n, mask_n)
    bias = load_row(bias_ptr, offs_n, mask_n)
    h = load_row(x_ptr + row * stride_xm, offs_n, mask_n)
    if residual_ptr is not None:
        h += load_row(residual_ptr + row * stride_rm, offs_n, mask_n)

    x_hat, _ = normalize(h, mask_n, N, eps)
    y = x_hat * weight + bias

    tl.store(y_ptr + row * N + offs_n, y, mask=mask_n)


# -- launchers ------------------------------------------------------------------------------
def row_config(N):
    """A program holds its whole row."""
    BLOCK_N = next_power_of_2(N)
    config = {"BLOCK_N": BLOCK_N, "num_warps": launch.warps(BLOCK_N)}
    return launch.configuration("layer_norm", config, fixed=("BLOCK_N",), N=N)


def _forward(y, x, weight, bias, residual, eps, num_tokens):
    x, stride_xm = launch.rows(x)
    residual, stride_rm = launch.rows(residual)
    M, N = x.shape
    if M:
        launch.start(
            _forward_kernel, M,
            x, weight.contiguous(), bias.contiguous(), residual, num_tokens, y,
            stride_xm, stride_rm, N, eps, **row_config(N),
        )


def plain_layer_norm(h, weight, bias, eps, dtype):
    """F.layer_norm of h, in the dtype h has, rounded once to dtype."""
    y = F.layer_norm(h, weight.shape, weight.to(h.dtype), bias.to(h.dtype), eps)
    return y.to(dtype)


def sum_of(x, residual):
    """h in fp32, or in fp64 for fp64; x itself if nothing needs to be done."""
    h = x if x.dtype == torch.float64 else x.float()
    return h if residual is None else h + residual


def _plain(x, weight, bias, residual, eps, num_tokens):
    M = len(x)
    x, residual = launch.head(num_tokens, x, residual)
    return launch.with_room(plain_layer_norm(sum_of(x, residual), weight, bias, eps, x.dtype), M)


# -- registration ---------------------------------------------------------------------------
_layer_norm = launch.define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps,"
    " Tensor? num_tokens) -> Tensor",
    outputs=lambda x, weight, bias, residual, eps, num_tokens: x.new_empty(x.shape),
    launch=_forward,
    plain=_plain,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, num_tokens):
        ctx.save_for_backward(x, weight, residual, num_tokens)
        ctx.eps = eps
        return _layer_norm(x, weight, bias, residual, eps, num_tokens)

    @staticmethod
    @once_differentiable  # else a second derivative would be zeros and a warning
    def backward(ctx, dy):
        x, weight, residual, num_tokens = ctx.saved_tensors
        op = torch.ops.bert_fast.layer_norm_backward.default  # of layer_norm_backward.py
        dx, dweight, dbias = op(dy, x, weight, residual, ctx.eps, num_tokens)
        dresidual = None if residual is None else dx.to(residual.dtype)
        return dx, dweight, dbias, dresidual, None, None


# -- public op ------------------------------------------------------------------------------
def layer_norm(x, weight, bias, residual=None, eps=1e-12, num_tokens=None):
    """Layer norm of x + residual over the last dimension.

    x             [..., N], fp32, fp16 or bf16, 1 <= N <= 8192
    weight, bias  [N], both fp32, fp16 or bf16, not necessarily that of x
    residual      shape of x, fp32, fp16 or bf16; None adds nothing
    eps           added to the variance, so in units of x squared; BERT's by default
    num_tokens    [1] integer on the device of x [T, N]: rows past it are not read, and not
                  written in the result; None takes all rows

    Returns [..., N] in the dtype of x, contiguous. Differentiable once, in x, weight, bias and
    residual. Rows may have any constant stride; an input laid out otherwise is copied first.
    Raises ValueError for any other shape or dtype.
    """
    check_rows("layer_norm", x)
    check_weight_and_bias("layer_norm", x.shape[-1], weight, bias)
    check_residual("layer_norm", x, residual)
    launch.check_num_tokens("layer_norm", num_tokens)
    eps = float(eps)  # numpy's are no arguments of a kernel
    if launch.is_recorded():
        return _LayerNorm.apply(x, weight, bias, residual, eps, num_tokens)
    # apply costs 5 us even to record nothing
    return _layer_norm(x, weight, bias, residual, eps, num_tokens)


def check_rows(op, x):
    """Raise ValueError unless a program can hold the rows of x."""
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_N or x.dtype not in DTYPES:
        want = f"fp32, fp16 or bf16 [..., 1 to {MAX_N}]"
        raise ValueError(f"{op}: x must be {want}, got {show(x)}")


def check_weight_and_bias(op, N, weight, bias):
    """Raise ValueError unless they are the parameters of a LayerNorm over N numbers."""
    alike = weight.shape == bias.shape == (N,) and weight.dtype == bias.dtype
    if not alike or weight.dtype not in DTYPES:
        got = f"{show(weight)} and {show(bias)}"
        raise ValueError(
            f"{op}: weight and bias must be [{N}], both fp32, fp16 or bf16, got {got}"
        )


def check_residual(op, x, residual):
    """Raise ValueError unless residual can be added to x."""
    if residual is not None and (residual.shape != x.shape or residual.dtype not in DTYPES):
        want = f"{list(x.shape)} like x, fp32, fp16 or bf16"
        raise ValueError(f"{op}: residual must be {want}, got {show(residual)}")


# -- spec -----------------------------------------------------------------------------------
def _inputs(
    dtype, device, shape, residual=True, eps=1e-12, weight_dtype=None, residual_dtype=None,
    spread=1.0, mean=100.0,
):
    return {
        # |mean| >> std, where a one-pass variance fails
        "x": (spread * torch.randn(shape, device=device)).to(dtype) + mean,
        "weight": torch.randn(shape[-1], device=device).to(weight_dtype or dtype),
        "bias": torch.randn(shape[-1], device=device).to(weight_dtype or dtype),
        "residual": torch.randn(shape, device=device).to(residual_dtype or dtype)
        if residual
        else None,
        "eps": eps,
    }


def fuzz_shape(rng):
    """A shape of up to three dimensions, with few rows and column counts around powers of two."""
    leading = [rng.choice((0, 1, 1, 2, 3, 5)) for _ in range(rng.randint(0, 2))]
    return [*leading, rng.choice((1, 2, 3, 7, 16, 31, 64, 100, 127, 128, 129, 768, 1000, 1025))]


def _fuzz(rng):
    case = {"shape": fuzz_shape(rng), "residual": rng.random() < 0.7}
    if rng.random() < 0.3:
        case["eps"] = rng.choice((1e-5, 1.0))
    if rng.random() < 0.2:
        case["weight_dtype"] = "float32"
    return case


def _cost(itemsize, shape, residual=True, **_):
    size = math.prod(shape)
    return (9 + residual) * size, ((2 + residual) * size + 2 * shape[-1]) * itemsize


SPEC = Spec(
    fn=layer_norm,
    ref=layer_norm_ref,
    inputs=_inputs,
    cost=_cost,
    cases=(
        {"shape": (4, 768)},
        {"shape": (7, 100), "residual": False},
        {"shape": (2, 3, 129)},
        {"shape": (3, 8192)},
        {"shape": (64,)},
        {"shape": (5, 1)},
        {"shape": (0, 64)},
        {"shape": (37, 7)},
        {"shape": (3, 100), "residual": False, "spread": 1e-3, "mean": 0.0},  # 1 past N would show
        {"shape": (3, 64), "eps": 1.0},  # large enough to matter
        {"shape": (3, 64), "weight_dtype": torch.float32},  # fp32 master weights
        {"shape": (3, 64), "residual_dtype": torch.bfloat16},  # as under autocast
    ),
    fuzz=_fuzz,
    whole={"shape": (8, 1024)},
    huge=({"shape": (2**21 + 3, 1024)},),
    bench=(
        {"shape": (32 * 512, 384)},
        {"shape": (32 * 512, 768)},  # BERT-base
        {"shape": (32 * 512, 1024)},  # BERT-large
        {"shape": (1024, 8192)},  # the widest
    ),
    rejects={
        "x must be fp32, fp16 or bf16 [..., 1 to 8192], got float32[2, 8193]": {
            "x": torch.ones(2, 8193)
        },
        "x must be fp32, fp16 or bf16 [..., 1 to 8192], got float32[]": {"x": torch.tensor(1.0)},
        "x must be fp32, fp16 or bf16 [..., 1 to 8192], got int64[4, 768]": {
            "x": torch.ones(4, 768).long()
        },
        "weight and bias must be [768], both fp32, fp16 or bf16, got float32[3] and float32": {
            "weight": torch.ones(3)
        },
        "weight and bias must be [768], both fp32, fp16 or bf16, got float16[768] and float32": {
            "weight": torch.ones(768).half()
        },
        "weight and bias must be [768], both fp32, fp16 or bf16, got int64[768] and int64": {
            "weight": torch.ones(768).long(), "bias": torch.ones(768).long()
        },
        "residual must be [4, 768] like x, fp32, fp16 or bf16, got float32[768]": {
            "residual": torch.ones(768)
        },
        "num_tokens must be int32[1] or int64[1], got float32[1]": {"num_tokens": torch.ones(1)},
    },
    packed=("x", "residual"),
)
