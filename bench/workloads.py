"""What is timed, as data. The ops are in op_workloads.py, the model in model_workloads.py.

A contender is built once for a problem, then bound to inputs; what is bound is called:

    bind = contender.build(problem)         a copy of the model, compiled, exported, ...
    run = bind(problem.timed)               inputs in the layout that suits it
    run()                                   what the clock sees
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Contender:
    name: str
    build: Callable  # problem -> bind, see above; raises Skip with a reason
    collect: Callable = lambda result, inputs: result  # result of a run -> tensors to compare
    gated: bool = True  # whether too large an error makes its row a failure
    slow: bool = False  # takes minutes to build


@dataclass(frozen=True)
class Workload:
    name: str
    dtype: torch.dtype
    contenders: tuple[Contender, ...]
    baseline: str  # name of the contender that ratios and errors are compared with
    prepare: Callable  # () -> Problem; nothing is allocated before
    lengths: str | None = None  # name of the distribution of sequence lengths


@dataclass(frozen=True)
class Problem:
    subject: Any  # Spec or model
    timed: Any  # inputs
    checked: Any  # inputs, small enough for fp64
    checked_on: str  # what these are
    truth: list  # fp64 tensors: the definition's result on `checked`
    gate: Callable  # (error, error of the baseline) -> why that is too much, or None
    work: dict  # {"C": FLOP, "B": bytes} of a run
    unit: Any = 1.0  # of errors: a number, or a tensor that broadcasts against `truth`
    tokens: int | None = None  # valid ones, of a run
    fill: float | None = None  # valid ones / positions
    static: bool = True  # one shape in all of `timed` and `checked`
    layers: int | None = None  # where the time of a layer is the question
