"""Dropout, and the sum with a residual that follows it in BERT. No mask is stored.

    y = x * where(draw <= most, 1 / (1 - p), 0) + residual

Shapes     x, residual, y [..., N]. The leading dimensions are M rows, possibly none.
Draws      Uniform int32, a function of (seed, row, column) alone and the same on every device: a
           backward repeats the forward's draws. In attention a row is a query and head, a column
           is a key's index in its sequence.
Precision  fp32; y is rounded once, to the dtype of x. p is exact to 2^-32.
Backward   dx = dy * where(draw <= most, 1 / (1 - p), 0), dresidual = dy.
Source     Srivastava et al., Dropout, 2014. `mix` is lowbias32: Wellons, Prospecting for Hash
           Functions, 2018. With Philox, as in tl.rand, attention would take twice as long.
"""

import math

import torch

from . import launch
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
from .layer_norm import fuzz_shape
from .spec import Spec


# -- reference ------------------------------------------------------------------------------
def _mix_ref(x):
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def kept(seed, rows, columns, p):
    """Where dropout p keeps a number: bool, in the broadcast shape of rows and columns.

    seed is int64[1], the others int32, whose arithmetic is that of uint32 except for >>.
    """
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    start, step = _mix_ref(_mix_ref(high) + low), _mix_ref(_mix_ref(low) + high) | 1
    hashes = _mix_ref(rows * step + start)
    x = hashes + columns
    x ^= x >> 16 & 0xFFFF
    x *= 0x7FEB352D
    x += hashes
    x ^= x >> 15 & 0x1FFFF
    x *= 0x846CA68B - 2**32
    return x <= most(p)


def scales_at(seed, rows, columns, p, dtype):
    """The factors by which dropout multiplies numbers of dtype: in fp32 or wider."""
    return kept(seed, rows, columns, p).to(torch.promote_types(dtype, torch.float32)) * factor(p)


def _drop(x, p, seed):
    """Dropout of x, in fp32 or wider."""
    rows = torch.arange(math.prod(x.shape[:-1]), dtype=torch.int32, device=x.device)
    columns = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    return x * scales_at(seed, rows.view(*x.shape[:-1], 1), columns, p, x.dtype)


def dropout_ref(x, p, seed, residual=None, num_tokens=None):
    y = _drop(x, p, seed).to(x.dtype)
    return y if residual is None else y + residual


# -- kernels --------------------------------------------------------------------------------
@triton.jit
def mix(x):
    """A permutation of uint32 in which each input bit flips about half of the output bits."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def hash_rows(seed_ptr, rows):
    """The hash of each row, which all its draws share: uint32, as are rows. With a step of 1 seeds
    whose starts are close would have the same rows, some further on."""
    seed = tl.load(seed_ptr)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    start, step = mix(mix(high) + low), mix(mix(low) + high) | 1
    return mix(rows * step + start)


@triton.jit
def draw(hashes, columns):
    """int32, uniform, for each pair of a row (given by its hash) and a column. `mix` without its
    last step, which changes only low bits; the hash enters twice, so that rows with close hashes do
    not share draws."""
    x = hashes + columns
    x ^= x >> 16
    x = x * 0x7FEB352D + hashes
    x ^= x >> 15
    x *= 0x846CA68B
    return x.to(tl.int32)


@triton.jit(
    do_not_specialize=["most"], do_not_specialize_on_alignment=["seed_ptr", "num_tokens_ptr"]
)
def _kernel(
    x_ptr,  # [M, N]
    seed_ptr,  # [1]
    residual_ptr,  # [M, N] or None
    num_tokens_ptr,  # [1] or None
    y_ptr,  # [M, N], contiguous
    stride_xm, stride_rm,
    N,
    most, factor,
    BLOCK_N: tl.constexpr,
):
    """Program (m, n) takes block n of row m; both are in one grid axis, the one without a limit."""
    wait_for_inputs()
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)  # row * stride may pass 2^31
    offs_n = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    y_ptr += row * N + offs_n
    if num_tokens_ptr is not None:
        if row >= tl.load(num_tokens_ptr):
            return
    x = tl.load(x_ptr + row * stride_xm + offs_n, mask=mask_n)
    hashes = hash_rows(seed_ptr, row.to(tl.uint32))

    y = x * tl.where(draw(hashes, offs_n) <= most, factor, 0.0)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + row * stride_rm + offs_n, mask=mask_n)

    tl.store(y_ptr, y, mask=mask_n)


# -- launchers ------------------------------------------------------------------------------
def most(p):
    """The largest draw that dropout p keeps; for p = 0 the largest int32."""
    return max(round((1 - p) * 2**32) - 1, 0) - 2**31


def factor(p):
    """The factor for kept numbers. For p = 1 `most` still keeps one in 2^32, with a factor of 0."""
    return 1 / (1 - p) if p < 1 else 0.0


def _config(N):
    BLOCK_N = min(next_power_of_2(N), 1024)
    config = {"BLOCK_N": BLOCK_N, "num_warps": launch.warps(BLOCK_N)}
    return launch.configuration("dropout", config, N=N)


def _forward(y, x, p, seed, residual, num_tokens):
    x, stride_xm = launch.rows(x)
    residual, stride_rm = launch.rows(residual)
    M, N = x.shape
    if M * N:
        config = _config(N)
        launch.start(
            _kernel, M * ceil_div(N, config["BLOCK_N"]),
            x, seed, residual, num_tokens, y, stride_xm, stride_rm, N, most(p), factor(p), **config
        )  # fmt: skip


def _plain(x, p, seed, residual, num_tokens):
    M = x.shape[0]
    tokens, residual = launch.head(num_tokens, x, residual)
    y = _drop(tokens, p, seed)
    if residual is not None:
        y += residual
    return launch.with_room(y.to(x.dtype), M)


# -- registration ---------------------------------------------------------------------------
_dropout = launch.define(
    "dropout(Tensor x, float p, Tensor seed, Tensor? residual, Tensor? num_tokens) -> Tensor",
    outputs=lambda x, *_: x.new_empty(x.shape),
    launch=_forward,
    plain=_plain,
)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed, residual, num_tokens):
        ctx.save_for_backward(seed, num_tokens)
        ctx.p, ctx.residual = p, residual is not None
        return _dropout(x, p, seed, residual, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        seed, num_tokens = ctx.saved_tensors
        dx = _dropout(dy, ctx.p, seed, None, num_tokens)
        dx, dresidual = launch.zeros_past(num_tokens, dx, dy if ctx.residual else None)
        return dx, None, None, dresidual, None


# -- public op ------------------------------------------------------------------------------
def dropout(x, p, seed, residual=None, num_tokens=None):
    """Dropout of x, and the sum with a residual.

    x           [..., N], fp32, fp16 or bf16
    p           the probability that a number becomes zero, from 0 to 1
    seed        int64[1] on the device of x, from which the draws follow. Equal seeds drop the same
                positions.
    residual    shape and dtype of x; None adds nothing
    num_tokens  [1] integer on the device of x [T, N]: rows past it are not read, and not written
                in the result; None takes all rows

    Returns [..., N] in the dtype of x, contiguous. Differentiable once, in x and residual. Rows may
    have any constant stride; an input laid out otherwise is copied first. Raises ValueError for any
    other shape, dtype or p.
    """
    if x.ndim == 0 or x.dtype not in DTYPES:
        raise ValueError(f"dropout: x must be fp32, fp16 or bf16 [..., N], got {show(x)}")
    seed = check_dropout("dropout", "p", p, seed)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"dropout: residual must be {show(x)} like x, got {show(residual)}")
    launch.check_num_tokens("dropout", num_tokens)
    p = float(p)  # numpy's are no arguments of a kernel
    if launch.is_recorded():
        return _Dropout.apply(x, p, seed, residual, num_tokens)
    return _dropout(x, p, seed, residual, num_tokens)


def check_dropout(op, name, p, seed):
    """The seed. Raises ValueError unless it is int64[1], and p, argument `name` of op, is from 0 to
    1."""
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: {name} must be from 0 to 1, got {p}")
    if not isinstance(seed, torch.Tensor) or seed.shape != (1,) or seed.dtype != torch.int64:
        raise ValueError(f"{op}: seed must be int64[1], got {show(seed)}")
    return seed


def new_seeds(count, device):
    """Yields count seeds, int64[1] each, from torch's generator: all drawn when the first is."""
    # No `yield from`: torch 2.14's dynamo then closes a list's iterator, which has no close.
    for seed in torch.randint(2**63 - 1, (count, 1), device=device).unbind():  # noqa: UP028
        yield seed


