"""Every launch of every op, compiled for GPUs that this machine need not have.

Reports what the machine code holds, whether it is within budget, and roofline.py's predicted time.

The ops are called on CPU tensors of benchmark size, and Triton's own launch path decides what to
compile: types, alignment, None, num_warps. Only the launch is left out. So no signature is
written twice, and what is checked is what will run.

Budgets, as text in `over` of a launch that exceeds one:

shared      fits what one program can have, on every architecture; the others apply to GATED alone
spills      none in a hot loop; elsewhere they are reported
tensor      a tensor core instruction, where the kernel has a tl.dot. Exact fp32 products need none
            on NVIDIA, whose tensor cores do not compute them; AMD's do. And no loop of wgmma each
            of which waits for the one before
accesses    of the bytes that a launch's global accesses move, 90 % are accessed 128 bits at a time
            per thread. Loads of one value (an id, a length) do not count. On AMD, stores of 64 bits
            and more pass after a tl.dot: its matrix cores leave four neighbours in a thread, and
            the backend prefers such stores to a trip through shared memory. A launch that moves
            less than BULK is exempt: there wide accesses save less than a kernel's start takes.

For variants of a configuration (Spec.variants) the first three are checked and nothing is
predicted, even if they are what is launched: roofline.py does not model loops that are flattened
into one. The prediction is for the form without the variant. So is it for the form without
num_tokens; with it, as models call the op, the first case alone is compiled.
"""

import contextlib
import importlib
import inspect
import itertools
import json
import math
import os
import pkgutil
import re
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import triton
from judge import varied
from rich.console import Console
from rich.progress import track
from rich.table import Table
from roofline import COPY, GPUS, LAUNCH, PRODUCT, TARGETS, analyse, predict, tool, trips_of
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast import kernels
from bert_fast.kernels import SPECS
from bert_fast.kernels.launch import COMPOSED, INTERPRET, KERNELS

ROOT = Path(__file__).resolve().parents[1]
GATED = ("sm_80", "sm_90", "gfx942")
BULK = 4 << 20  # bytes, which an A100 moves in 2 us
COUNTED = {"num_tokens": 1}  # no entry of a configuration, but other code as well
WITHOUT_SPEC = "the op {} has kernels and no Spec among SPECS of kernels/__init__.py"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# -- compiling ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Launch:
    kernel: triton.compiler.CompiledKernel
    programs: int


class Driver:
    """What Triton queries from a GPU driver before it launches."""

    def __init__(self, target):
        self.target = target
        those = [g.multiprocessors for g in GPUS.values() if TARGETS[g.arch].triton == target]
        count = those[0] if those else 132
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"multiprocessor_count": count}
        )

    def get_current_device(self):
        return self.target.arch  # kernels are cached by device: one per target

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


class OnKernels(TorchDispatchMode):
    """Every bert_fast op runs as on a GPU: its Triton form, or what it is composed of."""

    def __init__(self):
        super().__init__()
        self.called = set()  # their names

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace != "bert_fast":
            return op(*args, **(kwargs or {}))
        self.called.add(op._opname)
        with self:  # ops that are composed of others call these
            return (KERNELS.get(op._opname) or COMPOSED[op._opname])(*args)


@contextlib.contextmanager
def launching(driver):
    """Ops called inside launch their Triton form through driver, whatever the device."""
    with (
        patch.object(triton.runtime.driver, "_active", driver),
        patch("bert_fast.kernels.launch.WARP_SIZE", driver.target.warp_size),
        patch("bert_fast.kernels.launch._gpus", lambda: False),  # no table of this machine's GPU
        OnKernels(),
    ):
        yield


def compile_all(spec, case, dtype, archs, num_tokens=False):
    """{arch: the launches of one call of the op, with num_tokens or without}, each kernel compiled
    for it."""
    inputs = spec.without_values(dtype, "cpu", case)  # to make values takes a fifth of the time
    if num_tokens:
        inputs["num_tokens"] = torch.ones(1, dtype=torch.int32)
    return {arch: _launches(spec.fn, inputs, TARGETS[arch].triton) for arch in archs}


