"""The predicted time of a BERT forward on a GPU: the launches of a layer, and the whole.

Each launch is compiled and predicted as in `check aot`, with roofline.py's assumptions. The whole
is every layer, the embeddings, and the packing of a mask; a model that waits for Python takes
longer (`check overhead`). Its share of C counts the FLOPs of products and attention.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, replace

import aot
from rich.console import Console
from rich.table import Table
from roofline import GPUS, PRODUCT

from bert_fast.kernels import SPECS
from bert_fast.kernels.launch import INTERPRET

OPS = {spec.name: spec for spec in SPECS}


@dataclass(frozen=True)
class Workload:
    """A batch of B sequences of S tokens, without padding."""

    model: str
    layers: int
    hidden: int
    heads: int
    B: int
    S: int
    target: str

    @property
    def flops(self):
        return self.B * self.S * self.layers * (24 * self.hidden**2 + 4 * self.S * self.hidden)


WORKLOADS = (
    Workload("6x384", 6, 384, 12, 128, 128, ""),
    Workload("base", 12, 768, 12, 128, 128, "0.78 C"),
    Workload("base", 12, 768, 12, 32, 512, "0.75 C"),
    Workload("large", 24, 1024, 16, 128, 128, ""),
    Workload("large", 24, 1024, 16, 43, 384, "0.80 C"),
    Workload("base", 12, 768, 12, 1, 128, "158 us"),
    Workload("large", 24, 1024, 16, 1, 128, "366 us"),
)


def layer(hidden, heads, B, S):
    """[(label, op, case)] of a layer, in the order of encoder.layer_forward."""
    T = B * S
    norm = ("LN", "layer_norm", {"shape": (T, hidden), "residual": False})
    lengths = {"lengths": (S,) * B, "heads": heads, "D": hidden // heads}
    return [
        ("QKV", "qkv", {"T": T, "K": hidden, "N": hidden}),
        ("attention", "attention", lengths),
        ("out", "linear", {"T": T, "K": hidden, "N": hidden, "residual": True}),
        norm,
        ("FC1", "linear", {"T": T, "K": hidden, "N": 4 * hidden, "gelu": True}),
        ("FC2", "linear", {"T": T, "K": 4 * hidden, "N": hidden, "residual": True}),
        norm,
    ]


def around(hidden, B, S):
    """The same for what runs once."""
    return [
        ("pack", "pack", {"lengths": (S,) * B, "S": S}),
        ("embed", "embedding", {"B": B, "S": S, "N": hidden, "V": 30522, "types": True}),
        ("unpack", "unpack", {"lengths": (S,) * B, "S": S, "N": hidden}),
    ]


def seconds(op, case, gpu, dtype, known):
    """Predictions for one call; known caches what was compiled."""
    key = op, repr(case)
    if key not in known:
        spec = replace(OPS[op], bench=(case,))
        rows = aot.rows(spec, [GPUS[gpu].arch], [dtype], only_predicted=True)
        known[key] = sum(row["predicted"][gpu]["seconds"] for row in rows)
    return known[key]


def predict(workload, gpu="H200", dtype="bfloat16", known=None):
    """{"layer": {label: seconds}, "forward": seconds, "share": of C}"""
    known = {} if known is None else known
    w, of_layer = workload, defaultdict(float)
    for label, op, case in layer(w.hidden, w.heads, w.B, w.S):
        of_layer[label] += seconds(op, case, gpu, dtype, known)
    once = sum(seconds(op, case, gpu, dtype, known) for _, op, case in around(w.hidden, w.B, w.S))
    forward = w.layers * sum(of_layer.values()) + once
    share = w.flops / forward / (GPUS[gpu].tensor * PRODUCT)
    return {"layer": dict(of_layer), "forward": forward, "share": share}


def add_arguments(command):
    command.add_argument("--gpu", choices=GPUS, default="H200", help="default H200")


def main(options, specs):
    if INTERPRET:
        sys.exit("check forward: the interpreter compiles nothing; unset TRITON_INTERPRET")
    known = {}
    found = [(w, predict(w, options.gpu, known=known)) for w in WORKLOADS]
    title = f"predicted us on {options.gpu}, bfloat16; LN is both of a layer"
    grid = Table(title=title, title_justify="left", box=None)
    grid.add_column("model")
    for heading in ("batch", *found[0][1]["layer"], "layer", "forward", "share of C", "target"):
        grid.add_column(heading, justify="right")
    for w, p in found:
        of_layer = p["layer"].values()
        times = [*of_layer, sum(of_layer), p["forward"]]
        cells = [f"{t * 1e6:,.1f}" for t in times[:-1]] + [f"{times[-1] * 1e6:,.0f}"]
        grid.add_row(w.model, f"{w.B} x {w.S}", *cells, f"{p['share']:.2f}", w.target)
    Console(width=None if sys.stdout.isatty() else 140).print(grid)
    return 0
