"""Spec: one op as data, all that tests, benchmarks and the compile check know about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spec:
    """A case is a dict of plain values, passed to `inputs` and `cost` as keywords."""

    fn: Callable  # the public op
    ref: Callable  # its definition in plain PyTorch: same signature, any floating dtype
    inputs: Callable  # (dtype, device, **case) -> keywords of fn and ref
    cost: Callable  # (itemsize, **case) -> (flops, bytes moved) of one forward call
    cases: tuple[Mapping, ...]  # small, for the interpreter: a typical one, then every edge
    fuzz: Callable  # (random.Random) -> a small case at random, plain enough for JSON
    whole: Mapping  # small, of whole tiles: its launches' work is compared with its cost
    huge: tuple[Mapping, ...]  # with an offset past 2^31; never allocated, see check/examine.py
    bench: tuple[Mapping, ...]  # real sizes, for benchmarks and the compile check
    rejects: Mapping[str, Mapping]  # start of a ValueError's text -> keywords that raise it
    traps: tuple[Mapping, ...] = ()  # keywords that end a launch in a device-side assertion
    packed: tuple[str, ...] = ()  # inputs with a row for each token, not read past num_tokens
    rounds_inside: bool = False  # may err, from fp64, as its definition does in the same dtype
    gradient: bool = False  # the gradient of another op, timed as its backward
    variants: tuple[Mapping, ...] = ()  # entries of a configuration that select other code
    rounds_backward: bool = False  # its gradients multiply rounded numbers: the same, plus an ulp

    @property
    def name(self):
        return self.fn.__name__

    def label(self, case):
        return f"{self.name}({', '.join(f'{k}={_short(v)}' for k, v in case.items())})"

    def without_values(self, dtype, device, case):
        """Keywords of fn as `inputs` gives them, their tensors uninitialised: to compile for."""
        return {
            name: torch.empty_like(given, device=device) if torch.is_tensor(given) else given
            for name, given in self.inputs(dtype, "meta", **case).items()
        }


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def cast(inputs, dtype):
    """inputs with every float in dtype: in fp64 the definition gives the truth."""
    return {k: t.to(dtype) if is_float(t) else t for k, t in inputs.items()}


def tensors_of(result):
    """What an op returns, as a list: there may be several gradients."""
    return list(result) if isinstance(result, tuple) else [result]


def _short(value):
    """str, but 64x512 for a tuple of 64 times 512, 64x20..256 for other long tuples, and dtypes
    without their module."""
    if isinstance(value, tuple) and len(value) > 3:
        if len(set(value)) == 1:
            return f"{len(value)}x{value[0]}"
        if len(value) > 8:
            return f"{len(value)}x{min(value)}..{max(value)}"
    return str(value).removeprefix("torch.")
