"""The gradients of linear's weight and bias: dW = dy^T x, db = sum of dy over rows.

Shapes     dy [T, N], x [T, K]; dweight [N, K], dbias [N].
Precision  Sums in fp32, rounded once to the dtype of x. Products in fp32 are exact unless torch
           allows TF32; sums of steps are added, as in linear.
Batches    Rows are split among programs, whose partial sums are then added, in an order that
           depends only on shapes and the GPU, so two runs give the same bits. With num_tokens
           nothing waits for the number of rows: a step can be recorded in a graph. Where it is
           known on the host, linear's backward uses torch's products.
Source     The plain tiled GEMM with its rows, the K of this product, split (split-K), as N x K
           alone are too few tiles for a GPU: 36 of 128 x 128 for a weight of 768 x 768.
"""

import functools
from typing import NamedTuple

import torch

from . import launch
from .launch import DTYPES, ceil_div, show, tl, triton, wait_for_inputs
from .pointwise import factor_of
from .spec import Spec


class WeightGradients(NamedTuple):
    dweight: torch.Tensor  # [N, K]
    dbias: torch.Tensor  # [N]


# -- reference ------------------------------------------------------------------------------
def weight_gradient_ref(dy, x, num_tokens=None):
    if num_tokens is not None:
        tokens = torch.arange(len(dy), device=dy.device)[:, None] < num_tokens
        dy, x = dy.where(tokens, 0.0), x.where(tokens, 0.0)
    return WeightGradients(dy.mT @ x, dy.sum(0))


