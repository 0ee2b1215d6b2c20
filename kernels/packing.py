"""Packing: which positions of a padded batch hold tokens, and the inverse.

    packed  row t of T is position row_index[t] of the B * S positions of the batch
    padded  position r is row packed_row[r], or holds no token where that is -1

Shapes     attention_mask [B, S]; a token is where it is not zero, anywhere in its row.
           row_index [B * S], zeros from T on; packed_row [B, S];
           cu_seqlens [B + 1], non-decreasing, as attention takes it. T = cu_seqlens[B].
Precision  unpack copies bits.
Backward   unpack: the gradient of row t is that of its position; zeros for rows past T.
Source     Zeng et al., Boosting Distributed Training Performance of the Unpadded BERT Model, 2022.

Everything stays on the device: T is never read on the host, so nothing waits for the GPU.
"""

from typing import NamedTuple

import torch

from . import launch
from .launch import DTYPES, next_power_of_2, once_differentiable, show, tl, triton, wait_for_inputs
from .spec import Spec


class Packing(NamedTuple):
    row_index: torch.Tensor  # int32[B * S]
    packed_row: torch.Tensor  # int32[B, S]
    cu_seqlens: torch.Tensor  # int32[B + 1]


# -- reference ------------------------------------------------------------------------------
def pack_ref(attention_mask):
    B, S = attention_mask.shape
    row_index, packed_row, cu_seqlens = [], [-1] * (B * S), [0]
    for r, value in enumerate(attention_mask.flatten().tolist()):
        if value != 0:
            packed_row[r] = len(row_index)
            row_index.append(r)
        if (r + 1) % S == 0:
            cu_seqlens.append(len(row_index))
    cu_seqlens += [0] * (B + 1 - len(cu_seqlens))  # S = 0
    row_index += [0] * (B * S - len(row_index))
    return Packing(
        *(
            torch.tensor(values, dtype=torch.int32, device=attention_mask.device).view(shape)
            for values, shape in ((row_index, -1), (packed_row, (B, S)), (cu_seqlens, -1))
        )
    )


def unpack_ref(x, packed_row):
    zeros = x.new_zeros(1, x.shape[1])
    return torch.cat((x, zeros))[packed_row.long()]  # -1 is the last row


# -- kernels --------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["stride_mb", "S"])
def _count_kernel(
    mask_ptr,  # [B, S]
    count_ptr,  # [B]
    stride_mb, stride_ms,
    S,
    BLOCK_S: tl.constexpr,
):
    """Program b counts the tokens of sequence b."""
    wait_for_inputs()
    b = tl.program_id(0).to(tl.int64)
    count = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, S, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        offs = b * stride_mb + offs_s.to(tl.int64) * stride_ms
        mask = tl.load(mask_ptr + offs, mask=offs_s < S, other=0)
        count += (mask != 0).to(tl.int32)
    tl.store(count_ptr + b, tl.sum(count, 0))


