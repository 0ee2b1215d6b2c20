"""The gradient through linear's GELU: dz = dy * gelu'(z), z = x W^T + b.

    gelu'(z) = Phi(z) + z * phi(z)        phi is Phi's density

Shapes     dy [T, N], x [T, K], weight [N, K], bias [N]; dz [T, N].
Precision  On a GPU z is linear's, in fp32 and never rounded, like all that follows; dz is rounded
           once. A CPU rounds z to the dtype of x, as stock does, which stores it.
Batches    As linear: a row of dz has the same bits whatever the other rows.
Source     Hendrycks, Gimpel, Gaussian Error Linear Units, 2016, differentiated. The product is
           linear's kernel; dy is read in its epilogue, where z is, so z never goes to memory.
"""

import torch

from . import launch
from .gelu import gelu_ref
from .linear import SPEC as LINEAR
from .linear import check_product, launch_product, plain_rows
from .pointwise import slope_erf, slope_exp2
from .spec import Spec


# -- reference ------------------------------------------------------------------------------
def gelu_gradient_ref(dy, x, weight, bias=None, num_tokens=None):
    """By autograd, from the definition of GELU."""
    z = x @ weight.mT
    with torch.enable_grad():
        z = (z if bias is None else z + bias).detach().requires_grad_()
        return torch.autograd.grad(gelu_ref(z), z, dy)[0]


# -- launchers ------------------------------------------------------------------------------
def _backward(dz, dy, x, weight, bias, num_tokens):
    slope = slope_erf if x.dtype == torch.float32 else slope_exp2
    launch_product(dz, x, weight, bias, slope, dy, num_tokens, times=True, op="gelu_gradient")


def _plain(dy, x, weight, bias, num_tokens):
    T = len(x)
    dy, x = launch.head(num_tokens, dy, x)
    z = plain_rows(x, weight, bias, None, None)
    return launch.with_room(torch.ops.aten.gelu_backward(dy, z), T)  # in fp32 inside


# -- registration ---------------------------------------------------------------------------
_gelu_gradient = launch.define(
    "gelu_gradient(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? num_tokens) -> Tensor",
    outputs=lambda dy, *_: dy.new_empty(dy.shape),
    launch=_backward,
    plain=_plain,
)


# -- public op ------------------------------------------------------------------------------
def gelu_gradient(dy, x, weight, bias=None, num_tokens=None):
    """The gradient of z = x W^T + bias, where y = GELU(z) has the gradient dy.

    dy          [T, N], dtype of x
    x           [T, K], fp32, fp16 or bf16
    weight      [N, K], dtype of x
    bias        [N], dtype of x; None adds nothing
    num_tokens  [1] integer on the device of x: rows past it are not read, and not written in the
                result; None takes all rows

    Returns dz [T, N] in the dtype of x, contiguous. Not differentiable. Raises ValueError for any
    other shape or dtype.
    """
    check_product("gelu_gradient", x, weight, bias, num_tokens, dy=dy)
    with torch.no_grad():
        return _gelu_gradient(dy, x, weight, bias, num_tokens)


# -- spec -----------------------------------------------------------------------------------
def _inputs(dtype, device, T, K, N, **case):
    inputs = LINEAR.inputs(dtype, device, T, K, N, **case)
    del inputs["activation"], inputs["residual"]
    return {"dy": torch.randn(T, N, device=device).to(dtype), **inputs}


def _fuzz(rng):
    case = LINEAR.fuzz(rng)
    return {name: case[name] for name in ("T", "K", "N", "bias", "scale") if name in case}


def _cost(itemsize, T, K, N, bias=True, **_):
    flops = T * N * (2 * K + bias + 16)
    return flops, (T * K + N * K + bias * N + 2 * T * N) * itemsize


BASE, LARGE = 768, 1024

SPEC = Spec(
    fn=gelu_gradient,
    ref=gelu_gradient_ref,
    inputs=_inputs,
    cost=_cost,
    cases=(
        {"T": 128, "K": 130, "N": 72},  # further rows are in tiles of their own
        {"T": 37, "K": 96, "N": 136},  # column indices exceed the number of rows
        {"T": 131, "K": 16, "N": 130, "bias": False},  # edge tiles of three rows, two columns
        {"T": 6, "K": 64, "N": 64, "scale": 100.0},  # saturated
        {"T": 1, "K": 1, "N": 1},
        {"T": 0, "K": 128, "N": 128},
        {"T": 37, "K": 128, "N": 192},  # large enough for oneDNN
    ),
    fuzz=_fuzz,
    whole={"T": 256, "K": 256, "N": 128},
    huge=({"T": 2**20 + 3, "K": 64, "N": 2**11},),  # dy
    bench=(
        {"T": 16384, "K": BASE, "N": 4 * BASE},
        {"T": 16384, "K": LARGE, "N": 4 * LARGE},
        {"T": 16384, "K": BASE, "N": 4 * BASE, "num_tokens": 16384},
    ),
    rejects={
        "x must be fp32, fp16 or bf16 [T, K], got float32[8]": {"x": torch.ones(8)},
        "weight must be float32[N, 130], got float32[8, 7]": {"weight": torch.ones(8, 7)},
        "bias must be float32[72] like weight, got float32[3]": {"bias": torch.ones(3)},
        "dy must be float32[128, 72] like the result, got float64[128, 72]": {
            "dy": torch.ones(128, 72).double()
        },
        "num_tokens must be int32[1] or int64[1], got float32[1]": {"num_tokens": torch.ones(1)},
    },
    packed=("x", "dy"),
    rounds_inside=not launch.INTERPRET,  # of z, as a CPU does; the kernel is held to more there
    gradient=True,
    variants=LINEAR.variants,
)
