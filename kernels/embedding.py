"""BERT's embedding of the tokens alone: three look-ups, their sum and its LayerNorm, packed.

    r = row_index[t]                    h = word[input_ids[r]] + token_type[token_type_ids[r]]
                                            + position[position_ids[r]]
    y[t] = (h - mean(h)) * rstd * weight + bias         rstd = 1 / sqrt(var(h) + eps)

Shapes     input_ids, token_type_ids, position_ids [B, S]; row_index [T], indices into the B * S;
           word [V, N], position [P, N], token_type [C, N]; weight, bias [N]; y [T, N]; N <= 8192.
           inputs_embeds [B, S, N] may replace word[input_ids]. Without position_ids, a token's
           position is its column; without token_type_ids its type is 0; without row_index, T is
           B * S and all positions are embedded.
Precision  fp32 throughout, the sum h too. y is rounded once, to the dtype of word.
Backward   dh as layer_norm's; each table's gradient sums dh over the tokens that looked it up, in
           fp32. Row padding_idx of word gets none, as in torch.nn.Embedding.
Source     Devlin et al., BERT, 2018, section 3, figure 2.
"""

import torch
from torch.nn import functional as F

from . import launch
from .launch import DTYPES, once_differentiable, show, tl, triton, wait_for_inputs
from .layer_norm import (
    MAX_N,
    check_weight_and_bias,
    layer_norm_ref,
    load_row,
    normalize,
    plain_layer_norm,
    row_config,
)
from .layer_norm_backward import layer_norm_backward
from .spec import Spec


# -- reference ------------------------------------------------------------------------------
def embedding_ref(
    input_ids, word, position, token_type, weight, bias, *, inputs_embeds=None,
    token_type_ids=None, position_ids=None, row_index=None, eps=1e-12, padding_idx=None,
    num_tokens=None,
):
    B, S = (inputs_embeds if input_ids is None else input_ids).shape[:2]
    position_ids = torch.arange(S, device=word.device) if position_ids is None else position_ids
    position_ids = position_ids.expand(B, S)
    token_type_ids = torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids
    if inputs_embeds is None:
        inputs_embeds = F.embedding(input_ids, word, padding_idx)
    h = inputs_embeds + token_type[token_type_ids] + position[position_ids]
    h = h.flatten(0, 1)
    return layer_norm_ref(h if row_index is None else h[row_index.long()], weight, bias, eps=eps)


# -- kernels --------------------------------------------------------------------------------
@triton.jit
def _lookup(table_ptr, ids_ptr, r, count, N, offs_n, mask_n):
    """Row ids[r] of a table [count, N]. An id outside it ends the launch in a device-side assert,
    as in torch.nn.Embedding: it cannot be checked beforehand without waiting for the GPU."""
    index = tl.load(ids_ptr + r).to(tl.int64)
    tl.device_assert((index >= 0) & (index < count), "embedding: an id is outside its table")
    return load_row(table_ptr + index * N, offs_n, mask_n)


