"""Kernels with one bug each, and the finding expected of the sanitizer. Bugs are marked `# bug`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Bug:
    kernel: Callable
    kind: str  # of sanitizer.Finding
    launch: Callable  # ()


BUGS = []


def bug(kind):
    """Decorates the launcher of the kernel with the same name."""

    def register(launch):
        BUGS.append(Bug(globals()[launch.__name__ + "_kernel"], kind, launch))
        return launch

    return register


def _x(*shape):
    return torch.randn(shape)


# -- past an end ----------------------------------------------------------------------------
@triton.jit
def no_mask_on_load_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)  # bug
    tl.store(y_ptr + offs, x, mask=offs < N)


@bug("unmasked")
def no_mask_on_load():
    no_mask_on_load_kernel[(2,)](_x(13), torch.empty(13), 13, BLOCK=8)


@triton.jit
def no_mask_on_store_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N)
    tl.store(y_ptr + offs, x)  # bug


@bug("unmasked")
def no_mask_on_store():
    no_mask_on_store_kernel[(2,)](_x(13), torch.empty(13), 13, BLOCK=8)


@triton.jit
def mask_one_too_wide_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs <= N, other=0.0)  # bug
    tl.store(y_ptr + offs, x, mask=offs < N)


@bug("outside")
def mask_one_too_wide():
    """The byte past the end is within the allocation: only the tensor's shape reveals it."""
    mask_one_too_wide_kernel[(1,)](_x(64)[:13], torch.empty(13), 13, BLOCK=16)


@triton.jit
def before_the_start_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    left = tl.load(x_ptr + offs - 1, mask=offs < N, other=0.0)  # bug
    tl.store(y_ptr + offs, left, mask=offs < N)


@bug("outside")
def before_the_start():
    before_the_start_kernel[(1,)](_x(64)[8:24], torch.empty(16), 16, BLOCK=16)


@triton.jit
def one_tile_too_many_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N + BLOCK, BLOCK):
        acc += tl.load(x_ptr + start + tl.arange(0, BLOCK))  # bug
    tl.store(y_ptr + tl.arange(0, BLOCK), acc)


@bug("unmasked")
def one_tile_too_many():
    one_tile_too_many_kernel[(1,)](_x(32), torch.empty(8), 32, BLOCK=8)


@triton.jit
def program_past_the_grid_kernel(x_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + offs, mask=offs < N)  # bug
    tl.store(y_ptr + row * N + offs, x, mask=(offs < N) & (row < M))


@bug("outside")
def program_past_the_grid():
    program_past_the_grid_kernel[(4,)](_x(3, 8), torch.empty(3, 8), 3, 8, BLOCK=8)


# -- the wrong place ------------------------------------------------------------------------
@triton.jit
def width_of_the_block_kernel(x_ptr, y_ptr, stride_xm, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_xm + offs, mask=offs < BLOCK, other=0.0)  # bug
    tl.store(y_ptr + row * N + offs, x, mask=offs < N)


@bug("outside")
def width_of_the_block():
    """Rows are further apart than they are long: the gap does not belong to the tensor."""
    x = _x(3, 16)[:, :13]
    width_of_the_block_kernel[(3,)](x, torch.empty(3, 13), x.stride(0), 13, BLOCK=16)


@triton.jit
def strides_swapped_kernel(x_ptr, y_ptr, stride_xm, stride_xn, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_xn + offs * stride_xm, mask=offs < N)  # bug
    tl.store(y_ptr + row * N + offs, x, mask=offs < N)


@bug("outside")
def strides_swapped():
    x = _x(3, 8)
    strides_swapped_kernel[(3,)](x, torch.empty(3, 8), *x.stride(), 8, BLOCK=8)


