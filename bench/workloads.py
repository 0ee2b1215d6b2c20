"""What is timed, as data. The ops are in op_workloads.py, the model in model_workloads.py.

A contender is built once for a problem, then bound to inputs; what is bound is called:

    bind = contender.build(problem)         a copy of the model, compiled, exported, ...
    run = bind(problem.timed)               inputs in the layout that suits it
    run()                                   what the clock sees

`bind.implementation`, where there is one, says in a word whose code that is.
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
    gated: bool = True  # whether too large an error makes its row a failure; if not, its error is
    # all that is of interest: it is timed only as a baseline
    slow: bool = False  # takes minutes to build


@dataclass(frozen=True)
class Workload:
    name: str
    dtype: torch.dtype
    contenders: tuple[Contender, ...]
    baseline: str  # name of the contender that ratios and errors are compared with
    prepare: Callable  # () -> Problem; nothing is allocated before
    lengths: str | None = None  # name of the distribution of sequence lengths
    kind: str = "op"  # or backward, inference, training, encode
    tf32: bool = False  # whether products of fp32 may be TF32

    @property
    def precision(self):
        """float32, tf32, float16 or bfloat16"""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Problem:
    subject: Any  # Spec or model
    timed: Any  # inputs
    checked: Any  # inputs, small enough for fp64
    checked_on: str  # what these are
    truth: list  # fp64 tensors: the definition's result on `checked`
    gate: Callable  # (error, that of baseline or definition) -> why it is too much, or None
    work: dict  # {"C": FLOP, "B": bytes} of a run
    unit: Any = 1.0  # of errors, as rows.error_of takes it
    sequences: int | None = None  # of each batch
    padded_to: int | None = None  # positions of a sequence, where all of them have as many
    tokens: int | None = None  # valid ones, of a run
    fill: float | None = None  # valid ones / positions
    static: bool = True  # one shape in all of `timed` and `checked`
    layers: int | None = None  # where the time of a layer is the question
    energy_s: float = 0.0  # of calls back to back that a reading of energy is worth