# -- spec -----------------------------------------------------------------------------------
def _inputs(dtype, device, shape, p=0.5, residual=True):
    return {
        "x": torch.randn(shape, device=device).to(dtype),
        "p": p,
        "seed": next(new_seeds(1, device)),
        "residual": torch.randn(shape, device=device).to(dtype) if residual else None,
    }


def _fuzz(rng):
    p = rng.choice((0, 0.1, 0.5, 0.999, 1))
    return {"shape": fuzz_shape(rng), "p": p, "residual": rng.random() < 0.7}


def _cost(itemsize, shape, residual=True, **_):
    size = math.prod(shape)
    return (1 + residual) * size, (2 + residual) * size * itemsize


SPEC = Spec(
    fn=dropout,
    ref=dropout_ref,
    inputs=_inputs,
    cost=_cost,
    cases=(
        {"shape": (9, 96)},
        {"shape": (5, 1025), "p": 0.1},  # just past a block
        {"shape": (2, 3, 17), "residual": False},
        {"shape": (130, 1)},
        {"shape": (64,)},
        {"shape": (0, 64)},
        {"shape": (9, 64), "p": 0.0},  # all are kept
        {"shape": (9, 64), "p": 1.0},
        {"shape": (3, 2000), "p": 0.999},
    ),
    fuzz=_fuzz,
    whole={"shape": (4, 1024)},
    huge=({"shape": (2**19 + 3, 4096)},),
    bench=(
        {"shape": (32 * 512, 384), "p": 0.1},
        {"shape": (32 * 512, 768), "p": 0.1},  # BERT-base
        {"shape": (32 * 512, 1024), "p": 0.1},  # BERT-large
    ),
    rejects={
        "x must be fp32, fp16 or bf16 [..., N], got int64[2, 3]": {"x": torch.ones(2, 3).long()},
        "p must be from 0 to 1, got 1.5": {"p": 1.5},
        "p must be from 0 to 1, got nan": {"p": math.nan},
        "seed must be int64[1], got 7": {"seed": 7},
        "seed must be int64[1], got float32[1]": {"seed": torch.ones(1)},
        "residual must be float32[9, 96] like x, got float32[96]": {"residual": torch.ones(96)},
        "num_tokens must be int32[1] or int64[1], got float32[1]": {"num_tokens": torch.ones(1)},
    },
    packed=("x", "residual"),
)
