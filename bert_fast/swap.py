"""accelerate, restore and report: the kernels put into a model that is already there."""

import collections
import dataclasses
import functools
import inspect
import io

import torch
import transformers

from . import frozen as frozen_weights
from . import graphs
from . import kernels as ops
from .architectures import at
from .coverage import crosses, decodes, layers_of, reason_of_call, reason_of_model
from .inputs import Inputs
from .modeling import STOCK, calls_of, logger, put_on
from .seen import forget
from .training_graphs import of_training, training_graphs_of

ENCODERS = {fast: stock for fast, stock in STOCK.items() if hasattr(fast, "architecture")}
REPLACED = "forward was replaced on the module, by torch.compile, Accelerate's hooks or other code"
UNDO = "undo that (`del module.forward`, or accelerate.hooks.remove_hook_from_module(module))"


def accelerate(model, cuda_graphs=None, frozen=None, training_graphs=None):
    """Put the kernels into every transformers.BertModel inside `model`, in place, and likewise into
    RobertaModel, XLMRobertaModel, CamembertModel, ElectraModel and DistilBertModel.

    model        any torch.nn.Module: a BertModel, a BERT with a head, a SentenceTransformer, ...
    cuda_graphs  whether to record and replay forwards on a GPU where their kernels take longer to
                 launch than to run, at the cost of memory; see graphs.py. None leaves the setting
                 unchanged; it is on by default.
    frozen       whether the weights will no longer be written to: on a CPU products then run on a
                 copy of them, which is faster for short inputs; see frozen.py. None leaves the
                 setting unchanged; it is off by default.
    training_graphs  whether to record and replay training steps on a GPU likewise; see
                 training_graphs.py. None leaves the setting unchanged; it is off by default.

    Returns model. Weights, names and outputs stay; a module's class becomes the bert_fast class of
    its name. On a model that is already accelerated, the options that are given are changed, or a
    log line says that there is nothing to do. A log line names any encoder whose forward has been
    replaced on the module, as it does not reach the kernels. Raises ValueError if there is nothing
    to accelerate, naming what was found, and TypeError if model is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    modules = list(model.modules())
    todo = [m for m in modules if type(m) in ENCODERS.values()]
    there = [m for m in modules if isinstance(m, tuple(ENCODERS))]
    encoders = there + todo
    if not encoders:
        found = sorted({type(m).__name__ for m in modules if _is_telling(m)}) or ["no such module"]
        raise ValueError(
            f"accelerate: looked for transformers.BertModel inside {type(model).__name__}, or"
            f" {', '.join(sorted(c.__name__ for c in ENCODERS if c.__name__ != 'BertModel'))};"
            f" found {', '.join(found)}"
        )
    for module in todo:
        put_on(module)
    changed = []
    for module in encoders:
        if cuda_graphs is not None:
            changed.append(graphs.of_inference.turn(module, cuda_graphs))
        if frozen is not None:
            changed.append(frozen_weights.turn(module, frozen))
        if training_graphs is not None:
            changed.append(of_training.turn(module, training_graphs))
        changed.append(_uncover(module))
    for path, module in model.named_modules():
        if module in encoders and _hides_kernels(module):
            logger.warning(
                "bert_fast: accelerate: %s does not run on the kernels: %s", path or "the model",
                f"its {REPLACED}; {UNDO}, accelerate, and replace it then",
            )  # fmt: skip
    if not todo and not any(changed):
        logger.warning("bert_fast: accelerate: already accelerated, nothing to do")
    return model


def _uncover(module):
    """Remove from a module a stock or class forward that shadows the class's own: Accelerate leaves
    one there when it removes a hook. Returns whether there was one."""
    classes = (type(module), STOCK.get(type(module), type(module)))
    if module.__dict__.get("forward") not in [cls.forward.__get__(module) for cls in classes]:
        return False
    del module.forward
    return True


def _hides_kernels(module):
    """Whether an encoder has a forward of its own that does not call its class's. Wrappers such as
    those of torch.compile and Accelerate expose what they wrap."""
    if "forward" not in module.__dict__:
        return False
    inner = inspect.unwrap(module.forward)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    of_another = getattr(inner, "__self__", module) is not module
    own = inspect.unwrap(type(module).forward)
    return of_another or inspect.unwrap(getattr(inner, "__func__", inner)) is not own


def restore(model):
    """Turn every bert_fast class inside `model` back into its transformers class, in place.

    Returns model, with its weights unchanged to the bit. A model without any is left as it is, and
    a log line says so. Raises ValueError for a class derived from one of bert_fast's, or if code
    that replaced an encoder's forward would go on calling that of bert_fast; TypeError if model is
    not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        if type(module) not in STOCK and (base := _base_of(module)):
            raise ValueError(
                f"restore: {path or 'the model'} is a {type(module).__name__}, made of bert_fast's"
                f" {base.__name__}, and what else that class does is not known here; restore before"
                " fully_shard, or derive it from transformers' class and accelerate"
            )
    todo = [m for m in model.modules() if type(m) in STOCK]
    if not todo:
        logger.warning("bert_fast: restore: nothing of bert_fast in it, nothing to do")
    for path, module in model.named_modules():
        if type(module) not in ENCODERS:
            continue
        _uncover(module)
        if "forward" in module.__dict__ and not _hides_kernels(module):
            raise ValueError(
                f"restore: {path or 'the model'} would go on calling bert_fast: its {REPLACED};"
                f" {UNDO}, and restore then"
            )
    for module in todo:
        if type(module) in ENCODERS:
            module.__dict__.pop("_bert_fast_calls", None)
            graphs.of_inference.forget(module)
            of_training.forget(module)
            frozen_weights.turn(module, False)
            forget(module)
        module.__class__ = STOCK[type(module)]
    return model


