"""Every op of SPECS against its definition, through autograd and through torch.compile.

    pytest tests/test_ops.py                        the CPU's implementations; on a GPU, the kernels
    TRITON_INTERPRET=1 pytest tests/test_ops.py     the kernels, in Triton's interpreter
    pytest tests/test_ops.py --op layer_norm        one op
"""

import inspect
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast.kernels import SPECS, launch
from bert_fast.kernels.launch import DTYPES, INTERPRET

sys.path.append(str(Path(__file__).resolve().parents[1] / "check"))

from judge import LAYOUTS, further_rows, is_float

GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]


def cases(first=None, packed=False):
    """(spec, case) as pytest parameters: all cases of each op, or its first few."""
    return [
        pytest.param(s, c, id=s.label(c))
        for s in SPECS
        if s.packed or not packed
        for c in s.cases[:first]
    ]


def inputs_of(spec, case, dtype=torch.float32):
    torch.manual_seed(0)
    return spec.inputs(dtype, DEVICE, **case)


def results(spec, fn, inputs, dtype=None, layout=lambda t, i: t, dout_rows=None, only=None):
    """fn's outputs and gradients; inputs are cast to dtype if given, and laid out by layout.

    dout_rows: rows of the output that get a gradient; those past it get NaN.
    only: the one input that requires a gradient, instead of all.
    """
    laid = {
        k: layout(t.to(dtype) if dtype and is_float(t) else t, i)
        for i, (k, t) in enumerate(inputs.items(), start=1)
        if isinstance(t, torch.Tensor)
    }
    floats = {k: t.detach() for k, t in laid.items() if is_float(t)}
    leaves = {k: t.requires_grad_() for k, t in floats.items() if only in (None, k)}
    out = fn(**{**inputs, **laid, **leaves})
    if isinstance(out, tuple):
        return dict(zip(out._fields, out))
    torch.manual_seed(1)
    shape = (out.shape[0] if dout_rows is None else dout_rows, *out.shape[1:])
    dout = torch.randint(-8, 9, shape, device=out.device).to(out.dtype) / 4  # exact in every dtype
    if shape != out.shape:
        past = dout.new_full((out.shape[0] - dout_rows, *out.shape[1:]), torch.nan)
        dout = torch.cat((dout, past))
    if not out.requires_grad:
        return {"output": out}
    grads = torch.autograd.grad(out, list(leaves.values()), layout(dout, 0), allow_unused=True)
    grads = {f"gradient of {k}": g for k, g in zip(leaves, grads) if g is not None}
    return {"output": out.detach(), **grads}


