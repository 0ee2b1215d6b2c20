"""Whether compiled kernels compute what they should, without a GPU.

Runs what Triton compiles for sm_80 and sm_90 in an emulator, on the cases, layouts and variants of
an op's Spec, and judges the results as in the interpreter. In contrast to the interpreter it sees
what the compiler does: a * b + c rounded once, approximate exp2 and division, sums as tensor cores
make them, copies that are waited for, accesses wider than a number that must be aligned.

A small op takes a minute for each architecture, most of it in the compiler.
"""

import contextlib
import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest.mock import patch

import torch
import triton
from aot import Driver, launching
from emulator import execute
from examine import faults_of_values
from gpu_memory import Fault, Memory, TensorMap
from rich.console import Console
from rich.progress import track
from roofline import TARGETS

from bert_fast.kernels import SPECS
from bert_fast.kernels.launch import INTERPRET, TensorDescriptor

ARCHS = "sm_80", "sm_90"


class EmulatingDriver(Driver):
    """Launches run in the emulator, on tensors of the CPU.

    hidden  tensors no element of which may be loaded
    """

    def __init__(self, target, hidden=()):
        super().__init__(target)
        self.hidden = hidden

    def get_active_torch_device(self):
        return torch.device("cpu")

    def launch(self, kernel, programs, args):
        given = zip(kernel.src.signature.items(), args, strict=True)
        given = [(name, a) for (name, kind), a in given if kind != "constexpr"]
        maps = iter(getattr(kernel.metadata, "tensordesc_meta", None) or ())
        tensors, arguments = [], []
        for name, a in given:
            if isinstance(a, TensorDescriptor):
                tensors.append((name, a.base))
                arguments += [TensorMap(a.base, next(maps)), *a.shape, *a.strides]
            elif isinstance(a, torch.Tensor):
                tensors.append((name, a))
                arguments.append(a.data_ptr())
            else:
                arguments.append(a)
        scratch = [0, 0]  # pointers that Triton adds, to memory that these kernels do not ask for
        execute(
            kernel.asm["ptx"], kernel.metadata.shared, programs,
            Memory(tensors, self.hidden), [*arguments, *scratch], kernel.metadata.launch_pdl,
        )  # fmt: skip


class Watched:
    """What examine.py asks of the sanitizer."""

    findings = ()

    @staticmethod
    def unwritten(t):
        """How many elements of t are still what `filled` has put there."""
        return int((t.isnan() if t.is_floating_point() else t == torch.iinfo(t.dtype).max).sum())


@contextlib.contextmanager
def emulated(arch, hidden=()):
    """Ops called inside run their kernels, compiled for arch, in the emulator."""
    def handles(kernel):
        """In place of loading the kernel on a GPU."""
        kernel.module = kernel.function = kernel
        kernel._run = run

    def run(x, y, z, stream, kernel, packed, metadata, enter, leave, *args):
        triton.runtime.driver.active.launch(kernel, x * y * z, args)

    stand_in = patch.object(triton.compiler.CompiledKernel, "_init_handles", handles)
    dependent = patch("bert_fast.kernels.launch.DEPENDENT", True)
    with stand_in, dependent, launching(EmulatingDriver(TARGETS[arch].triton, hidden)):
        yield


def call_on(arch):
    """What examine.py calls: (result, Watched) of one call of an op's kernels."""

    def call(spec, inputs, hidden=()):
        with torch.no_grad(), filled(), emulated(arch, hidden):
            return spec.fn(**inputs), Watched

    return call


@contextlib.contextmanager
def filled():
    """torch.empty inside is filled: with NaN, or with the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def faults(spec, arch):
    """Yields the faults of a Spec's kernels, compiled for arch, in words."""
    try:
        yield from faults_of_values(spec, call_on(arch))
    except Fault as fault:  # nothing after it is run
        yield str(fault)


# -- the command ----------------------------------------------------------------------------
def add_arguments(parser):
    parser.add_argument("--arch", choices=ARCHS, action="append", help="may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: all cores")


def _faults_of(name, arch):
    (spec,) = (s for s in SPECS if s.name == name)
    return list(faults(spec, arch))


def main(options, specs):
    if INTERPRET:
        sys.exit("check compiled: the interpreter compiles nothing; unset TRITON_INTERPRET")
    archs = options.arch or ARCHS
    pairs = list(itertools.product([s.name for s in specs], archs))
    with contextlib.ExitStack() as stack:
        if options.jobs == 1:
            results = itertools.starmap(_faults_of, pairs)
        else:  # spawned, as a fork of a process with torch's threads may hang
            pool = ProcessPoolExecutor(
                options.jobs, get_context("spawn"), torch.set_num_threads, (1,)
            )
            results = stack.enter_context(pool).map(_faults_of, *zip(*pairs))
        console = Console(stderr=True)
        results = track(results, "emulate", len(pairs), console=console, transient=True)
        lines = [
            f"{name}, {arch}: {fault}"
            for (name, arch), found in zip(pairs, results)
            for fault in found
        ]
    ops = f"{len(specs)} op{'s' * (len(specs) > 1)}"
    print(*lines, f"{ops} on {' and '.join(archs)}: {len(lines)} faults", sep="\n")
    return int(bool(lines))
