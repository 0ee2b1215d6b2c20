"""One workload measured: a row for each contender, whatever became of it."""

from collections import defaultdict

import torch
from measure import Skip, interleave, noted, tf32
from result_schema import ROW

UNJUDGED = "not judged: the baseline has no result whose error would bound this one's"


def measure(
    workload, clock, seconds, ceilings=None, only=None, in_haste=False, sensors=None
):  # fmt: skip
    """The rows of workload: dicts with the keys ROW, None where there is nothing to say.

    seconds   that its rounds take, without building and checking
    ceilings  {"C": FLOP/s in its dtype, "B": bytes/s}; None where they are not known
    only      names of the contenders that take part beside the baseline; None for all
    in_haste  whether to leave out those that take minutes to build, and energy
    sensors   a Sensors, or None
    """
    contenders = [
        c for c in workload.contenders
        if only is None or c.name in only or c.name == workload.baseline
    ]  # fmt: skip
    failures, errors, runs, found = {}, {}, {}, defaultdict(dict)
    with torch.no_grad(), tf32(workload.tf32), clock.stream():
        with noted(failures, "inputs"):
            problem = workload.prepare()
        if failures:
            return [_row(workload, c, *failures["inputs"]) for c in contenders]
        if not in_haste and any(c.slow for c in contenders):
            torch.compiler.reset()  # or the eighth model would hit the limit on recompiling
        for c in contenders:
            with noted(failures, c.name, runs):
                if in_haste and c.slow:
                    raise Skip("takes minutes to build, and time is short")
                bind = c.build(problem)
                found[c.name]["implementation"] = getattr(bind, "implementation", None)
                result = c.collect(bind(problem.checked)(), problem.checked)
                errors[c.name] = error_of(result, problem.truth, problem.unit)
                del result
                if c.gated or c.name == workload.baseline:
                    runs[c.name] = bind(problem.timed)
                    found[c.name]["peak_bytes"] = sensors and sensors.peak_bytes(runs[c.name])
            bind = None  # what failed is not held while the next is built
        before = sensors and sensors.read()
        # A model pays for its launches, as its callers do; of an op they say what Python costs.
        graphed = workload.kind in ("op", "backward")
        timings = interleave(runs, clock, seconds, failures, graphed)
        seen = sensors and {"before": before, "after": sensors.read()}
        for name, timing in timings.items() if sensors and not in_haste else ():
            with noted({}, name):  # its times stand
                energy = sensors.energy_of(runs[name], timing.median, problem.energy_s)
                found[name]["energy_j"] = energy

    rows = []
    base, base_error = timings.get(workload.baseline), errors.get(workload.baseline)
    # A baseline that is wrong itself must excuse nobody: the definition is measured beside it.
    allowed = [
        errors[c.name] for c in contenders
        if c.name in errors and (c.name == workload.baseline or not c.gated)
    ]  # fmt: skip
    allowed = min(allowed, key=lambda error: error["max"], default=None)
    if base_error and problem.gate(base_error, allowed):
        base = None  # nor is there a ratio to what is wrong
    for c in contenders:
        untimed = None if c.name in timings else "not timed: there for its error"
        row = _row(workload, c, *failures.get(c.name, ("ok", untimed)))
        row |= {
            "sequences": problem.sequences,
            "padded_to": problem.padded_to,
            "fill": problem.fill,
            "flops": problem.work["C"],
            "bytes": problem.work["B"],
            "error": errors.get(c.name),
            "baseline_error": base_error,
            "error_on": problem.checked_on,
            **found[c.name],
        }
        if timing := timings.get(c.name):
            row |= {
                "rounds": len(timing.samples),
                "median_s": timing.median,
                "min_s": timing.min,
                "ci": timing.interval,
                "sensors": seen,
                "reason": timing.note,
            }
            if c.gated and allowed is None:
                row |= {"status": "error", "reason": UNJUDGED}
            elif c.gated and (wrong := problem.gate(row["error"], allowed)):
                row |= {"status": "FAILED", "reason": wrong}  # what is wrong has no speed
            else:
                row |= _speed(timing, base, problem, ceilings)
        rows.append(row)
    return rows


def skipped(workload, reason):
    """The rows of a workload that is not measured."""
    return [_row(workload, c, "skipped", reason) for c in workload.contenders]


def error_of(result, truth, unit=1.0):
    """{"max", "rms"} of what the tensors of result differ from those of truth, in fp64 and units.

    unit  a number, a tensor that broadcasts against each tensor of truth, or a list: one for each
    """
    units = unit if isinstance(unit, list) else [unit] * len(truth)
    apart = []
    for r, t, u in zip(result, truth, units, strict=True):
        if r.shape != t.shape:
            raise ValueError(f"result is {list(r.shape)}, the definition's {list(t.shape)}")
        apart.append(((r.double() - t) / u).flatten())
    apart = torch.cat(apart)
    if not apart.isfinite().all():
        raise ValueError("result is not finite")
    return {"max": apart.abs().max().item(), "rms": apart.square().mean().sqrt().item()}


def _row(workload, contender, status, reason):
    return {
        **dict.fromkeys(ROW),
        "workload": workload.name,
        "kind": workload.kind,
        "lengths": workload.lengths,
        "dtype": workload.precision,
        "contender": contender.name,
        "baseline": workload.baseline,
        "status": status,
        "reason": reason,
    }


def _speed(timing, base, problem, ceilings):
    speed = {}
    if problem.tokens:
        speed["valid_tokens_per_s"] = problem.tokens / timing.median
    if problem.layers:
        speed["us_per_layer"] = timing.median / problem.layers * 1e6
    if base:
        speed["ratio_median"] = base.median / timing.median
        speed["ratio_min"] = base.min / timing.min
        speed["ratio_ci"] = timing.ratio_interval(base)
        if problem.layers:
            added = timing.median - base.median
            speed["added_us_per_layer"] = added / problem.layers * 1e6
    if ceilings:
        least = {name: problem.work[name] / ceilings[name] for name in ceilings}
        speed["share_of"] = max(least, key=least.get)
        speed["share"] = least[speed["share_of"]] / timing.median
    return speed
