"""A model's ops go past torch's dispatcher, unless somebody listens there."""

import contextlib
import threading

import pytest
import torch
from models import ids_of, masks, stock_model
from torch.utils._python_dispatch import TorchDispatchMode

import bert_fast
from bert_fast.kernels import launch


class OfItsOwn(torch.Tensor):
    """A tensor whose class may do anything in an op."""


class Listener(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def dispatched(monkeypatch):
    """The ops of bert_fast that came to the dispatcher."""
    ops, call = [], torch._ops.OpOverload.__call__

    def counting(op, *args, **kwargs):
        if op.namespace == "bert_fast":
            ops.append(op._opname)
        return call(op, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", counting)
    return ops


@pytest.fixture
def model(device):
    return bert_fast.accelerate(stock_model(device=device), cuda_graphs=False)


OPS = {"pack", "embedding", "qkv", "attention", "linear", "layer_norm", "unpack"}


@pytest.mark.parametrize("gradients", [False, True])
def test_a_plain_call_dispatches_nothing(gradients, model, device, dispatched):
    with torch.set_grad_enabled(gradients):
        y = model(ids_of(device), masks(device)["right"])[0]
    assert not dispatched
    with Listener(), torch.set_grad_enabled(gradients):
        assert torch.equal(model(ids_of(device), masks(device)["right"])[0], y)
    assert OPS == set(dispatched)


LISTENERS = {
    "the profiler": lambda device: torch.profiler.profile(),
    "autocast": lambda device: torch.autocast(torch.device(device).type, torch.bfloat16),
    "a mode": lambda device: Listener(),
}


@pytest.mark.parametrize("listener", LISTENERS)
@torch.no_grad()
def test_whoever_listens_hears_every_op(listener, model, device, dispatched):
    with LISTENERS[listener](device):
        model(ids_of(device), masks(device)["right"])
    assert OPS == set(dispatched)


@torch.no_grad()
def test_a_tensor_of_a_class_of_its_own_is_dispatched(model, device, dispatched):
    model(ids_of(device).as_subclass(OfItsOwn), masks(device)["right"])
    assert OPS == set(dispatched)


def test_checkpointing_may_listen(model, device, dispatched):
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model(ids_of(device), masks(device)["right"])
    assert OPS <= set(dispatched)


@torch.no_grad()
def test_an_error_and_another_thread_leave_it_as_it_was(model, device, dispatched, monkeypatch):
    found = {}

    def fails(*args):
        here = launch._thread.direct
        other = threading.Thread(target=lambda: found.update(there=launch._thread.direct))
        other.start()
        other.join()
        found.update(here=here)
        raise RuntimeError("in the middle")

    monkeypatch.setattr(model, "_encode", fails)
    with contextlib.suppress(RuntimeError):
        model(ids_of(device), masks(device)["right"])
    assert found == {"here": torch.device(device).type, "there": None}
    assert launch._thread.direct is None
