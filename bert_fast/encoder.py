"""The encoder, written once over the ops for every architecture: what is computed for a call.

    input_ids, attention_mask [B, S]
      Tokens        row_index, cu_seqlens: where the T tokens are
      embed         word + position + token type, LayerNorm            x [T, H]
      each layer    query, key, value -> attention -> product          [T, 3, H] -> [T, H]
                    LayerNorm(... + x)                                 x [T, H]
                    in a decoder, the same over the encoder's tokens   [T, H], [Tk, H] -> [T, H]
                    product -> GELU -> product                         [T, 4H] -> [T, H]
                    LayerNorm(... + x)                                 x [T, H]
      unpack        zeros where there is no token                      [B, S, H]

The ops select their implementation by device; architectures.py says where the modules are.
"""

from typing import NamedTuple

import torch

from . import kernels as ops
from .architectures import find
from .frozen import prepacked
from .kernels.launch import is_recorded
from .kernels.linear import prepacked_linear
from .trained_layer import Settings, is_trained, trained_layer


# -- tokens ---------------------------------------------------------------------------------
class Tokens:
    """Where the tokens of a batch [B, S] are; `cu_seqlens` as attention takes it.

    row_index, packed_row   from `pack`; None for a batch without padding, which is packed already
    num_tokens              T on the device, for tensors of B * S rows; None for tensors of T rows

    static  whether T stays on the device; if not, it is read, which waits for a GPU. None means
            _stays_on_device decides.
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
        """x [B, S, ...] without its padding: [T, ...], or [B * S, ...] together with num_tokens."""
        x = x.flatten(0, 1)
        return x if self.row_index is None else x.index_select(0, self.row_index)

    def unpack(self, x):
        """x [T, H] at its positions: [B, S, H]."""
        if self.packed_row is None:
            return x.view(*self.shape, x.shape[1])
        return ops.unpack(x, self.packed_row)


def _stays_on_device(device):
    """Whether T stays on the device: where no shape may depend on data (torch.compile,
    torch.export, CUDA graph capture), and on a GPU unless gradients are on, as their products are
    PyTorch's, on T rows."""
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
        _frozen_row(parts.token_type.weight, parts.token_type.padding_idx)
        if parts.token_type
        else word.new_zeros(1, word.shape[1]),
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
        x.requires_grad_()  # no effect if it already does
    if _drops(parts.dropout):
        x = _drop(parts.dropout, x, tokens, seeds)
    project = architecture.project and model._modules.get(architecture.project)
    return _product(project, x, tokens) if project else x


def asks_for_gradients(hook):
    """Whether a hook is the one that transformers puts on word embeddings for gradient
    checkpointing: it makes their output require gradients, even if they are frozen."""
    name = getattr(hook, "__name__", "")
    return name == "make_inputs_require_grads" and hook.__module__.startswith("transformers.")


class _FrozenRow(torch.autograd.Function):
    """A table, unchanged, one row of which gets no gradient."""

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
    """A table as in torch.nn.Embedding: row padding_idx, if there is one, is not trained."""
    if padding_idx is None or not (table.requires_grad and torch.is_grad_enabled()):
        return table
    return _FrozenRow.apply(table, padding_idx)


def layer_forward(architecture, layer, x, tokens, seeds, causal, memory=None, cache=None):
    """One layer: x [T, H] -> [T, H]. Its keys and values are put into cache, transformers'."""
    part, feed_forward = find(layer, architecture.attention), find(layer, architecture.feed_forward)
    if memory is None and cache is None and is_recorded():
        modules = (
            part.query, part.key, part.value, part.dense, feed_forward.up, feed_forward.down,
            part.norm, feed_forward.norm,
        )  # fmt: skip
        parameters = [parameter(module, name) for module in modules for name in ("weight", "bias")]
        if is_trained(x, parameters):
            settings = _settings(part, feed_forward, x, tokens, seeds, causal)
            return trained_layer(x, settings, parameters)
    o = _attend(part, x, tokens, seeds, causal, cache)
    x = _add_norm(part, part.dense, o, x, tokens, seeds)
    if memory is not None:
        part = find(layer, architecture.cross_attention)
        o = _attend_to(part, x, tokens, seeds, memory, cache)
        x = _add_norm(part, part.dense, o, x, tokens, seeds)
    h = _product(feed_forward.up, x, tokens, "gelu")
    return _add_norm(feed_forward, feed_forward.down, h, x, tokens, seeds)


def _settings(part, feed_forward, x, tokens, seeds, causal):
    """The Settings of a trained layer. Seeds are taken in the order of layer_forward."""
    core = part.core
    dropouts = []
    for drops, dropout in (
        (core.training and core.dropout.p, core.dropout),
        (_drops(part.dropout), part.dropout),
        (_drops(feed_forward.dropout), feed_forward.dropout),
    ):
        dropouts.append((dropout.p, next(seeds)) if drops else (0.0, None))
    eps = part.norm.eps, feed_forward.norm.eps
    return Settings(
        tokens.cu_seqlens, tokens.shape[1], tokens.num_tokens,
        causal, core.attention_head_size, core.scaling, *dropouts, eps, autocast_dtype(x.device),
    )  # fmt: skip


def checkpoints(layer):
    """Whether a layer runs with gradient checkpointing now."""
    return keeps_no_cache(layer) and torch.is_grad_enabled()


