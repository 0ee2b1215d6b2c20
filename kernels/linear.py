"""Matrix product with what BERT applies to its result: bias, GELU, residual add.

    z = x W^T + b
    y = act(z) + residual        act(z) = z, or GELU in its erf form: z * Phi(z)

Shapes     x [T, K], weight [N, K], bias [N]; residual, y [T, N].
Precision  Sums in fp32, GELU and residual too; y is rounded once, to the dtype of x. A product in
           fp32 is six of bf16, see product_precision, or exact ("ieee") on other GPUs, or where
           torch.backends.cuda.matmul.fp32_precision says so; both are summed in steps of K whose
           sums are added. It is TF32 only where that allows it. GELU of 16 bits is a polynomial
           within half an ulp, see pointwise.py; with a residual it is erf.
Batches    Batch-invariant: a row of y has the same bits whatever the other rows are, and however
           many. Each element is accumulated over K in one fixed order (in exact fp32, step by
           step); the number of rows selects only the tile, and with it how often a program waits
           for memory, never the instruction that adds or the order of the sum.
CPU        With AVX-512, oneDNN on the weight as stored: torch's own linear gives fp32 to MKL,
           half as fast on AMD, whose AVX-512 it does not use, and about as fast on Intel. oneDNN
           sums K in one chain, MKL in shorter ones: in fp32 the error of a layer is 1.4 to 1.7
           times as large, some 1e-6 of its values. GELU or the residual is applied before y leaves
           the cache. In fp32 without AVX-512, torch's own: oneDNN takes 1.0 to 1.2 times as long,
           and more with GELU. 16-bit dtypes without CPU instructions are multiplied in fp32.
Backward   with dz = dy * act'(z): dx = dz W, dW = dz^T x, db = sum of dz over rows, dresidual = dy.
           torch's products in the dtype of x, dz rounded to it; with num_tokens, which those
           cannot read, this kernel on W transposed in place, and weight_gradient. With GELU, z is
           recomputed instead of stored (gelu_gradient): one more product, and z, as large as any
           activation of a layer, is not stored.
Source     Hendrycks, Gimpel, Gaussian Error Linear Units, 2016, for act; Henry, Tang, Heinecke,
           Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
           Computations, 2019, for fp32 by bf16. The kernel is the plain
           tiled GEMM: a program for each tile of y, its K loop pipelined by the compiler. For many
           tiles, on GPUs with tensor descriptors, its persistent form: as many programs as the GPU
           holds, each of which takes tile after tile.
"""

import functools
import math

import torch
from torch.nn import functional as F

from . import launch
from .gelu import act_of, gelu_ref
from .launch import (
    DTYPES,
    TensorDescriptor,
    ceil_div,
    once_differentiable,
    show,
    tl,
    triton,
    wait_for_inputs,
)
from .pointwise import factor_of, gelu_erf
from .spec import Spec
from .weight_gradient import weight_gradient


# -- reference ------------------------------------------------------------------------------
def linear_ref(x, weight, bias=None, activation=None, residual=None, num_tokens=None):
    z = x @ weight.mT
    y = gelu_ref(z, bias) if activation else z if bias is None else z + bias
    return y if residual is None else y + residual