@triton.jit(do_not_specialize=["stride_mb", "S"])
def _index_kernel(
    mask_ptr,  # [B, S]
    count_ptr,  # [B]
    row_index_ptr,  # [B * S]
    packed_row_ptr,  # [B, S], contiguous
    cu_seqlens_ptr,  # [B + 1]
    stride_mb, stride_ms,
    S,
    BLOCK_S: tl.constexpr,
):
    """Program b numbers the tokens of sequence b, after those of all sequences before it."""
    wait_for_inputs()
    b = tl.program_id(0)
    before = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, b, BLOCK_S):
        offs_b = start + tl.arange(0, BLOCK_S)
        before += tl.load(count_ptr + offs_b, mask=offs_b < b, other=0)
    t = tl.sum(before, 0)
    if b == 0:
        tl.store(cu_seqlens_ptr, 0)
    tl.store(cu_seqlens_ptr + b + 1, t + tl.load(count_ptr + b))

    mask_ptr += b.to(tl.int64) * stride_mb
    for start in range(0, S, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = tl.load(mask_ptr + offs_s.to(tl.int64) * stride_ms, mask=offs_s < S, other=0)
        token = (mask != 0).to(tl.int32)
        rows_t = t + tl.cumsum(token, 0) - token
        tl.store(row_index_ptr + rows_t, b * S + offs_s, mask=token != 0)
        tl.store(packed_row_ptr + b * S + offs_s, tl.where(token != 0, rows_t, -1), mask=offs_s < S)
        t += tl.sum(token, 0)


@triton.jit
def _unpack_kernel(
    x_ptr,  # [T, N]
    packed_row_ptr,  # [B * S]
    y_ptr,  # [B * S, N], contiguous
    stride_xt,
    N,
    BLOCK_N: tl.constexpr,
):
    """Program r writes position r."""
    wait_for_inputs()
    r = tl.program_id(0).to(tl.int64)  # r * N may pass 2^31
    row = tl.load(packed_row_ptr + r).to(tl.int64)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        x = tl.zeros([BLOCK_N], y_ptr.dtype.element_ty)
        if row >= 0:
            x = tl.load(x_ptr + row * stride_xt + offs_n, mask=mask_n)
        tl.store(y_ptr + r * N + offs_n, x, mask=mask_n)


# -- launchers ------------------------------------------------------------------------------
BLOCK_S = 256 if launch.INTERPRET else 1024  # fewer sequences are more than a block there


def _pack(packing, attention_mask):
    row_index, packed_row, cu_seqlens = packing
    mask = attention_mask
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    B, S = mask.shape
    if B == 0 or S == 0:
        cu_seqlens.zero_()
        return
    count = torch.empty(B, dtype=torch.int32, device=mask.device)
    config = {"BLOCK_S": BLOCK_S, "num_warps": 4}
    launch.start(_count_kernel, B, mask, count, mask.stride(0), mask.stride(1), S, **config)
    launch.start(
        _index_kernel, B,
        mask, count, row_index, packed_row, cu_seqlens, mask.stride(0), mask.stride(1), S, **config
    )


def _plain_pack(attention_mask):
    token = attention_mask != 0
    flat = token.flatten()
    rows = flat.nonzero().flatten()
    row_index = flat.new_zeros(len(flat), dtype=torch.int32)
    row_index[: len(rows)] = rows
    packed_row = (flat.cumsum(0, dtype=torch.int32) - 1).masked_fill_(~flat, -1)
    cu_seqlens = flat.new_zeros(len(token) + 1, dtype=torch.int32)
    cu_seqlens[1:] = token.sum(1).cumsum(0)
    return row_index, packed_row.view(token.shape), cu_seqlens


def _unpack(y, x, packed_row):
    x = x if x.stride(1) == 1 else x.contiguous()
    N = x.shape[1]
    if y.numel():
        BLOCK_N = min(next_power_of_2(N), 1024)
        launch.start(
            _unpack_kernel, packed_row.numel(),
            x, packed_row.contiguous(), y, x.stride(0), N,
            BLOCK_N=BLOCK_N, num_warps=launch.warps(BLOCK_N),
        )


def _plain_unpack(x, packed_row):
    y = x.new_zeros(*packed_row.shape, x.shape[1])
    token = packed_row >= 0
    y[token] = x[packed_row[token]]
    return y


def _plain_unpack_backward(dy, packed_row, T):
    row = packed_row.flatten().long()
    dx = dy.new_zeros(T + 1, dy.shape[-1])  # the last row collects gradients of padding
    dx.index_copy_(0, torch.where(row < 0, T, row), dy.reshape(len(row), dy.shape[-1]))
    return dx[:T].contiguous()


# -- registration ---------------------------------------------------------------------------
_pack_op = launch.define(
    "pack(Tensor attention_mask)"
    " -> (Tensor row_index, Tensor packed_row, Tensor cu_seqlens)",
    outputs=lambda mask: (
        mask.new_zeros(mask.shape[0] * mask.shape[1], dtype=torch.int32),
        mask.new_empty(mask.shape, dtype=torch.int32),
        mask.new_empty(mask.shape[0] + 1, dtype=torch.int32),
    ),
    launch=_pack,
    plain=_plain_pack,
)
_unpack_op = launch.define(
    "unpack(Tensor x, Tensor packed_row) -> Tensor",
    outputs=lambda x, packed_row: x.new_empty(*packed_row.shape, x.shape[1]),
    launch=_unpack,
    plain=_plain_unpack,
)
_unpack_backward = launch.define_plain(
    "unpack_backward(Tensor dy, Tensor packed_row, SymInt T) -> Tensor",
    outputs=lambda dy, packed_row, T: dy.new_empty(T, dy.shape[-1]),
    plain=_plain_unpack_backward,
)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed_row):
        ctx.save_for_backward(packed_row)
        ctx.T = x.shape[0]
        return _unpack_op(x, packed_row)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (packed_row,) = ctx.saved_tensors
        return _unpack_backward(dy, packed_row, ctx.T), None


