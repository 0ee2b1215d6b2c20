"""Seeded random cases of every op, in the interpreter, against the definition in fp64.

With --arch the kernels are compiled for that, and run in the emulator instead.

A case is what the Spec draws (shapes, options) plus a dtype, a memory layout, a magnitude, and a
place for NaN and infinity. It is one JSON object, so one line reproduces a failure. Failing cases
are shrunk: whatever can be removed or made smaller while it still fails, is.

The error is reported twice: as a share of what check/judge.py allows, which must not exceed 1, and
in units of the error of the definition in plain PyTorch in the same dtype.
"""

import json
import os
import random
import sys
import time
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from compiled import ARCHS, emulated
from judge import LAYOUTS, Judge, further_rows, is_float, is_packed, laid_out, varied
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bert_fast.kernels import SPECS
from bert_fast.kernels.launch import DTYPES, INTERPRET

BY_NAME = {str(d).removeprefix("torch."): d for d in DTYPES}
CHUNK = 50  # cases per task of a worker


# -- inputs ---------------------------------------------------------------------------------
def _plain(t, generator):
    return t


def _large(t, generator):
    """Up to nearly the largest number of fp16."""
    return t * (60000 / t.abs().max().clamp(min=1e-30))


def _small(t, generator):
    """Subnormal in fp16, or nearly so; in the other dtypes merely small."""
    return t * 1e-6


def _subnormal(t, generator):
    """Subnormal in fp32 and bf16; zeros in fp16."""
    return t * 1e-39


def _outliers(t, generator):
    """One column in sixteen is 60 times the others."""
    columns = torch.rand(t.shape[-1], generator=generator) < 1 / 16
    return torch.where(columns, 60 * t, t)


def _spread(t, generator):
    """Magnitudes from 1e-4 to 1e4 mixed."""
    return t * 10 ** (8 * torch.rand(t.shape, generator=generator) - 4)


MAGNITUDES = {
    f.__name__[1:]: f for f in (_plain, _large, _small, _subnormal, _outliers, _spread)
}
POISONS = ("none", "rows", "nan", "inf")


def draw(spec, rng):
    """A case of spec, in plain values."""
    return {
        "op": spec.name,
        "case": spec.fuzz(rng),
        "dtype": rng.choice(list(BY_NAME)),
        "layout": rng.choice(list(LAYOUTS)),
        "magnitude": rng.choice(list(MAGNITUDES)) if rng.random() < 0.5 else "plain",
        "poison": rng.choice(POISONS),
        "seed": rng.randrange(2**31),
    } | ({"variant": rng.choice(({}, *spec.variants))} if spec.variants else {})


def _values(case):
    """A Spec's case from JSON, where tuples are lists and dtypes are names."""
    return {
        k: tuple(v) if isinstance(v, list) else getattr(torch, v) if isinstance(v, str) else v
        for k, v in case.items()
    }


def inputs_of(spec, drawn):
    dtype = BY_NAME[drawn["dtype"]]
    torch.manual_seed(drawn["seed"])
    generator = torch.Generator().manual_seed(drawn["seed"])
    inputs = spec.inputs(torch.float32, "cpu", **_values(drawn["case"]))
    change = MAGNITUDES[drawn["magnitude"]]
    for name, t in inputs.items():
        if is_float(t):
            t = change(t, generator) if t.numel() else t
            limit = torch.finfo(dtype).max
            inputs[name] = t.clamp(-limit, limit).to(dtype)
    if drawn["poison"] in ("nan", "inf") and spec.packed:
        t = inputs[spec.packed[0]]
        if is_float(t) and len(t):
            row = torch.randint(len(t), (), generator=generator)
            t[row] = float(drawn["poison"])
    return laid_out(inputs, drawn["layout"])


# -- one case -------------------------------------------------------------------------------
def run(drawn):
    """(what is wrong or None, share of the allowance, error in units of stock's) of one case."""
    spec = next(s for s in SPECS if s.name == drawn["op"])
    inputs = inputs_of(spec, drawn)
    judge = Judge(spec, inputs, BY_NAME[drawn["dtype"]])
    rows = drawn["poison"] == "rows" and is_packed(spec, inputs)
    variant = varied(drawn.get("variant", {}))
    kernels = emulated(drawn["arch"]) if "arch" in drawn else nullcontext()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        with (
            torch.no_grad(), np.errstate(all="ignore"), warnings.catch_warnings(), variant, kernels,
        ):  # fmt: skip
            warnings.simplefilter("ignore")  # numpy's, about NaN and infinity
            result = spec.fn(**further_rows(spec, inputs) if rows else inputs)
            written = spec.fn(**further_rows(spec, inputs, fill=0)) if rows else None
    except Exception as error:
        return f"{type(error).__name__}: {error}", torch.inf, torch.inf
    finally:
        torch.use_deterministic_algorithms(False)
    if rows:
        count = len(judge.truth[0])
        if not written[count:].isnan().all():
            return "rows past num_tokens are written", torch.inf, torch.inf
        result = result[:count]
    share, error = judge(result)
    wrong = None if share <= 1 else f"error is {share:.3g} times what is allowed"
    return wrong, share, error


def shrink(drawn, run=run):
    """A minimal case that still fails in the same way."""

    def way(candidate):
        wrong, *_ = run(candidate)
        return wrong and wrong.partition(" ")[0]

    def fails(candidate):
        try:
            return way(candidate) == wanted
        except Exception:  # invalid: the definition does not take it
            return False

    wanted = way(drawn)

    while smaller := next((c for c in _simpler(drawn) if fails(c)), None):
        drawn = smaller
    return drawn


