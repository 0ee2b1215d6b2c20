"""The sanitizer finds every bug of the gallery, by name and line, and none in what we ship."""

import inspect
import sys
from pathlib import Path

import pytest
import torch

from bert_fast.kernels import SPECS
from bert_fast.kernels.launch import INTERPRET

if not INTERPRET:
    pytest.skip("the sanitizer watches the interpreter", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[1] / "check"))

import triton
import triton.language as tl
from examine import costs, examine, extremes, faults, of_infinity, of_size
from gallery import BUGS
from judge import InOrder, Judge
from sanitizer import Sanitizer


def marked(kernel):
    lines, first = inspect.getsourcelines(kernel.fn)
    return [first + i for i, line in enumerate(lines) if line.rstrip().endswith("# bug")]


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: b.launch.__name__)
def test_every_planted_bug_is_found_and_named(bug):
    with Sanitizer(programs=extremes) as watched:
        bug.launch()
    assert {(f.kind, f.kernel, f.line) for f in watched.findings} == {
        (bug.kind, bug.kernel.fn.__name__, line) for line in marked(bug.kernel)
    }
    for finding in watched.findings:
        assert str(finding).startswith(f"gallery.py:{finding.line}: ")


def test_the_gallery_has_every_kind():
    assert len(BUGS) >= 15
    assert {b.kind for b in BUGS} == {
        "outside", "unmasked", "overflow", "unwritten", "two writers", "race"
    }


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_nothing_is_found_in_a_shipped_kernel(spec):
    assert list(faults(spec)) == []


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_declared_cost_is_what_the_kernels_do(spec):
    for cost in costs(spec):
        assert not cost.wrong, f"{cost}: {cost.wrong}"


def test_a_wrong_cost_shows():
    spec = SPECS[1]
    half = {**vars(spec), "cost": lambda *args, **case: [n // 2 for n in spec.cost(*args, **case)]}
    assert all("FLOP" in cost.wrong for cost in costs(type(spec)(**half)))


@triton.jit
def _copy(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    tl.store(y_ptr + offs, 2.0 * tl.load(x_ptr + offs, mask=mask), mask=mask)


def test_it_counts_what_a_launch_does():
    x, y = torch.randn(13), torch.empty(13)
    with Sanitizer() as watched:
        _copy[(2,)](x, y, 13, BLOCK=8)
    assert torch.equal(y, 2 * x)
    (launch,) = watched.launches
    assert (launch.kernel, launch.grid) == ("_copy", (2, 1, 1))
    assert (launch.bytes_read, launch.bytes_written, launch.distinct_bytes) == (52, 52, 104)
    assert launch.flops == 16  # masked lanes too


def test_it_leaves_the_interpreter_as_it_was():
    from triton.runtime.interpreter import InterpreterBuilder

    before = dict(vars(InterpreterBuilder))
    with pytest.raises(ZeroDivisionError), Sanitizer():
        raise ZeroDivisionError
    assert dict(vars(InterpreterBuilder)) == before


def test_lanes_that_are_masked_and_have_no_other_are_not_numbers():
    """Zero in the interpreter, undefined on a GPU: a kernel that relies on it shows."""

    @triton.jit
    def total(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(y_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < N), 0))

    x, y = torch.ones(13), torch.empty(1)
    total[(1,)](x, y, 13, BLOCK=16)
    assert y.item() == 13
    with Sanitizer():
        total[(1,)](x, y, 13, BLOCK=16)
    assert y.isnan()


@pytest.mark.parametrize("spec", [s for s in SPECS if s.huge], ids=lambda s: s.name)
def test_sizes_past_2_to_31_take_no_memory(spec):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert list(of_size(spec, spec.huge[0])) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_examine_says_what_is_wrong():
    spec = SPECS[1]
    twice = {**vars(spec), "ref": lambda **inputs: 2 * spec.ref(**inputs)}
    assert "times what is allowed" in examine(type(spec)(**twice))


def test_products_in_order_lose_what_such_sums_lose():
    a, b = torch.tensor([[1.0, 1e8, -1e8]]), torch.ones(3, 1)
    for product in (
        lambda: a @ b,
        lambda: torch.einsum("bij,bjk->bik", a[None], b[None]),
        lambda: torch.nn.functional.linear(a, b.T, torch.zeros(1)),
    ):
        with InOrder():
            assert product().item() == 0.0
        with InOrder(backwards=True):
            assert product().item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_judge_allows_an_ulp_and_no_more(dtype):
    spec = next(s for s in SPECS if s.name == "gelu")
    torch.manual_seed(0)
    inputs = spec.inputs(dtype, "cpu", shape=(64, 64))
    judge = Judge(spec, inputs, dtype)
    right = judge.truth[0].to(dtype)
    assert judge(right)[0] <= 1
    ulps = torch.finfo(dtype).eps * right.abs()
    off = {torch.float32: 64, torch.float16: 3, torch.bfloat16: 3}[dtype]
    assert judge((right.double() + off * ulps).to(dtype))[0] > 1
    assert judge(right[:3])[0] == torch.inf
    assert judge(right.double())[0] == torch.inf
    assert judge(right.where(right > -10, 0).fill_diagonal_(torch.nan))[0] == torch.inf


@pytest.mark.parametrize("gradient", [False, True])
def test_the_judge_wants_nan_where_the_definition_has_it(gradient):
    """Of a gradient infinity will do: autograd may add two, one to each side."""
    spec = next(s for s in SPECS if s.name == "gelu")
    spec = type(spec)(**{**vars(spec), "gradient": gradient})
    inputs = spec.inputs(torch.float32, "cpu", shape=(4, 64))
    inputs["x"][1] = torch.nan
    right = spec.fn(**inputs)
    judge = Judge(spec, inputs, torch.float32)
    assert judge(right)[0] <= 1
    assert judge(right.nan_to_num())[0] == torch.inf
    assert (judge(right.nan_to_num(torch.inf))[0] <= 1) == gradient


@pytest.mark.parametrize("name", ["x", "residual"])
def test_a_kernel_that_makes_numbers_of_nan_is_found(name):
    spec = next(s for s in SPECS if s.name == "layer_norm")

    def without_nan(**inputs):
        return spec.fn(**{**inputs, name: inputs[name].nan_to_num()})

    lossy = type(spec)(**{**vars(spec), "fn": without_nan})
    assert any(f"nan in {name}" in fault for fault in of_infinity(lossy, spec.cases[0]))


def test_the_mask_of_an_atomic_is_heeded():
    @triton.jit
    def total(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.atomic_add(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)

    x, y = torch.randn(13), torch.zeros(13)
    with Sanitizer() as watched:
        total[(1,)](x, y, 13, BLOCK=16)
    assert watched.findings == []
    assert torch.equal(y, x)
