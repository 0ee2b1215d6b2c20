"""The model: BERT of several sizes on several distributions of lengths, against stock.

inference   hidden states of batches that are there
training    one step: forward, cross entropy on the first token, backward, AdamW
encode      texts to embeddings, tokenizer included, as sentence-transformers does it
"""

import copy
import functools
from dataclasses import dataclass, replace

import torch
import transformers
from contenders import COMPARED, INFERENCE, MODELS, OURS, SDPA, at_tokens, bound, needs
from lengths import lengths_of
from measure import Skip
from torch.nn import functional as F
from workloads import Contender, Problem, Workload

import bert_fast
from bert_fast import corpus, encode
from bert_fast.checkpoints import SHIPPED, outlier_model


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    per_layer: bool = False  # whether time per layer is the question
    vocabulary: int = 30522


SHAPES = {
    "6x384": Shape(6, 384, 12),
    "base": Shape(12, 768, 12),
    "large": Shape(24, 1024, 16),
    "12x32": Shape(12, 32, 2, per_layer=True),  # so small that Python is what it costs
}
TRAINS = {"train": 0.0, "train-with-dropout": 0.1}  # the first word of a workload's name
PLANS = {  # the first ones matter most, where a budget ends the run
    "cpu": (
        "6x384 docstrings", "12x32 batch-1-short", "6x384 docstrings-sorted", "6x384 full-128",
        "6x384 batch-1", "6x384 cola-128x8", "6x384 squad-384x8", "6x384 wikipedia-512x8",
        "base docstrings", "base docstrings-sortedx8", "base full-128x8", "base batch-1",
        "base batch-1-short", "6x384 batch-1-short", "train 6x384 docstringsx8",
        "train-with-dropout 6x384 docstringsx8", "encode docstrings", "base docstringsx8",
    ),
    "cuda": (
        "base squad-384", "12x32 batch-1-short", "base full-128x128", "base full-512",
        "base batch-1", "large full-384x43", "large squad-384", "large batch-1",
        "6x384 full-128x128", "train base wikipedia-512", "base docstrings",
        "base docstrings-sorted", "base wikipedia-512", "base cola-128", "base full-128",
        "base full-256", "base full-384", "6x384 docstrings", "6x384 full-128", "6x384 full-512",
        "6x384 batch-1", "large full-128", "large full-512", "large wikipedia-512",
        "base full-128x4", "base full-128x16", "base full-128x64", "base full-128x256",
        "base full-128x1024", "train base full-512", "train large squad-384x16",
        "train-with-dropout base wikipedia-512",
        "encode docstrings", "6x384 squad-384", "6x384 docstrings-sorted", "6x384 cola-128",
        "large full-256", "large docstrings", "large cola-128", "base full-512-fitting",
    ),
}  # fmt: skip


def models(dtype, device, quick, tf32=False):
    """A workload for each of PLANS; if quick, small batches for the first two of them."""
    plan = PLANS[device.type][: 2 if quick else None]
    found = [workload(name, dtype, device, quick, tf32) for name in plan]
    if device.type == "cpu":  # of this one, a round of all takes minutes
        found = [_with_few(w) if w.name == "base docstrings" else w for w in found]
    return found


def _with_few(workload):
    names = SDPA.name, "ours, frozen", OURS.name
    few = tuple(c for c in workload.contenders if c.name in names)
    return replace(workload, contenders=few)


def workload(name, dtype, device, quick=False, tf32=False):
    """A name is a shape of SHAPES and lengths, as in lengths.py; with a word of TRAINS before it, a
    training step; or "encode docstrings". Raises ValueError or KeyError for any other."""
    kind, _, rest = name.partition(" ")
    if kind == "encode":
        if rest not in TEXTS_OF:
            raise ValueError(f"no texts {rest}; there are {', '.join(TEXTS_OF)}")
        prepare = functools.partial(_texts, dtype, device, quick)
        return Workload(name, dtype, ENCODERS, ENCODERS[0].name, prepare, rest, kind, tf32)
    dropout = TRAINS.get(kind)
    kind = "inference" if dropout is None else "training"
    shape, lengths = (rest if kind == "training" else name).split()
    contenders = {
        "training": tuple(_training(model, dropout) for model in MODELS if model.trains),
        "inference": INFERENCE,
    }[kind]
    if SHAPES[shape].per_layer:
        contenders = (SDPA.inference(), OURS.inference())
    prepare = functools.partial(
        {"training": _step, "inference": _batches}[kind],
        SHAPES[shape], lengths_of(lengths), dtype, device, quick,
    )  # fmt: skip
    return Workload(name, dtype, contenders, SDPA.name, prepare, lengths, kind, tf32)


# -- inference ------------------------------------------------------------------------------
CHUNK = 32  # sequences that are computed at once in fp64


