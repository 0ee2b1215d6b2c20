"""All checks of one op: tests, sanitizer, cost, fuzz, mutants, compile report, compiled kernels.

A small op takes one to five minutes on two cores. The interpreter and the compiler need separate
processes: this one interprets, and runs the tests and the compiler as subprocesses.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fuzz
import mutants
import torch
from aot import GATED
from examine import costs, faults
from rich.console import Console
from rich.table import Table

from bert_fast.kernels.launch import INTERPRET

ROOT = Path(__file__).resolve().parents[1]
FUZZED, MUTANTS = 200, 8


@dataclass
class Line:
    """The result of one check: a row of the table, and details printed below it."""

    check: str
    good: bool
    said: str
    more: tuple = ()
    seconds: float = 0.0


def add_arguments(parser):
    pass


def main(options, specs):
    if not INTERPRET:
        sys.exit("check op: runs kernels in the interpreter; set TRITON_INTERPRET=1")
    (spec,) = specs
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    started = time.monotonic()
    with ThreadPoolExecutor(1) as beside:
        compiled = [beside.submit(_timed, check, spec) for check in (report, emulated)]
        lines = [_timed(check, spec) for check in (sanitizer, cost)]
        # Accesses that the sanitizer stops would otherwise happen, and may end this process.
        safe = lines[0].good
        lines += [_timed(check, spec) for check in (UNWATCHED if safe else ())]
        lines += [_timed(native_tests, spec), *(line.result() for line in compiled)]

    grid = Table(title=f"{spec.name}, {time.monotonic() - started:.0f} s", box=None)
    for column in ("check", "", "", "s"):
        grid.add_column(column, overflow="fold", justify="right" if column == "s" else "left")
    for line in lines:
        verdict = "[green]good[/]" if line.good else "[red]BAD[/]"
        grid.add_row(line.check, verdict, line.said, f"{line.seconds:.0f}")
    console.print(grid)
    for line in lines:
        for text in line.more:
            console.print(f"{line.check}: {text}", soft_wrap=True, markup=False, highlight=False)
    if not safe:
        console.print(
            "left out: fuzzer, mutants and tests of the kernels. They run the kernel without the"
            " sanitizer, and what it found may crash them; mend that and check again",
            soft_wrap=True,
            highlight=False,
        )
    return int(not all(line.good for line in lines))


def _timed(check, spec):
    started = time.monotonic()
    line = check(spec)
    line.seconds = time.monotonic() - started
    return line


def sanitizer(spec):
    found = list(faults(spec))
    said = f"{len(spec.cases)} cases, {len(spec.huge)} sizes past 2^31: {len(found)} findings"
    return Line("sanitizer and values", not found, said, tuple(found[:5]))


def cost(spec):
    rows = costs(spec)
    wrong = [row for row in rows if row.wrong]
    row = rows[0]
    said = f"{spec.label(row.case)}: {row}"
    return Line("measured cost", not wrong, said, tuple(f"{r}: {r.wrong}" for r in wrong[:3]))


def fuzzer(spec):
    summary = fuzz.campaign(FUZZED, 0, [spec], jobs=1)
    worst = max(row["worst share of the allowance"] for row in summary["ops"])
    more = [
        f"{wrong}\n  {fuzz.command(fuzz.shrink(drawn))}" for drawn, wrong in summary["failures"][:2]
    ]
    said = f"{FUZZED} cases, the worst at {worst:.2f} of what is allowed"
    return Line("fuzzer", not summary["failures"], said, tuple(more))


def mutation(spec):
    every = mutants.mutants_of(spec)
    chosen = mutants.sample([m for m in every if not m.proof], MUTANTS, 0)
    verdicts = [mutants.verdict(m) for m in chosen]
    alive = tuple(mutants.describe(m) for m, v in zip(chosen, verdicts) if not v.killed)
    said = f"{len(chosen)} of the op's {len(every)} mutants, {len(alive)} survive"
    return Line("mutants", not alive, said, alive)


def _pytest(check, spec, **env):
    command = [sys.executable, "-m", "pytest", "tests/test_ops.py", "--op", spec.name, "-q"]
    env = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **env}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines() or done.stderr.splitlines() or [""]
    failed = tuple(line for line in lines if line.startswith(("FAILED", "ERROR")))
    return Line(check, done.returncode == 0, lines[-1].strip("= "), failed[:5])


def interpreted_tests(spec):
    return _pytest("tests, kernels", spec, TRITON_INTERPRET="1")


UNWATCHED = fuzzer, mutation, interpreted_tests  # they run the kernel without the sanitizer


def native_tests(spec):
    return _pytest("tests, CPU form", spec)


def report(spec):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "aot.json")
        command = [sys.executable, ROOT / "check", "aot", "--op", spec.name, "--json", file]
        command += ["--jobs", "1", *(text for arch in GATED for text in ("--arch", arch))]
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
    over = [f"{r['kernel']} {r['arch']} {r['dtype']}: {o}" for r in rows for o in r["over"]]
    if done.returncode and not over:
        over = ((done.stdout + done.stderr).strip().splitlines() or ["no report"])[-1:]
    told = Counter()  # sums over all launches of the last case
    last = next((r["case"] for r in reversed(rows) if r["predicted"]), "")
    for r in rows:
        if r["dtype"] == "bfloat16" and r["case"] == last:
            told.update({gpu: t["seconds"] * 1e6 for gpu, t in r["predicted"].items()})
    times = ", ".join(f"{us:.1f} us on {gpu}" for gpu, us in told.items())
    case = f"; {last} in bf16: {times}" if rows else ""
    said = f"{len(rows)} launches for {', '.join(GATED)}{case}"
    return Line("compiled", not over, said, tuple(over[:5]))


def emulated(spec):
    command = [sys.executable, ROOT / "check", "compiled", "--op", spec.name, "--jobs", "1"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    *found, said = (done.stdout or done.stderr).strip().splitlines() or ["nothing was printed"]
    return Line("executed", done.returncode == 0, said, tuple(found[:5]))
