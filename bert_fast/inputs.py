"""The arguments of a call to an encoder, and the errors for invalid ones."""

import inspect
from typing import NamedTuple

import torch
import transformers

from .architectures import at
from .coverage import reason_of_parts

# What transformers calls a key-value cache, as an argument and in outputs.
CACHE = "cache"
if CACHE not in inspect.signature(transformers.BertModel.forward).parameters:  # before 5.24
    CACHE = "past_key_values"


class Inputs(NamedTuple):
    """The arguments of a forward: B sequences of S positions, and Sk positions of an encoder."""

    input_ids: torch.Tensor | None = None  # integer [B, S]
    attention_mask: torch.Tensor | None = None  # [B, S], what is not zero is a token
    token_type_ids: torch.Tensor | None = None  # integer [B, S] or [1, S]
    position_ids: torch.Tensor | None = None  # integer [B, S] or [1, S]
    inputs_embeds: torch.Tensor | None = None  # [B, S, width of the embeddings]
    encoder_hidden_states: torch.Tensor | None = None  # [B, Sk, H]
    encoder_attention_mask: torch.Tensor | None = None  # [B, Sk]
    cache: transformers.Cache | None = None
    use_cache: bool | None = None

    def shape(self):
        return tuple((self.inputs_embeds if self.input_ids is None else self.input_ids).shape[:2])


TENSORS = "input_ids", "token_type_ids", "position_ids", "inputs_embeds", "encoder_hidden_states"


def check(model, inputs):
    """Raise ValueError for inputs that do not fit, or return the reason to run stock."""
    me = type(model).__name__
    for other_name in TENSORS:
        t = getattr(inputs, other_name)
        if t is not None and not isinstance(t, torch.Tensor):
            raise ValueError(
                f"{me}: {other_name} must be a tensor, got {type(t).__name__};"
                ' tokenizer(..., return_tensors="pt") gives tensors'
            )
    if (inputs.input_ids is None) == (inputs.inputs_embeds is None):
        given = "neither" if inputs.input_ids is None else "both"
        raise ValueError(f"{me}: give input_ids or inputs_embeds, one of them; got {given}")
    if inputs.inputs_embeds is None:
        name, x, want, ndim = "input_ids", inputs.input_ids, "[batch, length]", 2
    else:
        name, x, want, ndim = "inputs_embeds", inputs.inputs_embeds, "[batch, length, hidden]", 3
    if x.ndim != ndim:
        raise ValueError(f"{me}: {name} must be {want}, got {list(x.shape)}")
    B, S = x.shape[:2]
    weight = at(model, model.architecture.embeddings.word).weight
    for other_name in (name, "token_type_ids", "position_ids", "encoder_hidden_states"):
        t = getattr(inputs, other_name)
        if t is not None and t.device != weight.device:
            raise ValueError(
                f"{me}: {other_name} is on {t.device} and the model on {weight.device};"
                f" move it with .to({str(weight.device)!r})"
            )
    for other_name in ("inputs_embeds", "encoder_hidden_states"):
        t = getattr(inputs, other_name)
        if t is not None and t.dtype != weight.dtype:
            return f"{other_name} in {t.dtype}, weights in {weight.dtype}"
    _check_positions(model, inputs, name, S)
    if S == 0 and getattr(model, "pooler", None) is not None:
        raise ValueError(f"{me}: {name} has length 0; the pooler needs a first position")
    for other_name in ("token_type_ids", "position_ids"):
        t = getattr(inputs, other_name)
        if t is None or t.shape in ((B, S), (1, S)):
            continue
        if t.ndim <= 2 and all(n in (1, m) for n, m in zip(t.shape[::-1], (S, B))):
            return f"{other_name} of a shape that stock broadcasts"
        raise ValueError(
            f"{me}: {other_name} must be [{B}, {S}] like {name}, got {list(t.shape)}"
        )
    states = inputs.encoder_hidden_states
    if states is not None and (states.ndim != 3 or states.shape[0] != B):
        want = f"[{B}, length, hidden] like {name}"
        raise ValueError(f"{me}: encoder_hidden_states must be {want}, got {list(states.shape)}")
    for other_name, like, whose, t in (
        ("attention_mask", name, "the input", x),
        ("encoder_attention_mask", "encoder_hidden_states", "encoder_hidden_states", states),
    ):
        mask = getattr(inputs, other_name)
        if mask is None or t is None:
            continue
        if mask.ndim != 2 or mask.shape[0] != B:
            want = f"{list(t.shape[:2])} like {like}"
            raise ValueError(f"{me}: {other_name} must be {want}, got {list(mask.shape)}")
        if mask.shape[1] != t.shape[1]:
            return f"{other_name} of another length than {whose}"
    return None


def first_position(model):
    """The first position where the model numbers them itself: 0, or the padding id plus 1."""
    return 0 if model.architecture.position_ids is None else model.embeddings.padding_idx + 1


def room(model):
    """How many tokens of a sequence have a position, where the model numbers them itself."""
    if reason_of_parts(model):  # stock runs, on the user's own embeddings
        return model.config.max_position_embeddings
    table = at(model, model.architecture.embeddings.position).weight
    return len(table) - first_position(model)


def _check_positions(model, inputs, name, S):
    """Raise for more tokens than there are positions, where the model numbers them itself."""
    if inputs.position_ids is not None:
        return
    count, has, less, first = S, room(model), "", first_position(model)
    if first:
        less = f" less {first}, as counting starts after the padding id"
        if count > has and inputs.input_ids is not None and not torch.compiler.is_compiling():
            # Padding ids take no position. Only here does a check wait for a GPU.
            count = max((inputs.input_ids != first - 1).sum(1).tolist(), default=0)
    if count > has:
        raise ValueError(
            f"{type(model).__name__}: the model has {has} positions (max_position_embeddings"
            f"{less}), {name} has {count};"
            " truncate with tokenizer(..., truncation=True) or split the text"
        )