@functools.lru_cache(3)  # to fit the outliers of large takes a CPU longer than all that is timed
def _model(shape):
    config = transformers.BertConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        hidden_dropout_prob=0.0,  # or a training step would have no definition
        attention_probs_dropout_prob=0.0,
    )
    return outlier_model(config)


def _batches(shape, lengths, dtype, device, quick):
    batches, sequences = lengths.batches, lengths.sequences
    if quick:
        batches, sequences = min(batches, 2), min(sequences, 4)
    model = copy.deepcopy(_model(shape)).to(device, dtype)
    if lengths.fitting:
        sequences = fitting(model, lengths, sequences)
    drawn = lengths.draw(batches, sequences)
    torch.manual_seed(0)
    timed = [_batch(row, lengths.padded_to, model) for row in drawn]
    static = len({batch["input_ids"].shape for batch in timed}) == 1
    # What is compiled for one shape must be checked at that shape.
    checked = timed[:1] if static else [_batch(drawn[0][:4], lengths.padded_to, model)]
    truth = [_exact(model, checked[0])]
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
        sequences=sequences,
        padded_to=timed[0]["input_ids"].shape[1] if static else None,
        tokens=int(n.sum()),
        fill=n.sum() / sum(batch["input_ids"].numel() for batch in timed),
        static=static,
        layers=layers if shape.per_layer else None,
        energy_s=0.0 if quick else 0.3,
    )


def _batch(lengths, padded_to, model):
    S = padded_to or lengths.max()
    mask = torch.arange(S) < torch.from_numpy(lengths)[:, None]
    ids = torch.randint(model.config.vocab_size, mask.shape)
    return {"input_ids": ids.to(model.device), "attention_mask": mask.long().to(model.device)}


def _exact(model, batch):
    """Hidden states of the tokens of a batch, by stock in fp64."""
    forward = bound(lambda **chunk: exact(**chunk).last_hidden_state)
    exact = copy.deepcopy(model).double()
    pieces = [t[:COMPARED].split(CHUNK) for t in batch.values()]
    chunks = [dict(zip(batch, chunk, strict=True)) for chunk in zip(*pieces, strict=True)]
    return torch.cat(at_tokens(forward(chunks)(), chunks))


def fitting(model, lengths, sequences, most=2**14):
    """The largest number of sequences, doubled from `sequences` on, that stock sdpa has memory for.

    Raises Skip on a CPU, which swaps instead of refusing.
    """
    if model.device.type != "cuda":
        raise Skip("what fits is found on a GPU alone")
    forward = copy.deepcopy(model)
    forward.set_attn_implementation("sdpa")
    while sequences < most:
        try:
            forward(**_batch(lengths.draw(1, 2 * sequences)[0], lengths.padded_to, model))
        except torch.OutOfMemoryError:
            break
        sequences *= 2
    torch.cuda.empty_cache()
    return sequences


def gate(error, baseline, dtype):
    """As close to fp64 as stock is in the same dtype, give or take a fifth.

    fp32 may also be apart by 1e-5 where each hidden dimension has an RMS of 1: below, it is the
    order of sums that decides, and that is another in each library.
    """
    limit = 1.2 * baseline["rms"]
    if error["rms"] <= limit or (dtype == torch.float32 and error["max"] <= 1e-5):
        return None
    return f"RMS error {error['rms']:.2g}, at most {limit:.2g} is allowed"


# -- training -------------------------------------------------------------------------------
GRADIENTS_OF = (  # what is compared: the first and the last that backward comes to, and between
    "embeddings.LayerNorm.weight",
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.{last}.intermediate.dense.weight",
)


def _loss(hidden, batch):
    """Cross entropy of two classes, each a sum over half of the first token's hidden state."""
    first = hidden[:, 0].unflatten(1, (2, -1))
    logits = first.float().sum(-1) if first.dtype != torch.float64 else first.sum(-1)
    return F.cross_entropy(logits / first.shape[-1] ** 0.5, batch["attention_mask"].sum(1) % 2)


def _gradients(model):
    wanted = dict(model.named_parameters())
    names = [name.format(last=model.config.num_hidden_layers - 1) for name in GRADIENTS_OF]
    return [wanted[name].grad for name in names]


def _gradient_gate(error, baseline, dtype):
    """As `gate`, but in fp32 an RMS of 1e-5 of the gradient's is what is always allowed: a few of
    its values are a hundred times as large as most."""
    if dtype == torch.float32 and error["rms"] <= 1e-5:
        return None
    return gate(error, baseline, dtype)


