"""The encoder, written once over the ops for every architecture: what is computed for a call.

    input_ids, attention_mask [B, S]
      Tokens        row_index, cu_seqlens: where the T tokens are
      embed         word + position + token type, LayerNorm            x [T, H]
      each layer    q, k, v in one product -> attention -> product     [T, 3H] -> [T, H]
                    LayerNorm(... + x)                                 x [T, H]
                    in a decoder, the same over the encoder's tokens   [T, H], [Tk, 2H] -> [T, H]
                    product -> GELU -> product                         [T, 4H] -> [T, H]
                    LayerNorm(... + x)                                 x [T, H]
      unpack        zeros where there is no token                      [B, S, H]

The ops find their implementation by device. Where a module is, architectures.py says.
"""

import collections
import threading
from typing import NamedTuple

import torch
from torch.multiprocessing import reductions

from . import kernels as ops
from .architectures import find
from .frozen import prepacked
from .kernels.linear import prepacked_linear


# -- tokens ---------------------------------------------------------------------------------
class Tokens:
    """Where the tokens of a batch [B, S] are; `cu_seqlens` as attention takes it.

    row_index, packed_row   as of `pack`; None for a batch without padding, which is packed already
    num_tokens              T on the device, for tensors of B * S rows; None for tensors of T rows

    static  whether T stays on the device; None means as _stays_on_device says. Else it is read, and
            a GPU waited for.
    """

    def __init__(self, attention_mask, B, S, device, static=None):
        self.shape = (B, S)
        self.row_index = self.packed_row = self.num_tokens = None
        if attention_mask is None:
            self.cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=device) * S
            return
        row_index, packed_row, self.cu_seqlens = ops.pack(attention_mask)
        if _stays_on_device(device) if static is None else static:
            self.row_index, self.packed_row = row_index, packed_row
            self.num_tokens = self.cu_seqlens[-1:]
            return
        T = int(self.cu_seqlens[-1])
        if T < B * S:
            self.row_index, self.packed_row = row_index[:T], packed_row

    def pack(self, x):
        """x [B, S, ...] without its padding: [T, ...], or B * S rows beside num_tokens."""
        x = x.flatten(0, 1)
        return x if self.row_index is None else x.index_select(0, self.row_index)

    def unpack(self, x):
        """x [T, H] at its positions: [B, S, H]."""
        if self.packed_row is None:
            return x.view(*self.shape, x.shape[1])
        return ops.unpack(x, self.packed_row)


def _stays_on_device(device):
    """Whether T does: where no shape may depend on data (torch.compile, torch.export, CUDA graph
    capture), and on a GPU unless gradients are wanted, whose ops are PyTorch on T rows."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and (
        not torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing()
    )


class Memory(NamedTuple):
    """What a decoder's cross attention reads: the states of an encoder, packed."""

    states: torch.Tensor  # [Tk, H]
    tokens: Tokens


# -- the encoder ----------------------------------------------------------------------------
def embed(model, inputs, tokens, seeds):
    """The embeddings of the tokens of Inputs: [T, H]. Each dropout takes the next of seeds."""
    architecture, position_ids = model.architecture, inputs.position_ids
    parts = find(model, architecture.embeddings)
    if position_ids is None and architecture.position_ids:
        position_ids = architecture.position_ids(model, inputs.input_ids, inputs.inputs_embeds)
    word, norm = parts.word.weight, parts.norm
    x = ops.embedding(
        inputs.input_ids,
        word,
        _frozen_row(parts.position.weight, parts.position.padding_idx),
        parts.token_type.weight if parts.token_type else word.new_zeros(1, word.shape[1]),
        norm.weight,
        norm.bias,
        inputs_embeds=inputs.inputs_embeds,
        token_type_ids=inputs.token_type_ids,
        position_ids=position_ids,
        row_index=tokens.row_index,
        eps=norm.eps,
        padding_idx=parts.word.padding_idx,
        num_tokens=tokens.num_tokens,
    )
    if torch.is_grad_enabled() and any(map(asks_for_gradients, parts.word._forward_hooks.values())):
        x.requires_grad_()  # it may already
    if _drops(parts.dropout):
        x = _drop(parts.dropout, x, tokens, seeds)
    project = architecture.project and model._modules.get(architecture.project)
    return _product([project], x, tokens) if project else x


def asks_for_gradients(hook):
    """Whether a hook is what transformers puts on word embeddings for gradient checkpointing: what
    comes out of them requires gradients, also where they are frozen."""
    name = getattr(hook, "__name__", "")
    return name == "make_inputs_require_grads" and hook.__module__.startswith("transformers.")


