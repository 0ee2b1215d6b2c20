"""Matrix product, and what BERT does to its result: bias, GELU, residual add.

    z = x W^T + b
    y = act(z) + residual        act(z) = z, or GELU in its erf form: z * Phi(z)

Shapes     x [T, K], weight [N, K], bias [N]; residual, y [T, N].
Precision  Sums in fp32, GELU and residual too; y is rounded once, to the dtype of x. fp32 products
           are exact fp32 ("ieee"), summed in steps of K whose sums are added, unless
           torch.backends.cuda.matmul.fp32_precision allows TF32. GELU of 16 bits is a polynomial
           within half an ulp, see pointwise.py; with a residual it is erf.
Batches    The kernel gives a row of y the same bits whatever the other rows, and however many. Each
           number is one chain of sums over K, or in exact fp32 of its steps; the number of rows
           chooses the tile, and so how often a program waits for memory, and never the instruction
           that adds or its order.
CPU        With AVX-512, oneDNN on the weight as it lies: torch's own linear gives fp32 to MKL,
           half as fast on AMD, whose AVX-512 it does not use, and about as fast on Intel. oneDNN
           adds up K in one chain, MKL in shorter ones: in fp32 a layer errs 1.4 to 1.7 times as
           far, some 1e-6 of its values. GELU or the residual is taken before y leaves the cache.
           In fp32 without AVX-512, torch's own: oneDNN takes 1.0 to 1.2 times as long, and its
           GELU more. 16 bits without instructions for them are multiplied in fp32.
Backward   with dz = dy * act'(z): dx = dz W, dW = dz^T x, db = sum of dz over rows, dresidual = dy.
           Products of torch in the dtype of x, dz rounded to it; with num_tokens, which torch's
           cannot read, this kernel on W as it lies, and weight_gradient. Where act is GELU, z is
           computed again instead of kept (gelu_gradient): one more product, a third of the largest
           activation less.
Source     Hendrycks, Gimpel, Gaussian Error Linear Units, 2016, for act. The kernel is the plain
           tiled product: a program for each tile of y, its K loop pipelined by the compiler. For
           many tiles, where there are tensor descriptors, its persistent form: a program for each
           place on the GPU, which takes tile after tile.
"""

import functools
import math

import torch
from torch.nn import functional as F

from . import launch
from .gelu import act_of, gelu_ref
from .launch import DTYPES, TensorDescriptor, ceil_div, once_differentiable, show, tl, triton
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
    """acc and the products of the step of BLOCK_K that starts at start_k."""
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
    if x.dtype == tl.float32 and PRECISION == "ieee":
        # One chain over all of K would err several times as far as a sum of sums. fma, as Triton
        # makes one chain of a dot and an addition.
        return tl.fma(tl.dot(x, weight, input_precision=PRECISION), 1.0, acc)
    x, weight = factor_of(x, PRECISION), factor_of(weight, PRECISION)
    return tl.dot(x, weight, acc, input_precision=PRECISION)


