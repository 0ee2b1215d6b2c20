"""The command line."""

import argparse
import math
import sys
import time
from pathlib import Path

import comparison
import gpu
import plots
import readme
import torch
import transformers
import tune
from lengths import LENGTHS
from measure import ceilings, clock_of, noted
from model_workloads import SHAPES, TEXTS_OF, TRAINS, models, workload
from op_workloads import ops
from results import Results, device_of, table
from rich.console import Console
from rows import measure, skipped
from sensors import Sensors

from bert_fast import kernels

DTYPES = {
    "float32": torch.float32, "tf32": torch.float32, "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}  # fmt: skip
PARTS = {"ops": (ops,), "model": (models,), "all": (ops, models)}
COMMANDS = {
    "gpu": gpu, "tune": tune, "compare": comparison, "plots": plots, "readme": readme
}  # fmt: skip
SECONDS = {  # --seconds, where it is not given
    "cpu": {ops: 1.0, models: 10.0}, "cuda": {ops: 0.5, models: 3.0},
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"bench: {message}\n")


def main(description):
    as_written = argparse.RawTextHelpFormatter
    parser = Parser("bench", description=description, formatter_class=as_written)
    commands = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    for name in PARTS:
        told = "both" if len(PARTS[name]) > 1 else PARTS[name][0].__doc__.partition(";")[0]
        _add_arguments(commands.add_parser(name, help=told))
    for name, module in COMMANDS.items():
        help = module.__doc__.partition("\n")[0]
        module.add_arguments(
            commands.add_parser(
                name, help=help, description=module.__doc__, formatter_class=as_written
            )
        )
    options = parser.parse_args()
    if options.what in COMMANDS:
        return COMMANDS[options.what].main(options, parser.error)

    transformers.logging.set_verbosity_error()  # of the heads that a checkpoint has besides
    transformers.logging.disable_progress_bar()
    todo = _todo(options, parser.error)
    device = torch.device(options.device)
    results = Results(
        options.output, device_of(device), quick=options.quick, seconds=options.seconds
    )
    dtypes = list(dict.fromkeys(item.precision for item, _, _ in todo))
    passed = run(results, todo, device, dtypes, options.budget, quick=options.quick)
    results.add(complete=True, passed=passed)
    if options.output:
        print(f"written to {options.output}")
    return int(not passed)


def run(results, todo, device, dtypes, budget=None, brief=False, hurried=False, quick=False):
    """Measure todo, a list of (workload, names of contenders or None, seconds), into results.

    budget   seconds, in which nothing is started that would take longer than what is left of them
             if it took as long as the longest before; None for as long as it takes
    brief    a line for each workload in place of a table
    hurried  whether what takes minutes to build is left out from the start, not from half of the
             budget on
    quick    whether the ceilings are left out

    Rows take the place of those that results has of the same workloads. Returns whether no row is
    FAILED.
    """
    started = time.monotonic()
    clock, sensors = clock_of(device), Sensors(device)
    console = Console(width=None if sys.stdout.isatty() else 160)
    say = (lambda rows: print(line(rows), flush=True)) if brief else (
        lambda rows: console.print(table(rows), "")
    )  # fmt: skip
    if not quick and (budget is None or budget > 1) and results.content["ceilings"] is None:
        failures = {}
        with noted(failures, "ceilings"):  # without them there are no shares
            results.add(ceilings=ceilings(clock, device, dtypes))
        if failures:
            print(f"no ceilings: {failures['ceilings'][1]}", flush=True)
    longest = 0.0
    for n, (item, only, seconds) in enumerate(todo):
        begun = time.monotonic()
        used = begun - started
        if budget is not None and used + longest > budget:
            known = {(row["workload"], row["dtype"]) for row in results.content["rows"]}
            left = [of for of, _, _ in todo[n:] if (of.name, of.precision) not in known]
            why = f"the budget of {budget:g} s is used up"
            results.add(rows=[row for of in left for row in skipped(of, why)])
            print(f"skipped: {len(todo) - n} of {len(todo)} workloads, {why}", flush=True)
            break
        in_haste = hurried or (budget is not None and used > budget / 2)
        reached = results.content["ceilings"]
        reached = reached and {"B": reached["B"], "C": reached["C"][item.precision]}
        rows = measure(item, clock, seconds, reached, only, in_haste, sensors)
        results.add(rows=rows)
        if not brief or any(row["status"] != "skipped" for row in rows):
            say(rows)
        longest = max(longest, time.monotonic() - begun)
    return all(row["status"] != "FAILED" for row in results.content["rows"])


def line(rows):
    """base squad-384 bfloat16: ours 2.61 x stock sdpa; best other FlashAttention 2.10; 1 FAILED"""
    first = rows[0]
    speeds = {row["contender"]: row["ratio_median"] for row in rows if row["ratio_median"]}
    ours = speeds.get("ours") or speeds.get("ours, frozen")
    told = [f"{first['workload']} {first['dtype']}:"]
    told.append(f"ours {ours:.2f} x {first['baseline']}" if ours else "ours has no speed")
    others = {
        name: x for name, x in speeds.items()
        if name != first["baseline"] and not name.startswith("ours")
    }  # fmt: skip
    if others:
        best = max(others, key=others.get)
        told.append(f"; best other {best} {others[best]:.2f}")
    for status in ("FAILED", "error", "skipped"):
        if of := [row for row in rows if row["status"] == status]:
            names = ", ".join(row["contender"] for row in of) if status != "skipped" else ""
            told.append(f"; {len(of)} {status} {names}".rstrip())
    for row in rows:
        if row["status"] in ("FAILED", "error"):
            told.append(f"\n    {row['contender']}: {row['reason']}")
    return " ".join(told).replace(" ;", ";").replace(" \n", "\n")


# -- what to measure ------------------------------------------------------------------------
def _add_arguments(parser):
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--only", metavar="TEXT", default="", help="of a workload or contender")
    parser.add_argument(
        "--workload", metavar="NAME", action="append", default=[],
        help='any size and lengths, as "base full-128x8" or "train large squad-384"',
    )  # fmt: skip
    parser.add_argument("--seconds", type=_seconds, help="of rounds of a workload; 6 at least")
    parser.add_argument(
        "--budget", metavar="SECONDS", type=_seconds, help="begin nothing that may pass it"
    )
    parser.add_argument("--output", metavar="FILE.json", type=Path)


def _seconds(text):
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text}")
    return seconds


