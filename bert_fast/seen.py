"""A snapshot of an encoder's modules when they were last checked, and whether it still holds.

Checking the two hundred modules of a base model takes as long as a GPU takes for one sentence, and
a recorded graph needs a second check, that it has the same numbers and weights. Comparing what the
modules hold with a snapshot replaces both, as Python compares dicts by the identity of their
values. Anything set on a module, replacing a child or a weight, or added to its hooks is still
noticed, as are a weight whose memory moves and numbers written into a buffer. Where torch exposes a
dict's version, as its compiler uses, dicts that have not been written to are not even compared.
"""

import operator
import sys
import types
import weakref

import torch
from torch import nn


def _find_dict_version():
    """The function by which torch's compiler reads a dict's version, or None. It is private to
    torch, so it is tested; and from Python 3.13 on, setting an attribute need not change the
    version of the object's __dict__."""
    if sys.version_info >= (3, 13):
        return None
    try:
        from torch._C._dynamo.guards import dict_version

        tried = types.SimpleNamespace(number=0)
        versions = [dict_version(tried.__dict__)]
        for tried.number in (1, 2):
            versions.append(dict_version(tried.__dict__))
        return dict_version if len(set(versions)) == 3 else None
    except (ImportError, RuntimeError):
        return None


dict_version = _find_dict_version()
_dtype_of = operator.attrgetter("dtype")
CONTENTS = "_modules", "_parameters", "_buffers"
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


class Seen:
    """A snapshot of some modules, and of `beside`: whatever else matters and can be compared."""

    def __init__(self, model, modules, beside):
        self.of = weakref.ref(model)
        states = [m.__dict__ for m in modules]
        contents = [s[name] for s in states for name in CONTENTS]
        self._modules, self._beside = modules, beside
        self._empty = [c for c in contents if not c]  # most are
        self._live = [model.__dict__["_modules"], *states, *filter(None, contents)]
        self._copies = list(map(dict, self._live))
        self._versions = self._versions_now()
        self._kinds = list(map(type, modules))
        self._methods = _methods_of(set(self._kinds))
        self._hooks = [s[name] for s in states for name in HOOKS]
        self._hooked = self._hooks_now()
        self._weights = [p for s in states for p in s["_parameters"].values()]
        self._places = self._places_now()
        self._buffers = [t for s in states for t in s["_buffers"].values() if t is not None]
        self._writes = self._writes_now()

    def __reduce__(self):  # a copied or loaded model has not been checked
        return type(None), ()

    def _versions_now(self):
        return dict_version and list(map(dict_version, self._live))

    def _same_contents(self):
        now = self._versions_now()
        if any(self._empty):
            return False
        if now is None or now != self._versions:
            if not all(map(operator.eq, self._live, self._copies)):
                return False
            self._versions = now
        return True

    def _hooks_now(self):
        return [tuple(hooks.values()) for hooks in filter(None, self._hooks)]

    def _places_now(self):
        """Element counts instead of shapes, which take twice the time."""
        weights, of = self._weights, torch.Tensor
        return [
            *map(of.data_ptr, weights), *map(of.stride, weights), *map(of.numel, weights),
            *map(_dtype_of, weights),
        ]  # fmt: skip

    def _writes_now(self):
        return list(map(state_of_buffer, self._buffers))

    def holds(self, beside):
        try:
            return (
                beside == self._beside
                and self._same_contents()
                and list(map(type, self._modules)) == self._kinds
                and _methods_of(self._methods) == self._methods
                and self._hooks_now() == self._hooked
                and self._places_now() == self._places
                and self._writes_now() == self._writes
            )
        except (RuntimeError, ValueError):  # == raises where a tensor replaced something
            return False


def state_of_buffer(t):
    """What changes if its numbers do: `t.data = ...` moves it, and other writes count."""
    has_place = type(t) is torch.Tensor and t.layout is torch.strided
    return has_place and t.data_ptr(), None if t.is_inference() else t._version


def _methods_of(kinds):
    """The methods of each class that may have been replaced."""
    return {kind: (kind.forward, kind.__dict__.get("feed_forward_chunk")) for kind in kinds}


def seen(model):
    """The Seen of a model, or None. It is stored on the model, as it may itself refer to the model;
    one of another model is ignored, as DataParallel replicas start with a copy of its __dict__."""
    found = model.__dict__.get("_bert_fast_seen")
    return found if found is not None and found.of() is model else None


def see(model, modules, beside):
    """Take a snapshot of the modules of a model, unless weights are plain tensors: those of a
    single call, such as torch.func.functional_call's, which it would keep alive."""
    weights = [p for m in modules for p in m.parameters(recurse=False)]
    if all(type(p) is nn.Parameter and not p.is_meta for p in weights):
        model.__dict__["_bert_fast_seen"] = Seen(model, modules, beside)


def forget(model):
    model.__dict__.pop("_bert_fast_seen", None)
