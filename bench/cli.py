"""The command line, and what `make gpu` runs."""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import ceilings, clock_of
from model_workloads import models
from op_workloads import ops
from results import Results, device_of, file_name, table
from rich.console import Console
from rows import measure, skipped

from bert_fast import kernels

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PARTS = {"ops": (ops,), "model": (models,), "all": (ops, models), "gpu": (models, ops)}
SECONDS = {ops: 1.0, models: 10.0}  # --seconds, where it is not given


def main(description):
    started = time.monotonic()
    options = _options(description)
    device = torch.device(options.device)
    known = device_of(device)
    path, budget = options.output, options.budget
    if options.what == "gpu":
        path = path or ROOT / "bench" / "results" / file_name(known)
        budget = budget or 510.0
    results = Results(path, known)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if options.what == "gpu":
        results.add(tests=run_tests(budget / 2))
        console.print(f"tests: {results.content['tests']['summary']}\n")

    clock = clock_of(device)
    if device.type == "cuda":
        results.add(ceilings=ceilings(clock, device))
    for workload, only, seconds in options.todo:
        used = time.monotonic() - started
        if budget and used > budget:
            rows = skipped(workload, f"the budget of {budget:g} s is used up")
        else:
            in_haste = bool(budget) and used > budget / 2
            rows = measure(workload, clock, seconds, results.content["ceilings"], only, in_haste)
        results.add(rows=rows)
        console.print(table(rows), "")
    if path:
        console.print(f"written to {path}")
    wrong = any(row["status"] == "FAILED" for row in results.content["rows"])
    return int(wrong or results.content.get("tests", {"returncode": 0})["returncode"] != 0)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"bench: {message}\n")


def _options(description):
    """The command line; todo is a list of (workload, names of contenders or None, seconds)."""
    as_written = argparse.RawTextHelpFormatter
    parser = Parser("bench", description=description, formatter_class=as_written)
    gpu = torch.cuda.is_available()
    parser.add_argument("what", choices=PARTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--only", metavar="TEXT", default="", help="of a workload or contender")
    parser.add_argument("--seconds", type=float, help="of rounds of each workload; 3 rounds at least")
    parser.add_argument("--budget", metavar="SECONDS", type=float, help="start nothing after it")
    parser.add_argument("--output", metavar="FILE.json", type=Path)
    options = parser.parse_args()

    if options.device == "cuda" and not gpu:
        parser.error("--device cuda: torch finds no GPU here")
    if reason := kernels.missing(options.device):
        parser.error(reason)

    workloads = [
        (workload, options.seconds or SECONDS[part] / (10 if options.quick else 1))
        for part in PARTS[options.what]
        for dtype in options.dtype or ["bfloat16" if options.device == "cuda" else "float32"]
        for workload in part(DTYPES[dtype], torch.device(options.device), options.quick)
    ]
    options.todo = []
    for workload, seconds in workloads:
        names = [c.name for c in workload.contenders if options.only in c.name]
        if options.only in workload.name:
            options.todo.append((workload, None, seconds))
        elif names:
            options.todo.append((workload, names, seconds))
    if not options.todo:
        known = dict.fromkeys(w.name.partition("(")[0] for w, _ in workloads)
        known |= dict.fromkeys(c.name for w, _ in workloads for c in w.contenders)
        parser.error(f"--only {options.only}: no such name; there are {', '.join(known)}")
    if kernels.backend(options.device) == "interpreter":
        parser.error("TRITON_INTERPRET is set, and the interpreter's speed says nothing; unset it")
    return options


def run_tests(seconds):
    """The test suite in a process of its own; on a GPU that is the real kernels."""
    command = [sys.executable, "-m", "pytest", "tests", "-q", "--tb=line", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels
        command += ["-n", "8"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:  # a pipe would outlive pytest in processes it leaves
        try:
            returncode = subprocess.run(
                command, cwd=ROOT, env={**env, "PYTHONSAFEPATH": "1"}, timeout=seconds,
                stdout=log, stderr=subprocess.STDOUT, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            returncode = None
        log.seek(0)
        lines = log.read().splitlines()
    if returncode is None:
        lines.append(f"killed after {seconds:g} s")
    return {
        "returncode": returncode,
        "seconds": time.monotonic() - started,
        "summary": lines[-1],
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))][:40],
    }