def _simpler(drawn):
    """Cases with one thing removed or made smaller, largest step first."""
    for key, value in (
        ("poison", "none"), ("magnitude", "plain"), ("layout", "contiguous"), ("dtype", "float32")
    ):  # fmt: skip
        if drawn[key] != value:
            yield {**drawn, key: value}
    if "variant" in drawn:
        yield {k: v for k, v in drawn.items() if k != "variant"}
    case = drawn["case"]
    for key in case:
        without = {k: v for k, v in case.items() if k != key}
        yield {**drawn, "case": without}
        for value in _smaller(case[key]):
            yield {**drawn, "case": {**case, key: value}}
    if drawn["seed"]:
        yield {**drawn, "seed": 0}


def _smaller(value):
    if isinstance(value, (list, tuple)):
        value = list(value)
        yield from (value[: len(value) // 2], value[len(value) // 2 :]) if len(value) > 1 else ()
        for i, v in enumerate(value):
            yield value[:i] + value[i + 1 :]
            yield from (value[:i] + [s] + value[i + 1 :] for s in _smaller(v))
    elif isinstance(value, bool):
        yield from [False] * value
    elif isinstance(value, int) and value > 0:
        yield from dict.fromkeys((1, value // 2, value - 1)) if value > 1 else (0,)


def command(drawn):
    """The line that reproduces a case."""
    case = {k: v for k, v in drawn.items() if k != "arch"}
    arch = f" ARCH={drawn['arch']}" if "arch" in drawn else ""
    return f"make fuzz{arch} CASE='{json.dumps(case, separators=(',', ':'))}'"


# -- many -----------------------------------------------------------------------------------
def case_of(number, seed, specs, arch=None):
    """Case `number` of a run, the same whichever worker draws it."""
    rng = random.Random(f"{seed} {number}")
    return draw(specs[number % len(specs)], rng) | ({"arch": arch} if arch else {})


def _chunk(numbers, seed, names, arch):
    specs = [s for s in SPECS if s.name in names]
    return [(drawn, *run(drawn)) for drawn in (case_of(n, seed, specs, arch) for n in numbers)]


def campaign(cases, seed, specs, jobs, arch=None):
    """Runs the cases; {"cases", "seed", "seconds", "ops": {...}, "failures": [...]}."""
    started = time.monotonic()
    chunk = partial(_chunk, seed=seed, names=[s.name for s in specs], arch=arch)
    chunks = [range(i, min(i + CHUNK, cases)) for i in range(0, cases, CHUNK)]
    rows, failures = defaultdict(list), []
    with ExitStack() as stack:
        if jobs == 1:
            results = map(chunk, chunks)
        else:  # spawned, as a fork of a process with torch's threads may hang
            pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,))
            results = stack.enter_context(pool).map(chunk, chunks)
        console = Console(stderr=True)
        for result in track(results, "fuzz", len(chunks), console=console, transient=True):
            for drawn, wrong, share, error in result:
                rows[drawn["op"], drawn["dtype"]].append((share, error, drawn))
                if wrong:
                    failures.append((drawn, wrong))
    return {
        "cases": cases,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "ops": [
            {
                "op": op,
                "dtype": dtype,
                "cases": len(of),
                "worst share of the allowance": max(share for share, _, _ in of),
                "median error over stock's": sorted(error for _, error, _ in of)[len(of) // 2],
                "worst error over stock's": max(error for _, error, _ in of),
                "worst case": max(of, key=lambda row: row[0])[2],
            }
            for (op, dtype), of in sorted(rows.items())
        ],
        "failures": failures,
    }


def table(summary):
    grid = Table(title=f"{summary['cases']:,} cases, seed {summary['seed']}", box=None)
    grid.add_column("op")
    grid.add_column("dtype")
    for heading in ("cases", "worst share of allowance", "median over stock", "worst over stock"):
        grid.add_column(heading, justify="right")
    for row in summary["ops"]:
        grid.add_row(
            row["op"], row["dtype"], f"{row['cases']:,}",
            *(f"{row[k]:.2f}" for k in (
                "worst share of the allowance", "median error over stock's",
                "worst error over stock's",
            )),
        )  # fmt: skip
    return grid


def add_arguments(parser):
    parser.add_argument("--cases", type=int, default=2000, help="default 2000")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--arch", choices=ARCHS, help="in the emulator, compiled for this")
    parser.add_argument("--case", type=json.loads, metavar="JSON", help="run this case alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there")


def main(options, specs):
    if not INTERPRET and not options.arch:
        sys.exit("check fuzz: runs kernels in the interpreter; set TRITON_INTERPRET=1, or --arch")
    if INTERPRET and options.arch:
        sys.exit("check fuzz: the interpreter compiles nothing; for --arch unset TRITON_INTERPRET")
    console = Console()
    if options.case:
        wrong, share, error = run(options.case | ({"arch": options.arch} if options.arch else {}))
        console.print(f"{share:.3g} of the allowance, {error:.3g} times stock's error")
        console.print(wrong or "nothing wrong", markup=False)
        return int(wrong is not None)
    summary = campaign(options.cases, options.seed, specs, options.jobs, options.arch)
    console.print(table(summary))
    for drawn, wrong in summary["failures"][:5]:
        console.print(f"{wrong}\n  {command(shrink(drawn))}", soft_wrap=True, markup=False)
    if (more := len(summary["failures"]) - 5) > 0:
        console.print(f"and {more} more")
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    return int(bool(summary["failures"]))
