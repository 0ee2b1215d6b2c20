"""launch.start takes the compiled kernel that Triton would, with the same arguments."""

import itertools
import sys
from pathlib import Path
from unittest.mock import patch

import numpy
import pytest
import torch

pytest.importorskip("triton")  # macOS, Windows

import triton
from models import ids_of, masks, stock_model

import bert_fast
from bert_fast import kernels as ops
from bert_fast.kernels import SPECS, launch, linear
from bert_fast.kernels.launch import DTYPES, INTERPRET

sys.path.append(str(Path(__file__).resolve().parents[1] / "check"))

from aot import Driver, OnKernels
from judge import LAYOUTS, laid_out, varied
from roofline import TARGETS

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter has no compiled kernels")


class ForTests(Driver):
    def get_current_device(self):
        return 9000  # whose kernels no other test has compiled


class Compiled:
    """In place of a compiled kernel: it knows what Triton compiled it for, and notes launches."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, key, launches):
        self.key, self.launches = key, launches

    def launch_metadata(self, grid, stream, *args):
        return None

    def run(self, *args):
        where, call, args = args[:4], args[4:7], args[9:]
        assert call == (self.function, self.packed_metadata, None)
        self.launches.append((self.key, where, list(map(comparable, args))))


def comparable(a):
    """An argument of a launch, where tensors would be compared by their numbers."""
    if isinstance(a, launch.TensorDescriptor):
        return comparable(a.base), a.shape, a.strides, a.block_shape
    return (a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else a


@pytest.fixture
def launches(monkeypatch):
    """Launches in place of a GPU: (Triton's key of the kernel, grid and stream, arguments)."""
    launches = []

    def compile(self, key, signature, device, *args, **kwargs):
        kernel = self.device_caches[device][0][key] = Compiled(key, launches)
        return kernel

    monkeypatch.setattr(triton.JITFunction, "_do_compile", compile)
    monkeypatch.setattr(triton.runtime.driver, "_active", ForTests(TARGETS["sm_90"].triton))
    monkeypatch.setattr(launch, "_gpus", lambda: False)  # no table of the GPU that is here
    monkeypatch.setattr(launch, "_compiled", {})
    with OnKernels(), torch.no_grad():
        yield launches
    for module in list(sys.modules.values()):
        for kernel in vars(module).values() if module.__name__.startswith("bert_fast.") else ():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.pop(9000, None)


def left_to_triton(self, *args, run=launch._run, **kwargs):
    return run(self, *args, **kwargs)


def begun_late(t, i):
    """Its first element is at an address that is no multiple of 16."""
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@patch.dict(LAYOUTS, begun_late=begun_late)
def test_the_kernel_and_its_arguments_are_those_of_triton(spec, launches):
    seen = 0
    for variant, dtype in itertools.product(({}, *spec.variants), DTYPES):
        for n, case in enumerate(spec.cases):
            for layout in LAYOUTS if n < 2 else ["contiguous"]:
                torch.manual_seed(0)
                inputs = laid_out(spec.inputs(dtype, "cpu", **case), layout)
                launches.clear()
                with varied(variant):
                    with patch.object(triton.JITFunction, "run", left_to_triton):
                        spec.fn(**inputs)
                    wanted = launches.copy()
                    for _ in range(2):  # as new, and as known
                        launches.clear()
                        spec.fn(**inputs)
                        assert launches == wanted, (case, dtype, layout)
                seen += len(wanted)
    assert seen > 15


def test_rows_of_any_number_are_one_entry_and_integers_of_others_are_several(launches):
    weight = torch.ones(32, 64)
    for rows in (1, 5, 16, 17, 64):
        linear(torch.ones(rows, 64), weight)
    assert len(launch._compiled) == 1
    linear(torch.ones(5, 80)[:, :64], weight)
    assert len(launch._compiled) == 2


def test_numbers_of_a_table_are_not_taken_for_others_of_the_same_values(launches, monkeypatch):
    """A table has its names in another order than a default."""
    tile = {"BLOCK_K": 64, "BLOCK_M": 32, "BLOCK_N": 128}
    others = {"num_stages": 4, "num_warps": 4, "PERSISTENT": 0}
    turned = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128}
    x, weight = torch.ones(256, 256), torch.ones(256, 256)
    for config in (tile | others, turned | others):
        monkeypatch.setattr(launch, "configuration", lambda *args, config=config, **key: config)
        linear(x, weight)
    assert len(launch._compiled) == 2
    assert launches[0][1][0] == 8 * 2
    assert launches[1][1][0] == 4 * 8