def _launches(fn, inputs, target):
    launches = []
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(kernel, math.prod(grid)))

    for name in ("ptxas", "cuobjdump", "nvdisasm") if target.backend == "cuda" else ():
        tool(name)
    stand_in = patch.object(triton.JITFunction, "run", compile_only)
    with stand_in, launching(Driver(target)), torch.no_grad():
        fn(**inputs)
    assert launches
    return launches


def kernels_without_spec(specs=SPECS):
    """Names of the ops with a Triton form, in any file of kernels/, that no op of specs calls."""
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    driver = patch.object(triton.runtime.driver, "_active", Driver(TARGETS[GATED[0]].triton))
    with driver, patch.object(triton.JITFunction, "run"), torch.no_grad(), OnKernels() as mode:
        for spec in specs:
            spec.fn(**spec.inputs(torch.float32, "cpu", **spec.cases[0]))
    return sorted(KERNELS.keys() - mode.called)


# -- rows -----------------------------------------------------------------------------------
def rows(spec, archs, dtypes, only_predicted=False):
    """A row for each launch of each benchmark case, of its variants, and of the first case with
    num_tokens: a dict, as in the JSON file. Of the two latter nothing is predicted."""
    known, usual = {}, set()  # kernels, and those without a variant
    variants = () if only_predicted else spec.variants
    forms = list(itertools.product(({}, *variants), spec.bench))
    if not only_predicted and "num_tokens" in inspect.signature(spec.fn).parameters:
        forms.append((COUNTED, spec.bench[0]))
    for name, (variant, case) in itertools.product(dtypes, forms):
        dtype, given = DTYPES[name], variant is COUNTED
        flops, moved = spec.cost(dtype.itemsize, **case)
        label = " ".join([spec.label(case), *(f"{k}={v}" for k, v in variant.items())])
        with varied({name: 0 for v in spec.variants for name in v} | ({} if given else variant)):
            compiled = compile_all(spec, case, dtype, archs, given)
        for arch, launches in compiled.items():
            hashes = {launch.kernel.hash for launch in launches}
            if variant and hashes <= usual:
                continue  # on this architecture no other code
            if not variant:
                usual |= hashes
            for launch in launches:
                if launch.kernel.hash not in known:
                    known[launch.kernel.hash] = analyse(launch.kernel, TARGETS[arch])
            found = [known[launch.kernel.hash] for launch in launches]
            for launch, resources, share in zip(launches, found, _shares(launches, found)):
                yield launch_row(
                    {"op": spec.name, "case": label, "dtype": name},
                    arch, resources, launch.programs,
                    flops if resources.dots or len(launches) == 1 else 0,
                    0 if variant else round(moved * share),
                    predicted=not variant,
                )  # fmt: skip


def _rows_of(name, archs, dtypes):
    (spec,) = (s for s in SPECS if s.name == name)
    return list(rows(spec, archs, dtypes))


def report(specs, archs, dtypes, jobs=1):
    """The rows of all specs, as a list. Ops are passed by name, so that workers can find them."""
    todo = list(itertools.product([s.name for s in specs], [[a] for a in archs], [dtypes]))
    if jobs == 1:
        return [row for part in todo for row in _rows_of(*part)]
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(_rows_of, *part) for part in todo]
        futures = track(futures, "compile", console=Console(stderr=True), transient=True)
        return [row for future in futures for row in future.result()]


def _shares(launches, resources):
    """The bytes of an op, divided among its launches."""
    moves = [
        launch.programs * (r.once["bytes"] + r.trip.get("bytes", 0))
        for launch, r in zip(launches, resources)
    ]
    return [n / sum(moves) for n in moves]


def launch_row(labels, arch, resources, programs, flops, moved, predicted=True):
    target = TARGETS[arch]
    accesses = accesses_of(resources, trips_of(resources, programs, flops, moved))
    row = {
        **labels,
        "arch": arch,
        "programs": programs,
        "flops": flops,
        "bytes": moved,
        **asdict(resources),
        **accesses,
        "wide": _wide(**accesses, matrix_cores=resources.dots and not target.nvidia),
        "shared_limit": target.shared,
        "predicted": {
            name: predict(resources, gpu, programs, flops, moved)
            for name, gpu in GPUS.items()
            if gpu.arch == arch and predicted
        },
    }
    return row | {"over": budget(row)}


