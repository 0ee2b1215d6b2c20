"""The ops, forward and backward: each case of each Spec, against the definition and what torch and
others offer."""

from functools import partial

import torch
from lengths import lengths_of
from op_peers import BASELINES, OTHERS
from workloads import Contender, Problem, Workload

from bert_fast.kernels import SPECS
from bert_fast.kernels.spec import cast, is_float, tensors_of

MORE = {  # cases beside a Spec's
    "attention": tuple(
        {"lengths": tuple(lengths.tolist()), "heads": 12, "D": 64}
        for name in ("squad-384", "wikipedia-512", "full-256", "full-384")
        for lengths in lengths_of(name).draw(1, 32)
    ),
}


# -- workloads ------------------------------------------------------------------------------
DIFFERENTIATED = 4  # cases of an op


def ops(dtype, device, quick, tf32=False):
    """A workload for each bench case of each op; if quick, for its small whole one alone.

    For the first few cases of an op that has gradients, their backward too.
    """
    found = []
    for spec in SPECS:
        if spec.gradient:
            continue
        cases = (*spec.bench, *MORE.get(spec.name, ()))
        for n, case in enumerate((spec.whole,) if quick else cases):
            found.append(_workload(spec, case, dtype, device, tf32))
            if n < DIFFERENTIATED and _differentiable(spec):
                found.append(_workload(spec, case, dtype, device, tf32, backward=True))
    return found


def _workload(spec, case, dtype, device, tf32, backward=False):
    baseline = BASELINES.get(spec.name, DEFINITION)
    contenders = tuple(dict.fromkeys((DEFINITION, baseline, *OTHERS.get(spec.name, ()), OURS)))
    return Workload(
        name=spec.label(case) + (" backward" if backward else ""),
        dtype=dtype,
        contenders=tuple(map(_backward, contenders)) if backward else contenders,
        baseline=baseline.name,
        prepare=partial(_backward_problem if backward else _problem, spec, case, dtype, device),
        kind="backward" if backward else "op",
        tf32=tf32,
    )


def _problem(spec, case, dtype, device):
    torch.manual_seed(0)
    flops, moved = spec.cost(8, **case)
    small = flops <= 2e10 and moved <= 2**29  # of fp64, a few seconds and 2 GB with temporaries
    timed = spec.inputs(dtype, device, **case)
    checked = timed if small else spec.inputs(dtype, device, **spec.cases[0])
    truth = _tensors(spec.ref(**cast(checked, torch.float64)))
    peak = max((_peak(t) for t in truth if t.is_floating_point()), default=0.0)
    flops, moved = spec.cost(dtype.itemsize, **case)
    return Problem(
        subject=spec,
        timed=timed,
        checked=checked,
        checked_on=spec.label(case if small else spec.cases[0]),
        truth=truth,
        gate=partial(_op_gate, ulp=torch.finfo(dtype).eps * peak),
        work={"C": flops, "B": moved},
    )


def _peak(t):
    return t.abs().max().item() if t.numel() else 0.0


def _tensors(result, inputs=None):
    return tensors_of(result)


def _op_gate(error, baseline, ulp):
    """The tests' allowance, in short: an ulp of the largest result and four baseline errors."""
    limit = ulp + 4 * baseline["max"]
    if not error["max"] <= limit:
        return f"error {error['max']:.2g}, at most {limit:.2g} is allowed"
    return None


DEFINITION = Contender(
    "definition",
    lambda problem: lambda inputs: partial(problem.subject.ref, **inputs),
    _tensors,
    gated=False,  # in fp16 and bf16 it rounds at every step
)
OURS = Contender(
    "ours",
    lambda problem: lambda inputs: partial(problem.subject.fn, **inputs),
    _tensors,
)


# -- backward -------------------------------------------------------------------------------
PRODUCTS_OF_BACKWARD = {"attention": 2.5}  # times those of forward: five to two; of others 2


def _leaves(inputs):
    return [t for t in inputs.values() if is_float(t)]


def _differentiable(spec):
    return bool(_leaves(spec.inputs(torch.float32, "cpu", **spec.cases[0])))


def _leaf(value):
    return value.detach().requires_grad_() if is_float(value) else value


def _gradient_of(y, dtype):
    """The same numbers for every contender, and in fp64: normal, rounded to dtype."""
    generator = torch.Generator(y.device).manual_seed(1)
    drawn = torch.randn(y.shape, generator=generator, device=y.device)
    return drawn.to(dtype).to(y.dtype)


def _backward(contender):
    """The contender's gradients, from a forward that is done before the clock starts."""

    def build(problem):
        bind = contender.build(problem)

        def bind_backward(inputs):
            inputs = {k: _leaf(v) for k, v in inputs.items()}
            run = bind(inputs)
            leaves = getattr(run, "leaves", None) or _leaves(inputs)
            with torch.enable_grad():
                y = run()
                packed = contender.collect(y, inputs)[0]
                dy = _gradient_of(packed, _leaves(problem.timed)[0].dtype)
                # the gradient of y in its own layout
                (dy,) = torch.autograd.grad(packed, y, dy, retain_graph=True)
            return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True)

        bind_backward.implementation = getattr(bind, "implementation", None)
        return bind_backward

    def collect(gradients, inputs):
        like = _leaves(inputs)
        return [
            torch.zeros_like(t) if g is None else contender.collect(g, inputs)[0]
            if g.shape != t.shape else g
            for g, t in zip(gradients, like, strict=True)
        ]  # fmt: skip

    return Contender(contender.name, build, collect, contender.gated, contender.slow)


def _moved_back(op, inputs, y):
    """Bytes that the gradients of op must read and write. Of most ops each input is read, dy, and
    each gradient written."""
    size = {name: t.nbytes for name, t in inputs.items() if is_float(t)}
    moved = 2 * sum(size.values()) + y.nbytes
    if op == "attention":
        moved += y.nbytes  # o
    if op in ("layer_norm", "dropout", "linear"):
        # The residual's gradient is x's in layer_norm, and dy itself in the two others.
        moved -= size.get("residual", 0) * (1 if op == "layer_norm" else 2)
    if op == "dropout":
        moved -= size["x"]  # places follow from the seed
    if op == "layer_norm" or (op == "linear" and not inputs["activation"]):
        moved -= size.get("bias", 0)  # its gradient alone
    return moved


def _backward_problem(spec, case, dtype, device):
    problem = _problem(spec, case, dtype, device)
    exact = _backward(DEFINITION)
    checked = cast(problem.checked, torch.float64)
    truth = exact.collect(exact.build(problem)(checked)(), checked)
    y = _tensors(spec.fn(**problem.timed))[0]
    return Problem(
        subject=spec,
        timed=problem.timed,
        checked=problem.checked,
        checked_on=problem.checked_on,
        truth=truth,
        gate=partial(_op_gate, ulp=torch.finfo(dtype).eps),
        work={
            "C": PRODUCTS_OF_BACKWARD.get(spec.name, 2.0) * problem.work["C"],
            "B": _moved_back(spec.name, problem.timed, y),
        },
        unit=[_peak(t) or 1.0 for t in truth],
    )