def workloads(what, dtypes, device, quick, seconds=None):
    """The planned ones: [(workload, None, seconds)]."""
    return [
        (item, None, seconds or SECONDS[device.type][part] / (10 if quick else 1))
        for part in PARTS[what]
        for dtype in dtypes
        for item in part(DTYPES[dtype], device, quick, tf32=dtype == "tf32")
    ]


def _todo(options, fail):
    """What the command line asks for, as run takes it."""
    if options.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no GPU here")
    if reason := kernels.missing(options.device):
        fail(reason)
    if options.device == "cpu" and "tf32" in (options.dtype or ()):
        fail("--dtype tf32: only a GPU multiplies in TF32")
    device = torch.device(options.device)
    dtypes = options.dtype or ["bfloat16" if options.device == "cuda" else "float32"]
    if options.workload:
        seconds = options.seconds or SECONDS[device.type][models] / (10 if options.quick else 1)
        found = [
            (_named(name, dtype, device, options.quick, fail), None, seconds)
            for dtype in dtypes
            for name in options.workload
        ]
    else:
        found = workloads(options.what, dtypes, device, options.quick, options.seconds)
    todo = []
    for item, _, seconds in found:
        names = [c.name for c in item.contenders if options.only in c.name]
        if options.only in item.name:
            todo.append((item, None, seconds))
        elif names:
            todo.append((item, names, seconds))
    if not todo:
        known = dict.fromkeys(w.name.partition("(")[0] for w, _, _ in found)
        known |= dict.fromkeys(c.name for w, _, _ in found for c in w.contenders)
        fail(f"--only {options.only}: no such name; there are {', '.join(known)}")
    if kernels.backend(options.device) == "interpreter":
        fail("TRITON_INTERPRET is set, and the interpreter's speed says nothing; unset it")
    return todo


def _named(name, dtype, device, quick, fail):
    try:
        return workload(name, DTYPES[dtype], device, quick, tf32=dtype == "tf32")
    except (KeyError, ValueError):
        fail(
            f"--workload {name}: must be a size and lengths, with {' or '.join(TRAINS)} before them"
            f" or without, or encode {' or '.join(TEXTS_OF)}; sizes are {', '.join(SHAPES)},"
            f" lengths {', '.join(LENGTHS)}, each with x1, x2, ... sequences behind"
        )