class _FrozenRow(torch.autograd.Function):
    """A table itself, one row of which gets no gradient."""

    @staticmethod
    def forward(ctx, table, row):
        ctx.row = row
        return table.view_as(table)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.row] = 0
        return grad, None


def _frozen_row(table, padding_idx):
    """A table as torch.nn.Embedding has it: row padding_idx, if there is one, is not trained."""
    if padding_idx is None or not (table.requires_grad and torch.is_grad_enabled()):
        return table
    return _FrozenRow.apply(table, padding_idx)


def layer_forward(architecture, layer, x, tokens, seeds, causal, memory=None, cache=None, index=0):
    """One layer: x [T, H] -> [T, H]. A cache of transformers gets its keys and values, as layer
    `index`."""
    part = find(layer, architecture.attention)
    o = _attend(part, x, tokens, seeds, causal, cache, index)
    x = _add_norm(part, part.dense, o, x, tokens, seeds)
    if memory is not None:
        part = find(layer, architecture.cross_attention)
        o = _attend_to(part, x, tokens, seeds, memory, cache, index)
        x = _add_norm(part, part.dense, o, x, tokens, seeds)
    part = find(layer, architecture.feed_forward)
    h = _product([part.up], x, tokens, "gelu")
    return _add_norm(part, part.down, h, x, tokens, seeds)


def checkpoints(layer):
    """Whether gradient checkpointing is on for a layer, as transformers notes it there."""
    on = layer.__dict__.get("gradient_checkpointing", False)
    return on and layer.training and torch.is_grad_enabled()


def checkpointed(architecture, layer, x, tokens, seeds, causal, memory=None):
    """layer_forward, of which nothing is kept for the backward but x, where it runs once more, on
    the same seeds: by the function that transformers has put on the layer."""
    drawn = []

    def run(x, states):
        there = memory and memory._replace(states=states)
        return layer_forward(architecture, layer, x, tokens, _again(drawn, seeds), causal, there)

    return layer._gradient_checkpointing_func(run, x, memory and memory.states)


def _again(drawn, seeds):
    """Those drawn before, then others, which are drawn then."""
    yield from tuple(drawn)
    for seed in seeds:
        drawn.append(seed)
        yield seed


def _attend(part, x, tokens, seeds, causal, cache, index):
    """Self attention: x [T, H] -> [T, H]."""
    q, k, v = _products(x, tokens, part.core, part.query, part.key, part.value)
    if cache is not None:
        _keep(getattr(cache, "self_attention_cache", cache), index, k, v, tokens)
    o = ops.attention(
        q, k, v, tokens.cu_seqlens, tokens.shape[1],
        causal=causal, scale=part.core.scaling, num_tokens=tokens.num_tokens,
        **_dropout_of(part.core, seeds),
    )  # fmt: skip
    return o.flatten(1)


def _attend_to(part, x, tokens, seeds, memory, cache, index):
    """Cross attention: x [T, H] asks, memory [Tk, H] answers -> [T, H]."""
    (q,) = _products(x, tokens, part.core, part.query)
    k, v = _products(memory.states, memory.tokens, part.core, part.key, part.value)
    if cache is not None:
        _keep(cache.cross_attention_cache, index, k, v, memory.tokens)
        cache.is_updated[index] = True
    o = ops.attention(
        q, k, v, tokens.cu_seqlens, tokens.shape[1],
        cu_seqlens_k=memory.tokens.cu_seqlens, max_seqlen_k=memory.tokens.shape[1],
        scale=part.core.scaling, num_tokens=tokens.num_tokens, **_dropout_of(part.core, seeds),
    )  # fmt: skip
    return o.flatten(1)


def _dropout_of(core, seeds):
    """Keywords of attention for its dropout. Whether core trains counts, as in stock."""
    if core.training and core.dropout.p:
        return {"dropout_p": core.dropout.p, "seed": next(seeds)}
    return {}