def assert_matches_definition(spec, case, dtype, **layout):
    """Every result is that of fp32 arithmetic, rounded once.

    So the allowance is measured, not chosen: one ulp of each number for the rounding, and four
    times what fp32 costs the definition itself, which fp64 on the same inputs tells. An op that
    must round inside may err as much as its definition does in the same dtype; gradients that
    are products of what was rounded, as the definition's in the same dtype and an ulp.
    """
    inputs = inputs_of(spec, case, dtype)
    exact = results(spec, spec.ref, inputs, torch.float64)
    fp32 = results(spec, spec.ref, inputs, torch.float32)
    same = results(spec, spec.ref, inputs)
    ours = results(spec, spec.fn, inputs, **layout)
    # More than these where there are no sequences: the definition then records no gradient.
    assert ours.keys() >= exact.keys(), f"the op lacks {', '.join(exact.keys() - ours.keys())}"
    for name, truth in exact.items():
        result = ours[name]
        assert result.shape == truth.shape, name
        if not result.is_floating_point():
            assert result.dtype == truth.dtype, name
            assert torch.equal(result, truth), name
        elif result.numel():
            assert result.dtype == (dtype if name == "output" else same[name].dtype), name
            cost = (fp32[name] - truth).abs().max()
            floor = torch.finfo(torch.float32).eps * truth.abs().max()
            rtol = torch.finfo(result.dtype).eps
            rounds = spec.rounds_inside or (spec.rounds_backward and name != "output")
            if rounds and dtype != torch.float32:
                cost = (same[name].double() - truth).abs().max() / 4
                rtol = 0 if spec.rounds_inside and name == "output" else rtol
            torch.testing.assert_close(
                result.double(),
                truth,
                rtol=rtol,
                atol=(4 * cost + floor).item(),
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec, case", cases())
def test_matches_definition(spec, case, dtype):
    assert_matches_definition(spec, case, dtype)


@pytest.mark.parametrize("spec, case", cases(first=1))
def test_a_gradient_is_the_same_where_no_other_is_wanted(spec, case):
    inputs = inputs_of(spec, case)
    expected = results(spec, spec.fn, inputs)
    for key in expected:
        if key.startswith("gradient of "):
            ours = results(spec, spec.fn, inputs, only=key.removeprefix("gradient of "))
            assert ours.keys() == {"output", key}
            torch.testing.assert_close(ours[key], expected[key])


class DenseResults(TorchDispatchMode):
    """Fails where the result of an op is not laid out as fake tensors say, which torch.compile
    counts on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "bert_fast":
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if func is torch.ops.bert_fast.qkv.default:
                    t = t.transpose(0, 1)
                assert t.is_contiguous(), f"{func} gave strides {t.stride()}"
        return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec, case", cases(first=2))
def test_any_layout(spec, case, layout):
    with DenseResults():
        assert_matches_definition(spec, case, torch.float32, layout=LAYOUTS[layout])


def test_tensors_on_several_devices_are_refused():
    op = torch.ops.bert_fast.linear.default
    x, weight = torch.ones(2, 3), torch.ones(4, 3, device="meta")
    assert launch.one_device(op, (x, x, None, None, None, None)) == x.device
    with pytest.raises(ValueError, match="got x on cpu and weight on meta"):
        launch.one_device(op, (x, weight, None, None, None, None))


@pytest.mark.parametrize("where", [torch.backends, torch.backends.cuda.matmul])
def test_tf32_is_allowed_as_torch_has_it_whoever_set_it(where, monkeypatch):
    monkeypatch.setattr(launch, "arch", lambda: 90)
    x = torch.ones(1)
    assert launch.precision(x) == "ieee"
    where.fp32_precision = "tf32"
    try:
        assert launch.precision(x) == "tf32"
        assert launch.precision(x.half()) == "ieee"
        monkeypatch.setattr(launch, "arch", lambda: "gfx90a")  # which has none
        assert launch.precision(x) == "ieee"
    finally:
        where.fp32_precision = "none"
    assert launch.precision(x) == "ieee"


@pytest.mark.parametrize("spec, case", cases(first=2, packed=True))
def test_rows_past_num_tokens_are_neither_read_nor_written(spec, case):
    """And their gradients are zeros, as autograd adds others to them. Those of products are of
    torch's where the number of rows is known, and so not the same bits."""
    inputs = inputs_of(spec, case)
    expected = results(spec, spec.fn, inputs)
    for fill in (torch.nan, 0):  # read, the first would show; written, what the second gives
        further = further_rows(spec, inputs, fill)
        ours = results(spec, spec.fn, further, dout_rows=len(expected["output"]))
        assert ours.keys() == expected.keys()
        for name, result in ours.items():
            apart = 0.0 if name == "output" or not spec.rounds_backward else 1e-4
            rows = result[: len(expected[name])]
            torch.testing.assert_close(rows, expected[name], rtol=0, atol=apart)
            past = result[len(expected[name]) :]
            assert past.isnan().all() if name == "output" else not past.any(), name


ROWS, APART = 3, 2**30  # each stride fits 32 bits, the offset of the last row does not
ROOMY = not GPU or torch.cuda.mem_get_info()[1] > 32 * 2**30


@pytest.mark.skipif(not ROOMY, reason="needs a GPU of more than 32 GiB")
@pytest.mark.parametrize(
    "spec, case", [p for p in cases(first=1, packed=True) if p.values[0].packed != ("row_index",)]
)
def test_a_row_may_start_2_to_31_elements_into_a_tensor(spec, case):
    """On the CPU only the pages that are touched take memory."""
    torch.use_deterministic_algorithms(False)  # it would touch every page
    inputs = inputs_of(spec, case, torch.float16)
    few = {k: t[:ROWS] if k in spec.packed and t is not None else t for k, t in inputs.items()}
    if "cu_seqlens" in few:
        few["cu_seqlens"] = torch.tensor([0, ROWS], dtype=torch.int32, device=DEVICE)
    if "packed_row" in few:
        few["packed_row"] = torch.where(few["packed_row"] < ROWS, few["packed_row"], -1)
    expected = spec.fn(**few)
    for name in spec.packed:
        t = few[name]
        apart = torch.empty((ROWS - 1) * APART + t[0].numel(), dtype=t.dtype, device=DEVICE)
        apart = apart.as_strided(t.shape, (APART, *t[0].contiguous().stride()))
        apart.copy_(t)
        assert torch.equal(spec.fn(**{**few, name: apart}), expected), name


@pytest.mark.parametrize("spec, case", cases(first=2))
def test_torch_library_contract(spec, case):
    """opcheck passes for each op that one call and its backward dispatch, as they call it."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "bert_fast":
                calls.append((op, [a.detach() if isinstance(a, torch.Tensor) else a for a in args]))
            return op(*args, **(kwargs or {}))

    torch.use_deterministic_algorithms(False)
    with Record():
        results(spec, spec.fn, inputs_of(spec, case))
    assert calls
    for op, args in calls:
        torch.library.opcheck(op, args)


@pytest.mark.filterwarnings("error:Dynamo detected")  # something that it had better not see
@pytest.mark.parametrize("spec, case", cases(first=1))
def test_compiles_to_one_graph(spec, case):
    inputs = inputs_of(spec, case)
    expected = results(spec, spec.fn, inputs)
    compiled = torch.compile(spec.fn, backend="aot_eager", fullgraph=True)
    for name, ours in results(spec, compiled, inputs).items():
        assert torch.equal(ours, expected[name]), name


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.packed and not s.gradient], ids=lambda s: s.name
)
def test_second_derivative_raises(spec):
    inputs = inputs_of(spec, spec.cases[0])
    leaf = next(t for t in inputs.values() if is_float(t)).requires_grad_()
    (grad,) = torch.autograd.grad(spec.fn(**inputs).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), leaf)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_rejects(spec):
    for message, keywords in spec.rejects.items():
        keywords = {k: t.to(DEVICE) if torch.is_tensor(t) else t for k, t in keywords.items()}
        with pytest.raises(ValueError) as caught:
            spec.fn(**{**inputs_of(spec, spec.cases[0]), **keywords})
        said = str(caught.value).replace(" on cuda:0", "")
        assert said.startswith(f"{spec.name}: {message}")


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_signature_is_that_of_the_definition(spec):
    assert inspect.signature(spec.fn) == inspect.signature(spec.ref)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_cost_is_positive_and_grows_with_the_itemsize(spec):
    for case in spec.bench:
        (flops, two), (_, four) = spec.cost(2, **case), spec.cost(4, **case)
        assert flops >= 0
        assert 0 < two <= four


def test_poison_shows_a_result_that_was_not_written():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.empty(3, device=DEVICE).isnan().all()