def accesses_of(resources, trips):
    """{"loads" and "stores" of a thread: {bits: how many}}, for so many trips of its hot loop."""
    found = {}
    for kind in ("loads", "stores"):
        once, trip = resources.once[kind], resources.trip.get(kind, {})
        found[kind] = {b: once.get(b, 0) + round(trips * trip.get(b, 0)) for b in {*once, *trip}}
    return found


def _wide(loads, stores, matrix_cores):
    """The share of bytes in accesses as wide as the budget requires."""
    least = 64 if matrix_cores else 128  # of stores
    counts = [(b, n, 128) for b, n in loads.items()] + [(b, n, least) for b, n in stores.items()]
    total = sum(bits * n for bits, n, _ in counts)
    return sum(bits * n for bits, n, least in counts if bits >= least) / total if total else 1


def budget(row):
    """The budgets that a row exceeds."""
    over = []
    if row["shared"] > row["shared_limit"]:
        over.append(f"shared memory: {row['shared']} bytes, {row['shared_limit']} there are")
    if row["arch"] not in GATED:
        return over
    if row["spills"]["hot"]:
        over.append(f"spills: {row['spills']['hot']} in a hot loop")
    impossible = {"f32"} if TARGETS[row["arch"]].nvidia else set()
    if not row["tensor"] and (dots := set(row["dots"]) - impossible):
        over.append(f"tensor cores: none for products of {', '.join(sorted(dots))}")
    if row["serial"]:
        over.append(f"tensor cores: {row['serial']} products in a hot loop, each awaited alone")
    if row["bytes"] >= BULK and row["wide"] < 0.9:
        told = ", ".join(
            f"{n} {kind} of {b} bits" for kind in ("loads", "stores") for b, n in row[kind].items()
        )
        over.append(f"accesses: {row['wide']:.0%} of the bytes are 128 bits wide ({told})")
    return over


# -- what was measured ----------------------------------------------------------------------
def measured(rows, folder=ROOT / "bench" / "results"):
    """Predictions and the measurements of result files: (file, gpu, op, dtype, both in seconds)."""
    predicted = defaultdict(float)
    for row in rows:
        for gpu, times in row["predicted"].items():
            predicted[gpu, row["case"], row["dtype"]] += times["seconds"]
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text())
        device = content["device"]
        gpu = next((g for g, of in GPUS.items() if _is_a(device, g, of)), None)
        for row in content["rows"]:
            key = gpu, row["workload"], row["dtype"]
            if row["contender"] == "ours" and row["status"] == "ok" and key in predicted:
                yield file.name, *key, predicted[key], row["median_s"]


def _is_a(device, name, gpu):
    """Whether a result's device is this GPU of GPUS, and not a variant of it."""
    known = re.findall(r"\w+", device["name"])  # NVIDIA H100 80GB HBM3
    same = gpu.multiprocessors == device.get("multiprocessors")
    return name in known and same and not {"PCIe", "40GB"} & set(known)


# -- tables ---------------------------------------------------------------------------------
def resource_table(rows):
    """A line for each kernel and architecture: the worst of its cases and dtypes."""
    grid = Table(title="the worst of all cases and dtypes", title_justify="left", box=None)
    grid.add_column("kernel")
    grid.add_column("arch")
    for heading in (
        "registers", "spills hot/cold", "shared KiB", "of", "warps resident", "tensor cores",
        "128 bits", "budgets",
    ):  # fmt: skip
        grid.add_column(heading, justify="right")
    groups = defaultdict(list)
    for row in rows:
        groups[f"{row['op']} {row['kernel']}", row["arch"]].append(row)
    for (kernel, arch), of in groups.items():
        target = TARGETS[arch]
        bulky = [row["wide"] for row in of if row["bytes"] >= BULK]
        dotted = [bool(row["tensor"]) for row in of if row["dots"]]
        grid.add_row(
            kernel, arch,
            f"{max(row['registers'] for row in of)}",
            f"{max(r['spills']['hot'] for r in of)}/{max(r['spills']['cold'] for r in of)}",
            f"{max(row['shared'] for row in of) / 1024:.0f}",
            f"{target.shared // 1024}",
            f"{min(r['resident'] * r['warps'] / 4 / target.warps for r in of):.0%}",
            f"{sum(dotted)} of {len(dotted)}" if dotted else "",
            f"{min(bulky):.0%}" if bulky else "",
            "[red]over[/]" if any(row["over"] for row in of) else "kept",
        )  # fmt: skip
    return grid


