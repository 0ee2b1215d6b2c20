"""Time launch configurations of the kernels and write the table that launchers read.

From its default each configuration is changed in one number at a time: tiles and warps doubled or
halved, stages one more or less; the best becomes the next start, until nothing gains. A candidate
is checked against the definition before it is timed: what is wrong, or does not compile, is no
choice. What comes next is compiled meanwhile by other processes, into Triton's cache.

One configuration serves all benchmark cases with its key, in every batch: where the key says how
many rows there are, what gives other bits than the default is no choice either.
"""

import functools
import json
import math
import os
import sys
import time
from collections import defaultdict
from concurrent import futures
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
from measure import Skip, clock_of, interleave, one_line
from result_schema import read
from results import Results, commit, device_of, versions
from rich.console import Console
from rich.table import Table
from rows import error_of

from bert_fast.kernels import SPECS, launch
from bert_fast.kernels.spec import cast, tensors_of

GAIN = 0.98  # of the time that is needed to be chosen: a change within the noise is none
TABLES = Path(__file__).resolve().parents[1] / "kernels" / "tuned"
CASES = 3  # that a configuration is timed on
DTYPES = (torch.bfloat16, torch.float32)  # the first one first
KEYS_AHEAD = 2  # whose candidates are compiled while another key's are timed
PROCESSES = os.cpu_count() - 1  # that compile


# -- what there is to tune ------------------------------------------------------------------
def asked(fn):
    """The configurations that fn() asks for: {(op, key): (default, names that are fixed)}. Nothing
    is compiled, nor launched."""
    found = {}

    def ask(op, default, fixed=(), rows=None, **key):
        found[op, launch.written(key, rows)] = default, fixed
        return default

    kernel = launch.triton.JITFunction
    with patch.object(launch, "configuration", ask), patch.object(kernel, "run"), torch.no_grad():
        fn()
    return found


def given(config, wanted):
    """launch.configuration, but with config for wanted, an (op, key)."""
    original = launch.configuration

    def answer(op, default, fixed=(), rows=None, **key):
        if (op, launch.written(key, rows)) == wanted:
            return config
        return original(op, default, fixed, rows, **key)

    return patch.object(launch, "configuration", answer)


