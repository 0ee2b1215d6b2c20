"""linear against fp64: oneDNN's product where it is taken, torch's own elsewhere."""

import importlib

import pytest
import torch
from torch.nn import functional as F

from bert_fast.kernels import linear
from bert_fast.kernels.launch import DTYPES, INTERPRET

file = importlib.import_module("bert_fast.kernels.linear")
GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"


def operands(T, K, N, dtype):
    torch.manual_seed(0)
    x = torch.randn(T, K, device=DEVICE).to(dtype)
    weight = (torch.randn(N, K, device=DEVICE) / K**0.5).to(dtype)
    return x, weight, torch.randn(N, device=DEVICE).to(dtype)


def definition(x, weight, bias, activation=None):
    y = F.linear(x, weight, bias)
    return F.gelu(y) if activation else y


def assert_as_exact_as_torch(ours, args, activation=None):
    """An ulp for the rounding, and four times torch's own error in this dtype."""
    exact = definition(*(None if t is None else t.double() for t in args), activation)
    theirs = definition(*args, activation)
    assert ours.shape == exact.shape
    assert ours.dtype == theirs.dtype
    if ours.numel():
        cost = (theirs.double() - exact).abs().max().item()
        z = definition(*args).double().abs().max().item()  # 1 + erf(z) cancels: fp32 of z counts
        floor = torch.finfo(torch.float32).eps * z
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), exact, rtol=eps, atol=4 * cost + floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    "T, K, N", [(37, 128, 192), (1, 1, 1), (0, 128, 128), (129, 768, 31), (5, 3072, 7)]
)
def test_matches_definition(T, K, N, activation, dtype):
    x, weight, bias = operands(T, K, N, dtype)
    with torch.no_grad():
        for args in ((x, weight, bias), (x, weight, None)):
            assert_as_exact_as_torch(linear(*args, activation), args, activation)


def test_any_layout():
    x, weight, bias = operands(9, 128, 160, torch.float32)
    apart = x.repeat_interleave(2, 1)[:, ::2], weight.mT.contiguous().mT, bias
    with torch.no_grad():
        assert_as_exact_as_torch(linear(*apart, "gelu"), apart, "gelu")


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients(activation):
    args = [t.requires_grad_() for t in operands(13, 160, 128, torch.float32)]
    exact = [t.detach().double().requires_grad_() for t in args]
    ours = torch.autograd.grad(linear(*args, activation).square().sum(), args)
    theirs = torch.autograd.grad(definition(*exact, activation).square().sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_rows_past_num_tokens_are_zero_after_gelu():
    x, weight, bias = operands(7, 8, 8, torch.float32)
    x[5:] = torch.nan
    y = linear(x, weight, bias, "gelu", torch.tensor([5], dtype=torch.int32, device=DEVICE))
    assert not y[5:].any()
    assert_as_exact_as_torch(y[:5], (x[:5], weight, bias), "gelu")


def test_compiles_to_one_graph():
    args = operands(5, 8, 8, torch.float32)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args, "gelu"), linear(*args, "gelu"))


@pytest.mark.skipif(GPU or INTERPRET, reason="oneDNN is for the CPU's own implementations")
def test_onednn_is_taken_and_may_be_switched_off(monkeypatch):
    args = operands(5, 128, 128, torch.float32)
    calls = []
    product = file._product
    if product is None:
        pytest.skip("this torch has no oneDNN, or calls its product by another name")
    monkeypatch.setattr(file, "_product", lambda *a: calls.append(1) or product(*a))
    with torch.no_grad():
        linear(*args)
        assert len(calls) == 1
        with torch.backends.mkldnn.flags(enabled=False):
            off = linear(*args)
        assert len(calls) == 1
        assert torch.equal(off, F.linear(*args))
        linear(args[0], args[1].mT.contiguous().mT, args[2])  # slow there
        linear(*operands(5, 8, 8, torch.float32))  # not worth it
        assert len(calls) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(8)}, "x must be fp32, fp16 or bf16 [T, K], got float32[8]"),
        ({"weight": torch.ones(8, 7)}, "weight must be float32[N, 8], got float32[8, 7]"),
        ({"bias": torch.ones(3)}, "bias must be [8] like weight, got float32[3]"),
        ({"activation": "relu"}, "activation must be None or \"gelu\", got 'relu'"),
    ],
)
def test_rejects(change, message):
    x, weight, bias = (t.cpu() for t in operands(5, 8, 8, torch.float32))
    with pytest.raises(ValueError) as caught:
        linear(**{"x": x, "weight": weight, "bias": bias, **change})
    assert str(caught.value) == f"linear: {message}"
