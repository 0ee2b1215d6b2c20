"""What `make gpu` runs on a bare machine with a GPU, in parts that each write a file at once.

tests     the test suite, on the real kernels
sanitize  compute-sanitizer's memcheck and racecheck over small cases of every op, and attention
          compiled by every PTX compiler at hand: triton 3.6 brings one that can miscompile it on
          Hopper
bench     the models and ops that matter most, in every dtype
tune      launch configurations, into kernels/tuned/
ncu       what Nsight Compute counts in each kernel

All of them take less than nine minutes: each is killed at its limit, and has written by then what
it had. A part that is complete for this commit is not run again, unless it is named.
"""

import importlib.util
import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from measure import clock_of
from model_workloads import PLANS
from nvidia_tools import ncu, ptx, sanitize
from process import run_limited
from result_schema import read
from results import Results, commit, device_of, file_name
from tune import TABLES, tune, write_table

from bert_fast.kernels import launch

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"tests": 200.0, "sanitize": 70.0, "bench": 150.0, "tune": 60.0, "ncu": 30.0}  # seconds
ALL, ALONE = 515.0, 510.0  # seconds: of all parts; of a part that is named
MARGIN = 10.0  # seconds before its limit at which a part begins nothing new
# What runs on kernels, or is what `accelerate` promises of them: 110 s on an H100. The other tests
# are of what a GPU does not change, and take longer.
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        "ops", "attention", "linear", "modeling", "waits", "graphs", "swap", "architectures",
        "decoder", "attention_interface",
    )
)  # fmt: skip
HEAD = 5  # models of the plan that come before the ops; as many again come behind their first cases
DTYPES = {  # what each dtype is measured on, the first ones first; None for everything
    "bfloat16": None,
    "float16": ("base squad-384", "base full-512", "attention", "layer_norm", "gelu"),
    "tf32": ("base squad-384", "base full-512"),
    "float32": ("base squad-384", "base full-512", "attention"),
}


def add_arguments(parser):
    parser.add_argument("--part", choices=LIMITS, help="this alone, done or not")
    parser.add_argument("--folder", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="after which it is killed")


def main(options, fail):
    if not torch.cuda.is_available():
        fail("gpu: torch finds no GPU here; `bench all` measures the CPU")
    if reason := launch.missing("cuda"):
        fail(f"gpu: {reason}")
    known = device_of(torch.device("cuda"))
    if options.part:
        return run_part(options.part, known, options.folder, options.limit or ALONE)
    return run_all(known, options.folder, options.limit or ALL)