@triton.jit(do_not_specialize=["S"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _forward_kernel(
    ids_ptr,  # [B * S] or None
    embeds_ptr,  # [B * S, N] or None: one of the two is given
    type_ids_ptr,  # [B * S] or None
    position_ids_ptr,  # [B * S] or None
    row_index_ptr,  # [T] or None
    num_tokens_ptr,  # [1] or None
    word_ptr,  # [V, N]
    position_ptr,  # [P, N]
    token_type_ptr,  # [C, N]
    weight_ptr,  # [N]
    bias_ptr,  # [N]
    y_ptr,  # [T, N]; all contiguous
    S, V, P, C, N,
    eps,
    BLOCK_N: tl.constexpr,
):
    """Program t embeds packed row t."""
    wait_for_inputs()
    t = tl.program_id(0).to(tl.int64)  # t * N may pass 2^31
    if num_tokens_ptr is not None:
        if t >= tl.load(num_tokens_ptr):
            return
    r = t
    if row_index_ptr is not None:
        r = tl.load(row_index_ptr + t).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if embeds_ptr is not None:
        h = load_row(embeds_ptr + r * N, offs_n, mask_n)
    else:
        h = _lookup(word_ptr, ids_ptr, r, V, N, offs_n, mask_n)
    if type_ids_ptr is not None:
        h += _lookup(token_type_ptr, type_ids_ptr, r, C, N, offs_n, mask_n)
    else:
        h += load_row(token_type_ptr, offs_n, mask_n)
    if position_ids_ptr is not None:
        h += _lookup(position_ptr, position_ids_ptr, r, P, N, offs_n, mask_n)
    else:
        h += load_row(position_ptr + r % S * N, offs_n, mask_n)
    weight = load_row(weight_ptr, offs_n, mask_n)
    bias = load_row(bias_ptr, offs_n, mask_n)

    x_hat, _ = normalize(h, mask_n, N, eps)
    y = x_hat * weight + bias

    tl.store(y_ptr + t * N + offs_n, y, mask=mask_n)


# -- launchers ------------------------------------------------------------------------------
def _forward(
    y, input_ids, inputs_embeds, token_type_ids, position_ids, row_index, word, position,
    token_type, weight, bias, padding_idx, eps, num_tokens,
):
    ids, embeds, types, positions, row_index = (
        None if t is None else t.contiguous()
        for t in (input_ids, inputs_embeds, token_type_ids, position_ids, row_index)
    )
    S = (embeds if ids is None else ids).shape[1]
    if len(y):
        launch.start(
            _forward_kernel, len(y),
            ids, embeds, types, positions, row_index, num_tokens, word.contiguous(),
            position.contiguous(), token_type.contiguous(), weight.contiguous(), bias.contiguous(),
            y, S, len(word), len(position), len(token_type), y.shape[1], eps,
            debug=True, sanitize_overflow=False,  # only to compile device_assert in
            **row_config(y.shape[1]),
        )


def _packed(ids, row_index, num_tokens):
    """ids [B, S, ...] at the tokens: [T, ...]."""
    if ids is None:
        return None
    (row_index,) = launch.head(num_tokens, row_index)
    ids = ids.flatten(0, 1)
    return launch.head(num_tokens, ids)[0] if row_index is None else ids[row_index]


def _positions(shape, row_index, num_tokens, device):
    """Each token's column, in place of position ids: [T]."""
    columns = torch.arange(shape[1], device=device).expand(shape[:2])
    return _packed(columns, row_index, num_tokens)


def _sum(x, types, positions, word, token_type, position, padding_idx=None):
    """h [T, N] in fp32, or fp64 for fp64. x is ids [T] or embeddings [T, N]."""
    wide = torch.promote_types(word.dtype, torch.float32)
    h = F.embedding(x, word, padding_idx).to(wide) if x.ndim == 1 else x.to(wide)
    h = h + (token_type[0] if types is None else F.embedding(types, token_type))
    return h + F.embedding(positions, position)


def _tokens(input_ids, inputs_embeds, token_type_ids, position_ids, row_index, num_tokens):
    """Words (ids or embeddings), types (or None) and positions of the tokens: [T, ...]."""
    given = inputs_embeds if input_ids is None else input_ids
    x, types, positions = (
        _packed(ids, row_index, num_tokens) for ids in (given, token_type_ids, position_ids)
    )
    if positions is None:
        positions = _positions(given.shape, row_index, num_tokens, given.device)
    return x, types, positions


def _plain(
    input_ids, inputs_embeds, token_type_ids, position_ids, row_index, word, position, token_type,
    weight, bias, padding_idx, eps, num_tokens,
):
    given = inputs_embeds if input_ids is None else input_ids
    T = given.shape[0] * given.shape[1] if row_index is None else len(row_index)
    x, types, positions = _tokens(
        input_ids, inputs_embeds, token_type_ids, position_ids, row_index, num_tokens
    )
    for name, ids, table in (
        ("input_ids", x, word), ("token_type_ids", types, token_type),
        ("position_ids", positions, position),
    ):
        if ids is not None and ids.ndim == 1 and len(ids):
            low, high = (bound.item() for bound in ids.aminmax())
            if low < 0 or high >= len(table):
                raise ValueError(
                    f"embedding: {name} must be in 0 to {len(table) - 1}, the rows of its table;"
                    f" got {low if low < 0 else high}"
                )
    # Autograd traces into the bare op of an exported program: hence padding_idx.
    h = _sum(x, types, positions, word, token_type, position, padding_idx)
    return launch.with_room(plain_layer_norm(h, weight, bias, eps, word.dtype), T)


def _plain_backward(
    dy, input_ids, inputs_embeds, token_type_ids, position_ids, row_index, word, position,
    token_type, weight, padding_idx, eps, num_tokens,
):
    # Rows past num_tokens act as tokens with ids of 0 and zero gradients.
    (row_index,) = launch.zeros_past(num_tokens, row_index)
    tokens = _tokens(input_ids, inputs_embeds, token_type_ids, position_ids, row_index, None)
    x, types, positions = launch.zeros_past(num_tokens, *tokens)
    h = _sum(x, types, positions, word, token_type, position)
    dh, *dparams = layer_norm_backward(
        dy.to(h.dtype), h, weight.to(h.dtype), eps=eps, num_tokens=num_tokens
    )

    def scatter(ids, table):
        return dh.new_zeros(table.shape).index_add_(0, ids, dh).to(table.dtype)

    dposition = scatter(positions, position)
    if types is None:
        types = torch.zeros_like(positions)
    dtype = scatter(types, token_type)
    if inputs_embeds is None:
        dword = scatter(x, word)
        if padding_idx is not None:
            dword[padding_idx] = 0
        dembeds = dword.new_empty(0)
    else:
        dword = word.new_empty(0)
        rows = torch.arange(len(dh), device=dh.device) if row_index is None else row_index
        dembeds = scatter(rows, inputs_embeds.flatten(0, 1)).view(inputs_embeds.shape)
    return dword, dembeds, dposition, dtype, torch.stack(dparams)


# -- registration ---------------------------------------------------------------------------
_TENSORS = (
    "Tensor? input_ids, Tensor? inputs_embeds, Tensor? token_type_ids, Tensor? position_ids,"
    " Tensor? row_index, Tensor word, Tensor position, Tensor token_type, Tensor weight"
)


def _outputs(
    input_ids, inputs_embeds, token_type_ids, position_ids, row_index, word, position, token_type,
    weight, bias, padding_idx, eps, num_tokens,
):
    given = inputs_embeds if input_ids is None else input_ids
    T = given.shape[0] * given.shape[1] if row_index is None else row_index.shape[0]
    return word.new_empty(T, word.shape[1])


def _backward_outputs(
    dy, input_ids, inputs_embeds, token_type_ids, position_ids, row_index, word, position,
    token_type, weight, padding_idx, eps, num_tokens,
):
    return (
        word.new_empty(word.shape if inputs_embeds is None else 0),
        word.new_empty(0 if inputs_embeds is None else inputs_embeds.shape),
        position.new_empty(position.shape),
        token_type.new_empty(token_type.shape),
        weight.new_empty(2, *weight.shape, dtype=torch.float32),
    )


_embedding = launch.define(
    f"embedding({_TENSORS}, Tensor bias, int? padding_idx, float eps, Tensor? num_tokens)"
    " -> Tensor",
    outputs=_outputs,
    launch=_forward,
    plain=_plain,
)
_embedding_backward = launch.define_plain(
    f"embedding_backward(Tensor dy, {_TENSORS}, int? padding_idx, float eps, Tensor? num_tokens)"
    " -> (Tensor dword, Tensor dembeds, Tensor dposition, Tensor dtype, Tensor dparams)",
    outputs=_backward_outputs,
    plain=_plain_backward,
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, _, padding_idx, eps, num_tokens = args
        ctx.save_for_backward(*tensors, num_tokens)
        ctx.padding_idx, ctx.eps = padding_idx, eps
        try:
            return _embedding(*args)
        except ValueError:
            ctx = None  # else an error that is kept, as notebooks do, keeps a graph of old tables
            raise

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *tensors, num_tokens = ctx.saved_tensors
        inputs_embeds, weight = tensors[1], tensors[-1]
        dword, dembeds, dposition, dtype, dparams = _embedding_backward(
            dy, *tensors, ctx.padding_idx, ctx.eps, num_tokens
        )
        dweight, dbias = dparams.to(weight.dtype).unbind()
        if inputs_embeds is None:
            dembeds = None
        else:
            dword = None
        return None, dembeds, *[None] * 3, dword, dposition, dtype, dweight, dbias, *[None] * 3


# -- public op ------------------------------------------------------------------------------
def embedding(
    input_ids, word, position, token_type, weight, bias, *, inputs_embeds=None,
    token_type_ids=None, position_ids=None, row_index=None, eps=1e-12, padding_idx=None,
    num_tokens=None,
):
    """LayerNorm of the sum of word, token type and position embeddings, for the tokens alone.

    input_ids       int32 or int64 [B, S]; None where inputs_embeds is given
    word, position, token_type   [V, N], [P, N], [C, N]: the tables, fp32, fp16 or bf16, N <= 8192
    weight, bias    [N] of the LayerNorm, both fp32, fp16 or bf16
    inputs_embeds   [B, S, N] in the dtype of word, to use for word[input_ids]
    token_type_ids  integer [B, S] or [1, S]; None means 0
    position_ids    integer [B, S] or [1, S]; None means the column
    row_index       integer [T]: the positions b * S + s to embed, as `pack` gives; None means all
    eps             of the LayerNorm, added to the variance
    padding_idx     row of word that gets no gradient; None means that all rows get one
    num_tokens      [1] integer on the device: entries of row_index past it are not read, and these
                    rows of the result are not written; None takes all

    Returns [T, N] in the dtype of word. Differentiable once, in the tables, weight, bias and
    inputs_embeds. Raises ValueError for any other shape or dtype, and for an id outside its table
    on the CPU; on a GPU such an id ends the launch in a device-side assertion.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("embedding: give one of input_ids and inputs_embeds")
    if word.ndim != 2 or word.dtype not in DTYPES or not 1 <= word.shape[1] <= MAX_N:
        raise ValueError(
            f"embedding: word must be fp32, fp16 or bf16 [V, 1 to {MAX_N}], got {show(word)}"
        )
    N = word.shape[1]
    for name, t in (("position", position), ("token_type", token_type)):
        if t.ndim != 2 or t.shape[1] != N or t.dtype != word.dtype:
            raise ValueError(f"embedding: {name} must be [rows, {N}] like word, got {show(t)}")
    check_weight_and_bias("embedding", N, weight, bias)
    if inputs_embeds is not None:
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != N:
            got = show(inputs_embeds)
            raise ValueError(f"embedding: inputs_embeds must be [B, S, {N}], got {got}")
        if inputs_embeds.dtype != word.dtype:
            raise ValueError(
                f"embedding: inputs_embeds must have the dtype of word, {word.dtype},"
                f" got {show(inputs_embeds)}"
            )
    elif input_ids.ndim != 2 or input_ids.dtype not in (torch.int32, torch.int64):
        got = show(input_ids)
        raise ValueError(f"embedding: input_ids must be int32 or int64 [B, S], got {got}")
    B, S = (inputs_embeds if input_ids is None else input_ids).shape[:2]
    if position_ids is None and S > len(position):
        raise ValueError(
            f"embedding: at most {len(position)} positions have an embedding, got S = {S}"
        )
    token_type_ids, position_ids = (
        t.expand(B, S) if t is not None and t.shape == (1, S) else t
        for t in (token_type_ids, position_ids)
    )
    for name, t in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if t is not None and (t.shape != (B, S) or t.dtype not in (torch.int32, torch.int64)):
            raise ValueError(f"embedding: {name} must be integer [{B}, {S}], got {show(t)}")
    if row_index is not None and (
        row_index.ndim != 1 or row_index.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(f"embedding: row_index must be integer [T], got {show(row_index)}")
    launch.check_num_tokens("embedding", num_tokens)
    args = (
        input_ids, inputs_embeds, token_type_ids, position_ids, row_index, word, position,
        token_type, weight, bias, padding_idx, float(eps), num_tokens,
    )
    if launch.is_recorded():
        return _Embedding.apply(*args)
    return _embedding(*args)


# -- spec -----------------------------------------------------------------------------------
def _inputs(
    dtype, device, B, S, N, V=11, tokens=None, embeds=False, types=False, positions=False,
    padding_idx=None, id_dtype=torch.int64, spread=1.0, mean=10.0,
):
    def table(count):
        return (spread * torch.randn(count, N, device=device)).to(dtype) + mean

    def draw(high):
        return torch.randint(high, (B, S), device=device, dtype=id_dtype)

    return {
        "input_ids": None if embeds else draw(V),
        "word": table(V), "position": table(S + 3), "token_type": table(2),
        "weight": torch.randn(N, device=device).to(dtype),
        "bias": torch.randn(N, device=device).to(dtype),
        "inputs_embeds": torch.randn(B, S, N, device=device).to(dtype) if embeds else None,
        "token_type_ids": draw(2) if types else None,
        "position_ids": draw(S + 3) if positions else None,
        "row_index": None if tokens is None
        else torch.randperm(B * S, device=device)[:tokens].int(),
        "padding_idx": padding_idx,
    }


def _fuzz(rng):
    B, S = rng.randint(0, 3), rng.randint(1, 9)
    case = {"B": B, "S": S, "N": rng.choice((1, 2, 7, 16, 31, 64, 100, 129, 768))}
    if rng.random() < 0.6:
        case["tokens"] = rng.randint(0, B * S)
    for option in ("embeds", "types", "positions"):
        if rng.random() < 0.4:
            case[option] = True
    if rng.random() < 0.2:
        case["padding_idx"] = rng.randint(0, 10)
    if rng.random() < 0.3:
        case["id_dtype"] = "int32"
    return case


def _cost(itemsize, B, S, N, tokens=None, types=False, positions=False, **_):
    T = B * S if tokens is None else tokens
    indices = 8 * (1 + types + positions) + 4 * (tokens is not None)
    return 11 * T * N, T * (4 * N * itemsize + indices)


SPEC = Spec(
    fn=embedding,
    ref=embedding_ref,
    inputs=_inputs,
    cost=_cost,
    cases=(
        {"B": 2, "S": 5, "N": 128, "tokens": 7},
        {"B": 3, "S": 7, "N": 100, "types": True, "positions": True, "tokens": 13},
        {"B": 2, "S": 3, "N": 129, "padding_idx": 3},  # which is among the ids
        {"B": 2, "S": 3, "N": 64, "embeds": True, "tokens": 4, "types": True, "positions": True},
        {"B": 2, "S": 3, "N": 7, "embeds": True},
        {"B": 1, "S": 1, "N": 1},
        {"B": 2, "S": 3, "N": 64, "tokens": 0},
        {"B": 0, "S": 3, "N": 64},
        {"B": 2, "S": 3, "N": 65, "types": True},
        {"B": 2, "S": 3, "N": 65, "spread": 1e-3, "mean": 0.0},  # a 1 read past N would show
        {"B": 2, "S": 4, "N": 33, "types": True, "positions": True, "id_dtype": torch.int32},
    ),
    fuzz=_fuzz,
    whole={"B": 2, "S": 8, "N": 1024, "types": True, "positions": True},
    huge=(
        {"B": 4200, "S": 512, "N": 1024, "V": 2**22, "id_dtype": torch.int32},
        {"B": 4200, "S": 512, "N": 8192, "embeds": True, "tokens": 4200 * 512 - 9},
    ),
    bench=(
        {"B": 32, "S": 512, "N": 768, "V": 30522, "types": True, "positions": True},
        {"B": 32, "S": 512, "N": 1024, "V": 30522, "types": True, "positions": True,
         "tokens": 7000},
    ),
    rejects={
        "give one of input_ids and inputs_embeds": {"input_ids": None},
        "position must be [rows, 128] like word": {"position": torch.ones(8, 64)},
        "weight and bias must be [128], both fp32, fp16 or bf16": {"weight": torch.ones(3)},
        "input_ids must be int32 or int64 [B, S], got float32[2, 5]": {
            "input_ids": torch.ones(2, 5)
        },
        "token_type_ids must be integer [2, 5], got int64[2, 4]": {
            "token_type_ids": torch.zeros(2, 4).long()
        },
        "at most 8 positions have an embedding, got S = 9": {
            "input_ids": torch.zeros(2, 9).long()
        },
        "num_tokens must be int32[1] or int64[1], got float32[1]": {"num_tokens": torch.ones(1)},
    },
    traps=tuple(
        {name: torch.full((2, 5), id)}
        for name, rows in (("input_ids", 11), ("token_type_ids", 2), ("position_ids", 8))
        for id in (-1, rows)
    ),
    packed=("row_index",),
)
