"""Bias and exact GELU, the activation between BERT's two feed-forward products.

    z = x + bias
    y = z * Phi(z) = z * (1 + erf(z / sqrt(2))) / 2

Shapes     x, y [..., N]; bias [N]. The leading dimensions are M rows, possibly none.
Precision  fp32 throughout, the sum z too. y is rounded once, to the dtype of x. Where that has 16
           bits, Phi is exp2 of a polynomial, off by at most 1.4e-6: see pointwise.py.
Backward   dx = dy * (Phi(z) + z * phi(z)), dbias = sum of dx over rows; phi is Phi's density.
           torch's gelu_backward on z in fp32.
Source     Hendrycks, Gimpel, Gaussian Error Linear Units, 2016, section 2. This is the erf form,
           BERT's "gelu"; the tanh form is another function.
"""

import math

import torch
from torch.nn import functional as F

from . import launch
from .launch import (
    DTYPES,
    ceil_div,
    next_power_of_2,
    once_differentiable,
    show,
    tl,
    triton,
    wait_for_inputs,
)
from .layer_norm import fuzz_shape
from .pointwise import gelu_erf, gelu_exp2
from .spec import Spec


# -- reference ------------------------------------------------------------------------------
def gelu_ref(x, bias=None, num_tokens=None):
    z = x if bias is None else x + bias
    if z.dtype == torch.float64:  # exact where 1 + erf underflows: Phi(-8.3) is already 1e-16
        return z * torch.erfc(-z * math.sqrt(0.5)) / 2
    return z * (1 + torch.erf(z * math.sqrt(0.5))) / 2


# -- kernels --------------------------------------------------------------------------------
@triton.jit(do_not_specialize_on_alignment=["num_tokens_ptr"])
def _forward_kernel(
    x_ptr,  # [M, N]
    bias_ptr,  # [N] or None
    num_tokens_ptr,  # [1] or None
    y_ptr,  # [M, N], contiguous
    stride_xm,
    N,
    ACT: tl.constexpr,  # gelu_erf or gelu_exp2
    BLOCK_N: tl.constexpr,
):
    """Program (m, n) takes block n of row m; both are in one grid axis, the one without a limit."""
    wait_for_inputs()
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)  # row * stride may pass 2^31
    if num_tokens_ptr is not None:
        if row >= tl.load(num_tokens_ptr):
            return
    offs_n = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    z = tl.load(x_ptr + row * stride_xm + offs_n, mask=mask_n).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_n, mask=mask_n)

    y = ACT(z)

    tl.store(y_ptr + row * N + offs_n, y, mask=mask_n)


# -- launchers ------------------------------------------------------------------------------
def _config(N):
    """A row of 3072 is three programs."""
    BLOCK_N = min(next_power_of_2(N), 1024)
    config = {"BLOCK_N": BLOCK_N, "num_warps": launch.warps(BLOCK_N)}
    return launch.configuration("gelu", config, N=N)


def act_of(dtype):
    """The cheapest form of GELU that is exact enough for results in dtype."""
    return gelu_erf if dtype == torch.float32 else gelu_exp2


def _forward(y, x, bias, num_tokens):
    x, stride_xm = launch.rows(x)
    M, N = x.shape
    if M * N:
        config = _config(N)
        launch.start(
            _forward_kernel, M * ceil_div(N, config["BLOCK_N"]),
            x, None if bias is None else bias.contiguous(), num_tokens, y, stride_xm, N,
            ACT=act_of(x.dtype), **config,
        )


def _sum(x, bias):
    """z in fp32, or fp64 for fp64; x itself if nothing is added, as F.gelu widens by itself."""
    return x if bias is None else x.to(torch.promote_types(x.dtype, torch.float32)) + bias


def _plain(x, bias, num_tokens):
    (tokens,) = launch.head(num_tokens, x)
    y = F.gelu(_sum(tokens, bias)).to(x.dtype)
    return launch.with_room(y, x.shape[0])