def _training(of, dropout=0.0):
    """A contender that takes training steps with the Model `of`. Dropout is of the steps that are
    timed: each drops other places, so gradients are checked without."""

    def build(problem):
        if dropout and not of.drops:
            raise Skip("this one drops no probabilities")
        forward = of.forward(problem)
        model = getattr(forward.model, "_orig_mod", forward.model).train()
        on_gpu = model.device.type == "cuda"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=on_gpu or None)
        drops = [m for m in model.modules() if dropout and isinstance(m, torch.nn.Dropout)]

        def bind(batches):
            def run():
                for m in drops:
                    m.p = dropout if batches is problem.timed else 0.0
                for batch in batches:
                    model.zero_grad(set_to_none=True)
                    with torch.enable_grad():
                        _loss(forward(**batch), batch).backward()
                    if batches is problem.timed:
                        optimizer.step()

            def checked():
                for _ in range(1 + of.warm_ups):
                    run()
                return _gradients(model)

            return run if batches is problem.timed else checked

        bind.implementation = getattr(forward, "implementation", None)
        return bind

    return Contender(of.name, build, slow=of.slow)


def _step(shape, lengths, dtype, device, quick):
    problem = _batches(shape, replace(lengths, batches=1), dtype, device, quick)
    exact = copy.deepcopy(problem.subject).double().train()
    checked = [dict(problem.timed[0])]  # another object than timed: gradients without a step
    with torch.enable_grad():
        _loss(exact(**checked[0]).last_hidden_state, checked[0]).backward()
    truth = _gradients(exact)
    return replace(
        problem,
        checked=checked,
        checked_on=f"gradients of input_ids {list(checked[0]['input_ids'].shape)}",
        truth=truth,
        gate=functools.partial(_gradient_gate, dtype=dtype),
        unit=[g.square().mean().sqrt().item() for g in truth],
        work={"C": 3 * problem.work["C"], "B": 3 * problem.work["B"]},
    )


# -- texts ----------------------------------------------------------------------------------
TEXTS_OF = ("docstrings",)
TEXTS, TEXTS_CHECKED, LONGEST = 2048, 32, 256


def _texts(dtype, device, quick):
    texts = [doc.text for doc in corpus.docstrings()]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    texts = [texts[i] for i in order[: 64 if quick or device.type == "cpu" else TEXTS]]
    model, tokenizer = encode.load(SHIPPED, dtype, device)
    checked = texts[:TEXTS_CHECKED]
    rows = tokenizer(
        checked, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt"
    )
    exact = transformers.BertModel.from_pretrained(SHIPPED, add_pooling_layer=False)
    mask = rows["attention_mask"]
    hidden = exact.double()(rows["input_ids"], mask).last_hidden_state
    truth = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    lengths = [min(len(ids), LONGEST) for ids in tokenizer(texts)["input_ids"]]
    config, n = model.config, torch.tensor(lengths, dtype=torch.float64)
    H, layers = config.hidden_size, config.num_hidden_layers
    products = 4 * H**2 + 2 * H * config.intermediate_size  # of a token and layer
    return Problem(
        subject=(model, tokenizer, device, dtype),
        timed=texts,
        checked=checked,
        checked_on=f"{len(checked)} texts",
        truth=[truth],
        gate=functools.partial(gate, dtype=dtype),
        unit=truth.square().mean().sqrt().item(),
        work={
            "C": layers * (2 * products * n.sum().item() + 4 * H * n.square().sum().item()),
            "B": layers * products * dtype.itemsize,
        },
        sequences=len(texts),
        tokens=sum(lengths),
        static=False,
    )


def _sentence_transformers(problem, swapped=False):
    needs("sentence_transformers")
    import sentence_transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as parts

    _, _, device, dtype = problem.subject
    encoder = parts.Transformer(str(SHIPPED), max_seq_length=LONGEST)
    pooling = parts.Pooling(encoder.model.config.hidden_size, pooling_mode="mean")
    model = SentenceTransformer(modules=[encoder, pooling], device=str(device)).to(dtype)
    if swapped:
        bert_fast.accelerate(model)

    def bind(texts):
        def run():
            return model.encode(texts, convert_to_tensor=True, show_progress_bar=False).cpu()

        return run

    version = sentence_transformers.__version__
    bind.implementation = f"sentence-transformers {version}, in batches of 32 texts"
    return bind


def _encode(problem):
    model, tokenizer, _, _ = problem.subject

    def bind(texts):
        def run():
            ids, _ = encode.tokenize(texts, tokenizer, LONGEST)
            return encode.encode(ids, model, pooling="mean")

        return run

    bind.implementation = "bert_fast.encode, in batches of 8,192 tokens with their padding"
    return bind


def _embeddings(result, texts):
    return [result]


ENCODERS = (
    Contender("sentence-transformers", _sentence_transformers, _embeddings),
    Contender(
        "sentence-transformers, accelerated",
        functools.partial(_sentence_transformers, swapped=True), _embeddings,
    ),
    Contender("ours, frozen", _encode, _embeddings),  # which encode.load has it
)  # fmt: skip