@triton.jit
def into_its_neighbour_kernel(q_ptr, k_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    q = tl.load(q_ptr + offs, mask=offs < N)
    k = tl.load(q_ptr + N + offs, mask=offs < N)  # bug
    tl.store(y_ptr + offs, q * k, mask=offs < N)


@bug("outside")
def into_its_neighbour():
    """q and k lie side by side in one allocation: the address is mapped, and it is k's."""
    q, k = _x(2, 8).unbind()
    into_its_neighbour_kernel[(1,)](q, k, torch.empty(8), 8, BLOCK=8)


@triton.jit
def index_not_checked_kernel(table_ptr, ids_ptr, y_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    index = tl.load(ids_ptr + row)
    x = tl.load(table_ptr + index * N + offs, mask=offs < N)  # bug
    tl.store(y_ptr + row * N + offs, x, mask=offs < N)


@bug("outside")
def index_not_checked():
    ids = torch.tensor([0, 5, 1])
    index_not_checked_kernel[(3,)](_x(5, 8), ids, torch.empty(3, 8), 8, BLOCK=8)


# -- 32 bits --------------------------------------------------------------------------------
@triton.jit
def row_times_stride_kernel(x_ptr, y_ptr, stride_xm, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    start = row * stride_xm  # bug
    x = tl.load(x_ptr + start + offs, mask=offs < N)
    tl.store(y_ptr + row.to(tl.int64) * N + offs, x, mask=offs < N)


@bug("overflow")
def row_times_stride():
    M, N = 2**21 + 1, 1024
    x, y = (torch.empty(M, N, device="meta") for _ in range(2))
    row_times_stride_kernel[(M,)](x, y, N, N, BLOCK=1024)


@triton.jit
def block_of_a_vector_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # bug
    mask = offs < N
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask), mask=mask)


@bug("overflow")
def block_of_a_vector():
    x, y = (torch.empty(2**31 + 4096, device="meta") for _ in range(2))
    block_of_a_vector_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)


# -- before it is there ---------------------------------------------------------------------
@triton.jit
def adds_to_nothing_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < N
    acc = tl.load(y_ptr + offs, mask=mask)  # bug
    tl.store(y_ptr + offs, acc + tl.load(x_ptr + offs, mask=mask), mask=mask)


@bug("unwritten")
def adds_to_nothing():
    adds_to_nothing_kernel[(1,)](_x(13), torch.empty(13), 13, BLOCK=16)


@triton.jit
def partial_sums_kernel(x_ptr, partial_ptr, N, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial_ptr + pid, tl.sum(tl.load(x_ptr + offs, mask=offs < N, other=0.0), 0))


@triton.jit
def more_partials_than_stored_kernel(partial_ptr, y_ptr, P: tl.constexpr):
    partial = tl.load(partial_ptr + tl.arange(0, P))  # bug
    tl.store(y_ptr, tl.sum(partial, 0))


@bug("unwritten")
def more_partials_than_stored():
    partial = torch.empty(8)
    partial_sums_kernel[(5,)](_x(40), partial, 40, BLOCK=8)
    more_partials_than_stored_kernel[(1,)](partial, torch.empty(1), P=8)


# -- programs in each other's way -----------------------------------------------------------
@triton.jit
def two_programs_a_row_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + pid * N + offs, mask=offs < N)
    tl.store(y_ptr + pid // 2 * N + offs, x, mask=offs < N)  # bug


@bug("two writers")
def two_programs_a_row():
    two_programs_a_row_kernel[(4,)](_x(4, 8), torch.empty(4, 8), 8, BLOCK=8)


@triton.jit
def tiles_overlap_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    mask = offs < N
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask), mask=mask)  # bug


@bug("two writers")
def tiles_overlap():
    tiles_overlap_kernel[(4,)](_x(25), torch.empty(25), 25, BLOCK=8)


@triton.jit
def lanes_collide_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs // 2, tl.load(x_ptr + offs))  # bug


@bug("two writers")
def lanes_collide():
    lanes_collide_kernel[(1,)](_x(8), torch.empty(8), BLOCK=8)


@triton.jit
def in_place_stencil_kernel(x_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    right = tl.load(x_ptr + offs + 1, mask=offs + 1 < N, other=0.0)
    tl.store(x_ptr + offs, right, mask=offs < N)  # bug


@bug("race")
def in_place_stencil():
    in_place_stencil_kernel[(2,)](_x(16), 16, BLOCK=8)


@triton.jit
def reads_what_the_last_one_wrote_kernel(x_ptr, y_ptr):
    pid = tl.program_id(0)
    total = tl.load(x_ptr + pid)
    if pid > 0:
        total += tl.load(y_ptr + pid - 1)  # bug
    tl.store(y_ptr + pid, total)


@bug("race")
def reads_what_the_last_one_wrote():
    """Correct in the interpreter, where programs run in order; on a GPU they do not."""
    reads_what_the_last_one_wrote_kernel[(4,)](_x(4), torch.zeros(4))


@triton.jit
def takes_a_ticket_kernel(count_ptr, y_ptr):
    ticket = tl.load(count_ptr)  # bug
    tl.atomic_add(count_ptr, 1)  # bug
    tl.store(y_ptr + ticket, tl.program_id(0))


@bug("race")
def takes_a_ticket():
    count, y = (torch.zeros(n, dtype=torch.int32) for n in (1, 3))
    takes_a_ticket_kernel[(3,)](count, y)
