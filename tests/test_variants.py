"""What a tuned table may choose where that takes other code: `variants` of a Spec."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from test_linear import DEVICE, KERNELS, launched_on, operands
from test_ops import assert_matches_definition

from bert_fast.kernels import SPECS, linear, qkv
from bert_fast.kernels.launch import DTYPES, INTERPRET

sys.path.append(str(Path(__file__).resolve().parents[1] / "check"))

from judge import varied

file = importlib.import_module("bert_fast.kernels.linear")
pytestmark = pytest.mark.skipif(not KERNELS, reason="of kernels")
VARIANTS = [pytest.param(s, v, id=f"{s.name} {v}") for s in SPECS for v in s.variants]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec, variant", VARIANTS)
def test_variants_match_the_definition(spec, variant, dtype):
    with varied(variant):
        for case in spec.cases:
            assert_matches_definition(spec, case, dtype)


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.usefixtures("sums_without_place")
@torch.no_grad()
def test_persistent_programs_give_the_bits_of_the_others(
    activation, dtype, arch, monkeypatch, request
):
    """In every form of tile that there is, and whatever the other rows."""
    arch, dtype, precision = launched_on(arch, dtype, monkeypatch, request)
    x, *parts = operands(131, 200, 96, dtype)
    residual = torch.randn(131, 96, device=DEVICE).to(dtype)
    expected = linear(x, *parts, activation, residual)
    parts += [t.flip(0) for t in parts] + [-t for t in parts]
    expected_qkv = torch.stack([linear(x, *parts[i : i + 2]) for i in (0, 2, 4)], 1)
    count = torch.tensor([70], device=DEVICE)
    for form in file._forms(arch, dtype.itemsize, precision):
        monkeypatch.setattr(file, "_tile", lambda *_, form=form: form)
        with varied({"PERSISTENT": 1}):
            ours = linear(x, *parts[:2], activation, residual)
            first = linear(x[:70], *parts[:2], activation, residual[:70])
            some = linear(x, *parts[:2], activation, residual, num_tokens=count)
            assert torch.equal(ours, expected), form
            assert torch.equal(first, expected[:70]), form
            assert torch.equal(some[:70], expected[:70]), form
            assert torch.equal(qkv(x, *parts), expected_qkv), form
            some = qkv(x, *parts, num_tokens=count)
            assert torch.equal(some[:70], expected_qkv[:70]), form


@pytest.mark.skipif(not INTERPRET, reason="counts launches of the interpreter")
@torch.no_grad()
def test_a_table_has_the_persistent_form_where_descriptors_can_be(monkeypatch):
    """They are of addresses and rows that are multiples of 16 bytes."""
    launched = []
    of_qkv = importlib.import_module("bert_fast.kernels.qkv")
    for kernel in (
        file._forward_kernel, file._persistent_kernel, of_qkv._forward_kernel,
        of_qkv._persistent_kernel,
    ):

        def run(*args, kernel=kernel, original=kernel.run, **kwargs):
            launched.append(kernel.fn.__name__)
            return original(*args, **kwargs)

        monkeypatch.setattr(kernel, "run", run)
    x, weight, bias = operands(5, 64, 16, torch.float16)
    odd = torch.randn(5, 66).half()
    linear(x, weight, bias)
    with varied({"PERSISTENT": 1}):
        linear(x, weight, bias)
        linear(odd[:, :64], weight, bias)  # rows apart by 132 bytes
        linear(odd.flatten()[1:321].view(5, 64), weight, bias)  # begins at an odd number
        linear(x[:, :0], weight[:, :0], bias)  # nothing to load
        qkv(x, *3 * (weight, bias))
        qkv(odd[:, :64], *3 * (weight, bias))
        at_odd_numbers = torch.randn(16 * 64 + 1).half()[1:].view(16, 64)
        qkv(x, *2 * (weight, bias), at_odd_numbers, bias)  # one of the three
    forward, persistent = "_forward_kernel", "_persistent_kernel"
    of_linear = [forward, persistent, forward, forward, forward]
    assert launched == [*of_linear, persistent, forward, forward]
