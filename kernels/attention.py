"""Multi-head attention over packed sequences: no padding is read or computed.

    o = dropout(softmax(scale * q k^T)) v        for each sequence and head on its own

Shapes     q, o [T, heads, D]; k, v [Tk, heads, D]; D <= 256. Sequence b is rows cu_seqlens[b] to
           cu_seqlens[b + 1] of q, and cu_seqlens_k[b] to cu_seqlens_k[b + 1] of k and v.
           A query without keys gives zeros.
Dropout    Of probabilities, in training; see dropout.py for what is drawn.
Causal     query i of Lq sees key j of Lk where j <= i + Lk - Lq: the last query sees all keys.
Precision  Scores, softmax and sums in fp32. Probabilities are rounded to the dtype of v before
           they are multiplied with it, and o once. fp32 products are exact fp32 ("ieee") unless
           torch.backends.cuda.matmul.fp32_precision allows TF32.
Backward   attention_backward.py.
Source     Vaswani et al., Attention Is All You Need, 2017, section 3.2. The softmax is online, a
           tile of keys at a time: Milakov, Gimelshein, Online normalizer calculation for softmax,
           2018; Dao et al., FlashAttention, 2022, algorithm 1.
"""

import itertools
import math

import torch
from torch.nn import functional as F

from . import launch
from .dropout import check_dropout, draw, factor, hash_rows, most, new_seeds, scales_at
from .launch import (
    DTYPES,
    ceil_div,
    next_power_of_2,
    once_differentiable,
    show,
    tl,
    triton,
    wait_for_inputs,
)
from .pointwise import factor_of
from .spec import Spec

MAX_D = 256
LOG2E = math.log2(math.e)


# -- reference ------------------------------------------------------------------------------
def softmax(scores, causal):
    """Of scores [..., Lq, Lk] over the keys that a query sees; zeros where it sees none."""
    Lq, Lk = scores.shape[-2:]
    unseen = torch.ones(Lq, Lk, dtype=torch.bool, device=scores.device)
    unseen = unseen.triu(1 + Lk - Lq) if causal else ~unseen
    p = torch.softmax(scores.masked_fill(unseen, -math.inf), -1)
    return p.masked_fill(unseen.all(-1, keepdim=True), 0.0)


def scales_of(p, start_q, dropout_p, seed):
    """The factors of dropout for p [n, heads, Lq, Lk], whose n * Lq queries are the rows of q from
    start_q on: like p, in fp32 or wider."""
    n, heads, Lq, Lk = p.shape
    rows = torch.arange(n * Lq * heads, dtype=torch.int32, device=p.device) + start_q * heads
    rows = rows.view(n, Lq, heads, 1).transpose(1, 2)
    columns = torch.arange(Lk, dtype=torch.int32, device=p.device)
    return scales_at(seed, rows, columns, dropout_p, p.dtype)


def attention_ref(
    q, k, v, cu_seqlens, max_seqlen, *,
    cu_seqlens_k=None, max_seqlen_k=None, causal=False, scale=None, dropout_p=0.0, seed=None,
    num_tokens=None,
):
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o = torch.zeros_like(q)
    for b in range(len(cu_seqlens) - 1):
        of_q = slice(cu_seqlens[b], cu_seqlens[b + 1])
        of_k = slice(cu_seqlens_k[b], cu_seqlens_k[b + 1])
        scores = torch.einsum("qhd,khd->hqk", q[of_q], k[of_k]) * scale
        p = softmax(scores, causal)
        if dropout_p:
            p = (p * scales_of(p[None], int(cu_seqlens[b]), dropout_p, seed)[0]).to(p.dtype)
        o[of_q] = torch.einsum("hqk,khd->qhd", p, v[of_k])
    return o


# -- kernels --------------------------------------------------------------------------------
@triton.jit
def hash_queries(seed_ptr, queries, h, heads):
    """As hash_rows of dropout.py: row heads * query + h is that of a query and head h."""
    return hash_rows(seed_ptr, queries.to(tl.uint32) * heads + h.to(tl.uint32))


