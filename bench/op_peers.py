"""What one would run in place of each op: torch and its libraries, and other packages' kernels."""

from functools import partial

import torch
from contenders import BACKENDS, forced, needs, varlen_kernel
from measure import Skip
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from workloads import Contender

from bert_fast.kernels.dropout import dropout_ref


def peer(name, bind, collect=lambda result, **_: [result], **options):
    """bind(**inputs) is what the clock sees. `leaves` of it are the tensors whose gradients are
    asked for, where these are not the inputs themselves; collect takes one tensor of their layout,
    or of the result's, to a list of tensors in the layout of the op."""
    return Contender(
        name,
        lambda problem: lambda inputs: bind(**inputs),
        lambda result, inputs: collect(result, **inputs),
        **options,
    )


# -- attention ------------------------------------------------------------------------------
def _padded_sdpa(
    q, k, v, cu_seqlens, max_seqlen, causal=False, scale=None, dropout_p=0.0, backend=None, **_
):
    lengths = cu_seqlens.diff()
    q, k, v = (
        pad_sequence(t.detach().split(lengths.tolist()), batch_first=True)
        .transpose(1, 2).requires_grad_(t.requires_grad)
        for t in (q, k, v)
    )  # fmt: skip
    valid = torch.arange(max_seqlen, device=q.device) < lengths[:, None]  # [B, S]
    # Padding is at the end, where a causal query sees none of it.
    mask = None if causal or valid.all() else valid[:, None, None]

    def run():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, scale=scale)

    run = forced(backend, q.device, run) if backend else run
    return _of(run, (q, k, v))


def _of(run, leaves):
    """run, with the tensors that it is differentiated in."""

    def bound():
        return run()

    bound.leaves = leaves
    return bound


def _unpadded(o, cu_seqlens, max_seqlen, **_):
    valid = torch.arange(max_seqlen, device=o.device) < cu_seqlens.diff()[:, None]
    return [o.transpose(1, 2)[valid]]


def _varlen(problem):
    """FlashAttention on the packed sequences as they are."""
    first = problem.timed["q"]
    kernel, implementation = varlen_kernel(first.device, first.dtype)

    def bind(q, k, v, cu_seqlens, max_seqlen, causal=False, scale=None, dropout_p=0.0, **_):
        if causal or scale is not None or dropout_p:
            raise Skip("timed without causal and dropout and with the default scale alone")
        return partial(kernel, q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)

    def bind_inputs(inputs):
        return bind(**inputs)

    bind_inputs.implementation = implementation
    return bind_inputs