def neighbours(config, fixed):
    """config with one number changed, or a side of the tile and the warps alike: each warp has as
    much to do then, and a multiprocessor more or fewer programs to take turns."""
    free = {name: value for name, value in config.items() if name not in fixed}
    for name in free.keys() & launch.FLAGS:
        yield {**config, name: 1 - config[name]}
    for name, value in free.items():
        if name.startswith("BLOCK") and (warps := free.get("num_warps")):
            for steps in ((value // 2, warps // 2), (value * 2, warps * 2)):
                if all(map(_may_be, (name, "num_warps"), steps)):
                    yield {**config, name: steps[0], "num_warps": steps[1]}
    for name, value in free.items():
        if name not in launch.FLAGS:
            steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
            yield from ({**config, name: v} for v in steps if _may_be(name, v))


def _may_be(name, value):
    return 1 <= value <= {"num_stages": 6, "num_warps": 16}.get(name, 4096)


# -- compiling ahead ------------------------------------------------------------------------
class Ahead:
    """Candidates that other processes compile, into the cache on disk that Triton reads.

    What fails there fails again where it is launched, and is reported from there.
    """

    def __init__(self, device, processes, pool=ProcessPoolExecutor):
        self.device, self.asked = device, {}
        self.pool = pool(processes, mp_context=get_context("spawn")) if processes else None

    def ask(self, wanted, where, dtype, configs):
        """Compile configs of an (op, key), each for all (spec, case)."""
        for config in configs:
            key = wanted, *config.values()
            if self.pool is None or key in self.asked:
                continue
            calls = [(spec.name, case) for spec, case in where]
            try:
                self.asked[key] = self.pool.submit(
                    compile_only, calls, dtype, self.device, wanted, config
                )
            except BrokenProcessPool:  # the compiler took a process down
                self.pool = None

    def started(self, end):
        """Until the first is compiled: a process takes seconds to come to that."""
        futures.wait(self.asked.values(), max(end - time.monotonic(), 0), FIRST_COMPLETED)

    def wait(self, wanted, config, deadline):
        """Until this one is compiled. Raises Skip if it is not by the deadline."""
        job = self.asked.get((wanted, *config.values()))
        if job and futures.wait([job], max(deadline - time.monotonic(), 0)).not_done:
            raise Skip("not compiled in time")

    def drop(self, wanted):
        """What nobody has begun to compile for an (op, key) is not compiled: others come first."""
        for key, job in self.asked.items():
            if key[0] == wanted:
                job.cancel()

    def close(self):
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)


def compile_only(calls, dtype, device, wanted, config):
    """Compile what each (name of an op, case) launches with config for wanted, an (op, key)."""
    import triton

    run = triton.JITFunction.run

    def warm_up(self, *args, warmup, **kwargs):
        return run(self, *args, warmup=True, **kwargs)

    with given(config, wanted), patch.object(triton.JITFunction, "run", warm_up), torch.no_grad():
        for name, case in calls:
            fn, inputs = _call_of(name, case, dtype, device)
            fn(**inputs)


def _call_of(name, case, dtype, device):
    """The op and inputs like those of the case, without values: the GPU is being timed."""
    (spec,) = (s for s in SPECS if s.name == name)
    return spec.fn, spec.without_values(dtype, device, case)


# -- the search -----------------------------------------------------------------------------
def climb(default, fixed, time_of, deadline, clock=time.monotonic, ahead=lambda configs: None):
    """The fastest configuration on the way up from default, and a record of each that was tried.

    time_of(config)  seconds; raises ValueError for a wrong result and Skip where it cannot run
    deadline         in seconds of clock(), after which nothing more is tried
    ahead(configs)   told what will be tried

    Returns (config, [{"config", "seconds", "status", "reason"}]).
    """
    best, best_s = default, time_of(default)
    record = [_tried(default, best_s, "default")]
    tried = {tuple(default.values())}
    climbing = True
    while climbing:
        climbing = False
        start = best
        ahead(neighbours(start, fixed))
        for config in neighbours(start, fixed):
            if tuple(config.values()) in tried or clock() > deadline:
                continue
            tried.add(tuple(config.values()))
            try:
                seconds = time_of(config)
            except Skip as error:
                record.append(_tried(config, None, "refused", str(error)))
            except ValueError as error:
                record.append(_tried(config, None, "wrong", str(error)))
            else:
                record.append(_tried(config, seconds, "slower"))
                if seconds < GAIN * best_s:
                    best, best_s, climbing = config, seconds, True
    for entry in record:
        if entry["config"] == best and best != default:
            entry["status"] = "chosen"
    return best, record


def _tried(config, seconds, status, reason=None):
    return {"config": config, "seconds": seconds, "status": status, "reason": reason}


def with_config(fn, inputs, config, wanted):
    """fn(**inputs) launched with config, as a callable."""

    def run():
        with given(config, wanted):
            return fn(**inputs)

    return run


def time_on(problems, wanted, clock, seconds, ahead, deadline):
    """config -> the geometric mean of its times on problems, (fn, inputs, truths, limits) each."""
    of_first = []  # what the first configuration gives, where others must give the same

    def time_of(config):
        ahead.wait(wanted, config, deadline)
        logs = []
        for n, (fn, inputs, truths, limits) in enumerate(problems):
            run = with_config(fn, inputs, config, wanted)
            try:
                results = tensors_of(run())
                errors = [error_of([r], [t])["max"] for r, t in zip(results, truths, strict=True)]
            except refusals() as error:
                raise Skip(one_line(error)) from error
            for error, limit in zip(errors, limits):
                if not error <= limit:
                    raise ValueError(f"error {error:.2g}, at most {limit:.2g} is allowed")
            if "rows<=" in wanted[1]:
                if n == len(of_first):
                    of_first.append(results)
                elif not all(map(torch.equal, results, of_first[n])):
                    raise ValueError("other bits than the default's")
            failures = {}
            timings = interleave({"it": run}, clock, seconds, failures, graphed=True)
            if failures:
                raise Skip(failures["it"][1])
            logs.append(math.log(timings["it"].median))
        return math.exp(sum(logs) / len(logs))

    return time_of


def gain(problems, wanted, default, best, clock, seconds):
    """How many times as fast best is as default, both in the same rounds: the geometric mean.

    0.0 if either fails.
    """
    logs, failures = [], {}
    for fn, inputs, _, _ in problems:
        runs = {
            name: with_config(fn, inputs, config, wanted)
            for name, config in (("default", default), ("best", best))
        }
        timings = interleave(runs, clock, seconds, failures, graphed=True)
        if failures:
            return 0.0
        logs.append(math.log(timings["default"].median / timings["best"].median))
    return math.exp(sum(logs) / len(logs))


def refusals():
    """What a launch raises that asks too much of the compiler or the GPU."""
    import triton

    return RuntimeError, triton.CompilationError, triton.OutOfResources


# -- the command ----------------------------------------------------------------------------
def groups(specs, dtype, device):
    """{(op, key): (default, fixed, [(spec, case)])} of the benchmark cases, on Triton."""
    found = defaultdict(lambda: [None, None, []])
    for spec in specs:
        for case in spec.bench:
            inputs = spec.inputs(dtype, device, **case)
            for which, (default, fixed) in asked(lambda: spec.fn(**inputs)).items():  # noqa: B023
                found[which][:2] = default, fixed
                found[which][2].append((spec, case))
    return dict(found)


def problem(spec, case, dtype, device):
    """(fn, inputs, truths, limits): of each result the definition in fp64, and how far off it may
    be."""
    torch.manual_seed(0)
    inputs = spec.inputs(dtype, device, **case)
    with torch.no_grad():
        truths, rounded = (
            tensors_of(spec.ref(**of)) for of in (cast(inputs, torch.float64), inputs)
        )
    ulps = [torch.finfo(dtype).eps * t.abs().max().item() for t in truths]
    errors = [error_of([r], [t])["max"] for r, t in zip(rounded, truths)]
    return spec.fn, inputs, truths, [ulp + 2 * error for ulp, error in zip(ulps, errors)]


def tune(results, clock, device, end, path, specs=SPECS, dtypes=DTYPES):
    """Tune until `end` by time.monotonic(). What was tried is written into results, and what was
    chosen into the table in path, after each key.

    Returns {op: {key: configuration}} of those that are faster than their default.
    """
    todo = {}  # what two dtypes ask for alike is tuned for the first
    for dtype in dtypes:
        for which, group in groups(specs, dtype, device).items():
            todo.setdefault(which, (*group, dtype))
    ahead = Ahead(device, PROCESSES if device.type == "cuda" else 0)
    try:
        return _tune(results, clock, device, end, path, list(todo.items()), ahead)
    finally:
        ahead.close()


def _tune(results, clock, device, end, path, todo, ahead):
    chosen, tried, cut = defaultdict(dict), [], set()
    for n, (which, (default, fixed, where, dtype)) in enumerate(todo):
        for key, (start, kept, cases, its_dtype) in todo[n : n + 1 + KEYS_AHEAD]:
            ahead.ask(key, cases[:CASES], its_dtype, (start, *neighbours(start, kept)))
        if n == 0:
            ahead.started(end)
        now = time.monotonic()
        if now > end:
            break
        deadline = now + (end - now) / (len(todo) - n)  # an even part of what is left
        try:
            problems = [problem(spec, case, dtype, device) for spec, case in where[:CASES]]
            time_of = time_on(problems, which, clock, 0.05, ahead, deadline)
            ask = functools.partial(ahead.ask, which, where[:CASES], dtype)
            best, record = climb(default, fixed, time_of, deadline, ahead=ask)
            if time.monotonic() > deadline and which not in cut:
                cut.add(which)  # once more after the others, which may leave it some time
                todo.append(todo[n])
            if best != default and gain(problems, which, default, best, clock, 0.2) * GAIN < 1:
                best = default
                for entry in record:
                    if entry["status"] == "chosen":
                        entry |= {"status": "slower", "reason": "in the same rounds as the default"}
        except (Skip, ValueError, torch.OutOfMemoryError) as error:  # the default cannot run
            best, record = default, [_tried(default, None, "refused", one_line(error))]
        ahead.drop(which)
        tried = [entry for entry in tried if (entry["op"], entry["key"]) != which]
        tried += [{"op": which[0], "key": which[1], **entry} for entry in record]
        chosen[which[0]].pop(which[1], None)
        if best != default:
            chosen[which[0]][which[1]] = best
        if best != default or path.exists():
            write_table(path, results.content["device"], chosen, lost=which)
        results.add(tune=tried)
    return {op: keys for op, keys in chosen.items() if keys}


def write_table(path, device, tables, lost=(None, None)):
    """The table of a device, as device_of describes it, keeping what an earlier run found for other
    keys than these, and than the (op, key) `lost`, which has no more than what tables say of it."""
    known, gpu = {}, device["name"]
    if path.exists():
        for (op, key), config in launch.read_table(path, gpu).items():
            if (op, key) != lost:
                known.setdefault(op, {})[key] = config
    for op, keys in tables.items():
        known.setdefault(op, {}).update(keys)
    content = {
        "schema": 1, "gpu": gpu, "capability": device["capability"],
        "multiprocessors": device["multiprocessors"], "git commit": commit(),
        "versions": versions(), "configurations": known,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".part")
    new.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    new.replace(path)


def add_arguments(parser):
    parser.add_argument("--budget", metavar="SECONDS", type=float, default=300.0)
    parser.add_argument("--output", metavar="FILE.json", help="of all that was tried")
    parser.add_argument("--from", metavar="FILE.json", dest="source", help="write its table alone")
    parser.add_argument("--table", metavar="FILE.json", help="of the choices; in kernels/tuned/")


def chosen_in(content):
    """(device, {op: {key: configuration}}) of a result file of this part."""
    tables = defaultdict(dict)
    for entry in content.get("tune", ()):
        if entry["status"] == "chosen":
            tables[entry["op"]][entry["key"]] = entry["config"]
    return content["device"], dict(tables)


def main(options, fail):
    if options.source:
        try:
            device, tables = chosen_in(read(options.source))
        except ValueError as error:
            fail(str(error))
        if not tables:
            fail(f"--from {options.source}: chose no configuration; give the file of a run of tune")
        path = Path(options.table or TABLES / f"{launch.slug(device['name'])}.json")
        write_table(path, device, tables)
        print(f"table written to {path}")
        return 0
    if not torch.cuda.is_available():
        fail("tune: needs a GPU: launch configurations are of its kernels")
    if reason := launch.missing("cuda"):
        fail(f"tune: {reason}")
    device = torch.device("cuda")
    known = device_of(device)
    results = Results(Path(options.output) if options.output else None, known, "tune")
    path = Path(options.table or TABLES / f"{launch.slug(known['name'])}.json")
    end = time.monotonic() + options.budget
    tune(results, clock_of(device), device, end, path)
    results.add(complete=True, passed=True)
    Console(width=None if sys.stdout.isatty() else 150).print(table(results.content["tune"]))
    print(f"table written to {path}" if path.exists() else "no table: every default is as fast")
    return 0


def table(tried):
    """A line for each key: default and best."""
    grid = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("op", "key", "tried", "default us", "best us", "gain", "configuration"):
        grid.add_column(heading)
    of = defaultdict(list)
    for entry in tried:
        of[entry["op"], entry["key"]].append(entry)
    for (op, key), entries in of.items():
        default = entries[0]
        best = next((e for e in entries if e["status"] == "chosen"), default)
        if default["seconds"] is None:
            grid.add_row(op, key, "1", "", "", "", default["reason"])
            continue
        times = [f"{e['seconds'] * 1e6:.1f}" for e in (default, best)]
        gain = f"{default['seconds'] / best['seconds']:.2f}"
        config = ", ".join(f"{k} {v}" for k, v in best["config"].items())
        grid.add_row(op, key, str(len(entries)), *times, gain, config)
    return grid