# -- kernels --------------------------------------------------------------------------------
@triton.jit
def _accumulate(
    acc,  # [BLOCK_M, BLOCK_N]
    x_ptrs,  # [BLOCK_M, 1]: first element of each row
    weight_ptrs,  # [1, BLOCK_N]: the same, of the rows of weight
    stride_wk,
    start_k,
    K,
    MASKED: tl.constexpr,  # the step goes past K
    BY_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc plus the products of the K step [start_k, start_k + BLOCK_K)."""
    offs_k = start_k + tl.arange(0, BLOCK_K)
    x_ptrs += offs_k[None, :]
    if BY_COLUMNS:
        weight_ptrs += offs_k.to(tl.int64)[:, None] * stride_wk
    else:
        weight_ptrs += offs_k[:, None]
    if MASKED:
        mask_k = offs_k < K
        x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=mask_k[:, None], other=0.0)
    else:
        x = tl.load(x_ptrs)
        weight = tl.load(weight_ptrs)
    if x.dtype == tl.float32 and PRECISION != "tf32":
        # One chain over all of K would err several times as much as a sum of partial sums. The fma
        # keeps them apart: Triton fuses a dot and an addition into one chain.
        return tl.fma(tl.dot(x, weight, input_precision=PRECISION), 1.0, acc)
    x, weight = factor_of(x, PRECISION), factor_of(weight, PRECISION)
    return tl.dot(x, weight, acc, input_precision=PRECISION)


@triton.jit
def product(
    x_ptr, weight_ptr, stride_xt,
    stride_w,  # between rows of weight; if BY_COLUMNS, between its columns
    start_m, start_n,
    rows, N, K,
    PRECISION: tl.constexpr,
    BY_COLUMNS: tl.constexpr,  # weight is as `by_columns` lays it out
    REST: tl.constexpr,  # whether K is no multiple of BLOCK_K
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The tile of x W^T in fp32 [BLOCK_M, BLOCK_N] that starts at (start_m, start_n)."""
    # Rows past the end are clamped to the last: no mask in the loop, and nothing past it is read.
    rows_m = tl.minimum(start_m + tl.arange(0, BLOCK_M), rows - 1).to(tl.int64)
    x_ptrs = x_ptr + rows_m[:, None] * stride_xt
    rows_n = start_n + tl.arange(0, BLOCK_N)
    if BY_COLUMNS:
        weight_ptrs = weight_ptr + rows_n[None, :]
    else:
        weight_ptrs = weight_ptr + tl.minimum(rows_n, N - 1).to(tl.int64)[None, :] * stride_w
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    full = K // BLOCK_K * BLOCK_K
    for start_k in range(0, full, BLOCK_K):
        acc = _accumulate(
            acc, x_ptrs, weight_ptrs, stride_w, start_k, K, False, BY_COLUMNS, PRECISION, BLOCK_K
        )
    if REST:
        acc = _accumulate(
            acc, x_ptrs, weight_ptrs, stride_w, full, K, True, BY_COLUMNS, PRECISION, BLOCK_K
        )
    return acc


@triton.jit
def _finish_half(
    y,  # [BLOCK_M, BLOCK_N]: x W^T in fp32
    bias_ptr, residual_ptr, y_ptr, stride_rt,
    start_m, start_n,
    rows, N,
    ACT: tl.constexpr,
    TIMES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """The epilogue of half a tile of y, which starts at (start_m, start_n)."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows_m = offs_m.to(tl.int64)[:, None]  # row * stride may pass 2^31
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n)[None, :]
    if ACT is not None:
        y = ACT(y)
    mask = (offs_m < rows)[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows_m * stride_rt + offs_n[None, :]
        residual = tl.load(residual_ptrs, mask=mask)
        y = y * residual if TIMES else y + residual
    tl.store(y_ptr + rows_m * N + offs_n[None, :], y, mask=mask)


@triton.jit
def _finish(
    y,  # [BLOCK_M, BLOCK_N]: x W^T in fp32
    bias_ptr, residual_ptr, y_ptr, stride_rt,
    start_m, start_n,
    rows, N,
    ACT: tl.constexpr,
    TIMES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """The epilogue of the tile of y that starts at (start_m, start_n)."""
    # In halves: the whole residual at once would take the registers of a second program on the SM.
    left, right = y.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    _finish_half(
        left, bias_ptr, residual_ptr, y_ptr, stride_rt,
        start_m, start_n, rows, N, ACT, TIMES, BLOCK_M, BLOCK_N // 2,
    )
    _finish_half(
        right, bias_ptr, residual_ptr, y_ptr, stride_rt,
        start_m, start_n + BLOCK_N // 2, rows, N, ACT, TIMES, BLOCK_M, BLOCK_N // 2,
    )


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _forward_kernel(
    x_ptr,  # [T, K]
    weight_ptr,  # [N, K], or by columns
    bias_ptr,  # [N] or None
    residual_ptr,  # [T, N] or None
    num_tokens_ptr,  # [1] or None
    y_ptr,  # [T, N], contiguous
    stride_xt, stride_w, stride_rt,
    T, N, K,
    ACT: tl.constexpr,  # a function of z, or None
    TIMES: tl.constexpr,  # whether residual is a factor, and not added
    PRECISION: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    REST: tl.constexpr,  # whether K is no multiple of BLOCK_K
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Program (m, n) takes tile (m, n) of y. Neighbours differ in n: a BERT weight stays in L2, and
    x is read from memory once."""
    wait_for_inputs()
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    start_m = pid // blocks_n * BLOCK_M
    start_n = pid % blocks_n * BLOCK_N
    rows = T
    if num_tokens_ptr is not None:
        rows = tl.minimum(tl.load(num_tokens_ptr), T)
        if start_m >= rows:
            return
    acc = product(
        x_ptr, weight_ptr, stride_xt, stride_w,
        start_m, start_n, rows, N, K, PRECISION, BY_COLUMNS, REST, BLOCK_M, BLOCK_N, BLOCK_K,
    )
    _finish(
        acc, bias_ptr, residual_ptr, y_ptr, stride_rt,
        start_m, start_n, rows, N, ACT, TIMES, BLOCK_M, BLOCK_N,
    )


@triton.jit
def take_tiles(
    first, programs,  # this one takes tiles first, first + programs, ...
    x,  # descriptor of [T, K] in tiles of [BLOCK_M, BLOCK_K]
    weight,  # descriptor of [N, K] in tiles of [BLOCK_N, BLOCK_K]; if BY_COLUMNS, both transposed
    bias_ptr, residual_ptr, y_ptr, stride_rt,
    rows, N, K,
    ACT: tl.constexpr,
    TIMES: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """What a persistent program does. The loads of the next tile overlap the epilogue of this one.
    Past the ends of x and weight, descriptors load zeros; what is loaded past rows is not stored.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_M) * blocks_n
    for tile in tl.range(first, tiles, programs, flatten=True):
        start_m = tile // blocks_n * BLOCK_M
        start_n = tile % blocks_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start_k in range(0, K, BLOCK_K):
            of_x = factor_of(x.load([start_m, start_k]), PRECISION)
            if BY_COLUMNS:
                of_weight = weight.load([start_k, start_n])
            else:
                of_weight = weight.load([start_n, start_k]).T
            acc = tl.dot(of_x, factor_of(of_weight, PRECISION), acc, input_precision=PRECISION)
        _finish(
            acc, bias_ptr, residual_ptr, y_ptr, stride_rt,
            start_m, start_n, rows, N, ACT, TIMES, BLOCK_M, BLOCK_N,
        )


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _persistent_kernel(
    x, weight,  # descriptors, see take_tiles
    bias_ptr, residual_ptr, num_tokens_ptr, y_ptr,  # as above
    stride_rt,
    T, N, K,
    ACT: tl.constexpr,
    TIMES: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """As many programs as the GPU holds take all tiles of y, in the order above."""
    wait_for_inputs()
    rows = T
    if num_tokens_ptr is not None:
        rows = tl.minimum(tl.load(num_tokens_ptr), T).to(tl.int32)  # as descriptors require
    take_tiles(
        tl.program_id(0), tl.num_programs(0), x, weight, bias_ptr, residual_ptr, y_ptr, stride_rt,
        rows, N, K, ACT, TIMES, PRECISION, BY_COLUMNS, BLOCK_M, BLOCK_N, BLOCK_K,
    )


# -- launchers ------------------------------------------------------------------------------
SPLIT = (80, 90, 100, 103)  # tensor cores 15 times as fast in bf16 as other units in fp32, or more


def product_precision(x):
    """input_precision of a product of x. fp32 is "bf16x6" on GPUs of SPLIT: each number is a sum of
    three of bf16, which have all of its 24 bits; of their nine products three, below the last bit,
    are left out. As sums of a few steps of K are added up, the result errs less than that of exact
    products in one chain. Two things are lost: numbers within 0.4 % of the largest count as
    infinity, and of those below 1e-33 what is below 1e-40."""
    precision = launch.precision(x)
    if not launch.is_exact(x.itemsize, precision) or launch.INTERPRET:
        return precision
    return "bf16x6" if launch.arch() in SPLIT and launch.fp32_precision() != "ieee" else precision


def _is_fp32(itemsize, precision):
    """Whether products have all digits of fp32: exact or of bf16, not TF32."""
    return itemsize == 4 and precision != "tf32"


def _forms(arch, itemsize, precision):
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages), small tiles first. None spills on sm_80, sm_90 or
    gfx942.

    The last is for large batches; that of 256 columns is for persistent programs: others of 128
    columns share an SM in twos and hide each other's epilogues. sm_80 has less tensor core
    throughput to feed. Small tiles wait at each K step, so their steps are longer.

    At least 64 rows: fewer use another instruction on sm_90, whose sums may round differently. For
    the same reason tiles on AMD have at least 32 columns and a common BLOCK_K, as have those of
    fp32. TF32 uses the tiles of 16 bits with half the BLOCK_K.
    """
    if precision == "bf16x6":
        if launch.multiplies_from_shared_memory(arch):
            small = ((64, 16, 32, 4, 4), (64, 32, 32, 4, 4), (64, 64, 32, 4, 4))
            return (*small, (128, 128, 32, 8, 3))
        return ((64, 32, 16, 4, 4), (64, 64, 16, 4, 4), (64, 128, 16, 4, 4))  # 32 would spill
    if launch.is_exact(itemsize, precision):  # operands are in registers
        small = ((64, 32, 32, 4, 3), (64, 64, 32, 4, 3))
        if isinstance(arch, str):
            return small
        return (*small, (64, 128, 32, 4, 3 if launch.multiplies_from_shared_memory(arch) else 2))
    small = ((64, 16, 128, 4, 4), (64, 32, 128, 4, 4), (64, 64, 128, 4, 3))
    if isinstance(arch, str):
        forms = ((64, 64, 64, 4, 2), (128, 128, 64, 8, 2))
    elif launch.multiplies_from_shared_memory(arch):
        forms = (*small, (128, 128, 64, 8, 3))
        if itemsize == 2:
            forms = (*forms, (128, 256, 64, 8, 3))
    else:
        forms = (*small, (64, 128, 64, 4, 3))
    return tuple((M, N, K * 2 // itemsize, *rest) for M, N, K, *rest in forms)


# KiB of shared memory per SM; 99 on other architectures
SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, "gfx942": 64}


@functools.lru_cache(1024)  # every launch calls this
def _tile(T, N, itemsize, precision, arch, multiprocessors, parts):
    """The form with the least work for the busiest SM. In the interpreter, where each program is
    costly, the largest; in exact fp32 one whose halves are not square, so that swapped sides show.
    """
    forms = _forms(arch, itemsize, precision)
    if launch.INTERPRET:
        return forms[1 if launch.is_exact(itemsize, precision) else -1]
    # The cost of a tile's row or column, in products. Fitted to what `check aot` predicts for base
    # and large, as sm_90 loads tiles from L2 more slowly than it multiplies.
    from_shared = launch.multiplies_from_shared_memory(arch)
    edge = 67 if from_shared and not _is_fp32(itemsize, precision) else 34

    def work(form):
        M, N_, K, warps, stages = form
        share = ceil_div(T, M) * parts * ceil_div(N, N_) / multiprocessors
        # Programs of four warps share an SM if shared memory holds two. Where operands are in
        # registers instead, shared memory holds one stage less.
        shared = (stages if from_shared else stages - 1) * (M + N_) * K * itemsize
        co_resident = warps == 4 and 2 * shared <= SHARED.get(arch, 99) << 10
        rounds = max(share, 1) if co_resident else math.ceil(share)
        return rounds * max(M * N_, edge * (M + N_))

    return min(forms, key=work)


def config_of(op, T, N, K, itemsize, precision, arch, multiprocessors, parts=1):
    """(whether programs persist, the tile) of op, which has `parts` results of T rows and N columns
    each: the default, or the tuned table's entry. On an H200 persistent programs of linear take 9
    to 16 % less time at 16,384 rows; in TF32 they have not been measured, nor has qkv."""
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"
    tile = dict(zip(names, _tile(T, N, itemsize, precision, arch, multiprocessors, parts)))
    large = launch.multiplies_from_shared_memory(arch) and itemsize == 2 and tile["BLOCK_M"] == 128
    default = {"PERSISTENT": int(large), **tile}
    key = launch.product_key(N, K, itemsize, precision)
    tile = launch.configuration(op, default, rows=T, **key).copy()
    return tile.pop("PERSISTENT"), tile


def describable(arch, precision, *rows):
    """Whether the GPU has tensor descriptors that can describe each (t [.., K], stride of rows).
    fp32 products spill in this form, but for TF32."""
    has = launch.INTERPRET or (isinstance(arch, int) and arch >= 90)
    return has and not _is_fp32(rows[0][0].itemsize, precision) and all(
        t.data_ptr() % 16 == 0 and stride * t.itemsize % 16 == 0 and stride >= t.shape[1] > 0
        for t, stride in rows
    )


def places(parts, arch, multiprocessors, itemsize, BLOCK_M, BLOCK_N, BLOCK_K, num_stages, **_):
    """How many persistent programs a GPU holds for each of `parts` results; in the interpreter few,
    so that each has several tiles."""
    if launch.INTERPRET:
        return 2
    shared = num_stages * (BLOCK_M + BLOCK_N) * BLOCK_K * itemsize
    beside = min(max((SHARED.get(arch, 99) << 10) // shared, 1), 2)
    return max(multiprocessors * beside // parts, 1)


COLUMNS_FROM = 512  # rows of x from which transposing the weight pays


def by_columns(T, precision, BLOCK_N, *weights):
    """(weights, stride, whether by columns) for a product with T rows; weights [N, K] are alike.

    By columns means stored as [K, N], padded to whole tiles; the padding is read, and its contents
    do not matter. Weights stored that way are used in place: a gradient's weight is its forward's,
    transposed. Exact fp32 on NVIDIA GPUs needs this layout: threads share a row of x, and each
    reads other columns of weight, which in row-major shared memory are all in one bank, as the
    compiled layouts show; on an H200 that took 3.5 times as long as cuBLAS. By columns has not
    been measured yet."""
    first = weights[0]
    N, K = first.shape
    columns = ceil_div(N, BLOCK_N) * BLOCK_N
    if _lies_by_columns(first) and columns == N:
        return weights, first.stride(1), True
    exact = launch.is_exact(first.itemsize, precision) and isinstance(launch.arch(), int)
    if not exact or T < COLUMNS_FROM:
        weights = [launch.rows(w)[0] for w in weights]
        return weights, weights[0].stride(0), False
    laid = [w.new_empty(K, columns) for w in weights]
    for new, w in zip(laid, weights):
        new[:, :N] = w.mT
    return laid, columns, True


def _lies_by_columns(weight):
    return weight.stride(0) == 1 != weight.stride(1)


def _forward(y, x, weight, bias, activation, residual, num_tokens):
    # The polynomial's error is below 16-bit rounding, but not after a residual that cancels.
    form = act_of(x.dtype) if residual is None else gelu_erf
    launch_product(y, x, weight, bias, form if activation else None, residual, num_tokens)


def launch_product(y, x, weight, bias, act, residual, num_tokens, times=False, op="linear"):
    """y = act(x W^T + bias) + residual; if times, the residual is multiplied instead. The
    configuration is that of op, as an epilogue as long as the GEMM wants another one."""
    x, stride_xt = launch.rows(x)
    residual, stride_rt = launch.rows(residual)
    (T, K), N = x.shape, weight.shape[0]
    precision = product_precision(x)
    gpu = launch.arch(), launch.multiprocessors()
    persistent, config = config_of(op, T, N, K, x.itemsize, precision, *gpu)
    shared = {"ACT": act, "TIMES": times, "PRECISION": precision, **config}
    bias = None if bias is None else bias.contiguous()
    tiles = ceil_div(T, config["BLOCK_M"]) * ceil_div(N, config["BLOCK_N"])
    transposed = _lies_by_columns(weight)
    stored, stride_w = launch.rows(weight.mT if transposed else weight)
    if tiles and persistent and describable(gpu[0], precision, (x, stride_xt), (stored, stride_w)):
        M_, N_, K_ = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
        weight_tile = (K_, N_) if transposed else (N_, K_)
        launch.start(
            _persistent_kernel, min(tiles, places(1, *gpu, x.itemsize, **config)),
            TensorDescriptor(x, (T, K), (stride_xt, 1), (M_, K_)),
            TensorDescriptor(stored, stored.shape, (stride_w, 1), weight_tile),
            bias, residual, num_tokens, y, stride_rt, T, N, K, BY_COLUMNS=transposed, **shared,
        )  # fmt: skip
    elif tiles:
        weight = stored.mT if transposed else stored
        (weight,), stride_w, is_by_columns = by_columns(T, precision, config["BLOCK_N"], weight)
        launch.start(
            _forward_kernel, tiles,
            x, weight, bias, residual, num_tokens, y, stride_xt, stride_w, stride_rt, T, N, K,
            BY_COLUMNS=is_by_columns, REST=K % config["BLOCK_K"] != 0, **shared,
        )  # fmt: skip


def _find_products():
    """oneDNN's product in this torch, and the one that adds a tensor, or None and None. Their names
    are private to torch, so they are tested."""
    try:
        ops = torch.ops.mkldnn._linear_pointwise
        x = torch.ones(2, 8, dtype=torch.float32, device="cpu")
        y = ops.default(x, x, None, "none", [], "")
        if torch.equal(ops.binary(x, y, x, None, "add"), 16 * x[:, :2]):
            return ops.default, ops.binary
    except (AttributeError, RuntimeError):
        pass
    return None, None


SMALL = 2**14  # elements; for smaller weights oneDNN's 10 us per call exceed MKL's whole time

ROWS = 64  # of x, for which oneDNN chooses a layout; it works for any number of rows

SHORT = 48  # rows; up to here MKL's time on Intel varies by a factor of four between shapes

FEW = 24  # rows; up to here oneDNN in its own layout beats MKL without AVX-512

EMULATED = 16  # rows; up to here oneDNN's emulated bf16 beats fp32

_product, _product_and_add = _find_products()
_reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None) if _product else None
ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


def _onednn_leads(x, alone=False):
    """Whether oneDNN beats torch's own product of x [T, K]; alone: there is no epilogue to fuse,
    which would save a pass. In fp32 it loses without AVX-512; with it, to MKL on Intel if alone."""
    return x.itemsize == 2 or (
        launch.AVX512 and not (launch.INTEL and alone and len(x) > SHORT)
    )


def onednn_takes(x, weight, residual, activation=None, prepacked=False):
    tensors = [t for t in (x, weight, residual) if t is not None]
    return (
        _product is not None
        and (prepacked or _onednn_leads(x, alone=not activation and residual is None))
        and x.dtype in ONEDNN_DTYPES
        and launch.cpu_multiplies(x.dtype, len(x) <= EMULATED)
        and weight.numel() >= SMALL
        and all(t.is_contiguous() for t in tensors)  # other layouts are a thousand times slower
        and torch.backends.mkldnn.enabled
    )


def _plain(x, weight, bias, activation, residual, num_tokens):
    T = len(x)
    x, residual = launch.head(num_tokens, x, residual)
    return launch.with_room(plain_rows(x, weight, bias, activation, residual), T)


def plain_rows(x, weight, bias, activation, residual):
    both = activation and residual is not None  # oneDNN fuses only one of them
    if onednn_takes(x, weight, residual, activation) and not (both and x.itemsize == 2):
        return _onednn(x, weight, bias, activation, residual)
    further = activation or residual is not None
    if x.itemsize == 2 and (further or not launch.cpu_multiplies(x.dtype)):  # rounded once
        args = (t if t is None else t.float() for t in (x, weight, bias, residual))
        wide_x, wide_weight, wide_bias, wide_residual = args
        y = plain_rows(wide_x, wide_weight, wide_bias, activation, wide_residual)
        return y.to(x.dtype)
    y = F.linear(x, weight, bias)
    y = torch.ops.aten.gelu_(y) if activation else y  # in place: 0.85 of F.gelu's time
    return y if residual is None else y.add_(residual)


def _onednn(x, weight, bias, activation, residual):
    if residual is not None and not activation:
        return _product_and_add(x, residual, weight, bias, "add")
    if activation and _onednn_leads(x):
        y = _product(x, weight, bias, "gelu", [], "none")  # "none": not the tanh form
    else:
        y = _product(x, weight, bias, "none", [], "")
        y = torch.ops.aten.gelu_(y) if activation else y
    return y if residual is None else y.add_(residual)


def prepack(weight):
    """weight [N, K] in oneDNN's layout for prepacked_linear, in fp32 where linear would compute in
    fp32; None where oneDNN does not take it."""
    (weight,) = launch.for_products(weight)
    if _reorder is None or not onednn_takes(weight[:1], weight, None, prepacked=True):
        return None
    return _reorder(weight, ROWS)


def takes_prepacked(x):
    """Whether to use prepacked_linear for x [T, K]."""
    return (
        type(x) is torch.Tensor
        and x.device.type == "cpu"
        and not launch.INTERPRET
        and torch.backends.mkldnn.enabled
        and x.shape[0] > 0
        and (x.shape[0] <= FEW or _onednn_leads(x))
    )


def prepacked_linear(x, packed, bias, activation=None, residual=None):
    """linear(x, weight, bias, activation, residual) with packed = prepack(weight), without
    gradients; at most one of activation and residual."""
    residual = None if residual is None else residual.contiguous()
    wide_x, bias, residual = launch.for_products(x.contiguous(), bias, residual)
    return _onednn(wide_x, packed, bias, activation, residual).to(x.dtype)


def _matmul(a, b):
    wide_a, wide_b = launch.for_products(a, b)
    return (wide_a @ wide_b).to(a.dtype)


def product_gradients(
    dz, x, weight, num_tokens=None, residual=None, needs_x=True, needs_weight=True
):
    """(dx, dweight, dbias) of z = x W^T + b; residual, a gradient of x from another path, is added
    to dx. Rows of dx past num_tokens are undefined. Gradients that are not needed are empty."""
    dx = dweight = x.new_empty(0)
    if needs_x:
        # Under autocast a residual may be wider. On a CPU the fused form is slower.
        wide = residual is not None and (residual.dtype != dz.dtype or dz.device.type == "cpu")
        added = None if wide else residual
        if num_tokens is not None:
            dx = _linear(dz, weight.mT, None, None, added, num_tokens)
        else:
            dx = _matmul(dz, weight) if added is None else torch.addmm(added, dz, weight)
        dx = residual + dx if wide else dx
    if num_tokens is not None and needs_weight:
        return dx, *weight_gradient(dz, x, num_tokens)
    if needs_weight:
        dweight = _matmul(dz.mT, x)
    (dz,) = launch.zeros_past(num_tokens, dz)
    return dx, dweight, dz.sum(0)


def _plain_backward(dy, x, weight, bias, activation, num_tokens, needs_x, needs_weight):
    if activation:
        op = torch.ops.bert_fast.gelu_gradient.default  # of gelu_gradient.py
        dy = op(dy, x, weight, bias, num_tokens)
    dx, *others = product_gradients(dy, x, weight, num_tokens, None, needs_x, needs_weight)
    return *launch.zeros_past(num_tokens if needs_x else None, dx), *others


# -- registration ---------------------------------------------------------------------------
_linear = launch.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual,"
    " Tensor? num_tokens) -> Tensor",
    outputs=lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
    launch=_forward,
    plain=_plain,
)
_linear_backward = launch.define_plain(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, str? activation,"
    " Tensor? num_tokens, bool needs_x, bool needs_weight)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    outputs=lambda dy, x, weight, bias, activation, num_tokens, needs_x, needs_weight: (
        x.new_empty(x.shape if needs_x else 0),
        x.new_empty(weight.shape if needs_weight else 0),
        x.new_empty(weight.shape[0]),
    ),
    plain=_plain_backward,
)


def linear_backward(dy, x, weight, bias, activation, num_tokens, needs_x, needs_weight):
    """(dx, dweight, dbias) of linear; those not needed are empty, except dbias."""
    # The op hides this from torch.compile, and from autocast.
    hides = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
    backward = _linear_backward if hides or num_tokens is not None else _plain_backward
    return backward(dy, x, weight, bias, activation, num_tokens, needs_x, needs_weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation, residual, num_tokens):
        ctx.save_for_backward(x, weight, bias, num_tokens)
        ctx.activation = activation
        return _linear(x, weight, bias, activation, residual, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, num_tokens = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, needs_residual, _ = ctx.needs_input_grad
        args = (dy, x, weight, bias, ctx.activation, num_tokens, needs_x, needs_weight)
        dx, dweight, dbias = linear_backward(*args)
        (dresidual,) = launch.zeros_past(num_tokens, dy) if needs_residual else (None,)
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            None, dresidual, None,
        )  # fmt: skip


# -- public op ------------------------------------------------------------------------------
def check_product(op, x, weight, bias, num_tokens, **like_result):
    """Raise ValueError unless x is [T, K], weight [N, K] and bias [N] (or None) in one dtype, and
    each of like_result, by name, [T, N] (or None)."""
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"{op}: x must be fp32, fp16 or bf16 [T, K], got {show(x)}")
    launch.check_rows(op, x)
    (T, K), dtype = x.shape, x.dtype
    if weight.ndim != 2 or weight.shape[1] != K or weight.dtype != dtype:
        want = f"{show(dtype)}[N, {K}]"
        raise ValueError(f"{op}: weight must be {want}, got {show(weight)}")
    N = weight.shape[0]
    if bias is not None and (bias.shape != (N,) or bias.dtype != dtype):
        want = f"{show(dtype)}[{N}]"
        raise ValueError(f"{op}: bias must be {want} like weight, got {show(bias)}")
    for name, t in like_result.items():
        if t is not None and (t.shape != (T, N) or t.dtype != dtype):
            want = f"{show(dtype)}[{T}, {N}]"
            raise ValueError(f"{op}: {name} must be {want} like the result, got {show(t)}")
    launch.check_num_tokens(op, num_tokens)


def linear(x, weight, bias=None, activation=None, residual=None, num_tokens=None):
    """x W^T + bias, then GELU if requested, then the residual added.

    x           [T, K], fp32, fp16 or bf16
    weight      [N, K], dtype of x
    bias        [N], dtype of x; None adds nothing
    activation  None, or "gelu": the exact-erf form
    residual    [T, N], dtype of x, added last; None adds nothing
    num_tokens  [1] integer on the device of x: rows past it do not affect the result and are not
                written in it; None takes all rows

    Returns [T, N] in the dtype of x, contiguous. Differentiable once, in x, weight, bias and
    residual. Rows may have any constant stride; an input laid out otherwise is copied first.
    Raises ValueError for any other shape, dtype or activation.
    """
    if activation not in (None, "gelu"):
        raise ValueError(f'linear: activation must be None or "gelu", got {activation!r}')
    check_product("linear", x, weight, bias, num_tokens, residual=residual)
    if launch.is_recorded():
        return _Linear.apply(x, weight, bias, activation, residual, num_tokens)
    return _linear(x, weight, bias, activation, residual, num_tokens)


# -- spec -----------------------------------------------------------------------------------
def _inputs(
    dtype, device, T, K, N, bias=True, gelu=False, residual=False, scale=1.0, by_columns=False,
    num_tokens=None,
):
    if num_tokens is not None:
        num_tokens = torch.tensor([num_tokens], dtype=torch.int32, device=device)
    weight = (torch.randn(N, K, device=device) / max(K, 1) ** 0.5).to(dtype)
    return {
        "x": (scale * torch.randn(T, K, device=device)).to(dtype),
        "weight": weight.mT.contiguous().mT if by_columns else weight,
        "bias": torch.randn(N, device=device).to(dtype) if bias else None,
        "activation": "gelu" if gelu else None,
        "residual": (scale * torch.randn(T, N, device=device)).to(dtype) if residual else None,
        "num_tokens": num_tokens,
    }


SIZES = (1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 200)


def _fuzz(rng):
    case = {"T": rng.choice((0, *SIZES)), "K": rng.choice(SIZES), "N": rng.choice(SIZES)}
    case["bias"] = rng.random() < 0.7
    if rng.random() < 0.5:
        case["gelu"] = True
    if rng.random() < 0.5:
        case["residual"] = True
    if rng.random() < 0.3:
        case["scale"] = rng.choice((1e-6, 0.1, 100.0))
    return case


def _cost(itemsize, T, K, N, bias=True, gelu=False, residual=False, **_):
    flops = T * N * (2 * K + bias + 16 * gelu + residual)
    return flops, (T * K + N * K + bias * N + (1 + residual) * T * N) * itemsize


BASE, LARGE = 768, 1024

SPEC = Spec(
    fn=linear,
    ref=linear_ref,
    inputs=_inputs,
    cost=_cost,
    cases=(
        {"T": 128, "K": 130, "N": 72, "residual": True},  # further rows are in tiles of their own
        {"T": 37, "K": 96, "N": 136, "gelu": True},  # column indices exceed the number of rows
        {"T": 131, "K": 128, "N": 130, "residual": True},  # edge tiles of three rows, two columns
        {"T": 257, "K": 16, "N": 257, "bias": False},
        {"T": 513, "K": 70, "N": 21},  # enough rows for a weight by columns
        {"T": 67, "K": 72, "N": 256, "by_columns": True, "residual": True},  # used in place
        {"T": 9, "K": 40, "N": 24, "gelu": True, "residual": True, "bias": False},
        {"T": 3, "K": 3072, "N": 7},
        {"T": 1, "K": 1, "N": 1},
        {"T": 0, "K": 128, "N": 128},
        {"T": 37, "K": 128, "N": 192},  # large enough for oneDNN, as are the next two
        {"T": 21, "K": 192, "N": 128, "gelu": True},
        {"T": 21, "K": 192, "N": 128, "residual": True},
        {"T": 6, "K": 64, "N": 64, "gelu": True, "scale": 100.0},  # saturated
        {
            "T": 16, "K": 8, "N": 64, "gelu": True, "residual": True, "bias": False, "scale": 0.1
        },  # GELU and residual cancel in places
    ),
    fuzz=_fuzz,
    whole={"T": 256, "K": 256, "N": 128, "gelu": True, "residual": True},
    huge=(
        {"T": 2**20 + 3, "K": 2**11, "N": 64},  # x
        {"T": 2**20 + 3, "K": 64, "N": 2**11, "residual": True},
        {"T": 64, "K": 2**12, "N": 2**20 + 3},  # weight
        {"T": 513, "K": 2**12, "N": 2**20 + 3},  # in fp32 by columns
        {"T": 64, "K": 2**12 + 3, "N": 2**20, "by_columns": True},
    ),
    bench=(
        {"T": 16384, "K": BASE, "N": BASE, "residual": True},
        {"T": 16384, "K": BASE, "N": 4 * BASE, "gelu": True},
        {"T": 16384, "K": 4 * BASE, "N": BASE, "residual": True},
        {"T": 16384, "K": LARGE, "N": 4 * LARGE, "gelu": True},
        {"T": 16384, "K": 4 * LARGE, "N": LARGE, "residual": True},
        {"T": 128, "K": BASE, "N": BASE, "residual": True},  # one sequence of 128
        {"T": 128, "K": BASE, "N": 4 * BASE, "gelu": True},
        {"T": 128, "K": 4 * BASE, "N": BASE, "residual": True},
        {"T": 16384, "K": BASE, "N": 4 * BASE, "gelu": True, "num_tokens": 16384},
        {"T": 16384, "K": 4 * BASE, "N": BASE, "residual": True, "by_columns": True},  # a gradient
    ),
    rejects={
        "x must be fp32, fp16 or bf16 [T, K], got float32[8]": {"x": torch.ones(8)},
        "weight must be float32[N, 130], got float32[8, 7]": {"weight": torch.ones(8, 7)},
        "bias must be float32[72] like weight, got float32[3]": {"bias": torch.ones(3)},
        'activation must be None or "gelu", got \'relu\'': {"activation": "relu"},
        "residual must be float32[128, 72] like the result, got float32[72]": {
            "residual": torch.ones(72)
        },
        "num_tokens must be int32[1] or int64[1], got float32[1]": {"num_tokens": torch.ones(1)},
    },
    packed=("x", "residual"),
    variants=({"PERSISTENT": 1},),
    rounds_backward=True,
)
