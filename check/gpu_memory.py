"""The memory that an emulated launch sees: tensors, tensor maps, and what waits for copies."""

import ctypes

import numpy as np
import torch
from gpu_arithmetic import U64


class Fault(Exception):
    """What on a GPU would crash, hang, or touch the memory of others."""


class Memory:
    """The tensors that launches may touch.

    tensors  (name, tensor) of each
    hidden   tensors, parts of these, no element of which may be loaded
    """

    def __init__(self, tensors, hidden=()):
        found = {}
        for name, t in tensors:
            storage = t.untyped_storage()
            if storage.nbytes():
                found.setdefault(storage.data_ptr(), (name, storage.nbytes()))
        starts = sorted(found)
        self.names, sizes = zip(*(found[start] for start in starts)) if found else ((), ())
        self.starts = np.array(starts, U64)
        self.ends = self.starts + np.array(sizes, U64)
        self.bytes = [
            np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
            for start, size in zip(starts, sizes)
        ]
        self.hidden = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in hidden]

    def places(self, addresses, width):
        """(index of a tensor, which of addresses are in it, their offsets there), for each tensor.
        Raises Fault for an address that is in none."""
        if (addresses % np.uint64(width)).any():
            raise Fault(f"an access of {width} bytes is not aligned to {width} bytes")
        which = np.searchsorted(self.starts, addresses, "right") - 1
        inside = (which >= 0) & (addresses + np.uint64(width) <= self.ends[which])
        if not inside.all():
            k, address = which[~inside][0], addresses[~inside][0]
            where = f", {address - self.ends[k]} bytes past {self.names[k]}" if k >= 0 else ""
            raise Fault(f"an access of {width} bytes is outside of all tensors{where}")
        for k in np.unique(which):
            of = np.flatnonzero(which == k)
            yield k, of, (addresses[of] - self.starts[k]).astype(np.int64)

    def load(self, addresses, width):
        """uint8 [n, width]"""
        for start, end in self.hidden:
            if ((addresses >= start) & (addresses < end)).any():
                raise Fault("a load of what must not be read")
        found = np.empty((len(addresses), width), np.uint8)
        for k, of, offsets in self.places(addresses, width):
            found[of] = self.bytes[k][offsets[:, None] + np.arange(width)]
        return found

    def store(self, addresses, numbers):
        """numbers: uint8 [n, width]"""
        width = numbers.shape[1]
        for k, of, offsets in self.places(addresses, width):
            self.bytes[k][offsets[:, None] + np.arange(width)] = numbers[of]


class TensorMap:
    """Boxes of a matrix, with zeros outside of it, for TMA.

    matrix    [rows, columns]
    metadata  what Triton compiled the kernel for
    """

    def __init__(self, matrix, metadata):
        self.matrix = matrix
        self.rows, self.columns = metadata["block_size"]
        self.pitch = {0: 16, 1: 32, 2: 64, 3: 128}[metadata["swizzle"]]  # see swizzled

    def box(self, x, y):
        """uint8 [rows, bytes] of the box at column x, row y."""
        box = self.matrix.new_zeros(self.rows, self.columns)
        part = self.matrix[max(y, 0) : y + self.rows, max(x, 0) : x + self.columns]
        box[max(-y, 0) :, max(-x, 0) :][: len(part), : part.shape[1]] = part
        return box.view(torch.uint8).numpy()


class Barrier:
    """An mbarrier: a phase ends when all have arrived, and all bytes that they announced."""

    def __init__(self, count):
        self.count = self.awaited = count
        self.phase = self.announced = 0
        self.boxes = []  # (offsets in shared memory, bytes) of copies under way

    def arrive(self, announced):
        self.awaited -= 1
        self.announced += announced

    def settle(self, shared):
        """End the phase if it can. What was copied is there only now."""
        if self.awaited == 0 and self.announced == sum(box.size for _, box in self.boxes):
            for at, box in self.boxes:
                shared[at] = box
            self.boxes, self.announced, self.awaited = [], 0, self.count
            self.phase += 1


def swizzled(address, pitch):
    """Where shared memory holds what is at an address of a tile with rows of `pitch` bytes."""
    return address ^ (address >> 7 & pitch // 16 - 1) << 4
