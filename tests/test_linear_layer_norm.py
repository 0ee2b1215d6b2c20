"""What test_ops.py cannot say for every op: its one launch or two, and bits whatever the batch."""

import importlib

import pytest
import torch

from bert_fast.kernels import layer_norm, linear, linear_layer_norm
from bert_fast.kernels.launch import DTYPES, INTERPRET

file = importlib.import_module("bert_fast.kernels.linear_layer_norm")
GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"
kernels = pytest.mark.skipif(not (GPU or INTERPRET), reason="of the kernels")


def inputs_of(T, K, N, dtype, num_tokens=None):
    torch.manual_seed(0)
    return file._inputs(dtype, DEVICE, T, K, N, num_tokens=num_tokens)


def launches(monkeypatch, number):
    monkeypatch.setattr(file, "_launches", lambda *_: number)


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [64, 300, 768])
@torch.no_grad()
def test_one_launch_and_two_are_the_ops_one_after_the_other(N, dtype, monkeypatch):
    inputs = inputs_of(131, 96, N, dtype)
    names = ("x", "weight", "bias")
    h = linear(*(inputs[name] for name in names), residual=inputs["residual"])
    expected = layer_norm(h, inputs["norm_weight"], inputs["norm_bias"])
    for number in (1, 2):
        launches(monkeypatch, number)
        ours = linear_layer_norm(**inputs)
        if number == 2:
            assert torch.equal(ours, expected)
        else:  # a row may be added up in another order
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(ours, expected, rtol=2 * eps, atol=8e-7)


@kernels
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("sums_without_place")
@torch.no_grad()
def test_a_row_has_the_same_bits_in_any_batch(dtype, number, monkeypatch):
    launches(monkeypatch, number)
    inputs = inputs_of(131, 96, 300, dtype)
    expected = linear_layer_norm(**inputs)
    for rows in ([0], [130], [64, 3], list(range(7)), list(range(130, -1, -1))):
        part = {**inputs, "x": inputs["x"][rows], "residual": inputs["residual"][rows]}
        assert torch.equal(linear_layer_norm(**part), expected[rows]), rows
    count = torch.tensor([70], dtype=torch.int32, device=DEVICE)
    assert torch.equal(linear_layer_norm(**{**inputs, "num_tokens": count})[:70], expected[:70])


@kernels
@torch.no_grad()
def test_a_table_chooses(monkeypatch):
    asked, started, chosen = [], [], {"LAUNCHES": 1}

    def choose(op, default, rows=None, **key):
        asked.append((op, default.keys(), rows, key))
        return chosen

    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(file.launch, "configuration", choose)
    monkeypatch.setattr(file, "tile_config", lambda *_: tile)
    monkeypatch.setattr(file, "launch_linear", lambda *_: started.append("linear"))
    monkeypatch.setattr(file, "launch_layer_norm", lambda *_: started.append("layer_norm"))
    inputs = inputs_of(5, 32, 64, torch.float16)
    linear_layer_norm(**inputs)
    assert started == []
    chosen["LAUNCHES"] = 2
    linear_layer_norm(**inputs)
    assert started == ["linear", "layer_norm"]
    key = {"N": 64, "K": 32, "itemsize": 2}
    assert asked == [("linear_layer_norm", {"LAUNCHES"}, 5, key)] * 2


def test_gradients_are_those_of_the_two_ops():
    inputs = inputs_of(13, 160, 128, torch.float32)
    names = ("x", "weight", "bias", "residual", "norm_weight", "norm_bias")
    leaves = [inputs[name].requires_grad_() for name in names]
    ours = torch.autograd.grad(linear_layer_norm(**inputs).square().sum(), leaves)
    exact = {k: t.detach().double() if torch.is_tensor(t) else t for k, t in inputs.items()}
    leaves = [exact[name].requires_grad_() for name in names]
    truth = torch.autograd.grad(file.linear_layer_norm_ref(**exact).square().sum(), leaves)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)
