"""accelerate, restore and report: the kernels put into a model that is already there."""

import dataclasses
import functools
import io

import torch
import transformers

from . import kernels as ops
from .coverage import reason_of_model
from .modeling import CLASSES, BertModel, calls_of, logger, split_storage

STOCK = {fast: getattr(transformers, fast.__name__) for fast in CLASSES}


def accelerate(model):
    """Put the kernels into every transformers.BertModel inside `model`, in place.

    model  any torch.nn.Module: a BertModel, a BERT with a head, a SentenceTransformer, ...

    Returns model. Weights, names and outputs stay; a module's class becomes bert_fast.BertModel. A
    model that has been accelerated is left as it is, and a log line says so. Raises ValueError if
    there is no BertModel in it, naming what was found.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    modules = list(model.modules())
    todo = [m for m in modules if type(m) is transformers.BertModel]
    if not todo:
        if any(isinstance(m, BertModel) for m in modules):
            logger.warning("bert_fast: accelerate: already accelerated, nothing to do")
            return model
        found = sorted({type(m).__name__ for m in modules if _is_telling(m)}) or ["no such module"]
        raise ValueError(
            f"accelerate: looked for transformers.BertModel inside {type(model).__name__},"
            f" found {', '.join(found)}"
        )
    _register_outputs()
    for module in todo:
        module.__class__ = BertModel
    return model


def restore(model):
    """Make every bert_fast class inside `model` the transformers class it stands for, in place.

    Returns model, whose weights have the bits they had. A model without any is left as it is, and
    a log line says so.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    todo = [m for m in model.modules() if type(m) in STOCK]
    if not todo:
        logger.warning("bert_fast: restore: nothing of bert_fast in it, nothing to do")
    for module in todo:
        if type(module) is BertModel:
            split_storage(module)
            module.__dict__.pop("_bert_fast_calls", None)
        module.__class__ = STOCK[type(module)]
    return model


def _is_telling(module):
    """Whether a module's class tells a user what the model is: transformers' models, and roots."""
    name = type(module).__name__
    return isinstance(module, transformers.PreTrainedModel) or name.endswith("Model")


@functools.cache
def _register_outputs():
    """transformers notes in a model's constructor which outputs its class can record. A class that
    is put on a finished model must have been constructed once, or a stock forward of it would
    record no attentions."""
    config = transformers.BertConfig(
        vocab_size=2, hidden_size=2, num_hidden_layers=0, num_attention_heads=1,
        intermediate_size=2, max_position_embeddings=2,
    )  # fmt: skip
    with torch.device("meta"):
        BertModel(config, add_pooling_layer=False)


@dataclasses.dataclass(frozen=True)
class Swapped:
    """One BertModel that the kernels are in."""

    path: str  # of the module inside the model, "" for the model itself
    layers: int
    dtype: str
    device: str
    backend: str | None  # "triton", "pytorch" or "interpreter"; None where the stock forward runs
    reason: str | None  # why the stock forward would run now
    fast_calls: int
    stock_calls: dict[str, int]  # by reason


@dataclasses.dataclass(frozen=True)
class Report:
    """What runs on the kernels inside a model, what did not, and why."""

    model: str
    swapped: tuple[Swapped, ...]
    stock: tuple[str, ...]  # paths of BertModels that are not accelerated

    def to_dict(self):
        return dataclasses.asdict(self)

    def __str__(self):
        out = io.StringIO()
        print(f"bert_fast report of {self.model}", file=out)
        for s in self.swapped:
            runs = f"runs on {s.backend}" if s.reason is None else f"runs stock: {s.reason}"
            where = s.path or "the model itself"
            print(f"  {where}: {s.layers} layers, {s.dtype} on {s.device}, {runs}", file=out)
            print(f"    {s.fast_calls} calls on the kernels", file=out)
            for reason, count in s.stock_calls.items():
                print(f"    {count} calls on the stock forward: {reason}", file=out)
        for path in self.stock:
            print(f"  {path or 'the model itself'}: stock, not accelerated", file=out)
        if not self.swapped and not self.stock:
            print("  no BertModel in it", file=out)
        return out.getvalue().rstrip()


def report(model):
    """What the kernels do for `model`: a Report, to print or to read.

    `reason` and `backend` tell of a plain call as the model is now; the counts are of the calls
    since it was accelerated, of each BertModel inside.
    """
    swapped, stock = [], []
    for path, module in model.named_modules():
        if isinstance(module, BertModel):
            weight = module.embeddings.word_embeddings.weight
            reason = reason_of_model(module)
            calls = calls_of(module)
            swapped.append(
                Swapped(
                    path=path,
                    layers=len(module.encoder.layer),
                    dtype=str(weight.dtype).removeprefix("torch."),
                    device=str(weight.device),
                    backend=None if reason else ops.backend(weight.device),
                    reason=reason,
                    fast_calls=calls.fast,
                    stock_calls=dict(calls.stock),
                )
            )
        elif isinstance(module, transformers.BertModel):
            stock.append(path)
    return Report(type(model).__name__, tuple(swapped), tuple(stock))
