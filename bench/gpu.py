"""What `make gpu` runs on a bare machine with a GPU, in parts that each write a file at once.

tests     the test suite, on the real kernels
sanitize  attention compiled by every PTX compiler at hand, as triton 3.6 brings one that can
          miscompile it on Hopper; compute-sanitizer's memcheck and racecheck over small cases of
          every op
bench     the models and ops that matter most, in every dtype
tune      launch configurations, into kernels/tuned/
ncu       what Nsight Compute counts in each kernel

All of them take less than nine minutes: each is killed at its limit, and has written by then what
it had. The first two, in which no time is measured, run beside each other. A part that is complete
for the Python files that are here is not run again, unless it is named.
"""

import importlib.util
import json
import os
import re
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
import tune
from measure import clock_of
from model_workloads import PLANS
from nvidia_tools import ncu, ptx, sanitize
from process import run_limited
from result_schema import read
from results import Results, device_of, file_name, sources

from bert_fast.kernels import SPECS, launch

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"tests": 200.0, "sanitize": 200.0, "bench": 190.0, "tune": 85.0, "ncu": 35.0}  # seconds
TURNS = ("tests", "sanitize"), ("bench",), ("tune",), ("ncu",)  # beside each other, in turn
ALL, ALONE = 515.0, 510.0  # seconds: of all parts; of a part that is named
MARGIN = 10.0  # seconds before its limit at which a part begins nothing new
# What runs on kernels, or is what `accelerate` promises of them: 110 s on an H100. The other tests
# are of what a GPU does not change, and take longer.
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        "ops", "attention", "linear", "modeling", "waits", "graphs", "swap", "architectures",
        "decoder", "attention_interface", "dropout", "autocast", "checkpointing",
        # Last: what has not run on a GPU yet may stay there.
        "variants", "trained_layer", "training_graphs", "layer_norm", "start",
    )
)  # fmt: skip
OPS = tuple(spec.name for spec in SPECS if not spec.gradient)
HEAD = (
    "base squad-384", "base full-128x128", "base full-512", "large full-384x43", "base batch-1",
)  # fmt: skip
BRIEF = (
    "FlashAttention unpadded", "stock sdpa, CUDA graphs", "ours, without graphs",
    "ours, dependent launches", "ours, training graphs", "ours",
)  # fmt: skip
STAGES = (  # what is measured, in this order: dtype, models or ops, how many cases of an op
    ("bfloat16", HEAD, None),
    ("float32", ("base squad-384",), None),
    ("tf32", ("base squad-384",), None),
    ("bfloat16", ("train base wikipedia-512",), None),
    ("bfloat16", OPS, 6),
    ("bfloat16", ("attention backward", "layer_norm backward"), 2),
    ("float32", ("linear",), 4),
    ("bfloat16", PLANS["cuda"], None),
    ("bfloat16", OPS, None),
    ("float16", ("base squad-384", "base full-512", "attention", "layer_norm", "gelu"), None),
    ("tf32", ("base full-512",), None),
    ("float32", ("base full-512", "attention", "linear"), None),
    ("bfloat16", tuple(f"{name} backward" for name in OPS), None),
)
DTYPES = tuple(dict.fromkeys(dtype for dtype, _, _ in STAGES))