# -- public ops -----------------------------------------------------------------------------
def pack(attention_mask):
    """Where the tokens of a padded batch are.

    attention_mask  [B, S] of any integer, floating or bool dtype; what is not zero is a token.
                    B * S < 2^31

    Returns Packing(row_index, packed_row, cu_seqlens), int32 on the device of the mask; entries of
    row_index past the last token are 0. Raises ValueError for another shape or dtype.
    """
    if attention_mask.ndim != 2 or attention_mask.is_complex():
        raise ValueError(f"pack: attention_mask must be real [B, S], got {show(attention_mask)}")
    if attention_mask.numel() >= 2**31:
        raise ValueError(f"pack: attention_mask must have B * S < 2^31, got {show(attention_mask)}")
    return Packing(*_pack_op(attention_mask))


def unpack(x, packed_row):
    """Puts rows back at their positions, with zeros where there is no token.

    x           [T, N], fp32, fp16 or bf16; rows that packed_row does not name are not read
    packed_row  int32[B, S] of `pack`

    Returns [B, S, N] in the dtype of x. Differentiable once, in x. Raises ValueError for another
    shape or dtype.
    """
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"unpack: x must be fp32, fp16 or bf16 [T, N], got {show(x)}")
    if packed_row.ndim != 2 or packed_row.dtype != torch.int32:
        raise ValueError(f"unpack: packed_row must be int32[B, S], got {show(packed_row)}")
    if launch.is_recorded():
        return _Unpack.apply(x, packed_row)
    return _unpack_op(x, packed_row)


# -- specs ----------------------------------------------------------------------------------
def ragged_mask(lengths, S, device, dtype=torch.int64):
    """dtype[B, S] with lengths[b] tokens in row b; a negative length means the last -lengths[b]
    positions, None every third. If lengths is a number, that many rows without padding."""
    if isinstance(lengths, int):
        return torch.ones(lengths, S, dtype=dtype, device=device)
    position = torch.arange(S, device=device)
    return torch.stack(
        [
            position % 3 == 0 if n is None else position < n if n >= 0 else position >= S + n
            for n in lengths
        ]
    ).to(dtype) if lengths else torch.zeros(0, S, dtype=dtype, device=device)


def _pack_inputs(dtype, device, lengths, S, mask_dtype=torch.int64):
    mask = ragged_mask(lengths, S, device, mask_dtype)
    if mask.dtype.is_signed:
        mask[:, 1::2] *= -1  # whatever is not 0 is a token
    return {"attention_mask": mask}