# -- kernels --------------------------------------------------------------------------------
@triton.jit
def _load_rows(
    ptr, stride, start, end, offs, size,
    BLOCK_T: tl.constexpr,
):
    """Rows start to start + BLOCK_T and columns offs of [.., size]; zeros from row end on."""
    rows = start + tl.arange(0, BLOCK_T)
    mask = (rows < end)[:, None] & (offs < size)[None, :]
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs[None, :]  # may pass 2^31
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["T", "parts"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _product_kernel(
    dy_ptr,  # [T, N]
    x_ptr,  # [T, K]
    num_tokens_ptr,  # [1] or None
    dweight_ptr,  # [N, K] of each part
    dbias_ptr,  # [N] of each part
    stride_dyt, stride_xt, stride_part,
    T, N, K,
    parts,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """Program (part, n, k + 1) sums tile (n, k) of dweight over the rows of a part, program
    (part, n, 0) tile n of dbias."""
    wait_for_inputs()
    blocks_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * (blocks_k + 1)
    part = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    k = tile % (blocks_k + 1) - 1
    rows = T
    if num_tokens_ptr is not None:
        rows = tl.minimum(tl.load(num_tokens_ptr), T)
    share = tl.cdiv(tl.cdiv(rows, BLOCK_T), parts) * BLOCK_T
    start = part * share
    end = tl.minimum(start + share, rows)
    offs_n = tile // (blocks_k + 1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = part.to(tl.int64) * stride_part  # int64, like rows of dweight: may pass 2^31

    if k >= 0:
        offs_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start_t in range(start, end, BLOCK_T):
            dy = tl.trans(_load_rows(dy_ptr, stride_dyt, start_t, end, offs_n, N, BLOCK_T))
            x = _load_rows(x_ptr, stride_xt, start_t, end, offs_k, K, BLOCK_T)
            if x.dtype == tl.float32 and PRECISION == "ieee":  # partial sums, as in linear
                acc = tl.fma(tl.dot(dy, x, input_precision=PRECISION), 1.0, acc)
            else:
                dy, x = factor_of(dy, PRECISION), factor_of(x, PRECISION)
                acc = tl.dot(dy, x, acc, input_precision=PRECISION)
        mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
        offsets = offset + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
        tl.store(dweight_ptr + offsets, acc, mask=mask)
    else:
        total = tl.zeros([BLOCK_N], tl.float32)
        for start_t in range(start, end, BLOCK_T):
            dy = _load_rows(dy_ptr, stride_dyt, start_t, end, offs_n, N, BLOCK_T)
            total += tl.sum(dy.to(tl.float32), 0)
        tl.store(dbias_ptr + offset + offs_n, total, mask=offs_n < N)


@triton.jit(do_not_specialize=["parts"])
def _sum_kernel(
    sums_ptr,  # [parts, size + N] in fp32: of dweight, then of dbias
    dweight_ptr,  # [size]
    dbias_ptr,  # [N]
    parts, size, N,
    BLOCK: tl.constexpr,
):
    """Program i takes the elements from i * BLOCK on of both, concatenated."""
    wait_for_inputs()
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # parts may pass 2^31
    mask = offs < size + N
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        total += tl.load(sums_ptr + offs, mask=mask)
        sums_ptr += size + N
    tl.store(dweight_ptr + offs, total, mask=offs < size)
    tl.store(dbias_ptr + offs - size, total, mask=mask & (offs >= size))


# -- launchers ------------------------------------------------------------------------------
def _tile(itemsize, precision, arch):
    """BLOCK_N, BLOCK_K, BLOCK_T, warps, stages. Not yet measured."""
    if launch.is_exact(itemsize, precision):
        return (64, 64, 32, 4, 2)
    if isinstance(arch, str):
        tile = (64, 64, 64, 4, 2)
    elif launch.multiplies_from_shared_memory(arch):
        tile = (128, 128, 64, 8, 3)
    else:
        tile = (64, 128, 32, 4, 3)
    N, K, T, *rest = tile
    return N, K, T * 2 // itemsize, *rest


def _config(N, K, itemsize, precision):
    names = "BLOCK_N", "BLOCK_K", "BLOCK_T", "num_warps", "num_stages"
    config = dict(zip(names, _tile(itemsize, precision, launch.arch())))
    key = launch.product_key(N, K, itemsize, precision)
    return launch.configuration("weight_gradient", config, **key)


def _tiles(N, K, BLOCK_N, BLOCK_K):
    """The number of tiles of dweight and dbias."""
    return ceil_div(N, BLOCK_N) * (ceil_div(K, BLOCK_K) + 1)


@functools.lru_cache(1024)  # every launch calls this
def _parts(T, tiles, multiprocessors, BLOCK_T):
    """How many parts to split T rows into, for the least work of the busiest SM. Writing and
    reading a part's sums costs as much as the products of 437 rows on an H200."""
    most = min(ceil_div(T, BLOCK_T), 16)
    if launch.INTERPRET:
        return max(min(most, 3), 1)

    def work(parts):
        rounds = ceil_div(tiles * parts, multiprocessors) / parts
        return rounds * T + (437 * parts * tiles / multiprocessors if parts > 1 else 0)

    return min(range(1, most + 1), key=work, default=1)


def _backward(out, dy, x, num_tokens):
    dweight, dbias = out
    dy, stride_dyt = launch.rows(dy)
    x, stride_xt = launch.rows(x)
    (T, N), K = dy.shape, x.shape[1]
    precision = launch.precision(x)
    config = _config(N, K, x.itemsize, precision)
    tiles = _tiles(N, K, config["BLOCK_N"], config["BLOCK_K"])
    parts = _parts(T, tiles, launch.multiprocessors(), config["BLOCK_T"])
    to, size = (dweight, dbias), N * K
    if parts > 1:
        sums = x.new_empty(parts, size + N, dtype=torch.float32)
        to = sums, sums[:, size:]
    if tiles:
        launch.start(
            _product_kernel, tiles * parts,
            dy, x, num_tokens, *to, stride_dyt, stride_xt, size + N, T, N, K, parts,
            PRECISION=precision, **config,
        )  # fmt: skip
    if tiles and parts > 1:
        BLOCK = 64 if launch.INTERPRET else 2048
        launch.start(
            _sum_kernel, ceil_div(size + N, BLOCK),
            sums, dweight, dbias, parts, size, N, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def _plain(dy, x, num_tokens):
    dy, x = launch.head(num_tokens, dy, x)
    wide_dy, wide_x = launch.for_products(dy, x)
    return (wide_dy.mT @ wide_x).to(x.dtype), dy.sum(0)


# -- registration ---------------------------------------------------------------------------
_weight_gradient = launch.define(
    "weight_gradient(Tensor dy, Tensor x, Tensor? num_tokens) -> (Tensor dweight, Tensor dbias)",
    outputs=lambda dy, x, num_tokens: (
        x.new_empty(dy.shape[1], x.shape[1]), x.new_empty(dy.shape[1])
    ),
    launch=_backward,
    plain=_plain,
)  # fmt: skip


# -- public op ------------------------------------------------------------------------------
def weight_gradient(dy, x, num_tokens=None):
    """The gradients of linear's weight and bias, without an activation.

    dy          [T, N], fp32, fp16 or bf16: the gradient of x W^T + b
    x           [T, K], dtype of dy
    num_tokens  [1] integer on the device of x: rows past it are not read; None takes all rows

    Returns WeightGradients: dweight [N, K] and dbias [N] in the dtype of x. Not differentiable.
    The gradient of x is linear(dy, weight.mT). Raises ValueError for any other shape or dtype.
    """
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"weight_gradient: x must be fp32, fp16 or bf16 [T, K], got {show(x)}")
    if dy.ndim != 2 or dy.shape[0] != x.shape[0] or dy.dtype != x.dtype:
        want = f"{show(x.dtype)}[{x.shape[0]}, N]"
        raise ValueError(f"weight_gradient: dy must be {want} like x, got {show(dy)}")
    launch.check_num_tokens("weight_gradient", num_tokens)
    with torch.no_grad():
        return WeightGradients(*_weight_gradient(dy, x, num_tokens))


# -- spec -----------------------------------------------------------------------------------
def _inputs(dtype, device, T, N, K, num_tokens=None):
    dy, x = (torch.randn(T, size, device=device).to(dtype) for size in (N, K))
    if num_tokens is not None:
        dy[num_tokens:], x[num_tokens:] = torch.nan, torch.nan
        num_tokens = torch.tensor([num_tokens], dtype=torch.int32, device=device)
    return {"dy": dy, "x": x, "num_tokens": num_tokens}


SIZES = (1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129)


def _fuzz(rng):
    case = {"T": rng.choice((0, *SIZES)), "N": rng.choice(SIZES), "K": rng.choice(SIZES)}
    if rng.random() < 0.5:
        case["num_tokens"] = rng.choice((0, 1, 5, 33, 64, 1000))
    return case


def _cost(itemsize, T, N, K, **_):
    """Includes writing and reading the parts' fp32 sums, on an H100."""
    BLOCK_N, BLOCK_K, BLOCK_T, *_ = _tile(itemsize, "ieee", 80 if launch.INTERPRET else 90)
    parts = _parts(T, _tiles(N, K, BLOCK_N, BLOCK_K), 132, BLOCK_T)
    size = (N * K + N) * (parts > 1)
    flops = T * N * (2 * K + 1) + parts * size
    return flops, (T * (N + K) + N * K + N) * itemsize + 8 * parts * size


BASE, LARGE = 768, 1024

SPEC = Spec(
    fn=weight_gradient,
    ref=weight_gradient_ref,
    inputs=_inputs,
    cost=_cost,
    cases=(
        {"T": 130, "N": 72, "K": 136},  # further rows are in tiles of their own
        {"T": 131, "N": 136, "K": 72, "num_tokens": 37},  # a part without rows
        {"T": 257, "N": 16, "K": 257, "num_tokens": 200},
        {"T": 65, "N": 257, "K": 21},
        {"T": 700, "N": 5, "K": 7},
        {"T": 3, "N": 64, "K": 64},
        {"T": 1, "N": 1, "K": 1},
        {"T": 0, "N": 64, "K": 64},
        {"T": 33, "N": 40, "K": 24, "num_tokens": 0},
        {"T": 33, "N": 40, "K": 24, "num_tokens": 1000},  # out of range: all rows are tokens
    ),
    fuzz=_fuzz,
    whole={"T": 256, "N": 128, "K": 256},
    huge=(
        {"T": 2**11 + 3, "N": 2**20 + 3, "K": 64},  # dy
        {"T": 2**11 + 3, "N": 64, "K": 2**20 + 3},  # x
        {"T": 31, "N": 2**20 + 3, "K": 2**11},  # dweight
        {"T": 96, "N": 2**19 + 3, "K": 2**11 + 3},  # all but the last of its parts
    ),
    bench=(
        {"T": 16384, "N": BASE, "K": BASE},
        {"T": 16384, "N": 4 * BASE, "K": BASE},
        {"T": 16384, "N": BASE, "K": 4 * BASE},
        {"T": 16384, "N": 4 * LARGE, "K": LARGE},
    ),
    rejects={
        "x must be fp32, fp16 or bf16 [T, K], got float32[8]": {"x": torch.ones(8)},
        "dy must be float32[130, N] like x, got float32[8, 7]": {"dy": torch.ones(8, 7)},
        "dy must be float32[130, N] like x, got float64[130, 72]": {
            "dy": torch.ones(130, 72).double()
        },
        "num_tokens must be int32[1] or int64[1], got float32[1]": {"num_tokens": torch.ones(1)},
    },
    gradient=True,
)
