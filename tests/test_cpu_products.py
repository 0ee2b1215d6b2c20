"""16 bits on a CPU without instructions for them: products are of fp32, where torch's are slow."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from models import ids_of, masks, stock_model
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast import accelerate
from bert_fast.kernels import launch
from bert_fast.kernels.attention import SPEC as ATTENTION
from bert_fast.kernels.launch import INTERPRET
from bert_fast.kernels.linear import SPEC as LINEAR

sys.path.append(str(Path(__file__).resolve().parents[1] / "check"))
from judge import Judge

pytestmark = pytest.mark.skipif(INTERPRET, reason="of the CPU's own implementation")
linear_file, attention_file = (
    importlib.import_module(f"bert_fast.kernels.{name}") for name in ("linear", "attention")
)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise", "scaled_dot_product")
HALVES = [torch.bfloat16, torch.float16]


class Products(TorchDispatchMode):
    """The dtypes of what is multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in func.name() for name in PRODUCTS):
            self.dtypes += [a.dtype for a in args if isinstance(a, torch.Tensor)]
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def neither(monkeypatch):
    monkeypatch.setattr(launch, "cpu_multiplies", lambda dtype: dtype not in HALVES)


def products_of(fn, *args):
    with torch.no_grad(), Products() as products:
        out = fn(*args)
    assert products.dtypes and set(products.dtypes) == {torch.float32}
    return out


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", ["", "gelu", "residual", "gelu residual"])
@pytest.mark.parametrize("size", [7, 131])  # for oneDNN, where there is one, and too small
def test_linear(size, form, dtype):
    case = {"T": 5, "K": size, "N": size, "gelu": "gelu" in form, "residual": "residual" in form}
    inputs = LINEAR.inputs(dtype, "cpu", **case)
    order = ("x", "weight", "bias", "activation", "residual")
    y = products_of(linear_file._plain, *(inputs[name] for name in order), None)
    assert y.dtype == dtype
    assert Judge(LINEAR, inputs, dtype)(y)[0] <= 1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_of_linear(activation, dtype):
    x, weight, dy = torch.randn(5, 7), torch.randn(3, 7), torch.randn(5, 3)
    x, weight, dy = (t.to(dtype) for t in (x, weight, dy))
    backward = linear_file._plain_backward
    ours = products_of(backward, dy, x, weight, None, activation, None, True, True)
    wide = backward(dy.float(), x.float(), weight.float(), None, activation, None, True, True)
    for grad, truth in zip(ours, wide, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, truth.to(dtype), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {"lengths": (3, 3, 17)},
        {"lengths": (3, 3, 17), "dropout_p": 0.5},
        {"lengths": ()},
        {"lengths": (3,), "lengths_k": (0,)},
    ],
    ids=str,
)
def test_attention(case, dtype):
    inputs = ATTENTION.inputs(dtype, "cpu", **case)
    order = ("q", "k", "v", "cu_seqlens", "cu_seqlens_k", "max_seqlen", "max_seqlen_k", "causal")
    args = [inputs.get(name) for name in order]
    args += [0.125, inputs["dropout_p"], inputs["seed"]]
    if case["lengths"] == (3, 3, 17):
        o = products_of(attention_file._plain, *args)
    else:
        o = attention_file._plain(*args)
    assert o.dtype == dtype
    assert Judge(ATTENTION, {**inputs, "scale": 0.125}, dtype)(o)[0] <= 1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_a_model_is_nearer_to_stock_in_fp64_than_stock_is(frozen, dtype):
    model = stock_model(hidden_size=128, intermediate_size=192).to(dtype)
    mask = masks()["right"]
    there = mask.bool()
    stock = model(ids_of(), mask)[0].double()[there]
    ours = accelerate(model, frozen=frozen)(ids_of(), mask)[0].double()[there]
    exact = stock_model(hidden_size=128, intermediate_size=192).to(dtype).double()
    truth = exact(ids_of(), mask)[0][there]
    assert (ours - truth).abs().mean() < (stock - truth).abs().mean()