def run_all(known, folder, seconds):
    """Each part in a process of its own, so that what kills one spares the others."""
    started, failed = time.monotonic(), []
    for part, limit in LIMITS.items():
        path = folder / file_name(known, part)
        if done := done_before(path):
            outcome = "passed" if done["passed"] else "FAILED"
            print(f"{part}: {outcome} before, see {path}; PART={part} repeats it")
            failed += [] if done["passed"] else [part]
            continue
        limit = min(limit, seconds - (time.monotonic() - started))
        if limit < 2 * MARGIN:
            print(f"{part}: no time left; run it with PART={part}")
            failed.append(part)
            continue
        command = [sys.executable, str(ROOT / "bench"), "gpu", "--part", part]
        command += ["--folder", str(folder), "--limit", f"{limit - MARGIN:.0f}"]
        returncode, lines = run_limited(command, limit)
        print("\n".join(lines[-40:]), flush=True)
        if returncode is None:
            print(f"{part}: killed after {limit:.0f} s; what it had is in {path}")
        if returncode != 0:
            failed.append(part)
    print(f"parts that did not pass: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def done_before(path):
    """The content of path, if that is the whole part, of this commit and from a clean tree."""
    now = commit()
    if not path.exists() or now is None or now.endswith("-dirty"):
        return None
    try:
        content = read(path)
    except ValueError:  # cut off, or of an older schema
        return None
    return content if content.get("complete") and content["git commit"] == now else None


def run_part(part, known, folder, seconds):
    path = folder / file_name(known, part)
    results = Results(path, known, part)
    passed = {
        "tests": _tests, "sanitize": _sanitize, "bench": _bench, "tune": _tune, "ncu": _ncu
    }[part](results, seconds)  # fmt: skip
    results.add(complete=True, passed=passed)
    print(f"{part}: {'passed' if passed else 'FAILED'}, {path}", flush=True)
    return int(not passed)


# -- the parts: (results, seconds) -> whether it passed -------------------------------------
def _tests(results, seconds):
    ran = run_tests(seconds)
    results.add(tests=ran)
    print("\n".join([*ran["failed"][:10], ran["summary"]]))
    return ran["returncode"] == 0


def run_tests(seconds, tests=TESTS):
    """The tests in a process of their own; on a GPU that is the real kernels."""
    command = [sys.executable, "-m", "pytest", *tests, "-v", "--tb=line", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels
        command += ["-n", str(min(os.cpu_count(), 12))]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    started = time.monotonic()
    returncode, lines = run_limited(command, seconds, ROOT, {**env, "PYTHONSAFEPATH": "1"})
    # The summary says why. A run that was killed has none, but said of each test how it went.
    summary = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    of_a_test = re.compile(r"::.* (FAILED|ERROR)|(FAILED|ERROR) .*::")
    failed = summary or [line for line in lines if of_a_test.search(line)]
    if returncode is None:
        lines.append(f"killed after {seconds:g} s")
    return {
        "returncode": returncode,
        "seconds": time.monotonic() - started,
        "summary": lines[-1] if lines else "no output",
        "failed": failed[:40],
    }


def _sanitize(results, seconds):
    started, found = time.monotonic(), []
    for tool in ("memcheck", "racecheck"):
        found.append(sanitize(tool, (seconds - (time.monotonic() - started)) / 2))
        results.add(sanitize=found)
        print(f"{tool}: {found[-1]['status']} {found[-1]['reason'] or ''}")
    compilers = ptx(max(seconds - (time.monotonic() - started), MARGIN))
    results.add(ptx=compilers)
    for entry in compilers:
        print(f"{entry['compiler']}: {entry['status']} {entry['reason'] or ''}")
    return all(entry["status"] != "FAILED" for entry in found + compilers)


def _bench(results, seconds):
    import cli  # it imports this module

    hurried = seconds < ALONE / 2  # what takes minutes to build would take them all
    todo, device = plan(), torch.device("cuda")
    return cli.run(results, todo, device, list(DTYPES), seconds, brief=True, hurried=hurried)


def plan():
    """What the part measures, what matters most first, as cli.run takes it."""
    import cli

    todo = []
    for dtype, only in DTYPES.items():
        for item in cli.workloads("all", [dtype], torch.device("cuda"), quick=False):
            if only is None or item[0].name.partition("(")[0] in only:
                todo.append(item)
    models, seen, order = PLANS["cuda"], Counter(), []
    for workload, _, _ in todo:
        if workload.name in models:
            place = models.index(workload.name)
            stage = 3 if workload.precision != "bfloat16" else 0 if place < HEAD else 2
            stage = 5 if place >= 2 * HEAD and stage == 2 else stage
        else:  # of each op the first cases, then the second ones, ...
            group = workload.name.partition("(")[0], workload.kind, workload.precision
            place = seen[group]
            seen[group] += 1
            stage = 6 if workload.precision != "bfloat16" else 1 if place < 2 else 4
        order.append((stage, place, len(order)))
    return [todo[n] for _, _, n in sorted(order)]


def _tune(results, seconds):
    device, name = torch.device("cuda"), results.content["device"]["name"]
    tables = tune(results, clock_of(device), device, seconds)
    write_table(TABLES / f"{launch.slug(name)}.json", name, tables)
    for op, keys in tables.items():
        for key, config in keys.items():
            print(f"{op}, {key}: {json.dumps(config)}")
    return True


def _ncu(results, seconds):
    results.add(ncu=ncu(seconds))
    found = results.content["ncu"]
    print(f"ncu: {len(found['kernels'])} kernels {found['reason'] or ''}")
    return found["status"] != "FAILED"
