"""Every launch of every op of SPECS, compiled for GPUs that this machine need not have.

The ops are called on CPU tensors of benchmark size, and Triton's own launch path decides what to
compile: types, alignment, None, num_warps. Only the launch is left out. So no signature is
written twice, and what is checked is what will run.
"""

import re
import subprocess

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast.kernels import SPECS
from bert_fast.kernels.launch import HAS_TRITON, INTERPRET, KERNELS

if not HAS_TRITON:
    pytest.skip("nothing to compile without triton", allow_module_level=True)
if INTERPRET:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB
CASES = [pytest.param(s, c, id=s.label(c)) for s in SPECS for c in s.bench]


class Driver:
    """What Triton asks of a GPU driver before it launches."""

    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return self.target.arch  # kernels are cached by device: one for each target

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


class OnKernels(TorchDispatchMode):
    """Calls the Triton form of every bert_fast op that has one, whatever the device."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "bert_fast":
            return KERNELS[op._opname](*args)
        return op(*args, **(kwargs or {}))


def compile_all(spec, case, dtype, target):
    """The kernels that one call of the op launches, compiled for target."""
    compiled = []
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", compile_only)
        patch.setattr(triton.runtime.driver, "_active", Driver(target))
        with torch.no_grad(), OnKernels():
            spec.fn(**spec.inputs(dtype, "cpu", **case))
    assert compiled
    return compiled


def resources(kernel, path):
    """Registers and bytes of stack of one thread, read from the cubin."""
    path.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups())


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spec, case", CASES)
def test_no_kernel_spills(spec, case, dtype, name, tmp_path):
    for kernel in compile_all(spec, case, dtype, TARGETS[name]):
        registers, stack = resources(kernel, tmp_path / "kernel.cubin")
        meta = kernel.metadata
        print(f"{meta.name} {name} {dtype} {spec.label(case)}: {registers} registers, "
              f"{meta.num_warps} warps, {meta.shared} bytes of shared memory, {stack} of stack")
        assert stack == 0, f"{meta.name} spills"


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_every_kernel_compiles_and_fits_shared_memory(spec, dtype, name):
    for case in spec.bench[-3:]:
        for kernel in compile_all(spec, case, dtype, TARGETS[name]):
            assert kernel.metadata.shared <= SHARED[name] * 1024, kernel.metadata.name