@triton.jit
def product(
    x_ptr, weight_ptr, stride_xt,
    stride_w,  # between rows of weight, or by columns between those
    start_m, start_n,
    rows, N, K,
    PRECISION: tl.constexpr,
    BY_COLUMNS: tl.constexpr,  # weight is as `by_columns` lays it out
    REST: tl.constexpr,  # whether K is no multiple of BLOCK_K
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The tile of x W^T in fp32 [BLOCK_M, BLOCK_N] that starts at (start_m, start_n)."""
    # Rows past the end stand for the last one: no mask in the loop, and nothing past it is read.
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
    """All that follows the product, of half a tile of y, which starts at (start_m, start_n)."""
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
    """All that follows the product, of the tile of y that starts at (start_m, start_n)."""
    # In halves: all of residual at once would take the registers of a second program beside this.
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
    """Program (m, n) takes tile (m, n) of y. Neighbours differ in n: a weight of BERT stays in L2,
    and x comes from memory once."""
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


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _persistent_kernel(
    x,  # descriptor of [T, K] in tiles of [BLOCK_M, BLOCK_K]
    weight,  # descriptor of [N, K] in tiles of [BLOCK_N, BLOCK_K]; by columns, of both turned round
    bias_ptr, residual_ptr, num_tokens_ptr, y_ptr,  # as above
    stride_rt,
    T, N, K,
    ACT: tl.constexpr,
    TIMES: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Program n takes tiles n, n + programs, ... of y, in the order above. Loads of the next one
    are under way while this one is finished. Past the ends of x and weight descriptors load zeros;
    rows that they load past num_tokens are not stored."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    rows = T
    if num_tokens_ptr is not None:
        rows = tl.minimum(tl.load(num_tokens_ptr), T).to(tl.int32)  # descriptors take no other
    tiles = tl.cdiv(rows, BLOCK_M) * blocks_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
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


# -- launchers ------------------------------------------------------------------------------
def _forms(arch, itemsize, precision, persistent=True):
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages), small tiles first. None spills on sm_80, sm_90 or
    gfx942.

    The last is for large batches. That of 256 columns is for persistent programs, where it is ahead
    on an H200; of programs for one tile that of 128 is, as two of them hide each other's ends.
    sm_80 has fewer products to feed. Small tiles wait for each step over K, and take longer ones.

    64 rows at least: fewer take another instruction on sm_90, whose sums may round otherwise. For
    the same reason 32 columns on AMD, and one BLOCK_K. TF32 has the tiles of 16 bits, of half as
    many columns.
    """
    if launch.is_exact(itemsize, precision):  # each thread holds operands
        small = ((64, 32, 32, 4, 3), (64, 64, 32, 4, 3))
        if isinstance(arch, str):
            return small
        return (*small, (64, 128, 32, 4, 3 if launch.multiplies_from_shared_memory(arch) else 2))
    small = ((64, 16, 128, 4, 4), (64, 32, 128, 4, 4), (64, 64, 128, 4, 3))
    if isinstance(arch, str):
        forms = ((64, 64, 64, 4, 2), (128, 128, 64, 8, 2))
    elif launch.multiplies_from_shared_memory(arch):
        forms = (*small, (128, 128, 64, 8, 3))
        if persistent and itemsize == 2:
            forms = (*forms, (128, 256, 64, 8, 3))
    else:
        forms = (*small, (64, 128, 64, 4, 3))
    return tuple((M, N, K * 2 // itemsize, *rest) for M, N, K, *rest in forms)


# KiB of a multiprocessor; of others 99
SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, "gfx942": 64}


@functools.lru_cache(1024)  # a launch comes here
def _tile(T, N, itemsize, precision, arch, multiprocessors, parts):
    """The form that leaves the busiest multiprocessor the least to do; in the interpreter, which
    pays for programs, the largest, or of exact fp32 one whose halves are no squares, so that sides
    which are mistaken for each other show."""
    forms = _forms(arch, itemsize, precision, persistent=parts == 1)
    if launch.INTERPRET:
        return forms[1 if launch.is_exact(itemsize, precision) else -1]
    # Each row and column of a tile costs as much as so many of its products. Fitted to what `check
    # aot` predicts for base and large, as sm_90 loads tiles from L2 more slowly than it multiplies.
    from_shared = launch.multiplies_from_shared_memory(arch)
    edge = 67 if from_shared and not launch.is_exact(itemsize, precision) else 34

    def work(form):
        M, N_, K, warps, stages = form
        share = ceil_div(T, M) * parts * ceil_div(N, N_) / multiprocessors
        # Of four warps several programs run beside each other, where there is memory for two. What
        # other tensor cores multiply is in registers, and one step less is in memory.
        shared = (stages if from_shared else stages - 1) * (M + N_) * K * itemsize
        beside = warps == 4 and 2 * shared <= SHARED.get(arch, 99) << 10
        rounds = max(share, 1) if beside else math.ceil(share)
        return rounds * max(M * N_, edge * (M + N_))

    return min(forms, key=work)


def tile_of(T, N, itemsize, precision, arch, multiprocessors, parts=1):
    """The configuration of the tiled kernel, for `parts` results of T rows and N columns each."""
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"
    return dict(zip(names, _tile(T, N, itemsize, precision, arch, multiprocessors, parts)))


def _config(T, N, K, itemsize, precision, arch, multiprocessors, op="linear"):
    """The tile and whether programs persist, or what was measured. On an H200 they take 3 to 16 %
    less time where there are many tiles; in TF32 they have not been measured."""
    tile = tile_of(T, N, itemsize, precision, arch, multiprocessors)
    large = launch.multiplies_from_shared_memory(arch) and itemsize == 2 and tile["BLOCK_M"] == 128
    config = {"PERSISTENT": int(large), **tile}
    key = launch.product_key(N, K, itemsize, precision)
    return launch.configuration(op, config, rows=T, **key)


def _describable(arch, exact, *rows):
    """Whether the GPU has tensor descriptors, and they can be of each (t [.., K], stride of rows).
    Exact products of fp32 spill in this form."""
    has = launch.INTERPRET or (isinstance(arch, int) and arch >= 90)
    return has and not exact and all(
        t.data_ptr() % 16 == 0 and stride * t.itemsize % 16 == 0 and stride >= t.shape[1] > 0
        for t, stride in rows
    )


def _places(arch, multiprocessors, itemsize, BLOCK_M, BLOCK_N, BLOCK_K, num_stages, **_):
    """How many persistent programs a GPU holds; in the interpreter so few that each has several
    tiles."""
    if launch.INTERPRET:
        return 2
    shared = num_stages * (BLOCK_M + BLOCK_N) * BLOCK_K * itemsize
    return multiprocessors * min(max((SHARED.get(arch, 99) << 10) // shared, 1), 2)


COLUMNS_FROM = 512  # rows of x that make up for the copy of a weight


def by_columns(T, precision, BLOCK_N, *weights):
    """(weights, stride, whether by columns) of weights [N, K] for a product with T rows, all alike.

    By columns they are [K, N], with room up to whole tiles, which is read, and no matter what it
    holds. Those that lie so stay so: a gradient's weight is that of its forward, transposed. Exact
    products of fp32 want it on NVIDIA's GPUs: their threads share a row of x, and each reads other
    columns of weight. As rows of shared memory these lie in one and the same bank, as the compiled
    layouts say; an H200 took 3.5 times as long as cuBLAS so. By columns: not yet measured."""
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
    # The error of 16 bits' own form is less than rounding; next to a residual that cancels, more.
    form = act_of(x.dtype) if residual is None else gelu_erf
    launch_product(y, x, weight, bias, form if activation else None, residual, num_tokens)


def launch_product(y, x, weight, bias, act, residual, num_tokens, times=False, op="linear"):
    """y = act(x W^T + bias), and residual is added, or if times multiplied. The configuration is that
    of op: an epilogue that takes as long as the product wants another one."""
    x, stride_xt = launch.rows(x)
    residual, stride_rt = launch.rows(residual)
    (T, K), N = x.shape, weight.shape[0]
    precision = launch.precision(x)
    gpu = launch.arch(), launch.multiprocessors()
    config = _config(T, N, K, x.itemsize, precision, *gpu, op)
    persistent = config["PERSISTENT"]
    config = {name: value for name, value in config.items() if name != "PERSISTENT"}
    shared = {"ACT": act, "TIMES": times, "PRECISION": precision, **config}
    bias = None if bias is None else bias.contiguous()
    tiles = ceil_div(T, config["BLOCK_M"]) * ceil_div(N, config["BLOCK_N"])
    exact = launch.is_exact(x.itemsize, precision)
    turned = _lies_by_columns(weight)
    stored, stride_w = launch.rows(weight.mT if turned else weight)
    if tiles and persistent and _describable(gpu[0], exact, (x, stride_xt), (stored, stride_w)):
        M_, N_, K_ = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
        launch.start(
            _persistent_kernel, min(tiles, _places(*gpu, x.itemsize, **config)),
            TensorDescriptor(x, (T, K), (stride_xt, 1), (M_, K_)),
            TensorDescriptor(stored, stored.shape, (stride_w, 1), (K_, N_) if turned else (N_, K_)),
            bias, residual, num_tokens, y, stride_rt, T, N, K, BY_COLUMNS=turned, **shared,
        )  # fmt: skip
    elif tiles:
        weight = stored.mT if turned else stored
        (weight,), stride_w, is_by_columns = by_columns(T, precision, config["BLOCK_N"], weight)
        launch.start(
            _forward_kernel, tiles,
            x, weight, bias, residual, num_tokens, y, stride_xt, stride_w, stride_rt, T, N, K,
            BY_COLUMNS=is_by_columns, REST=K % config["BLOCK_K"] != 0, **shared,
        )  # fmt: skip


def _find_products():
    """oneDNN's product in this torch, and the one that adds a tensor, or None and None. Their names
    are private to torch, so they are tried out."""
    try:
        ops = torch.ops.mkldnn._linear_pointwise
        x = torch.ones(2, 8, dtype=torch.float32, device="cpu")
        y = ops.default(x, x, None, "none", [], "")
        if torch.equal(ops.binary(x, y, x, None, "add"), 16 * x[:, :2]):
            return ops.default, ops.binary
    except (AttributeError, RuntimeError):
        pass
    return None, None


SMALL = 2**14  # elements of a weight for which oneDNN's 10 us a call are more than MKL needs

ROWS = 64  # of x, that a layout is chosen for; it suits any number of them

SHORT = 48  # rows up to which MKL's time on Intel's leaps from shape to shape, by a factor of four

FEW = 24  # rows for which oneDNN in its own layout is ahead of MKL without AVX-512

EMULATED = 16  # rows of bf16 that oneDNN is ahead with, where it has no instructions for them

_product, _product_and_add = _find_products()
_reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None) if _product else None
ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


def _onednn_leads(x, alone=False):
    """Whether oneDNN is ahead of torch's own product of x [T, K]; alone says that nothing follows
    it, for which oneDNN would spare a pass. In fp32 it is behind without AVX-512, and behind MKL
    with it."""
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
        and all(t.is_contiguous() for t in tensors)  # another layout is a thousand times slower
        and torch.backends.mkldnn.enabled
    )


def _plain(x, weight, bias, activation, residual, num_tokens):
    T = len(x)
    x, residual = launch.head(num_tokens, x, residual)
    return launch.with_room(plain_rows(x, weight, bias, activation, residual), T)


def plain_rows(x, weight, bias, activation, residual):
    both = activation and residual is not None  # oneDNN takes one of them with its product
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
    """weight [N, K] in the layout that oneDNN computes in, in fp32 where linear would compute in
    fp32, for prepacked_linear; None where oneDNN does not take it."""
    (weight,) = launch.for_products(weight)
    if _reorder is None or not onednn_takes(weight[:1], weight, None, prepacked=True):
        return None
    return _reorder(weight, ROWS)


def takes_prepacked(x):
    """Whether prepacked_linear is for x [T, K]."""
    return (
        type(x) is torch.Tensor
        and x.device.type == "cpu"
        and not launch.INTERPRET
        and torch.backends.mkldnn.enabled
        and x.shape[0] > 0
        and (x.shape[0] <= FEW or _onednn_leads(x))
    )


def prepacked_linear(x, packed, bias, activation=None, residual=None):
    """linear(x, weight, bias, activation, residual) of packed = prepack(weight), without gradients,
    with an activation or a residual, not both."""
    residual = None if residual is None else residual.contiguous()
    wide_x, bias, residual = launch.for_products(x.contiguous(), bias, residual)
    return _onednn(wide_x, packed, bias, activation, residual).to(x.dtype)


def _matmul(a, b):
    wide_a, wide_b = launch.for_products(a, b)
    return (wide_a @ wide_b).to(a.dtype)


def product_gradients(
    dz, x, weight, num_tokens=None, residual=None, needs_x=True, needs_weight=True
):
    """(dx, dweight, dbias) of z = x W^T + b; residual, what x gets by another way, is part of dx.
    Rows of dx past num_tokens are whatever they are. What is not needed is empty."""
    dx = dweight = x.new_empty(0)
    if needs_x:
        # Under autocast a residual may be wider. A CPU takes longer for both at once.
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
    """(dx, dweight, dbias) of linear; what is not needed is empty, but for dbias."""
    # The op is for torch.compile, which is to see none of it, and against autocast.
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
    """Raise ValueError unless they are x [T, K], weight [N, K] and bias [N] (or None) of one dtype,
    and what is like the result, by name, [T, N] (or None)."""
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
    """x W^T + bias, GELU of it if asked for, and residual added.

    x           [T, K], fp32, fp16 or bf16
    weight      [N, K], dtype of x
    bias        [N], dtype of x; None adds nothing
    activation  None, or "gelu": the exact-erf form
    residual    [T, N], dtype of x, added last; None adds nothing
    num_tokens  [1] integer on the device of x: rows past it have no part in the result, and are not
                written there; None takes all rows

    Returns [T, N] in the dtype of x, contiguous. Differentiable once, in x, weight, bias and
    residual. Rows may lie any even distance apart; an input laid out otherwise is copied first.
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
        {"T": 128, "K": 130, "N": 72, "residual": True},  # rows past these have their own tiles
        {"T": 37, "K": 96, "N": 136, "gelu": True},  # columns of tiles go past the rows
        {"T": 131, "K": 128, "N": 130, "residual": True},  # tiles of three rows, of two columns
        {"T": 257, "K": 16, "N": 257, "bias": False},
        {"T": 513, "K": 70, "N": 21},  # enough for a weight by columns
        {"T": 67, "K": 72, "N": 256, "by_columns": True, "residual": True},  # which is not copied
        {"T": 9, "K": 40, "N": 24, "gelu": True, "residual": True, "bias": False},
        {"T": 3, "K": 3072, "N": 7},
        {"T": 1, "K": 1, "N": 1},
        {"T": 0, "K": 128, "N": 128},
        {"T": 37, "K": 128, "N": 192},  # enough for oneDNN, as are the next
        {"T": 21, "K": 192, "N": 128, "gelu": True},
        {"T": 21, "K": 192, "N": 128, "residual": True},
        {"T": 6, "K": 64, "N": 64, "gelu": True, "scale": 100.0},  # saturated
        {
            "T": 16, "K": 8, "N": 64, "gelu": True, "residual": True, "bias": False, "scale": 0.1
        },  # they cancel here and there
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