def keeps_no_cache(layer):
    """Whether gradient checkpointing is on for a layer, where transformers keeps that flag: stock
    then drops the cache, before transformers 5.24 without gradients too."""
    return layer.__dict__.get("gradient_checkpointing", False) and layer.training


def checkpointed(architecture, layer, x, tokens, seeds, causal, memory=None):
    """layer_forward, saving only x for the backward, where it runs again with the same seeds;
    through the function that transformers has put on the layer."""
    drawn = []

    def run(x, states):
        there = memory and memory._replace(states=states)
        return layer_forward(architecture, layer, x, tokens, _again(drawn, seeds), causal, there)

    return layer._gradient_checkpointing_func(run, x, memory and memory.states)


def _again(drawn, seeds):
    """The seeds drawn before, then new ones, which are recorded as they are drawn."""
    yield from tuple(drawn)
    for seed in seeds:
        drawn.append(seed)
        yield seed


def _attend(part, x, tokens, seeds, causal, cache):
    """Self attention: x [T, H] -> [T, H]."""
    q, k, v = _query_key_value(part, x, tokens)
    if cache is not None:
        _keep(getattr(cache, "self_attention_cache", cache), part.core.layer_idx, k, v, tokens)
    o = ops.attention(
        q, k, v, tokens.cu_seqlens, tokens.shape[1],
        causal=causal, scale=part.core.scaling, num_tokens=tokens.num_tokens,
        **_dropout_of(part.core, seeds),
    )  # fmt: skip
    return o.flatten(1)


def _attend_to(part, x, tokens, seeds, memory, cache):
    """Cross attention: queries from x [T, H], keys and values from memory [Tk, H] -> [T, H]."""
    q = _heads(part, _product(part.query, x, tokens))
    k, v = (_heads(part, _product(m, *memory)) for m in (part.key, part.value))
    if cache is not None:
        _keep(cache.cross_attention_cache, part.core.layer_idx, k, v, memory.tokens)
        cache.is_updated[part.core.layer_idx] = True
    o = ops.attention(
        q, k, v, tokens.cu_seqlens, tokens.shape[1],
        cu_seqlens_k=memory.tokens.cu_seqlens, max_seqlen_k=memory.tokens.shape[1],
        scale=part.core.scaling, num_tokens=tokens.num_tokens, **_dropout_of(part.core, seeds),
    )  # fmt: skip
    return o.flatten(1)


def _dropout_of(core, seeds):
    """Keywords of attention for its dropout; as in stock, core.training decides."""
    if core.training and core.dropout.p:
        return {"dropout_p": core.dropout.p, "seed": next(seeds)}
    return {}


def _query_key_value(part, x, tokens):
    """x [T, H] -> [T, heads, D] of each."""
    linears = part.query, part.key, part.value
    packed = _frozen(linears, x, tokens)
    if packed is not None:
        bias = torch.cat([parameter(m, "bias") for m in linears])
        y = prepacked_linear(x, packed, bias).unflatten(1, (3, -1))
    else:
        parameters = [parameter(m, name) for m in linears for name in ("weight", "bias")]
        y = ops.qkv(*_autocasted(x, *parameters), num_tokens=tokens.num_tokens)
    return _heads(part, y).unbind(1)


def _heads(part, y):
    """y [..., H] -> [..., heads, D]"""
    D = part.core.attention_head_size
    # Not unflatten: torch.export would take len(y) for a constant.
    return y.view(*y.shape[:-1], y.shape[-1] // D, D)


def _product(linear, x, tokens, activation=None, residual=None):
    """The product of x [T, K] with a Linear, with linear's epilogue. Under autocast it runs in
    autocast's dtype, like stock's products."""
    weight, bias = parameter(linear, "weight"), parameter(linear, "bias")
    packed = _frozen((linear,), x, tokens)
    if packed is not None:
        return prepacked_linear(x, packed, bias, activation, residual)
    x, weight, bias = _autocasted(x, weight, bias)
    return ops.linear(x, weight, bias, activation, residual, num_tokens=tokens.num_tokens)


def _frozen(linears, x, tokens):
    """Frozen weights for a product with x, stacked; None where there are none."""
    return prepacked(linears, x) if tokens.num_tokens is None else None


def parameter(linear, name):
    """Read through _parameters, as `at` does; DataParallel replicas have none there."""
    p = linear._parameters.get(name)
    return getattr(linear, name) if p is None else p


def _autocasted(*tensors):
    """The tensors in autocast's dtype, if it is on."""
    dtype = autocast_dtype(tensors[0].device)
    return tensors if dtype is None else [t.to(dtype) for t in tensors]


def autocast_dtype(device):
    """The dtype of products on a device under autocast, or None for that of their operands."""
    device = device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _add_norm(part, linear, h, x, tokens, seeds):
    """LayerNorm(dropout(linear(h)) + x), which ends attention and feed-forward. x is added by the
    product, or by a dropout that follows, or, under autocast, where x is wider, by LayerNorm."""
    drops, wider, norm = _drops(part.dropout), autocast_dtype(x.device) is not None, part.norm
    h = _product(linear, h, tokens, residual=None if drops or wider else x)
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
    """Put k and v [T, heads, D] into a cache at their positions, as those of layer `index`: the
    index stored in stock's attention, even if layers have been removed or moved."""
    k, v = (tokens.unpack(t.flatten(1)).unflatten(2, t.shape[1:]).transpose(1, 2) for t in (k, v))
    cache.update(k, v, index)