def add_arguments(parser):
    parser.add_argument("--part", choices=LIMITS, help="this alone, done or not")
    parser.add_argument("--folder", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument(
        "--until", type=float, metavar="TIME", help="nothing is begun after this Unix time"
    )


def main(options, fail):
    if not torch.cuda.is_available():
        fail("gpu: torch finds no GPU here; `bench all` measures the CPU")
    if reason := launch.missing("cuda"):
        fail(f"gpu: {reason}")
    # Time passes in Python's imports too, so a part is told when it ends, not what it has.
    seconds = options.until - time.time() if options.until else ALONE if options.part else ALL
    known = device_of(torch.device("cuda"))
    if options.part:
        return run_part(options.part, known, options.folder, time.monotonic() + seconds)
    return run_all(known, options.folder, seconds)


def run_all(known, folder, seconds):
    end, passed = time.monotonic() + seconds, {}
    for parts in TURNS:
        run = partial(_passes, known=known, folder=folder, end=end)
        with ThreadPoolExecutor(len(parts)) as pool:
            passed |= zip(parts, pool.map(run, parts))
    failed = [part for part, good in passed.items() if not good]
    print(f"parts that did not pass: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def _passes(part, known, folder, end):
    """Run a part in a process of its own, so that what kills it spares the others."""
    path = folder / file_name(known, part)
    if done := done_before(path):
        outcome = "passed" if done["passed"] else "FAILED"
        print(f"{part}: {outcome} before, see {path}; PART={part} repeats it")
        return done["passed"]
    limit = min(LIMITS[part], left(end))
    if limit < 2 * MARGIN:
        print(f"{part}: no time left; run it with PART={part}")
        return False
    command = [sys.executable, str(ROOT / "bench"), "gpu", "--part", part]
    command += ["--folder", str(folder), "--until", f"{time.time() + limit - MARGIN:.1f}"]
    returncode, lines = run_limited(command, limit)
    killed = f"{part}: killed after {limit:.0f} s; what it had is in {path}"
    print("\n".join([*lines[-40:], *([killed] if returncode is None else [])]), flush=True)
    return returncode == 0


def done_before(path):
    """The content of path, if that is the whole part, of the Python files that are here now.

    What `tune` writes, and results, are no such files: the commit is `-dirty` for them.
    """
    if not path.exists():
        return None
    try:
        content = read(path)
    except ValueError:  # cut off, or of an older schema
        return None
    same = content.get("environment", {}).get("sources") == sources()
    return content if content.get("complete") and same else None


def run_part(part, known, folder, end):
    path = folder / file_name(known, part)
    results = Results(path, known, part)
    passed = {
        "tests": _tests, "sanitize": _sanitize, "bench": _bench, "tune": _tune, "ncu": _ncu
    }[part](results, end)  # fmt: skip
    results.add(complete=True, passed=passed)
    print(f"{part}: {'passed' if passed else 'FAILED'}, {path}", flush=True)
    return int(not passed)


# -- the parts: (results, end by time.monotonic()) -> whether it passed ---------------------
def left(end):
    return max(end - time.monotonic(), 0.0)


def _tests(results, end):
    ran = run_tests(left(end))
    results.add(tests=ran)
    print("\n".join([*ran["failed"][:10], ran["summary"]]))
    return ran["returncode"] == 0


def run_tests(seconds, tests=TESTS):
    """The tests in a process of their own; on a GPU that is the real kernels."""
    command = [sys.executable, "-m", "pytest", *tests, "-v", "--tb=line", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors"]  # of what a bare machine may lack
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


def _sanitize(results, end):
    compilers, found = ptx(left(end) / 2), []
    results.add(ptx=compilers)
    for entry in compilers:
        print(f"{entry['compiler']}: {entry['status']} {entry['reason'] or ''}", flush=True)
    for tool, share in (("memcheck", 2), ("racecheck", 1)):
        found.append(sanitize(tool, left(end) / share))
        results.add(sanitize=found)
        print(f"{tool}: {found[-1]['status']} {found[-1]['reason'] or ''}", flush=True)
    return all(entry["status"] != "FAILED" for entry in found + compilers)


def _bench(results, end):
    """All in brief. A part of its own gives half of its time to HEAD again, with everyone."""
    import cli  # it imports this module

    todo, device, run = plan(), torch.device("cuda"), partial(cli.run, results, brief=True)
    if left(end) < ALONE / 2:
        return run(todo, device, DTYPES, left(end), hurried=True)
    run(todo, device, DTYPES, left(end) / 2, hurried=True)
    again = [(item, None, seconds) for item, _, seconds in todo[: len(HEAD)]]
    return run(again, device, DTYPES, left(end))


def plan():
    """What STAGES name, nothing twice, as cli.run takes it: of a model the contenders of BRIEF."""
    import cli

    device, todo = torch.device("cuda"), []
    found = {dtype: defaultdict(list) for dtype in DTYPES}
    for dtype, of in found.items():
        for item, names, seconds in cli.workloads("all", [dtype], device, quick=False):
            if item.kind in ("inference", "training"):
                names = (*BRIEF, "stock eager") if item.name in HEAD else BRIEF
            kind = " backward" if item.kind == "backward" else ""
            of[item.name.partition("(")[0] + kind].append((item, names, seconds))
    for dtype, names, cases in STAGES:  # of each op the first case, then the second ones, ...
        for turn in zip_longest(*(found[dtype][name][:cases] for name in names)):
            todo += [entry for entry in turn if entry and entry not in todo]
    return todo


def _tune(results, end):
    device, name = torch.device("cuda"), results.content["device"]["name"]
    path = tune.TABLES / f"{launch.slug(name)}.json"
    dtypes = tune.DTYPES if left(end) > ALONE / 2 else tune.DTYPES[:1]
    tables = tune.tune(results, clock_of(device), device, end, path, dtypes=dtypes)
    for op, keys in tables.items():
        for key, config in keys.items():
            print(f"{op}, {key}: {json.dumps(config)}")
    return True


def _ncu(results, end):
    results.add(ncu=ncu(left(end)))
    found = results.content["ncu"]
    print(f"ncu: {len(found['kernels'])} kernels {found['reason'] or ''}")
    return found["status"] != "FAILED"