def _flex(q, k, v, cu_seqlens, max_seqlen, causal=False, scale=None, dropout_p=0.0, **_):
    """FlexAttention over all tokens in a row, with a mask of the blocks that share a sequence."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if dropout_p:
        raise Skip("flex_attention has no dropout")
    if q.requires_grad and q.device.type == "cpu":
        raise Skip("flex_attention has no backward on a CPU")
    T = q.shape[0]
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)

    def seen(b, h, i, j):
        same = sequence[i] == sequence[j]
        return same & (j <= i) if causal else same

    mask = create_block_mask(seen, None, None, T, T, device=q.device)
    attend = torch.compile(flex_attention, dynamic=False)

    def run():
        rows = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, heads, T, D]
        return attend(*rows, block_mask=mask, scale=scale)[0].transpose(0, 1)

    return run


# -- the others -----------------------------------------------------------------------------
def _layer_norm(x, weight, bias, residual=None, eps=1e-12, **_):
    def run():
        h = x if residual is None else x + residual
        return F.layer_norm(h, weight.shape, weight, bias, eps)

    return run


def _liger_layer_norm(problem):
    if problem.timed["x"].device.type != "cuda":
        raise Skip("Liger's kernels run on a GPU alone")
    needs("liger_kernel")
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def bind(inputs):
        x, weight, bias, residual = (inputs[n] for n in ("x", "weight", "bias", "residual"))

        def run():
            h = x if residual is None else x + residual
            return LigerLayerNormFunction.apply(h, weight, bias, inputs["eps"])

        return run

    return bind


def _gelu(x, bias=None, **_):
    return lambda: F.gelu(x if bias is None else x + bias)


def _dropout(x, p, seed, residual=None, **_):
    if x.requires_grad:
        raise Skip("drops other places, so that its gradients cannot be compared")

    def run():
        y = F.dropout(x, p)
        return y if residual is None else y + residual

    return run


def _of_the_definition(y, **inputs):
    return [dropout_ref(**inputs)]  # F.dropout drops other places


def _padded_embedding(
    input_ids, word, position, token_type, weight, bias, token_type_ids, position_ids, **_
):
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)

    def run():
        h = F.embedding(input_ids, word) + F.embedding(token_type_ids, token_type)
        h = h + F.embedding(position_ids, position)
        return F.layer_norm(h, weight.shape, weight, bias, 1e-12)

    return run


def _taken(y, row_index, **_):
    y = y.flatten(0, 1)
    return [y if row_index is None else y[row_index]]


def _nonzero(attention_mask):
    def run():
        tokens = attention_mask != 0
        row_index = tokens.flatten().nonzero().flatten()
        packed_row = torch.full_like(tokens, -1, dtype=torch.int64)
        packed_row.view(-1)[row_index] = torch.arange(len(row_index), device=row_index.device)
        cu_seqlens = F.pad(tokens.sum(1).cumsum(0), (1, 0))
        return row_index, packed_row, cu_seqlens

    return run


def _filled(result, attention_mask):
    row_index, packed_row, cu_seqlens = result
    return [F.pad(row_index, (0, attention_mask.numel() - len(row_index))), packed_row, cu_seqlens]


def _indexed(x, packed_row):
    row_index = (packed_row >= 0).flatten().nonzero().flatten()

    def run():
        out = x.new_zeros(packed_row.numel(), x.shape[1])
        out[row_index] = x
        return out.view(*packed_row.shape, -1)

    return run


def _linear(x, weight, bias=None, activation=None, residual=None, **_):
    return lambda: _followed(F.linear(x, weight, bias), activation, residual)


def _followed(y, activation, residual):
    y = F.gelu(y) if activation else y
    return y if residual is None else y + residual


def _bare(x, weight, bias=None, activation=None, residual=None, **_):
    if not activation and residual is None:
        raise Skip("is F.linear, as nothing follows the product")
    if x.requires_grad:
        raise Skip("forward alone: what follows the product has gradients too")
    return lambda: F.linear(x, weight, bias)


def _with_the_rest(y, activation=None, residual=None, **_):
    return [_followed(y, activation, residual)]  # outside of the clock's sight


def _cublas(x, weight, **_):
    """The product alone: with a bias torch takes cuBLASLt, whatever is preferred."""
    if x.device.type != "cuda":
        raise Skip("cuBLAS runs on a GPU alone")
    if x.requires_grad:
        raise Skip("forward alone: what follows the product has gradients too")
    return partial(_without_lt, x, weight)


def _without_lt(x, weight):
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublas")
    try:
        return F.linear(x, weight)
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def _with_bias_and_the_rest(y, bias=None, **rest):
    return _with_the_rest(y if bias is None else y + bias, **rest)


def _qkv(x, product=F.linear, **parts):
    """One product of x with the three weights below each other, laid so outside of the clock's
    sight where they have no gradients."""

    def stacked():
        names = "query", "key", "value"
        weights, biases = ([parts[f"{n}_{of}"] for n in names] for of in ("weight", "bias"))
        return torch.cat(weights), torch.cat(biases)

    if x.requires_grad:
        return lambda: product(x, *stacked()).unflatten(1, (3, -1))
    weight, bias = stacked()
    return lambda: product(x, weight, bias).unflatten(1, (3, -1))


def _cublas_qkv(x, **parts):
    if x.device.type != "cuda":
        raise Skip("cuBLAS runs on a GPU alone")
    if x.requires_grad:
        raise Skip("forward alone: the bias has gradients too")
    return _qkv(x, lambda x, weight, bias: _without_lt(x, weight), **parts)


def _with_biases(y, query_bias, key_bias, value_bias, **_):
    return [y + torch.stack((query_bias, key_bias, value_bias))]


# The baseline of each op: what one would write with torch alone.
BASELINES = {
    "attention": peer("padded sdpa", _padded_sdpa, _unpadded),
    "layer_norm": peer("F.layer_norm", _layer_norm),
    "gelu": peer("F.gelu", _gelu),
    "dropout": peer("F.dropout", _dropout, _of_the_definition),
    "embedding": peer("padded F.embedding", _padded_embedding, _taken),
    "pack": peer("nonzero", _nonzero, _filled),
    "unpack": peer("index_put", _indexed),
    "linear": peer("F.linear", _linear),
    "qkv": peer("F.linear", _qkv),
}
OTHERS = {
    "attention": (
        *(
            peer(f"padded sdpa {name}", partial(_padded_sdpa, backend=name), _unpadded)
            for name in BACKENDS
        ),
        Contender("FlashAttention", _varlen, lambda result, inputs: [result]),
        peer("flex_attention", _flex, slow=True),
    ),
    "layer_norm": (
        Contender("Liger", _liger_layer_norm, lambda result, inputs: [result]),
    ),
    "linear": (
        peer("cuBLAS product", _cublas, _with_bias_and_the_rest),
        peer("bare product", _bare, _with_the_rest),
    ),
    "qkv": (
        peer("cuBLAS product", _cublas_qkv, _with_biases),
    ),
}  # fmt: skip