@pytest.mark.parametrize("kind", [numpy.float64, numpy.float32])
def test_numbers_of_numpy_are_taken(kind, launches, monkeypatch):
    """A config has them where a search for parameters made it."""
    half, cu_seqlens = kind(0.5), torch.tensor([0, 3], dtype=torch.int32)
    x, heads, seed = torch.ones(3, 64), torch.ones(3, 2, 32), torch.zeros(1, dtype=torch.int64)
    drops = {"dropout_p": half, "seed": seed}
    monkeypatch.setattr(launch._thread, "direct", "cuda")  # no dispatcher converts them
    ops.dropout(x, half, seed)
    ops.layer_norm(x, x[0], x[0], eps=half)
    ops.layer_norm_backward(x, x, x[0], eps=half)
    ops.attention(heads, heads, heads, cu_seqlens, 3, **drops)
    ops.attention_backward(heads, heads, heads, heads, cu_seqlens, 3, **drops)
    ops.embedding(None, x, x, x, x[0], x[0], inputs_embeds=x[None], eps=half)
    assert len(launches) == 8


def test_launches_are_dependent_where_gpus_have_that(launches, monkeypatch):
    x, weight = torch.ones(3, 64), torch.ones(32, 64)
    for arch, dependent in (("sm_90", False), ("sm_90", True), ("sm_80", True)):
        monkeypatch.setattr(launch, "DEPENDENT", dependent)
        monkeypatch.setattr(triton.runtime.driver, "_active", ForTests(TARGETS[arch].triton))
        monkeypatch.setattr(launch, "_arch", lambda device, a=TARGETS[arch].triton.arch: a)
        launches.clear()
        for _ in range(2):  # as new, and as known
            linear(x, weight)
        ((of_new, *_), (of_known, *_)) = launches
        assert of_new == of_known
        assert ("'launch_pdl': True" in str(of_new)) == (dependent and arch == "sm_90")


@pytest.mark.skipif(
    not torch.cuda.is_available() or not launch.depends(launch.arch()),
    reason="an NVIDIA GPU of sm_90 or newer has dependent launches",
)
def test_dependent_launches_give_the_same_bits(monkeypatch):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    model = stock_model("BertForSequenceClassification", "cuda", torch.bfloat16, **sizes)
    inputs = {"input_ids": ids_of("cuda"), "attention_mask": masks("cuda")["right"]}
    bert_fast.accelerate(model, cuda_graphs=False)

    def step():
        model.zero_grad()
        with torch.no_grad():
            logits = model(**inputs).logits
        model(**inputs).logits.square().sum().backward()
        return logits, *(p.grad for p in model.parameters())

    wanted = step()
    monkeypatch.setattr(launch, "DEPENDENT", True)
    for with_graphs in (False, True):
        bert_fast.accelerate(model, cuda_graphs=with_graphs)
        for _ in range(100):  # a race would show now and then
            assert all(map(torch.equal, step(), wanted))


def test_what_is_launched_without_end_is_not_kept_without_end(launches):
    launch._compiled.update(dict.fromkeys(range(10000)))
    linear(torch.ones(3, 64), torch.ones(32, 64))
    assert len(launch._compiled) == 1


def test_hooks_of_a_profiler_see_every_launch(launches, monkeypatch):
    """Proton puts them there."""
    runtime = triton.knobs.runtime
    monkeypatch.setattr(runtime, "launch_enter_hook", "enter")
    monkeypatch.setattr(runtime, "launch_exit_hook", "exit")
    given = []
    monkeypatch.setattr(Compiled, "run", lambda self, *args: given.append(args[7:9]))
    for _ in range(2):
        linear(torch.ones(3, 64), torch.ones(32, 64))
    assert given == [("enter", "exit")] * 2