def prediction_table(rows, dtype):
    """A line for each case of an op: microseconds, and what bounds its longest launch."""
    gpus = [g for g in GPUS if any(g in row["predicted"] for row in rows)]
    grid = Table(title=f"predicted us, {dtype}", title_justify="left", box=None)
    grid.add_column("case", overflow="fold")
    for heading in ("MFLOP", "MB", *gpus):
        grid.add_column(heading, justify="right", no_wrap=True)
    cases = defaultdict(list)
    for row in rows:
        if row["dtype"] == dtype and row["predicted"]:
            cases[row["case"]].append(row)
    for case, of in cases.items():
        first = [row for row in of if row["arch"] == of[0]["arch"]]
        cells = []
        for gpu in gpus:
            times = [row["predicted"][gpu] for row in of if gpu in row["predicted"]]
            longest = max(times, key=lambda t: t["seconds"])
            cells.append(f"{sum(t['seconds'] for t in times) * 1e6:.1f} {longest['bound']}")
        flops, moved = (sum(row[k] for row in first) / 1e6 for k in ("flops", "bytes"))
        grid.add_row(case, f"{flops:,.0f}", f"{moved:,.1f}", *cells)
    return grid


def measured_table(pairs):
    grid = Table(title="predicted against measured", title_justify="left", box=None)
    for heading in ("file", "GPU", "case", "dtype"):
        grid.add_column(heading, overflow="fold")
    for heading in ("predicted us", "measured us", "off"):
        grid.add_column(heading, justify="right")
    for *labels, ours, theirs in pairs:
        off = ours / theirs - 1
        grid.add_row(*labels, f"{ours * 1e6:.1f}", f"{theirs * 1e6:.1f}", f"{off:+.0%}")
    return grid


# -- the command ----------------------------------------------------------------------------
def add_arguments(parser):
    parser.add_argument("--arch", choices=TARGETS, action="append", help="may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row there")


def main(options, specs):
    if INTERPRET:
        sys.exit("check aot: the interpreter compiles nothing; unset TRITON_INTERPRET")
    archs, dtypes = options.arch or list(TARGETS), options.dtype or list(DTYPES)
    console = Console(width=None if sys.stdout.isatty() else 140)
    amiss = [WITHOUT_SPEC.format(name) for name in kernels_without_spec()]
    try:
        found = report(specs, archs, dtypes, options.jobs)
    except FileNotFoundError as error:  # a tool of the compiler
        sys.exit(f"check aot: {error}")
    console.print(resource_table(found), "")
    if any(row["predicted"] for row in found):
        shown = "bfloat16" if "bfloat16" in dtypes else dtypes[0]
        console.print(prediction_table(found, shown), "")
    if pairs := list(measured(found)):
        console.print(measured_table(pairs), "")
    amiss += [
        f"{row['op']} {row['kernel']}, {row['case']}, {row['dtype']}, {row['arch']}: {over}"
        for row in found
        for over in row["over"]
    ]
    for text in amiss:
        console.print(text, soft_wrap=True, markup=False, style="red")
    if options.json:
        content = {
            "schema": 1,
            "versions": {"torch": torch.__version__, "triton": triton.__version__},
            "assumed": {
                "share of bandwidth": COPY, "share of tensor cores": PRODUCT,
                "seconds of a launch": LAUNCH, "gpus": {k: asdict(g) for k, g in GPUS.items()},
            },
            "rows": found,
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(bool(amiss))
