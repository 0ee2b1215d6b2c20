"""The gradients of attention over packed sequences, for each sequence and head on its own:

    p = softmax(scale * q k^T)          the probabilities, computed again
    dp = dropout(do v^T)                the same places as in the forward
    ds = scale * p * (dp - delta)       delta = sum(p * dp) over the keys of a query
    dq = ds k                           dk = ds^T q                       dv = dropout(p)^T do

Shapes     do, q, dq [T, heads, D]; k, v, dk, dv [Tk, heads, D]; D <= 256. Sequences as in
           attention. Rows of no sequence get zeros.
Precision  As in attention: scores, p, dp, ds and sums in fp32; p and ds are rounded to the dtype of
           v before they are multiplied, and each gradient once.
Batches    A sequence's gradients have the same bits whatever the other sequences, and in each run.
Source     Dao et al., FlashAttention, 2022, algorithm 4, but for two things. Two launches, for
           tiles of queries and for tiles of keys, stand in place of atomic sums. And nothing is
           kept of the forward: delta there is sum(do * o), whose o has been rounded, so that a
           query which looks at one key alone gets noise for a gradient that is zero. That makes
           nine products instead of seven.
"""

from typing import NamedTuple

import torch

from . import launch
from .attention import SPEC as ATTENTION
from .attention import (
    batch_of,
    check_sequences,
    exp_of,
    hash_queries,
    runs,
    scales_of,
    sign_and_scale,
    softmax,
    tuning_key,
    unit_stride,
)
from .dropout import check_dropout, draw, factor, most
from .launch import ceil_div, next_power_of_2, show, tl, triton, wait_for_inputs
from .pointwise import factor_of
from .spec import Spec


class AttentionGradients(NamedTuple):
    dq: torch.Tensor  # [T, heads, D]
    dk: torch.Tensor  # [Tk, heads, D]
    dv: torch.Tensor  # [Tk, heads, D]


# -- reference ------------------------------------------------------------------------------
def attention_backward_ref(
    do, q, k, v, cu_seqlens, max_seqlen, *,
    cu_seqlens_k=None, max_seqlen_k=None, causal=False, scale=None, dropout_p=0.0, seed=None,
):
    """By autograd, from the definition of the forward."""
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        o = ATTENTION.ref(
            q, k, v, cu_seqlens, max_seqlen,
            cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k, causal=causal, scale=scale,
            dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
        if not o.requires_grad:  # there are no sequences
            return AttentionGradients(*(torch.zeros_like(t) for t in (q, k, v)))
        return AttentionGradients(*torch.autograd.grad(o, (q, k, v), do))


# -- kernels --------------------------------------------------------------------------------
@triton.jit
def _add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a b. In fp32 a sum of sums, as one chain over all rows would err several times as far:
    fma, as Triton makes one chain of a dot and an addition."""
    if a.dtype == tl.float32:
        a = factor_of(a, PRECISION)
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)
    return tl.dot(a, b, acc)


@triton.jit
def _load_rows(
    ptr,  # first row of this sequence and head
    stride,
    start,
    length,
    D,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK, BLOCK_D], to be multiplied: rows start and on; zeros from length on, and past D."""
    offs = start + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs < length)[:, None] & (offs_d < D)[None, :]
    rows = offs.to(tl.int64)[:, None]
    loaded = tl.load(ptr + rows * stride + offs_d[None, :], mask=mask, other=0.0)
    return factor_of(loaded, PRECISION)


@triton.jit
def _products(q, k, start_n, last, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr):
    """q k^T [BLOCK_M, BLOCK_N]; -inf where a query does not see a key."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    return tl.where(offs_n[None, :] <= last[:, None], s, float("-inf"))


@triton.jit
def _of_probabilities(
    do, v, start_n, hashes, most, factor, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dp [BLOCK_M, BLOCK_N]: gradients of probabilities before dropout, if there is one."""
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if hashes is not None:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        dp *= tl.where(draw(hashes[:, None], offs_n[None, :]) <= most, factor, 0.0)
    return dp


@triton.jit
def _first_row(b, start_q):
    """Of sequence b, in m, log_l and delta: a multiple of 128, whose rows come 16 bytes at a time.
    No two sequences share one, since each takes 127 further rows."""
    return (start_q + 127 * b) // 128 * 128