def _base_of(module):
    """The bert_fast class that a module's class is or derives from, or None."""
    return next((cls for cls in type(module).__mro__ if cls in STOCK), None)


def _is_telling(module):
    """Whether a module's class name tells a user what the model is."""
    name = type(module).__name__
    return isinstance(module, transformers.PreTrainedModel) or name.endswith("Model")


@dataclasses.dataclass(frozen=True)
class Swapped:
    """One encoder that has the kernels."""

    path: str  # of the module inside the model, "" for the model itself
    architecture: str  # "bert", "roberta", ...: the model_type of its config
    layers: int
    dtype: str
    device: str
    backend: str | None  # "triton", "pytorch" or "interpreter"; None where the stock forward runs
    reason: str | None  # why the stock forward would run now
    fast_calls: int
    stock_calls: dict[str, int]  # by reason
    frozen: bool  # whether accelerate was told that the weights are frozen
    cuda_graphs: int | None  # how many are recorded now; None if turned off, or not on a GPU
    cuda_graphs_off: str | None  # why no more are recorded
    training_graphs: int | None  # as cuda_graphs, for training; None if not turned on
    training_graphs_off: str | None


@dataclasses.dataclass(frozen=True)
class Attention:
    """The attentions inside a model that ran through attn_implementation="bert_fast"."""

    modules: int
    fast_calls: int
    stock_calls: dict[str, int]  # by reason


@dataclasses.dataclass(frozen=True)
class Report:
    """What runs on the kernels inside a model, what does not, and why."""

    model: str
    swapped: tuple[Swapped, ...]
    stock: tuple[str, ...]  # paths of encoders that could be accelerated
    attention: Attention | None = None  # None where none ran

    def to_dict(self):
        """The same as dicts and tuples, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self):
        out = io.StringIO()
        print(f"bert_fast report of {self.model}", file=out)
        for s in self.swapped:
            runs = f"runs on {s.backend}" if s.reason is None else f"runs stock: {s.reason}"
            what = f"{s.layers} layers of {s.architecture}, {s.dtype} on {s.device}"
            print(f"  {s.path or 'the model itself'}: {what}, {runs}", file=out)
            print(f"    {s.fast_calls} fast calls", file=out)
            for reason, count in s.stock_calls.items():
                print(f"    {count} calls on the stock forward: {reason}", file=out)
            if s.frozen:
                print("    weights are frozen", file=out)
            for count, off, what in (
                (s.cuda_graphs, s.cuda_graphs_off, "CUDA graphs"),
                (s.training_graphs, s.training_graphs_off, "CUDA graphs of training"),
            ):
                if count is not None:
                    print(f"    {count} {what}{f', off: {off}' if off else ''}", file=out)
        for path in self.stock:
            print(f"  {path or 'the model itself'}: stock, not accelerated", file=out)
        if a := self.attention:
            print(f'  {a.modules} attentions of attn_implementation="bert_fast":', file=out)
            print(f"    {a.fast_calls} fast calls", file=out)
            for reason, count in a.stock_calls.items():
                print(f"    {count} calls on transformers' own: {reason}", file=out)
        if not self.swapped and not self.stock and not self.attention:
            print("  no BertModel in it, nor another that the kernels know", file=out)
        return out.getvalue().rstrip()


def report(model):
    """What the kernels do for `model`: a Report, to print or to read.

    `reason` and `backend` describe a plain call of the model in its present state; the counts are
    the calls of each encoder since it was accelerated. Raises TypeError if model is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"report: model must be a torch.nn.Module, got {type(model).__name__}")
    swapped, stock, attention = [], [], []
    for path, module in model.named_modules():
        if isinstance(module, tuple(ENCODERS)):
            weight = next(module.parameters(), None)
            if weight is None:  # then they are plain tensors
                weight = at(module, module.architecture.embeddings.word).weight
            hidden = "forward replaced on the module" if _hides_kernels(module) else None
            reason = hidden or _reason_of_plain_call(module) or reason_of_model(module)
            calls = calls_of(module)
            on_gpu = graphs.there_are(weight.device)
            held = graphs.graphs_of(module) if on_gpu else None
            trains = training_graphs_of(module) if on_gpu else None
            swapped.append(
                Swapped(
                    path=path,
                    architecture=module.architecture.model_type,
                    layers=len(layers_of(module)),
                    dtype=str(weight.dtype).removeprefix("torch."),
                    device=str(weight.device),
                    backend=None if reason else ops.backend(weight.device),
                    reason=reason,
                    fast_calls=calls.fast,
                    stock_calls=dict(calls.stock),
                    frozen=frozen_weights.is_frozen(module),
                    cuda_graphs=held and held.count,
                    cuda_graphs_off=held and held.off,
                    training_graphs=trains and trains.count,
                    training_graphs_off=trains and trains.off,
                )
            )
        elif type(module) in ENCODERS.values():
            stock.append(path)
        elif "_bert_fast_calls" in vars(module):
            attention.append(calls_of(module))
    return Report(type(model).__name__, tuple(swapped), tuple(stock), _sum_up(attention))


def _reason_of_plain_call(module):
    """The reason why a call with only its required arguments would run stock, or None."""
    states = torch.empty(0) if decodes(module) and crosses(module) else None
    return reason_of_call(module, Inputs(encoder_hidden_states=states), {})


def _sum_up(calls):
    if not calls:
        return None
    stock = sum((c.stock for c in calls), collections.Counter())
    return Attention(len(calls), sum(c.fast for c in calls), dict(stock))