def _unpack_inputs(dtype, device, lengths, S, N):
    if isinstance(lengths, int):
        T = lengths * S
        packed_row = torch.arange(T, dtype=torch.int32, device=device).view(lengths, S)
    else:
        packed_row = pack_ref(ragged_mask(lengths, S, "cpu")).packed_row
        T = int((packed_row >= 0).sum())
        packed_row = packed_row.to(device)
    return {"x": torch.randn(T, N, device=device).to(dtype), "packed_row": packed_row}


_CASES = (
    {"lengths": (5, 8, 1), "S": 8},
    {"lengths": (-3, None, 0, 11), "S": 11},
    {"lengths": (1025, -1), "S": 1025},  # just past a block
    {"lengths": (1,), "S": 1},
    {"lengths": (0, 0), "S": 4},
    {"lengths": (), "S": 4},
    {"lengths": (0, 0), "S": 0},
)
_BENCH = ({"lengths": (128, 60, 20, 256) * 8, "S": 256}, {"lengths": (512,) * 32, "S": 512})
_DTYPES = (torch.bool, torch.float32, torch.float16, torch.uint8, torch.int32)


def _fuzz_lengths(rng):
    S = rng.choice((0, 1, 2, 5, 8, 15, 16, 17, 40, 130))
    lengths = [rng.choice((None, rng.randint(-S, S), 0, S)) for _ in range(rng.randint(0, 5))]
    return {"lengths": lengths, "S": S}


def _fuzz_pack(rng):
    return {**_fuzz_lengths(rng), "mask_dtype": rng.choice(("int64", "bool", "float32", "int32"))}


def _fuzz_unpack(rng):
    return {**_fuzz_lengths(rng), "N": rng.choice((1, 3, 16, 64, 65, 768, 1025))}


PACK = Spec(
    fn=pack,
    ref=pack_ref,
    inputs=_pack_inputs,
    cost=lambda itemsize, lengths, S, **_: (0, len(lengths) * (S * (8 + 8 + 4 + 4) + 12)),
    cases=(
        *_CASES,
        {"lengths": (1, 0, 2) * (BLOCK_S // 3 + 1) + (1,), "S": 2},  # more sequences than a block
        *({"lengths": (3, -2, None), "S": 7, "mask_dtype": dtype} for dtype in _DTYPES),
    ),
    fuzz=_fuzz_pack,
    whole={"lengths": (512, 1024), "S": 1024},
    huge=({"lengths": 65535, "S": 32767},),
    bench=(*_BENCH, *({**_BENCH[0], "mask_dtype": dtype} for dtype in _DTYPES[:3])),
    rejects={
        "attention_mask must be real [B, S], got float32[8]": {"attention_mask": torch.ones(8)},
        "attention_mask must be real [B, S], got float32[2, 1, 1, 8]": {
            "attention_mask": torch.ones(2, 1, 1, 8)
        },
        "attention_mask must have B * S < 2^31, got int64[65536, 32768]": {
            "attention_mask": torch.zeros((), dtype=torch.int64).expand(65536, 32768)
        },
    },
)
UNPACK = Spec(
    fn=unpack,
    ref=unpack_ref,
    inputs=_unpack_inputs,
    cost=lambda itemsize, lengths, S, N: (
        0, len(lengths) * S * (4 + N * itemsize) + sum(lengths) * N * itemsize
    ),
    cases=tuple(
        {**case, "N": N} for case, N in zip(_CASES, (64, 1, 3, 1025, 5, 7, 8))
    ),
    fuzz=_fuzz_unpack,
    whole={"lengths": (64, 64), "S": 64, "N": 256},
    huge=({"lengths": 4200, "S": 512, "N": 1024},),
    bench=tuple({**case, "N": 768} for case in _BENCH),
    rejects={
        "x must be fp32, fp16 or bf16 [T, N], got int64[3, 4]": {"x": torch.ones(3, 4).long()},
        "packed_row must be int32[B, S], got int64[2, 2]": {
            "packed_row": torch.zeros(2, 2).long()
        },
    },
    packed=("x",),
)