def _products(x, tokens, core, *linears):
    """The products of x [T, H] with one or more Linears of equal size: [T, heads, D] of each."""
    y, D = _product(linears, x, tokens), core.attention_head_size
    # Not len(x), here and in the ops: torch.export would take it for a constant.
    return y.view(x.shape[0], len(linears), y.shape[1] // (len(linears) * D), D).unbind(1)


def _product(linears, x, tokens, activation=None, residual=None):
    """The product of x [T, K] with the rows of all Linears, and what `linear` does to it. Under
    autocast it is in its dtype, like the products of stock."""
    bias = _one_of(linears, "bias")
    dtype = _autocast(x)
    if dtype is None and tokens.num_tokens is None:
        if (packed := prepacked(linears, x)) is not None:
            return prepacked_linear(x, packed, bias, activation, residual)
    weight = _one_of(linears, "weight")
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return ops.linear(x, weight, bias, activation, residual, num_tokens=tokens.num_tokens)


def _one_of(linears, name):
    """Their parameters of a name as one: by way of _parameters, as in `at`, which replicas of
    DataParallel do without."""
    parts = []
    for m in linears:
        p = m._parameters.get(name)
        parts.append(getattr(m, name) if p is None else p)
    return parts[0] if len(parts) == 1 else as_one(*parts)


def _autocast(x):
    """The dtype that products on the device of x are to have, or None for that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _add_norm(part, linear, h, x, tokens, seeds):
    """LayerNorm(dropout(linear(h)) + x): the end of an attention and of a feed-forward. x is added
    by the product, or by the dropout that follows, or under autocast, where x is wider, by
    LayerNorm."""
    drops, wider, norm = _drops(part.dropout), _autocast(x) is not None, part.norm
    h = _product([linear], h, tokens, residual=None if drops or wider else x)
    if drops:
        h = _drop(part.dropout, h, tokens, seeds, residual=None if wider else x)
    h, residual = (x, h) if wider else (h, None)
    return ops.layer_norm(
        h, norm.weight, norm.bias, residual, norm.eps, num_tokens=tokens.num_tokens
    )


def _drops(dropout):
    return dropout is not None and dropout.training and dropout.p > 0


def _drop(dropout, x, tokens, seeds, residual=None):
    return ops.dropout(x, dropout.p, next(seeds), residual, num_tokens=tokens.num_tokens)


def _keep(cache, index, k, v, tokens):
    """Put k and v [T, heads, D] into layer `index` of a cache, at their positions."""
    k, v = (tokens.unpack(t.flatten(1)).unflatten(2, t.shape[1:]).transpose(1, 2) for t in (k, v))
    cache.update(k, v, index)


# -- q, k, v as one product -----------------------------------------------------------------
_moving = threading.Lock()


def as_one(*parts):
    """The parameters parts [N, ...] as one tensor [len(parts) * N, ...], with no copy if possible.

    The first call moves the parameters into one storage, in which they stay rows of one tensor: the
    same parameters under the same names, no memory more, and never out of date whoever writes to
    them. Where they cannot be moved (shared with other processes, views of someone's buffer, under
    torch.compile or in the capture of a CUDA graph), or gradients are to reach them, they are
    concatenated at every call.
    """
    wants_gradients = torch.is_grad_enabled() and any(p.requires_grad for p in parts)
    if wants_gradients or torch.compiler.is_compiling():
        return torch.cat(parts)
    if not _adjacent(parts):
        with _moving:  # another thread may have moved them meanwhile
            if not _adjacent(parts):
                if not all(map(_movable, parts)) or _is_captured(parts[0].device):
                    return torch.cat(parts)
                with torch.inference_mode(False), torch.no_grad():
                    rows = torch.cat(parts).split([len(p) for p in parts])
                _finish_work(parts[0].device)
                for p, row in zip(parts, rows):
                    p.data = row
    first = parts[0].detach()
    return first.as_strided((len(parts) * len(first), *first.shape[1:]), first.stride())


def _adjacent(parts):
    """Whether parts are equal in shape and follow each other in one storage."""
    first = parts[0]
    start, size = first.data_ptr(), first.nbytes
    return all(
        p.data_ptr() == start + i * size and p.shape == first.shape and p.is_contiguous()
        for i, p in enumerate(parts)
    ) and first.untyped_storage().nbytes() >= size * len(parts)


def _movable(p):
    return (
        isinstance(p, torch.nn.Parameter)
        and not p.is_inference()
        and p.untyped_storage().nbytes() == p.nbytes
        and not _is_shared(p)
    )


def _is_captured(device):
    """Whether nothing is computed now, only recorded, into memory that a replay will fill."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _finish_work(device):
    """What other streams will read has been written, and what is freed they have read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_shared(p):
    """Whether other processes have this memory. torch says so of everything on a GPU; what has been
    sent or received is in the table of torch.multiprocessing."""
    if p.device.type == "cpu" and p.is_shared():
        return True
    mine = reductions.StorageWeakRef(p.untyped_storage())
    return any(mine == theirs for theirs in list(reductions.shared_cache.values()))


def split_storage(model):
    """Undo as_one: give each parameter that it moved a storage of its own, bits unchanged."""
    sharing = collections.defaultdict(list)
    for p in model.parameters():
        storage = p.untyped_storage() if type(p) is torch.nn.Parameter else None
        if storage is not None and storage.nbytes() > p.nbytes:
            sharing[storage.data_ptr()].append(p)
    for parts in sharing.values():
        size = parts[0].untyped_storage().nbytes()
        if len(parts) in (2, 3) and _adjacent(parts) and size == sum(p.nbytes for p in parts):
            for p in parts:
                p.data = p.data.clone()
