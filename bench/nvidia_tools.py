"""compute-sanitizer, Nsight Compute and the PTX compilers, each where it is installed.

They run exercise.py, in a process of its own.
"""

import csv
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

from process import run_limited

EXERCISE = str(Path(__file__).with_name("exercise.py"))
METRICS = {
    "gpu__time_duration.sum": "ns",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute %",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
    "smsp__sass_inst_executed_op_local.sum": "local accesses",
}


FINDING = re.compile(r"Invalid|Misaligned|Error: Race|Warning: Race|Race reported|Program hit")


def _python(*arguments):
    return [sys.executable, EXERCISE, *arguments]


# -- compute-sanitizer ----------------------------------------------------------------------
def sanitize(tool, seconds):
    """What a tool of compute-sanitizer finds in small cases of every op, as in the schema."""
    started = time.monotonic()
    entry = {"tool": tool, "status": "skipped", "findings": [], "seconds": 0.0}
    if shutil.which("compute-sanitizer") is None:
        return {**entry, "reason": "compute-sanitizer is not on the PATH"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *_python("small")]
    # Each tensor an allocation of its own, or what lies behind it is another tensor's memory.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    returncode, lines = run_limited(command, seconds, env=env)
    said = [line.removeprefix("=========").strip() for line in lines if line.startswith("=====")]
    found = [line for line in said if FINDING.match(line)]
    ended = any(line.startswith(("ERROR SUMMARY", "RACECHECK SUMMARY")) for line in said)
    entry |= {"findings": found[:20], "seconds": time.monotonic() - started, "reason": None}
    if returncode is None:  # of what it had not come to nothing is known
        status = "FAILED" if found else "skipped"
        return {**entry, "status": status, "reason": f"killed after {seconds:.0f} s"}
    if any("not supported" in line for line in said):
        return {**entry, "reason": next(line for line in said if "not supported" in line)}
    if returncode == 0 and ended:
        return {**entry, "status": "ok"}
    last = (said or lines or ["no output"])[-1]
    return {**entry, "status": "FAILED", "reason": f"exit status {returncode}: {last}"}


# -- PTX compilers --------------------------------------------------------------------------
def compilers():
    """The PTX compilers at hand, that of triton first: paths."""
    import triton

    found = [Path(triton.knobs.nvidia.ptxas.path)]
    if path := shutil.which("ptxas"):
        found.append(Path(path))
    found.append(Path("/usr/local/cuda/bin/ptxas"))
    if spec := importlib.util.find_spec("nvidia"):
        for folder in spec.submodule_search_locations:
            found += sorted(Path(folder).glob("*/bin/ptxas"))
    return list(dict.fromkeys(path.resolve() for path in found if path.exists()))


def ptx(seconds, found=None):
    """Attention's errors, as compiled by each PTX compiler: a list of dicts, as in the schema.

    FAILED are those with an error far beyond that of the definition in the same dtype.
    """
    found = compilers() if found is None else found
    entries = []
    with ThreadPoolExecutor(max(len(found), 1)) as pool:  # each waits for a process
        ran = list(pool.map(lambda path: _compiled_by(path, seconds), found))
    for n, (path, (version, returncode, lines)) in enumerate(zip(found, ran, strict=True)):
        entry = {"compiler": path.name if n else "triton's ptxas", "version": version, "cases": {}}
        cases = _last_json(lines)
        if returncode is None:
            why = f"killed after {seconds:.0f} s"
            entries.append({**entry, "status": "skipped", "reason": why})
            continue
        if returncode != 0 or cases is None:
            why = (lines or ["no output"])[-1]
            entries.append({**entry, "status": "FAILED", "reason": why})
            continue
        wrong = [
            name for name, c in cases.items()
            if c["error"] is None or c["error"] > 2 * c["baseline_error"]
        ]  # fmt: skip
        told = f"wrong in {', '.join(wrong)}" if wrong else None
        if first := next((e for e in entries if e["cases"]), None):
            other = [k for k, c in cases.items() if first["cases"][k]["bits"] != c["bits"]]
            if other and not wrong:
                told = f"other bits than {first['compiler']} in {', '.join(other)}"
        status = "FAILED" if wrong else "ok"
        entries.append({**entry, "cases": cases, "status": status, "reason": told})
    if len(entries) < 2:
        entries.append({
            "compiler": "another ptxas", "version": None, "cases": {}, "status": "skipped",
            "reason": "no second PTX compiler at hand to compare with",
        })  # fmt: skip
    return entries


def _compiled_by(path, seconds):
    """(the compiler's version, exit status, output) of attention and its gradients."""
    _, lines = run_limited([str(path), "--version"], 5)
    version = next(iter(re.findall(r"V([\d.]+)", " ".join(lines))), None)
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TRITON_PTXAS_PATH": str(path), "TRITON_CACHE_DIR": cache}
        return version, *run_limited(_python("attention"), seconds, env=env)


def _last_json(lines):
    for line in reversed(lines):
        if line.startswith("{"):
            return json.loads(line)
    return None


# -- Nsight Compute -------------------------------------------------------------------------
def ncu(seconds):
    """What ncu counts in each kernel of ours at benchmark size: a dict, as in the schema."""
    if shutil.which("ncu") is None:
        return {"status": "skipped", "reason": "ncu is not on the PATH", "kernels": []}
    command = [
        "ncu", "--clock-control", "none",  # the machine's clocks stay as they are
        "--profile-from-start", "off", "--kernel-name", "regex:^_",  # ours
        "--csv", "--page", "raw", "--metrics", ",".join(METRICS), *_python("profile"),
    ]  # fmt: skip
    returncode, lines = run_limited(command, seconds)
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    kernels = [] if start is None else [_counted(r) for r in csv.DictReader(lines[start:])]
    kernels = [k for k in kernels if k["kernel"]]
    launched = _last_json(lines) or {"ops": []}  # in the order of the kernels
    kernels = [{"op": op, **k} for op, k in zip_longest(launched["ops"][: len(kernels)], kernels)]
    if kernels:
        reason = None if returncode == 0 else "not all: killed at its limit"
        return {"status": "ok", "reason": reason, "kernels": kernels}
    if returncode is None:
        return {"status": "skipped", "reason": f"killed after {seconds:.0f} s", "kernels": []}
    said = next((line for line in lines if "ERR" in line or "rror" in line), "no output")
    # Counters that this machine does not give to its users are no failure of the kernels.
    return {"status": "skipped", "reason": said.strip("= "), "kernels": []}


def _counted(row):
    counted = {"kernel": row.get("Kernel Name")}
    for metric, name in METRICS.items():
        text = (row.get(metric) or "").replace(",", "")
        counted[name] = float(text) if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text) else None
    return counted
