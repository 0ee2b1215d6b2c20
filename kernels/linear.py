"""Matrix product, with bias and GELU: through torch and its libraries, not through a kernel of ours.

    y = x W^T + b        or        gelu(x W^T + b)

Shapes     x [T, K], weight [N, K], bias [N]; y [T, N].
CPU        oneDNN, on the weight as it lies, where it can: torch's own linear gives fp32 to MKL, which
           is half as fast on AMD and about as fast on Intel. oneDNN adds up K in one chain, MKL in
           shorter ones: in fp32 a layer errs 1.4 to 1.7 times as far, some 1e-6 of its values.
           GELU is taken before y leaves the cache.
Precision  Sums in fp32. With gelu in one product (bf16), y is rounded once instead of twice.
"""

import torch
from torch.nn import functional as F

from . import launch
from .gelu import gelu
from .launch import DTYPES, show


def _find_product():
    """oneDNN's product in this torch, or None. The name is private to torch, so it is tried out."""
    try:
        product = torch.ops.mkldnn._linear_pointwise.default
        x = torch.ones(2, 8, dtype=torch.float32, device="cpu")
        if torch.equal(product(x, x, None, "none", [], ""), 8 * x[:, :2]):
            return product
    except (AttributeError, RuntimeError):
        pass
    return None


SMALL = 2**14  # elements of a weight for which oneDNN's 10 us a call are more than MKL needs

_product = _find_product()
_ONEDNN_DTYPES = {torch.float32} if _product and not launch.INTERPRET else set()  # GELU is a kernel
if _ONEDNN_DTYPES and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _ONEDNN_DTYPES.add(torch.bfloat16)


def _onednn_takes(x, weight):
    return (
        not torch.compiler.is_compiling()  # Inductor has its own ways
        and x.dtype in _ONEDNN_DTYPES
        and x.device.type == weight.device.type == "cpu"
        and weight.numel() >= SMALL
        and x.is_contiguous() and weight.is_contiguous()  # another layout is a thousand times slower
        and torch.backends.mkldnn.enabled
        and type(x) is torch.Tensor  # not one of a fake mode
    )  # fmt: skip


class _Linear(torch.autograd.Function):
    """oneDNN's product with torch's gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            dy @ weight if needs_x else None,
            dy.mT @ x if needs_weight else None,
            dy.sum(0) if needs_bias else None,
        )


def linear(x, weight, bias=None, activation=None, num_tokens=None):
    """x W^T + bias, and GELU of it if asked for.

    x           [T, K], fp32, fp16 or bf16
    weight      [N, K] in the dtype of x
    bias        [N] in the dtype of x, or None
    activation  None, or "gelu": the exact-erf form
    num_tokens  [1] integer on the device, or None: the rows of x that count. The product is of all
                rows, the GELU of those alone, with zeros in further rows of its result.

    Returns [T, N] in the dtype of x. Differentiable. Raises ValueError for any other shape, dtype
    or activation.
    """
    if activation not in (None, "gelu"):
        raise ValueError(f'linear: activation must be None or "gelu", got {activation!r}')
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"linear: x must be fp32, fp16 or bf16 [T, K], got {show(x)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        dtype = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"linear: weight must be {dtype}[N, {x.shape[1]}], got {show(weight)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"linear: bias must be [{weight.shape[0]}] like weight, got {show(bias)}")
    if not _onednn_takes(x, weight):
        y = F.linear(x, weight, bias)
    elif torch.is_grad_enabled():
        y = _Linear.apply(x, weight, bias)
    elif activation and num_tokens is None:
        return _product(x, weight, bias, "gelu", [], "none")  # "none": not the tanh form
    else:
        y = _product(x, weight, bias, "none", [], "")
    return gelu(y, num_tokens=num_tokens) if activation else y