def _plain_backward(dy, x, bias, num_tokens):
    z = _sum(x, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    dz = torch.ops.aten.gelu_backward(dy.to(z.dtype), z)
    (dz,) = launch.zeros_past(num_tokens, dz)
    rows, N = math.prod(dz.shape[:-1]), x.shape[-1]
    return dz.to(x.dtype).contiguous(), dz.reshape(rows, N).sum(0)


# -- registration ---------------------------------------------------------------------------
_gelu = launch.define(
    "gelu(Tensor x, Tensor? bias, Tensor? num_tokens) -> Tensor",
    outputs=lambda x, bias, num_tokens: x.new_empty(x.shape),
    launch=_forward,
    plain=_plain,
)
_gelu_backward = launch.define_plain(
    "gelu_backward(Tensor dy, Tensor x, Tensor? bias, Tensor? num_tokens)"
    " -> (Tensor dx, Tensor dbias)",
    outputs=lambda dy, x, bias, num_tokens: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[-1], dtype=torch.float32),
    ),
    plain=_plain_backward,
)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, num_tokens):
        ctx.save_for_backward(x, bias, num_tokens)
        return _gelu(x, bias, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, bias, num_tokens = ctx.saved_tensors
        dx, dbias = _gelu_backward(dy, x, bias, num_tokens)
        return dx, None if bias is None else dbias.to(bias.dtype), None


# -- public op ------------------------------------------------------------------------------
def gelu(x, bias=None, num_tokens=None):
    """Exact GELU of x + bias.

    x           [..., N], fp32, fp16 or bf16
    bias        [N], dtype of x; None adds nothing
    num_tokens  [1] integer on the device of x [T, N]: rows past it are not read, and not written
                in the result; None takes all rows

    Returns [..., N] in the dtype of x, contiguous. Differentiable once, in x and bias. Rows may
    have any constant stride; an input laid out otherwise is copied first. Raises ValueError for
    any other shape or dtype.
    """
    if x.ndim == 0 or x.dtype not in DTYPES:
        raise ValueError(f"gelu: x must be fp32, fp16 or bf16 [..., N], got {show(x)}")
    if bias is not None and (bias.shape != x.shape[-1:] or bias.dtype != x.dtype):
        want = show(x[..., :0].new_empty(x.shape[-1:]))
        raise ValueError(f"gelu: bias must be {want} like the rows of x, got {show(bias)}")
    launch.check_num_tokens("gelu", num_tokens)
    if launch.is_recorded():
        return _Gelu.apply(x, bias, num_tokens)
    return _gelu(x, bias, num_tokens)


# -- spec -----------------------------------------------------------------------------------
def _inputs(dtype, device, shape, bias=True, scale=3.0):
    return {
        "x": (scale * torch.randn(shape, device=device)).to(dtype),
        "bias": torch.randn(shape[-1], device=device).to(dtype) if bias else None,
    }


def _fuzz(rng):
    scale = rng.choice((1e-6, 0.1, 3.0, 100.0))
    return {"shape": fuzz_shape(rng), "bias": rng.random() < 0.7, "scale": scale}


def _cost(itemsize, shape, bias=True, **_):
    size = math.prod(shape)
    return ((15 if itemsize == 2 else 5) + bias) * size, (2 * size + bias * shape[-1]) * itemsize


SPEC = Spec(
    fn=gelu,
    ref=gelu_ref,
    inputs=_inputs,
    cost=_cost,
    cases=(
        {"shape": (4, 512)},
        {"shape": (5, 1025)},  # just past a block
        {"shape": (2, 3, 17)},
        {"shape": (7, 1)},
        {"shape": (11,), "bias": False},
        {"shape": (0, 64)},
        {"shape": (3, 0)},
        {"shape": (3, 64), "bias": False},
        {"shape": (3, 64), "scale": 1e-6},
        {"shape": (3, 64), "scale": 100.0},  # saturated on both sides
    ),
    fuzz=_fuzz,
    whole={"shape": (4, 1024)},
    huge=({"shape": (2**19 + 3, 4096)},),
    bench=(
        {"shape": (32 * 512, 1536)},
        {"shape": (32 * 512, 3072)},  # BERT-base
        {"shape": (32 * 512, 4096)},  # BERT-large
    ),
    rejects={
        "x must be fp32, fp16 or bf16 [..., N], got int64[2, 3]": {"x": torch.ones(2, 3).long()},
        "bias must be float32[512] like the rows of x, got float32[3]": {"bias": torch.ones(3)},
        "num_tokens must be int32[1] or int64[1], got float32[1]": {"num_tokens": torch.ones(1)},
    },
    packed=("x",),
)
