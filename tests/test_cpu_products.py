"""16 bits on a CPU without instructions for them: products are of fp32, where torch's are slow."""

import importlib
import sys
from pathlib import Path
from unittest import mock

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
multiplies = launch.cpu_multiplies.__wrapped__  # what it says is kept, but for tests


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
    monkeypatch.setattr(launch, "cpu_multiplies", lambda dtype, few=False: dtype not in HALVES)
    monkeypatch.setattr(launch, "INTEL", False)


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


@pytest.mark.parametrize("has", [True, False])
def test_bf16_that_onednn_emulates_is_left_to_it_in_few_rows_alone(has, monkeypatch):
    monkeypatch.setattr(launch, "AVX512", True)
    monkeypatch.setattr(launch, "CPU", {"avx512_bf16": has})
    supported = mock.Mock(return_value=True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", supported)
    assert multiplies(torch.bfloat16) == has
    assert multiplies(torch.bfloat16, few=True)
    assert multiplies(torch.float32)
    supported.return_value = False
    assert not multiplies(torch.bfloat16, few=True)


def test_few_rows_may_be_multiplied_as_they_are(monkeypatch):
    if linear_file._product is None:
        pytest.skip("this torch has no oneDNN, or calls its product by another name")
    bf16 = torch.bfloat16
    monkeypatch.setattr(launch, "cpu_multiplies", lambda dtype, few=False: few or dtype != bf16)
    most = linear_file.EMULATED
    x, weight = torch.randn(most + 1, 131).to(bf16), torch.randn(131, 131).to(bf16)
    with torch.no_grad(), Products() as products:
        linear_file._plain(x[:most], weight, None, None, None, None)
    assert set(products.dtypes) == {bf16}
    products_of(linear_file._plain, x, weight, None, None, None, None)


def test_attention_of_16_bits_stays_in_them_on_intels_avx512(monkeypatch):
    monkeypatch.setattr(launch, "INTEL", True)
    monkeypatch.setattr(launch, "AVX512", True)
    q, k, v = torch.randn(3, 5, 2, 32, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    with torch.no_grad(), Products() as products:
        attention_file._plain(q, k, v, cu_seqlens, None, 5, None, False, 0.1, 0.0, None)
    assert set(products.dtypes) == {torch.bfloat16}


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
