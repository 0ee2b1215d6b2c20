"""The model: BERT of several sizes on several distributions of lengths, against stock."""

import copy
import functools
import importlib.util
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from measure import Skip
from workloads import Contender, Problem, Workload

import bert_fast
from bert_fast import corpus
from bert_fast.checkpoints import SHIPPED, outlier_model


# -- lengths --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Lengths:
    draw: Callable  # (batches, sequences in each) -> integers [batches, sequences]
    padded_to: int | None = None  # None: to the longest of the batch
    batches: int = 4  # that one timed call goes through
    sequences: int = 32


@functools.cache
def _docstring_lengths():
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    texts = [doc.text for doc in corpus.docstrings()]
    ids = tokenizer(texts, truncation=True, max_length=256).input_ids
    return np.array([len(row) for row in ids])


def _docstrings(batches, sequences):
    lengths = np.random.default_rng(0).permutation(_docstring_lengths())
    return lengths[: batches * sequences].reshape(batches, sequences)


def _sorted_docstrings(batches, sequences):
    """The whole corpus sorted and cut into batches, of which some at even distances."""
    lengths = np.sort(_docstring_lengths())
    cut = lengths[: len(lengths) // sequences * sequences].reshape(-1, sequences)
    return cut[((np.arange(batches) + 0.5) * len(cut) / batches).astype(int)]


def _squad(batches, sequences):
    """SQuAD's p10, p50 and p90, 107, 159 and 260: half log-normals on either side of the median."""
    z = np.random.default_rng(0).standard_normal((batches, sequences))
    spread = np.where(z < 0, math.log(159 / 107), math.log(260 / 159)) / 1.2816
    return np.clip(159 * np.exp(spread * z), 1, 384).astype(int)


def _full(length, batches, sequences):
    return np.full((batches, sequences), length)


LENGTHS = {
    "docstrings": Lengths(_docstrings),
    "docstrings-sorted": Lengths(_sorted_docstrings),
    "squad-384": Lengths(_squad, padded_to=384),
    "full-128": Lengths(functools.partial(_full, 128), batches=1),
    "full-384": Lengths(functools.partial(_full, 384), batches=1),
    "full-512": Lengths(functools.partial(_full, 512), batches=1),
    "batch-1": Lengths(functools.partial(_full, 128), batches=1, sequences=1),
    "batch-1-short": Lengths(functools.partial(_full, 16), batches=1, sequences=1),
}


# -- contenders -----------------------------------------------------------------------------
def _bound(forward):
    return lambda batches: lambda: [forward(**batch).last_hidden_state for batch in batches]


def _at_tokens(result, batches):
    """Hidden states of the tokens: what a model computes for padding has no meaning."""
    return [h[batch["attention_mask"].bool()] for h, batch in zip(result, batches, strict=True)]


def _stock(problem, implementation):
    model = copy.deepcopy(problem.subject)
    model.set_attn_implementation(implementation)
    return model


def _compiled(problem):
    torch.compiler.reset()  # or the eighth model would hit the limit on recompiling one forward
    mode = "max-autotune" if problem.subject.device.type == "cuda" else None
    model = torch.compile(
        _stock(problem, "sdpa"), fullgraph=True, dynamic=not problem.static, mode=mode
    )

    def forward(**batch):
        torch.compiler.cudagraph_mark_step_begin()  # the results of earlier batches may go
        return model(**batch)

    return forward


def _onnxruntime(problem):
    """The exported model with onnxruntime's own fusions, on as many threads as torch has."""
    for package in ("onnxruntime", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise Skip(f"{package} is not installed")
    if problem.subject.device.type != "cpu":
        raise Skip("timed on the CPU alone")
    import onnxruntime

    names = ("input_ids", "attention_mask")
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would spin on while the next contender runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        torch.onnx.export(
            _stock(problem, "sdpa"), kwargs=problem.checked[0], f=path, dynamo=True,
            dynamic_shapes=dict.fromkeys(names, sizes), external_data=True, verbose=False,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(path, options)
    output = session.get_outputs()[0].name

    def bind(batches):
        arrays = [{name: batch[name].numpy() for name in names} for batch in batches]
        return lambda: [torch.from_numpy(session.run([output], a)[0]) for a in arrays]

    return bind


def _ours(problem):
    model = bert_fast.accelerate(copy.deepcopy(problem.subject))
    if reason := bert_fast.report(model).swapped[0].reason:
        raise Skip(f"would run the stock forward: {reason}")
    return model


SDPA = Contender("stock sdpa", lambda problem: _bound(_stock(problem, "sdpa")), _at_tokens)
OURS = Contender("ours", lambda problem: _bound(_ours(problem)), _at_tokens)
CONTENDERS = (
    SDPA,
    Contender("stock eager", lambda problem: _bound(_stock(problem, "eager")), _at_tokens),
    Contender("torch.compile", lambda problem: _bound(_compiled(problem)), _at_tokens, slow=True),
    Contender("onnxruntime", _onnxruntime, _at_tokens),
    OURS,
)


# -- workloads ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    per_layer: bool = False  # whether time per layer is the question


SHAPES = {
    "6x384": Shape(6, 384, 12),
    "base": Shape(12, 768, 12),
    "large": Shape(24, 1024, 16),
    "12x32": Shape(12, 32, 2, per_layer=True),  # so small that Python is what it costs
}
PLANS = {
    "cpu": (
        ("6x384", "docstrings"), ("12x32", "batch-1-short"),
        ("6x384", "docstrings-sorted"), ("6x384", "full-128"), ("6x384", "batch-1"),
        ("base", "docstrings"), ("base", "docstrings-sorted"), ("base", "full-128"),
        ("base", "batch-1"),
    ),
    "cuda": (
        ("base", "squad-384"), ("12x32", "batch-1-short"),
        ("base", "full-128"), ("base", "full-512"), ("base", "batch-1"),
        ("large", "full-384"), ("large", "squad-384"), ("large", "batch-1"),
        ("base", "docstrings"), ("base", "docstrings-sorted"),
        ("6x384", "docstrings"), ("6x384", "docstrings-sorted"),
        ("6x384", "full-128"), ("6x384", "full-512"), ("6x384", "batch-1"),
    ),
}  # fmt: skip


def models(dtype, device, quick):
    """A workload for each of PLANS; if quick, small batches for the first two of them."""
    return [
        Workload(
            name=f"{shape} {lengths}",
            dtype=dtype,
            contenders=(SDPA, OURS) if SHAPES[shape].per_layer else CONTENDERS,
            baseline=SDPA.name,
            prepare=functools.partial(
                _problem, SHAPES[shape], LENGTHS[lengths], dtype, device, quick
            ),
            lengths=lengths,
        )
        for shape, lengths in PLANS[device.type][: 2 if quick else None]
    ]


def _problem(shape, lengths, dtype, device, quick):
    batches, sequences = lengths.batches, lengths.sequences
    if quick:
        batches, sequences = min(batches, 2), min(sequences, 4)
    drawn = lengths.draw(batches, sequences)
    config = transformers.BertConfig(
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
    )
    model = outlier_model(config).to(device, dtype)
    torch.manual_seed(0)
    timed = [_batch(row, lengths.padded_to, model) for row in drawn]
    static = len({batch["input_ids"].shape for batch in timed}) == 1
    # What is compiled for one shape must be checked at that shape.
    checked = timed[:1] if static else [_batch(drawn[0][:4], lengths.padded_to, model)]
    truth = _at_tokens(_bound(copy.deepcopy(model).double())(checked)(), checked)
    n = drawn.astype(float)
    H, layers = shape.hidden, shape.layers
    return Problem(
        subject=model,
        timed=timed,
        checked=checked,
        checked_on=f"input_ids {list(checked[0]['input_ids'].shape)}",
        truth=truth,
        gate=functools.partial(gate, dtype=dtype),
        unit=truth[0].square().mean(0).sqrt(),  # [H]: outlier dimensions do not hide the others
        work={
            "C": layers * (24 * H**2 * n.sum() + 4 * H * (n**2).sum()),
            "B": len(timed) * layers * 12 * H**2 * dtype.itemsize,  # the weights
        },
        tokens=int(n.sum()),
        fill=n.sum() / sum(batch["input_ids"].numel() for batch in timed),
        static=static,
        layers=layers if shape.per_layer else None,
    )


def _batch(lengths, padded_to, model):
    S = padded_to or lengths.max()
    mask = torch.arange(S) < torch.from_numpy(lengths)[:, None]
    ids = torch.randint(model.config.vocab_size, mask.shape)
    return {"input_ids": ids.to(model.device), "attention_mask": mask.long().to(model.device)}


def gate(error, baseline, dtype):
    """As close to fp64 as stock is in the same dtype, give or take a fifth.

    fp32 may also be apart by 1e-5 where each hidden dimension has an RMS of 1: below, it is the
    order of sums that decides, and that is another in each library.
    """
    limit = 1.2 * baseline["rms"]
    if error["rms"] <= limit or (dtype == torch.float32 and error["max"] <= 1e-5):
        return None
    return f"RMS error {error['rms']:.2g}, at most {limit:.2g} is allowed"