@triton.jit
def _store_zeros(
    ptr,  # [T, heads, D], contiguous
    start, end, step,
    h, heads, D,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """To head h of rows start, start + step and so on, BLOCK at each, up to end."""
    offs_d = tl.arange(0, BLOCK_D)
    zeros = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for row in range(start, end, step):
        rows = row + tl.arange(0, BLOCK)
        mask = (rows < end)[:, None] & (offs_d < D)[None, :]
        tl.store(ptr + rows[:, None] * (heads * D) + h * D + offs_d[None, :], zeros, mask=mask)


@triton.jit(
    do_not_specialize=["T", "B", "blocks", "most"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "cu_seqlens_k_ptr", "seed_ptr"],
)
def _dq_kernel(
    do_ptr, q_ptr,  # [T, heads, D]
    k_ptr, v_ptr,  # [Tk, heads, D]
    cu_seqlens_ptr,  # [B + 1]
    cu_seqlens_k_ptr,  # [B + 1]
    seed_ptr,  # [1]; None without dropout
    dq_ptr,  # [T, heads, D], contiguous
    m_ptr, log_l_ptr, delta_ptr,  # [heads, rows] in fp32: of exp_of, and the sum of p dp
    stride_dot, stride_doh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    T, B, rows, heads, D, blocks,
    scale,
    sign, qk_scale,  # as in attention
    most, factor,  # of dropout
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Program (b, h, i) takes queries i * BLOCK_M and on of sequence b, head h. Sequence B stands
    for the rows that are of none."""
    wait_for_inputs()
    pid = tl.program_id(0)
    start_m = pid % blocks * BLOCK_M
    h = (pid // blocks % heads).to(tl.int64)
    b = pid // blocks // heads
    start_q = tl.load(cu_seqlens_ptr + b).to(tl.int64)  # row * stride may pass 2^31
    if b == B:
        step = blocks * BLOCK_M
        _store_zeros(dq_ptr, start_q + start_m, T, step, h, heads, D, BLOCK_M, BLOCK_D)
        return
    length_q = (tl.load(cu_seqlens_ptr + b + 1) - start_q).to(tl.int32)
    if start_m >= length_q:
        return
    start_k = tl.load(cu_seqlens_k_ptr + b).to(tl.int64)
    length_k = (tl.load(cu_seqlens_k_ptr + b + 1) - start_k).to(tl.int32)
    do_ptr += start_q * stride_dot + h * stride_doh
    q_ptr += start_q * stride_qt + h * stride_qh
    k_ptr += start_k * stride_kt + h * stride_kh
    v_ptr += start_k * stride_vt + h * stride_vh

    do = _load_rows(do_ptr, stride_dot, start_m, length_q, D, PRECISION, BLOCK_M, BLOCK_D)
    q = _load_rows(q_ptr, stride_qt, start_m, length_q, D, PRECISION, BLOCK_M, BLOCK_D)
    q = (q * sign).to(q.dtype)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    end = length_k
    last = tl.zeros([BLOCK_M], tl.int32) + (length_k - 1)  # key that a query sees
    if CAUSAL:
        shift = length_k - length_q
        last = offs_m + shift
        end = tl.minimum(start_m + BLOCK_M + shift, length_k)

    hashes = None
    if seed_ptr is not None:
        hashes = hash_queries(seed_ptr, start_q + offs_m, h, heads)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # maximum of q k^T
    l = tl.zeros([BLOCK_M], tl.float32)  # sum of exp(score - maximum)
    delta = tl.zeros([BLOCK_M], tl.float32)  # the same, each times dp
    for start_n in range(0, end, BLOCK_N):
        k = _load_rows(k_ptr, stride_kt, start_n, length_k, D, PRECISION, BLOCK_N, BLOCK_D)
        v = _load_rows(v_ptr, stride_vt, start_n, length_k, D, PRECISION, BLOCK_N, BLOCK_D)
        s = _products(q, k, start_n, last, PRECISION, BLOCK_N)
        dp = _of_probabilities(do, v, start_n, hashes, most, factor, PRECISION, BLOCK_N)
        m_new = tl.maximum(m, tl.max(s, 1))
        # A query that has seen no key yet has the maximum -inf, and -inf - -inf is NaN.
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = exp_of(s, m_finite[:, None], qk_scale)
        rescale = tl.exp2((m - m_finite) * qk_scale)
        l = l * rescale + tl.sum(p, 1)
        delta = delta * rescale + tl.sum(p * dp, 1)
        m = m_new
    # Of a query without keys 0, as s is -inf.
    log_l = tl.where(l == 0.0, 0.0, tl.log2(l))
    m = tl.where(l == 0.0, 0.0, m)
    delta /= tl.where(l == 0.0, 1.0, l)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(0, end, BLOCK_N):
        k = _load_rows(k_ptr, stride_kt, start_n, length_k, D, PRECISION, BLOCK_N, BLOCK_D)
        v = _load_rows(v_ptr, stride_vt, start_n, length_k, D, PRECISION, BLOCK_N, BLOCK_D)
        s = _products(q, k, start_n, last, PRECISION, BLOCK_N)
        p = exp_of(s, m[:, None], qk_scale, log_l[:, None])
        dp = _of_probabilities(do, v, start_n, hashes, most, factor, PRECISION, BLOCK_N)
        # Scaled here, as of a loop without that Triton 3.6 makes wgmma that wait for each other.
        ds = p * (dp - delta[:, None]) * scale
        dq = _add_product(dq, ds.to(k.dtype), k, PRECISION)

    offsets = h * rows + _first_row(b, start_q) + offs_m
    tl.store(m_ptr + offsets, m)
    tl.store(log_l_ptr + offsets, log_l)
    tl.store(delta_ptr + offsets, delta)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < length_q)[:, None] & (offs_d < D)[None, :]
    dq_ptr += (start_q + offs_m)[:, None] * (heads * D) + h * D
    tl.store(dq_ptr + offs_d[None, :], dq, mask=mask)


@triton.jit(
    do_not_specialize=["Tk", "B", "blocks", "most"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "cu_seqlens_k_ptr", "seed_ptr"],
)
def _dkdv_kernel(
    do_ptr, q_ptr,  # [T, heads, D]
    k_ptr, v_ptr,  # [Tk, heads, D]
    m_ptr, log_l_ptr, delta_ptr,  # [heads, rows], as _dq_kernel leaves them
    cu_seqlens_ptr,  # [B + 1]
    cu_seqlens_k_ptr,  # [B + 1]
    seed_ptr,  # [1]; None without dropout
    dk_ptr, dv_ptr,  # [Tk, heads, D], contiguous
    stride_dot, stride_doh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    Tk, B, rows, heads, D, blocks,
    scale,
    sign, qk_scale,
    most, factor,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Program (b, h, j) takes keys j * BLOCK_N and on of sequence b, head h. Sequence B stands for
    the rows that are of none."""
    wait_for_inputs()
    pid = tl.program_id(0)
    start_n = pid % blocks * BLOCK_N
    h = (pid // blocks % heads).to(tl.int64)
    b = pid // blocks // heads
    start_k = tl.load(cu_seqlens_k_ptr + b).to(tl.int64)  # row * stride may pass 2^31
    if b == B:
        step = blocks * BLOCK_N
        _store_zeros(dk_ptr, start_k + start_n, Tk, step, h, heads, D, BLOCK_N, BLOCK_D)
        _store_zeros(dv_ptr, start_k + start_n, Tk, step, h, heads, D, BLOCK_N, BLOCK_D)
        return
    length_k = (tl.load(cu_seqlens_k_ptr + b + 1) - start_k).to(tl.int32)
    if start_n >= length_k:
        return
    start_q = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    length_q = (tl.load(cu_seqlens_ptr + b + 1) - start_q).to(tl.int32)
    do_ptr += start_q * stride_dot + h * stride_doh
    q_ptr += start_q * stride_qt + h * stride_qh
    k_ptr += start_k * stride_kt + h * stride_kh
    v_ptr += start_k * stride_vt + h * stride_vh
    m_ptr += h * rows + _first_row(b, start_q)
    log_l_ptr += h * rows + _first_row(b, start_q)
    delta_ptr += h * rows + _first_row(b, start_q)

    k = _load_rows(k_ptr, stride_kt, start_n, length_k, D, PRECISION, BLOCK_N, BLOCK_D)
    k = (k * sign).to(k.dtype)  # not q, of which dk is made too
    v = _load_rows(v_ptr, stride_vt, start_n, length_k, D, PRECISION, BLOCK_N, BLOCK_D)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    shift = length_k - length_q
    # Earlier queries see none of these keys.
    start = tl.maximum(start_n - shift, 0) // BLOCK_M * BLOCK_M if CAUSAL else 0
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start_m in range(start, length_q, BLOCK_M):
        q = _load_rows(q_ptr, stride_qt, start_m, length_q, D, PRECISION, BLOCK_M, BLOCK_D)
        do = _load_rows(do_ptr, stride_dot, start_m, length_q, D, PRECISION, BLOCK_M, BLOCK_D)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        # Past the end they are those of queries of zeros, which q and do are there.
        m = tl.load(m_ptr + offs_m)
        log_l = tl.load(log_l_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if CAUSAL:
            s = tl.where(offs_n[:, None] <= (offs_m + shift)[None, :], s, float("-inf"))
        p = exp_of(s, m[None, :], qk_scale, log_l[None, :])
        dropped = p
        if seed_ptr is not None:
            hashes = hash_queries(seed_ptr, start_q + offs_m, h, heads)
            kept = tl.where(draw(hashes[None, :], offs_n[:, None]) <= most, factor, 0.0)
            dropped = p * kept
        dv = _add_product(dv, dropped.to(do.dtype), do, PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if seed_ptr is not None:
            dp *= kept
        ds = p * (dp - delta[None, :])
        dk = _add_product(dk, ds.to(q.dtype), q, PRECISION)

    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_n < length_k)[:, None] & (offs_d < D)[None, :]
    offsets = (start_k + offs_n)[:, None] * (heads * D) + h * D + offs_d[None, :]
    tl.store(dk_ptr + offsets, dk * scale, mask=mask)
    tl.store(dv_ptr + offsets, dv, mask=mask)


# -- launchers ------------------------------------------------------------------------------
# BLOCK_M, BLOCK_N, warps, stages by BLOCK_D: of _dq_kernel, then of _dkdv_kernel, whose BLOCK_M is
# no larger. The fastest of those tried that keep the budgets of check aot.
TILES = {
    "shared": {  # operands of products are read from shared memory
        32: ((128, 64, 8, 2), (128, 64, 4, 2)),
        64: ((128, 64, 8, 2), (64, 64, 4, 2)),
        128: ((64, 64, 8, 2), (64, 64, 8, 2)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2)),
    },
    "registers": {
        32: ((64, 32, 4, 2), (64, 32, 2, 2)),
        64: ((64, 32, 4, 2), (64, 32, 4, 2)),
        128: ((32, 32, 4, 2), (32, 32, 4, 2)),
        256: ((32, 32, 8, 2), (32, 32, 8, 2)),
    },
    "amd": {
        32: ((64, 64, 4, 1), (64, 64, 4, 1)),
        64: ((64, 64, 4, 1), (64, 64, 4, 1)),
        128: ((32, 32, 4, 2), (32, 32, 4, 2)),
        256: ((16, 32, 4, 1), (16, 32, 4, 1)),
    },
    "exact": {  # fp32, on no tensor core of NVIDIA's
        32: ((32, 32, 4, 2), (16, 16, 1, 2)),
        64: ((32, 32, 4, 2), (32, 16, 4, 2)),
        128: ((16, 32, 4, 2), (16, 32, 4, 2)),
        256: ((16, 16, 4, 2), (16, 16, 4, 2)),
    },
    "exact amd": {
        32: ((32, 32, 4, 2), (32, 32, 4, 2)),
        64: ((32, 32, 4, 1), (32, 32, 4, 1)),
        128: ((16, 16, 4, 1), (16, 16, 4, 1)),
        256: ((16, 16, 4, 1), (16, 16, 4, 1)),
    },
}


def _configs(D, itemsize, drops, arch):
    """How to launch both kernels. It depends on nothing of the batch, as in attention."""
    if isinstance(arch, str):
        kind = "exact amd" if itemsize == 4 else "amd"
    elif itemsize == 4:
        kind = "exact"
    else:
        kind = "shared" if launch.multiplies_from_shared_memory(arch) else "registers"
    BLOCK_D = max(next_power_of_2(D), 16)
    names = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"
    of_q, of_k = (
        launch.configuration(
            op, {"BLOCK_D": BLOCK_D, **dict(zip(names, tile))}, fixed=("BLOCK_D",),
            **tuning_key(D, itemsize, drops),
        )
        for op, tile in zip(("attention_dq", "attention_dkdv"), TILES[kind][max(BLOCK_D, 32)])
    )  # fmt: skip
    # _dq_kernel leaves m, log_l and delta for whole tiles of its own, in rows that adjoin others'.
    M = min(of_q["BLOCK_M"], 128)
    return {**of_q, "BLOCK_M": M}, {**of_k, "BLOCK_M": min(of_k["BLOCK_M"], M)}


def _backward(
    out, do, q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, causal, scale,
    dropout_p, seed,
):
    dq, dk, dv = out
    do, q, k, v = (unit_stride(t) for t in (do, q, k, v))
    cu_seqlens = cu_seqlens.contiguous()
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    max_seqlen_k = max_seqlen if max_seqlen_k is None else max_seqlen_k
    (T, heads, D), Tk, B = q.shape, k.shape[0], len(cu_seqlens) - 1
    rows = (T + 127 * B) // 128 * 128
    m, log_l, delta = q.new_empty(3, heads, rows, dtype=torch.float32)
    form = {"CAUSAL": causal, "PRECISION": launch.precision(q)}
    strides = [s for t in (do, q, k, v) for s in t.stride()[:2]]
    scales = scale, *sign_and_scale(scale), most(dropout_p), factor(dropout_p)

    of_q, of_k = _configs(D, q.itemsize, seed is not None, launch.arch())
    blocks = max(ceil_div(max_seqlen, of_q["BLOCK_M"]), 1)
    if T * heads:
        launch.start(
            _dq_kernel, blocks * heads * (B + 1),
            do, q, k, v, cu_seqlens, cu_seqlens_k, seed, dq, m, log_l, delta, *strides,
            T, B, rows, heads, D, blocks, *scales, **form, **of_q,
        )
    blocks = max(ceil_div(max_seqlen_k, of_k["BLOCK_N"]), 1)
    if Tk * heads:
        launch.start(
            _dkdv_kernel, blocks * heads * (B + 1),
            do, q, k, v, m, log_l, delta, cu_seqlens, cu_seqlens_k, seed, dk, dv, *strides,
            Tk, B, rows, heads, D, blocks, *scales, **form, **of_k,
        )


def _plain(
    do, q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, causal, scale,
    dropout_p, seed,
):
    """In fp32, or fp64 for fp64, a run of sequences of equal lengths at a time."""
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    for n, Lq, Lk, start_q, start_k in runs(q, k, cu_seqlens, cu_seqlens_k):
        do_, q_ = (batch_of(t, start_q, n, Lq).to(wide) for t in (do, q))
        k_, v_ = (batch_of(t, start_k, n, Lk).to(wide) for t in (k, v))
        p = softmax(q_ @ k_.mT * scale, causal)
        dp, dropped = do_ @ v_.mT, p
        if dropout_p:
            scales = scales_of(p, start_q, dropout_p, seed)
            dp, dropped = dp * scales, p * scales
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        batch_of(dq, start_q, n, Lq).copy_(ds @ k_)
        batch_of(dk, start_k, n, Lk).copy_(ds.mT @ q_)
        batch_of(dv, start_k, n, Lk).copy_(dropped.mT @ do_)
    return dq, dk, dv


# -- registration ---------------------------------------------------------------------------
_attention_backward = launch.define(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens,"
    " Tensor? cu_seqlens_k, SymInt max_seqlen, SymInt? max_seqlen_k, bool causal, float scale,"
    " float dropout_p, Tensor? seed) -> (Tensor dq, Tensor dk, Tensor dv)",
    outputs=lambda do, q, k, v, *_: tuple(t.new_empty(t.shape) for t in (q, k, v)),
    launch=_backward,
    plain=_plain,
)


# -- public op ------------------------------------------------------------------------------
def attention_backward(
    do, q, k, v, cu_seqlens, max_seqlen, *,
    cu_seqlens_k=None, max_seqlen_k=None, causal=False, scale=None, dropout_p=0.0, seed=None,
):
    """The gradients of attention, as autograd asks for them.

    do    [T, heads, D] in the dtype of q: the gradient of the result
    q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, causal, scale, dropout_p, seed
          of the forward; max_seqlen and max_seqlen_k must bound the lengths

    Returns AttentionGradients, dq, dk and dv, each like what it is of, contiguous; zeros in rows of
    no sequence. Not differentiable. Raises ValueError for any other shape or dtype.
    """
    check_sequences("attention_backward", q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen_k)
    if do.shape != q.shape or do.dtype != q.dtype:
        raise ValueError(f"attention_backward: do must be {show(q)} like q, got {show(do)}")
    seed = check_dropout("attention_backward", "dropout_p", dropout_p, seed) if dropout_p else None
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    with torch.no_grad():
        return AttentionGradients(
            *_attention_backward(
                do, q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, causal, scale,
                float(dropout_p), seed,
            )
        )


# -- spec -----------------------------------------------------------------------------------
def _inputs(dtype, device, *args, further=0, **case):
    """`further` rows are of no sequence."""
    inputs = ATTENTION.inputs(dtype, device, *args, **case)
    inputs["do"] = torch.randn(inputs["q"].shape, device=device).to(dtype)
    for name in ("do", "q", "k", "v") if further else ():
        t = inputs[name]
        inputs[name] = torch.cat((t, t.new_full((further, *t.shape[1:]), torch.nan)))
    return inputs


def _cost(itemsize, lengths, lengths_k=None, heads=2, D=64, causal=False, **_):
    """Of the nine products that there are; forward has two."""
    flops, _ = ATTENTION.cost(itemsize, lengths, lengths_k, heads, D, causal)
    Tq, Tk = sum(lengths), sum(lengths if lengths_k is None else lengths_k)
    sums = 2 * 3 * Tq * heads * 4  # m, log_l, delta: written and read
    return 9 * flops // 2, (5 * Tq + 7 * Tk) * heads * D * itemsize + sums


SPEC = Spec(
    fn=attention_backward,
    ref=attention_backward_ref,
    inputs=_inputs,
    cost=_cost,
    cases=(
        {"lengths": (34, 5), "heads": 3, "D": 32},
        {"lengths": (5, 64), "heads": 1},
        {"lengths": (33, 1, 0, 65), "heads": 1},  # just past a block, and an empty one
        {"lengths": (19, 40), "D": 16, "causal": True},
        {"lengths": (130,), "heads": 1, "causal": True},
        {"lengths": (3, 70, 0), "lengths_k": (65, 1, 4)},
        {"lengths": (3, 40, 5), "lengths_k": (65, 7, 0), "causal": True},  # some see no key
        {"lengths": (3, 100), "lengths_k": (200, 7), "causal": True, "heads": 1},
        {"lengths": (130, 128), "lengths_k": (5, 191), "causal": True, "heads": 1},
        {"lengths": (), "D": 64},
        {"lengths": (0, 0)},
        {"lengths": (1,), "D": 1},
        {"lengths": (13, 13), "D": 8},
        {"lengths": (3, 2), "D": 40, "further": 70},  # rows of no sequence
        {"lengths": (128, 1), "heads": 1, "D": 16},  # their rows in m adjoin
        {"lengths": (129, 128), "heads": 1, "D": 16},  # the last one ends where m does
        {"lengths": (9, 33), "D": 80, "heads": 3},
        {"lengths": (33,), "D": 128, "heads": 1},
        {"lengths": (17,), "D": 256, "heads": 1},
        {"lengths": (31, 7), "heads": 1, "scale": 1.0},  # near one-hot
        {"lengths": (1, 65), "heads": 1, "scale": 30.0},
        {"lengths": (3, 40), "heads": 1, "D": 16, "scale": -0.5},
        {"lengths": (5,), "lengths_k": (33,), "heads": 1, "D": 16, "scale": 0.0},
        {"lengths": (3,), "lengths_k": (700,), "heads": 1, "D": 16},
        {"lengths": (700,), "lengths_k": (3,), "heads": 1, "D": 16},
        {"lengths": (5, 66), "D": 16, "dropout_p": 0.5},
        {"lengths": (3, 40), "lengths_k": (65, 2), "heads": 1, "causal": True, "dropout_p": 0.1},
    ),
    fuzz=ATTENTION.fuzz,
    whole={"lengths": (128, 256), "heads": 2, "D": 64},
    huge=({"lengths": (512,) * 16500, "heads": 8, "D": 64},),  # half of the way is past 2^31
    bench=ATTENTION.bench,
    rejects={
        "q must be fp32, fp16 or bf16 [T, heads, 1 to 256], got float32[4, 64]": {
            "q": torch.ones(4, 64)
        },
        "k must be float32[7, 3, 32] like q, got float32[7, 2, 32]": {"k": torch.ones(7, 2, 32)},
        "cu_seqlens must be int32[B + 1], got int64[4]": {"cu_seqlens": torch.zeros(4).long()},
        "seed must be int64[1], got None": {"dropout_p": 0.1},
        "do must be float32[39, 3, 32] like q, got float32[39, 32]": {"do": torch.ones(39, 32)},
    },
    rounds_inside=True,
    gradient=True,
)