@triton.jit
def exp_of(s, m, qk_scale, log_l=0.0):
    """exp(scale * (s - m)) / 2^log_l of s = q k^T. Without log_l that of the maximum, m, is exactly
    1. As one fma, s * qk_scale - (m * qk_scale), it would be off by what the product in brackets is
    rounded by: 3e-5 for scores of some hundreds, and for scores of 10^8 anything."""
    return tl.exp2((s - m) * qk_scale - log_l)


@triton.jit
def _attend(
    acc, m, l,  # [BLOCK_M, BLOCK_D], [BLOCK_M], [BLOCK_M]: sum of p v, maximum of q k^T, sum of p
    q,  # [BLOCK_M, BLOCK_D]
    k_ptr, v_ptr,  # first key and value of this sequence and head
    stride_kt, stride_vt,
    start_n,  # first key of the tile
    length_k,  # keys of this sequence
    last,  # [BLOCK_M]: last key that a query sees
    hashes, most,  # for dropout: [BLOCK_M] of rows, or None without; and the largest draw to keep
    D,
    qk_scale,  # |scale| * log2(e)
    MASKED: tl.constexpr,  # the tile has keys that some query must not see
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One step of the online softmax: the tile of keys that starts at start_n."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    rows_n = offs_n.to(tl.int64)[:, None]
    mask = (offs_d < D)[None, :]
    if MASKED:
        mask &= (offs_n < length_k)[:, None]
    k = tl.load(k_ptr + rows_n * stride_kt + offs_d[None, :], mask=mask, other=0.0)
    v = tl.load(v_ptr + rows_n * stride_vt + offs_d[None, :], mask=mask, other=0.0)

    FP32: tl.constexpr = v.dtype == tl.float32
    s = tl.dot(q, tl.trans(factor_of(k, PRECISION)), input_precision=PRECISION)
    if MASKED:
        s = tl.where(offs_n[None, :] <= last[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    # A query that has seen no key yet has the maximum -inf, and -inf - -inf is NaN.
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = exp_of(s, m_finite[:, None], qk_scale)
    rescale = tl.exp2((m - m_finite) * qk_scale)
    l = l * rescale + tl.sum(p, 1)
    if hashes is not None:
        p = tl.where(draw(hashes[:, None], offs_n[None, :]) <= most, p, 0.0)
    if FP32:
        # One chain over all keys errs several times as far as a sum of the tiles' sums. As fma,
        # since Triton would make one chain of a dot and an addition.
        p, v = factor_of(p, PRECISION), factor_of(v, PRECISION)
        acc = tl.fma(acc, rescale[:, None], tl.dot(p, v, input_precision=PRECISION))
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
    return acc, m_new, l


@triton.jit(
    do_not_specialize=["blocks", "most"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "cu_seqlens_k_ptr", "seed_ptr"],
)
def _forward_kernel(
    q_ptr,  # [T, heads, D]
    k_ptr,  # [Tk, heads, D]
    v_ptr,  # [Tk, heads, D]
    cu_seqlens_ptr,  # [B + 1]
    cu_seqlens_k_ptr,  # [B + 1]
    seed_ptr,  # [1]; None without dropout
    o_ptr,  # [T, heads, D], contiguous
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    heads, D, blocks,
    sign, qk_scale,  # see sign_and_scale
    most, factor,  # of dropout: the largest draw to keep, 1 / (1 - p)
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Program (b, h, i) takes queries i * BLOCK_M and on of sequence b, head h."""
    wait_for_inputs()
    pid = tl.program_id(0)
    start_m = pid % blocks * BLOCK_M
    h = pid // blocks % heads
    b = pid // blocks // heads
    start_q = tl.load(cu_seqlens_ptr + b).to(tl.int64)  # row * stride may pass 2^31
    length_q = (tl.load(cu_seqlens_ptr + b + 1) - start_q).to(tl.int32)
    if start_m >= length_q:
        return
    start_k = tl.load(cu_seqlens_k_ptr + b).to(tl.int64)
    length_k = (tl.load(cu_seqlens_k_ptr + b + 1) - start_k).to(tl.int32)
    k_ptr += start_k * stride_kt + h.to(tl.int64) * stride_kh
    v_ptr += start_k * stride_vt + h.to(tl.int64) * stride_vh

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_md = (offs_m < length_q)[:, None] & (offs_d < D)[None, :]
    rows_m = (start_q + offs_m)[:, None]
    q_ptr += h.to(tl.int64) * stride_qh
    q = tl.load(q_ptr + rows_m * stride_qt + offs_d[None, :], mask=mask_md, other=0.0)
    q = factor_of((q * sign).to(q.dtype), PRECISION)  # the largest product is the largest score

    hashes = None
    if seed_ptr is not None:
        hashes = hash_queries(seed_ptr, start_q + offs_m, h, heads)

    # Keys below `full` are seen by every query of the tile, keys from `end` on by none.
    if CAUSAL:
        shift = length_k - length_q
        last = offs_m + shift
        full = tl.maximum(start_m + shift + 1, 0)
        end = tl.minimum(start_m + BLOCK_M + shift, length_k)
    else:
        last = tl.zeros([BLOCK_M], tl.int32) + (length_k - 1)
        full = length_k
        end = length_k
    full = full // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for start_n in range(0, full, BLOCK_N):
        acc, m, l = _attend(
            acc, m, l, q, k_ptr, v_ptr, stride_kt, stride_vt, start_n, length_k, last,
            hashes, most, D, qk_scale, False, PRECISION, BLOCK_N, BLOCK_D,
        )
    # Seldom more than one tile: to load it ahead would only lengthen the code, but in fp32 the code
    # for a tile that is not loaded ahead spills.
    ahead: tl.constexpr = None if q.dtype == tl.float32 else 1
    for start_n in tl.range(full, end, BLOCK_N, num_stages=ahead):
        acc, m, l = _attend(
            acc, m, l, q, k_ptr, v_ptr, stride_kt, stride_vt, start_n, length_k, last,
            hashes, most, D, qk_scale, True, PRECISION, BLOCK_N, BLOCK_D,
        )

    o = acc * (factor / tl.where(l == 0.0, 1.0, l))[:, None]  # factor is 1 without dropout
    o_ptr += rows_m * (heads * D) + h * D
    tl.store(o_ptr + offs_d[None, :], o, mask=mask_md)


# -- launchers ------------------------------------------------------------------------------
def tuning_key(D, itemsize, drops):
    """What the choice of a configuration depends on. Drawing for dropout takes half of a kernel's
    instructions and registers, and so another one."""
    return {"D": D, "itemsize": itemsize} | ({"dropout": 1} if drops else {})


def _config(D, itemsize, drops, arch):
    """Tiles whose shape depends on nothing but D, dtype and the GPU, so that a sequence's bits
    depend on nothing else either. The fastest that spill no register, as check aot predicts.
    """
    BLOCK_D = max(next_power_of_2(D), 16)
    if itemsize == 4:  # exact fp32 products run on no tensor core: each thread holds its operands
        M, N, warps, stages = (32, 16, 8, 2) if BLOCK_D >= 128 else (64, 32, 8, 2)
    else:
        # Unless tensor cores read shared memory (sm_90, sm_100), operands take registers.
        lean = isinstance(arch, int) and not launch.multiplies_from_shared_memory(arch)
        M, N, warps, stages = {128: (128, 32, 8, 2), 256: (64, 32, 8, 2)}.get(
            BLOCK_D, (64, 64, 4, 3) if lean else (128, 64, 8, 3)
        )
    if isinstance(arch, str) and BLOCK_D <= 32:  # of 8 warps each thread would load 8 bytes of k
        warps = 4
    config = {
        "BLOCK_M": M, "BLOCK_N": N, "BLOCK_D": BLOCK_D, "num_warps": warps, "num_stages": stages,
    }
    key = tuning_key(D, itemsize, drops)
    return launch.configuration("attention", config, fixed=("BLOCK_D",), **key)


def unit_stride(t):
    return t if t.stride(-1) == 1 else t.contiguous()


def sign_and_scale(scale):
    """What kernels take for it: its sign, by which q is multiplied, and |scale| * log2(e), as exp2
    is one instruction and exp five. For what fp32 has as 0, the sign 0 and another scale, as
    -inf * 0 is NaN."""
    if abs(scale) < torch.finfo(torch.float32).tiny:
        return 0, LOG2E
    return 1 if scale > 0 else -1, abs(scale) * LOG2E


def _forward(
    o, q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, causal, scale, dropout_p, seed
):
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    cu_seqlens = cu_seqlens.contiguous()
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    heads, D = q.shape[1:]
    config = _config(D, q.itemsize, seed is not None, launch.arch())
    blocks = ceil_div(max_seqlen, config["BLOCK_M"])
    programs = blocks * heads * (len(cu_seqlens) - 1)
    if programs:
        launch.start(
            _forward_kernel, programs,
            q, k, v, cu_seqlens, cu_seqlens_k, seed, o,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            heads, D, blocks, *sign_and_scale(scale), most(dropout_p), factor(dropout_p),
            CAUSAL=causal, PRECISION=launch.precision(q), **config,
        )


def runs(q, k, cu_seqlens, cu_seqlens_k):
    """(sequences, Lq, Lk, first row of q, first row of k) of each run of equal lengths."""
    cu_q = cu_seqlens.tolist()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for name, cu, rows in (("cu_seqlens", cu_q, len(q)), ("cu_seqlens_k", cu_k, len(k))):
        if cu[0] != 0 or sorted(cu) != cu:
            raise ValueError(f"attention: {name} must not decrease, and start at 0, got {cu}")
        if cu[-1] > rows:
            raise ValueError(f"attention: {name} must end at {rows} rows or before, got {cu[-1]}")
    lengths = zip(
        (b - a for a, b in itertools.pairwise(cu_q)), (b - a for a, b in itertools.pairwise(cu_k))
    )
    start_q, start_k = cu_q[0], cu_k[0]
    for (Lq, Lk), run in itertools.groupby(lengths):
        n = sum(1 for _ in run)
        yield n, Lq, Lk, start_q, start_k
        start_q, start_k = start_q + n * Lq, start_k + n * Lk


def batch_of(t, start, n, length):
    """n sequences of equal length in t [T, heads, D] as a view [n, heads, length, D]."""
    stride_t, stride_h, stride_d = t.stride()
    return t.as_strided(  # at once: slicing and so on takes a tenth of a ragged batch's attention
        (n, t.shape[1], length, t.shape[2]),
        (length * stride_t, stride_h, stride_t, stride_d),
        t.storage_offset() + start * stride_t,
    )


def _plain(
    q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, causal, scale, dropout_p, seed
):
    """One call of scaled_dot_product_attention for each run of sequences of equal lengths, or its
    definition where there is dropout."""
    max_seqlen_k = max_seqlen if max_seqlen_k is None else max_seqlen_k
    dtype = q.dtype
    if not (launch.AVX512 and launch.INTEL):  # there 16 bits take as long as fp32, or less
        q, k, v = launch.for_products(q, k, v)
    parts = []
    for n, Lq, Lk, start_q, start_k in runs(q, k, cu_seqlens, cu_seqlens_k):
        if Lq > max_seqlen or Lk > max_seqlen_k:
            given = f"{max_seqlen} and {max_seqlen_k}"
            raise ValueError(
                f"attention: max_seqlen and max_seqlen_k must bound the lengths, here {Lq} queries"
                f" and {Lk} keys, got {given}"
            )
        blind = Lq if Lk == 0 else max(Lq - Lk, 0) if causal else 0  # queries that see no key
        if blind == Lq:
            parts.append(q.new_zeros(n * Lq, *q.shape[1:]))
            continue
        if dropout_p:
            of_q, of_k, of_v = (
                batch_of(t, start, n, length).float()
                for t, start, length in ((q, start_q, Lq), (k, start_k, Lk), (v, start_k, Lk))
            )
            p = softmax(of_q @ of_k.mT * scale, causal)
            o = (p * scales_of(p, start_q, dropout_p, seed)) @ of_v
            parts.append(o.transpose(1, 2).flatten(0, 1))
            continue
        unmasked = not causal or Lq >= Lk
        o = F.scaled_dot_product_attention(
            batch_of(q, start_q, n, Lq)[:, :, blind:],
            batch_of(k, start_k, n, Lk),
            batch_of(v, start_k, n, Lk),
            None if unmasked else q.new_ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq),
            is_causal=causal and unmasked,
            scale=scale,
        )
        o = F.pad(o, (0, 0, blind, 0)) if blind else o
        parts.append(o.transpose(1, 2).flatten(0, 1))
    if not parts:
        return q.new_empty(q.shape, dtype=dtype)
    o = parts[0] if len(parts) == 1 else torch.cat(parts)
    return launch.with_room(o.to(dtype).contiguous(), len(q))


# -- registration ---------------------------------------------------------------------------
_attention = launch.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k,"
    " SymInt max_seqlen, SymInt? max_seqlen_k, bool causal, float scale, float dropout_p,"
    " Tensor? seed) -> Tensor",
    outputs=lambda q, *_: q.new_empty(q.shape),
    launch=_forward,
    plain=_plain,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, dropout_p, seed):
        ctx.save_for_backward(q, k, v, cu_q, cu_k, seed)
        ctx.others = max_q, max_k, causal, scale, dropout_p
        return _attention(q, k, v, cu_q, cu_k, *ctx.others, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        op = torch.ops.bert_fast.attention_backward.default  # of attention_backward.py
        *tensors, seed = ctx.saved_tensors
        return *op(do, *tensors, *ctx.others, seed), *[None] * 8


# -- public op ------------------------------------------------------------------------------
def check_sequences(op, q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen_k):
    """Raise ValueError for what attention and its backward cannot mean."""
    if q.ndim != 3 or not 1 <= q.shape[2] <= MAX_D or q.dtype not in DTYPES:
        raise ValueError(
            f"{op}: q must be fp32, fp16 or bf16 [T, heads, 1 to {MAX_D}], got {show(q)}"
        )
    if (cu_seqlens_k is None) != (max_seqlen_k is None):
        got = f"{show(cu_seqlens_k)} and {max_seqlen_k}"
        raise ValueError(f"{op}: cu_seqlens_k and max_seqlen_k go together, got {got}")
    for name, t, T in (("k", k, k.shape[0]), ("v", v, k.shape[0])):
        if t.shape != (T, *q.shape[1:]) or t.dtype != q.dtype:
            want = f"{show(q.dtype)}[{T}, {q.shape[1]}, {q.shape[2]}]"
            raise ValueError(f"{op}: {name} must be {want} like q, got {show(t)}")
    if cu_seqlens_k is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: k must have the rows of q, {q.shape[0]}, got {show(k)}")
    for name, t in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if t is None:
            continue
        if t.dtype != torch.int32 or t.ndim != 1 or t.shape != cu_seqlens.shape or t.shape[0] == 0:
            raise ValueError(f"{op}: {name} must be int32[B + 1], got {show(t)}")


def attention(
    q, k, v, cu_seqlens, max_seqlen, *,
    cu_seqlens_k=None, max_seqlen_k=None, causal=False, scale=None, dropout_p=0.0, seed=None,
    num_tokens=None,
):
    """Multi-head attention of packed sequences.

    q             [T, heads, D], fp32, fp16 or bf16, D <= 256
    k, v          [Tk, heads, D], dtype of q
    cu_seqlens    int32[B + 1], never decreasing, from 0: where each sequence starts, then the total
    max_seqlen    a bound on the queries of one sequence; those past it are not computed on a GPU,
                  and an error on a CPU
    cu_seqlens_k, max_seqlen_k   the same of k and v; None means those of q
    causal        query i of Lq sees keys up to i + Lk - Lq, so the last query sees them all
    scale         factor of the scores; None means D ** -0.5
    dropout_p     the probability with which a probability becomes zero, in training
    seed          int64[1] on the device of q, needed where dropout_p is not 0: what is drawn from
    num_tokens    [1] integer, as other ops take it; of no effect, as cu_seqlens[-1] says the same:
                  rows past it are not read, and not written in the result

    Returns o [T, heads, D] in the dtype of q, contiguous; zeros for a query that sees no key.
    Differentiable once, in q, k and v. The last dimension is copied if it is not contiguous, the
    others may have any stride. Raises ValueError for any other shape or dtype.
    """
    check_sequences("attention", q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen_k)
    launch.check_num_tokens("attention", num_tokens)
    seed = check_dropout("attention", "dropout_p", dropout_p, seed) if dropout_p else None
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    args = (
        q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, causal, scale,
        float(dropout_p), seed,
    )  # fmt: skip
    if launch.is_recorded():
        return _Attention.apply(*args)
    return _attention(*args)


# -- spec -----------------------------------------------------------------------------------
def cu_seqlens_of(lengths, device):
    """int32[B + 1]: 0 and the running sums of lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _inputs(
    dtype, device, lengths, lengths_k=None, heads=2, D=64, causal=False, scale=None, dropout_p=0.0
):
    T, Tk = sum(lengths), sum(lengths if lengths_k is None else lengths_k)
    q, k, v = (
        torch.randn(rows, heads, D, device=device).to(dtype) for rows in (T, Tk, Tk)
    )
    inputs = {
        "q": q, "k": k, "v": v,
        "cu_seqlens": cu_seqlens_of(lengths, device),
        "max_seqlen": max(lengths, default=0),
        "causal": causal,
        "scale": scale,
        "dropout_p": dropout_p,
        "seed": next(new_seeds(1, device)) if dropout_p else None,
    }
    if lengths_k is not None:
        inputs["cu_seqlens_k"] = cu_seqlens_of(lengths_k, device)
        inputs["max_seqlen_k"] = max(lengths_k, default=0)
    return inputs


def _fuzz(rng):
    def lengths(count):
        return [rng.choice((0, 1, 2, 3, 5, 16, 17, 31, 33, 64, 65)) for _ in range(count)]

    case = {"lengths": lengths(rng.randint(0, 4)), "heads": rng.randint(1, 3)}
    case["D"] = rng.choice((1, 8, 16, 31, 32, 33, 64, 64, 80, 128, 200, 256))
    if rng.random() < 0.3:
        case["lengths_k"] = lengths(len(case["lengths"]))
    if rng.random() < 0.3:
        case["causal"] = True
    if rng.random() < 0.2:
        case["scale"] = rng.choice((-1.0, 0.0, 0.01, 1.0, 3.0))
    if rng.random() < 0.2:
        case["dropout_p"] = rng.choice((0.1, 0.5, 1.0))
    return case


def _cost(itemsize, lengths, lengths_k=None, heads=2, D=64, causal=False, **_):
    lengths_k = lengths if lengths_k is None else lengths_k
    pairs = sum(
        sum(min(max(i + 1 + Lk - Lq, 0), Lk) for i in range(Lq)) if causal else Lq * Lk
        for Lq, Lk in zip(lengths, lengths_k)
    )
    return 4 * pairs * heads * D, 2 * (sum(lengths) + sum(lengths_k)) * heads * D * itemsize


SPEC = Spec(
    fn=attention,
    ref=attention_ref,
    inputs=_inputs,
    cost=_cost,
    cases=(
        {"lengths": (37, 5, 64), "heads": 3},
        {"lengths": (65, 1, 0, 129), "D": 32},  # just past a block, and an empty one
        {"lengths": (19, 40), "D": 16, "causal": True},  # more rows than columns in a tile
        {"lengths": (130,), "heads": 1, "causal": True},
        {"lengths": (3, 70, 0), "lengths_k": (65, 1, 4)},
        {"lengths": (3, 40, 5), "lengths_k": (65, 7, 0), "causal": True},  # some see no key
        {"lengths": (3,), "lengths_k": (65,), "causal": True},  # a tile but for its last key
        {"lengths": (3, 100), "lengths_k": (200, 7), "causal": True, "heads": 1},
        {"lengths": (130, 128), "lengths_k": (5, 191), "causal": True, "heads": 1},
        {"lengths": (), "D": 64},
        {"lengths": (0, 0)},
        {"lengths": (1,), "D": 1},
        {"lengths": (13, 13), "D": 8},
        {"lengths": (9, 33), "D": 80, "heads": 3},
        {"lengths": (33,), "D": 128, "heads": 1},
        {"lengths": (17,), "D": 256, "heads": 1},
        {"lengths": (31, 7), "scale": 1.0},  # near one-hot
        {"lengths": (1, 1, 1, 65), "heads": 3, "scale": 30.0},  # exp2 of scores would be 0 or inf
        {"lengths": (3, 70), "heads": 1, "scale": -0.5},
        {"lengths": (3,), "lengths_k": (8192,), "heads": 1, "D": 16},
        {"lengths": (40, 66), "heads": 3, "D": 32, "dropout_p": 0.5},
        {"lengths": (3, 70), "lengths_k": (65, 2), "causal": True, "dropout_p": 0.1},
        {"lengths": (5,), "dropout_p": 1.0},
    ),
    fuzz=_fuzz,
    whole={"lengths": (128, 256), "heads": 2, "D": 64},
    huge=({"lengths": (512,) * 8200, "heads": 8, "D": 64},),
    bench=tuple(
        {"lengths": (S,) * (16384 // S), "heads": heads, "D": D}
        for heads, D in ((12, 64), (16, 64), (12, 32))
        for S in (128, 512)
    )
    + (
        {"lengths": (128,) * 16, "heads": 8, "D": 128},
        {"lengths": (512,) * 4, "heads": 4, "D": 256},
        {"lengths": (512,) * 8, "heads": 12, "D": 64, "causal": True},
        {"lengths": (512,) * 32, "heads": 12, "D": 64, "dropout_p": 0.1},
    ),
    rejects={
        "q must be fp32, fp16 or bf16 [T, heads, 1 to 256], got float32[4, 64]": {
            "q": torch.ones(4, 64)
        },
        "k must be float32[7, 3, 64] like q, got float32[7, 2, 32]": {"k": torch.ones(7, 2, 32)},
        "v must be float32[106, 3, 64] like q, got float32[5, 2, 64]": {"v": torch.ones(5, 2, 64)},
        "k must have the rows of q, 106, got": {
            "k": torch.ones(7, 3, 64), "v": torch.ones(7, 3, 64)
        },
        "cu_seqlens must be int32[B + 1], got int64[4]": {"cu_seqlens": torch.zeros(4).long()},
        "cu_seqlens_k and max_seqlen_k go together, got None and 3": {"max_seqlen_k": 3},
        "dropout_p must be from 0 to 1, got -0.1": {"dropout_p": -0.1},
        "seed must be int64[1], got None": {"dropout_p": 0.1},
        "num_tokens must be int32[1] or int64[1], got float32[1]": {"num_tokens": torch.ones(1)},
    },
    packed=("q", "k", "v"),
    rounds_inside=True,
)
