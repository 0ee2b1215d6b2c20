"""A trained layer as one autograd function instead of seven.

It launches what layer_forward of encoder.py does, with the same bits. But autograd takes 28 us for
each function written in Python, and more for what it inserts between them: here the gradients of
query, key and value are not stacked, those of their weights are one product, and the gradient of a
residual is added by the product next to it, which rounds once. Where T stays on the device, rows
past it are undefined, in gradients too: nothing reads them.

    a = dropout(o Wo^T + bo) + x        o = attention(x Wq^T + bq, x Wk^T + bk, x Wv^T + bv)
    f = dropout(h Wd^T + bd) + m        h = gelu(m Wu^T + bu)        m = LayerNorm(a)

The result is LayerNorm(f). Under autocast x, m, a and f are wider than the rest, and LayerNorm adds
the residual: then a and f are pairs.
"""

from functools import partial
from typing import NamedTuple

import torch

from . import kernels as ops
from .kernels.launch import directly, once_differentiable
from .kernels.linear import product_gradients


class Settings(NamedTuple):
    """A layer's settings besides parameters. A dropout is (p, seed); p is 0 if nothing drops."""

    cu_seqlens: torch.Tensor
    max_seqlen: int
    num_tokens: torch.Tensor | None  # as in Tokens
    causal: bool
    head_size: int
    scale: float
    of_probabilities: tuple
    after_attention: tuple
    after_feed_forward: tuple
    eps: tuple  # of the two LayerNorms
    dtype: torch.dtype | None  # of products under autocast


class Parameters(NamedTuple):
    """Weight and bias of each Linear and LayerNorm."""

    query: torch.Tensor
    query_bias: torch.Tensor
    key: torch.Tensor
    key_bias: torch.Tensor
    value: torch.Tensor
    value_bias: torch.Tensor
    out: torch.Tensor
    out_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    down: torch.Tensor
    down_bias: torch.Tensor
    norm: torch.Tensor
    norm_bias: torch.Tensor
    last_norm: torch.Tensor
    last_norm_bias: torch.Tensor


LINEARS = 12  # how many of the parameters belong to Linears


def is_trained(x, parameters):
    """Whether all gradients of a layer are needed, in one dtype."""
    if torch.compiler.is_compiling() or not x.requires_grad:
        return False
    return all(p.requires_grad and p.dtype == x.dtype for p in parameters)


def trained_layer(x, settings, parameters):
    """x [T, H] -> [T, H] of a layer for which is_trained."""
    return _Layer.apply(x, settings, *parameters)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, s, *parameters):
        p = Parameters(*(t.to(s.dtype or x.dtype) for t in parameters[:LINEARS]),
                       *parameters[LINEARS:])  # fmt: skip
        narrow_x = x.to(s.dtype or x.dtype)
        y = ops.qkv(narrow_x, *p[:6], num_tokens=s.num_tokens)
        drop, seed = s.of_probabilities
        o = ops.attention(
            *_of_heads(y, s.head_size), s.cu_seqlens, s.max_seqlen,
            causal=s.causal, scale=s.scale, dropout_p=drop, seed=seed, num_tokens=s.num_tokens,
        ).flatten(1)  # fmt: skip
        a = _summands(o, p.out, p.out_bias, x, s.after_attention, s)
        m = ops.layer_norm(a[0], p.norm, p.norm_bias, a[1], s.eps[0], s.num_tokens)
        narrow_m = m.to(s.dtype or m.dtype)
        h = ops.linear(narrow_m, p.up, p.up_bias, "gelu", num_tokens=s.num_tokens)
        f = _summands(h, p.down, p.down_bias, m, s.after_feed_forward, s)
        ctx.save_for_backward(narrow_x, y, o, *a, narrow_m, h, *f, *p)
        ctx.settings = s
        ctx.parameters = parameters if s.dtype else ()  # only copies of them are saved
        return ops.layer_norm(f[0], p.last_norm, p.last_norm_bias, f[1], s.eps[1], s.num_tokens)

    @staticmethod
    @partial(once_differentiable, sources=lambda ctx: (*ctx.saved_tensors, *ctx.parameters))
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False), directly(dy.device, (dy,)):
            return _backward(dy, ctx.settings, *ctx.saved_tensors)


def _summands(x, weight, bias, residual, dropout, s):
    """(LayerNorm's input, and the residual that it adds first or None)"""
    p, seed = dropout
    wide = s.dtype is not None
    added = None if p or wide else residual
    y = ops.linear(x, weight, bias, residual=added, num_tokens=s.num_tokens)
    if p:
        y = ops.dropout(y, p, seed, None if wide else residual, s.num_tokens)
    return (residual, y) if wide else (y, None)


def _of_heads(y, head_size):
    """Query, key and value [T, heads, head_size] from qkv's y."""
    T, _, N = y.shape
    return y.view(T, 3, N // head_size, head_size).unbind(1)


def _backward(dy, s, x, y, o, a, a_added, m, h, f, f_added, *parameters):
    p, dtype, n = Parameters(*parameters), dy.dtype, s.num_tokens
    df, *of_last_norm = ops.layer_norm_backward(dy, f, p.last_norm, f_added, s.eps[1], n)
    dh, *of_down = product_gradients(_dropped(df, s.after_feed_forward, s), h, p.down, n)
    dz = ops.gelu_gradient(dh, m, p.up, p.up_bias, n)
    del dh  # this and dz are the largest
    dm, *of_up = product_gradients(dz, m, p.up, n, df)
    del dz
    da, *of_norm = ops.layer_norm_backward(dm, a, p.norm, a_added, s.eps[0], n)
    do, *of_out = product_gradients(_dropped(da, s.after_attention, s), o, p.out, n)
    drop, seed = s.of_probabilities
    q, k, v = _of_heads(y, s.head_size)
    of_heads = ops.attention_backward(
        do.view(q.shape), q, k, v, s.cu_seqlens, s.max_seqlen,
        causal=s.causal, scale=s.scale, dropout_p=drop, seed=seed,
    )  # fmt: skip
    d, weight = torch.cat([t.flatten(1) for t in of_heads], 1), torch.cat((p.query, p.key, p.value))
    dx, dweight, dbias = product_gradients(d, x, weight, n, da)
    of_qkv = [t for pair in zip(dweight.chunk(3), dbias.chunk(3)) for t in pair]
    of_linears = [t.to(dtype) for t in (*of_qkv, *of_out, *of_up, *of_down)]
    return dx, None, *of_linears, *of_norm, *of_last_norm


def _dropped(d, dropout, s):
    p, seed = dropout
    d = d.to(s.dtype or d.dtype)
    return ops.dropout(d, p, seed, num_tokens=s.num_tokens) if p else d
