"""Checks every address that a kernel touches, in Triton's interpreter.

    with Sanitizer() as watched:
        layer_norm(x, weight, bias)
    watched.findings        the faults, with the line of the kernel's source
    watched.launches        what each launch cost: bytes, distinct bytes, floating-point operations

A kernel receives a tensor argument not at its address but at one in a region of its own, 2^46
bytes wide. Whatever the kernel adds to it, the region identifies the argument that a pointer came
from, so neighbouring memory cannot hide a stray access. After the check the access is made where
the tensor really is. A tensor on torch's meta device has no memory: its bounds are checked and
every load gives 1, so that offsets are checked at sizes that cannot be allocated (`phantoms`).

What is found
    outside         an access to no element of the tensor: past an end, between its rows, in another
                    tensor; `unmasked` if the access had no mask at all
    overflow        the same, after a 32-bit sum or product of that program passed 2^31
    unwritten       a load of memory from torch.empty before anything was stored there, or of what
                    was hidden (`hide`); not by a tensor descriptor, which loads whole tiles
    two writers     two programs, or two lanes of one store, store to one element
    race            a program loads what another program of the launch stores
What is not found: wrong values, so only tests catch a mask that is too narrow; races within a
program; and anything that depends on timing, as programs run one after the other.
"""

import inspect
import os
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from bert_fast.kernels import interpreter as mends
from bert_fast.kernels.launch import KERNELS

REGION = 46  # bits of the addresses that belong to one argument
MIDDLE = 1 << REGION - 1  # where in its region a tensor begins, with as much room before it
NOBODY = -1


@dataclass(frozen=True)
class Finding:
    kind: str  # as in the module's docstring
    kernel: str
    file: str
    line: int
    argument: str
    what: str  # the first occurrence, in words

    def __str__(self):
        return f"{self.file}:{self.line}: {self.kernel}: {self.kind}, {self.argument}: {self.what}"


@dataclass
class Launch:
    """What the programs of one launch did, and how often."""

    kernel: str
    grid: tuple
    bytes_read: int = 0
    bytes_written: int = 0
    distinct_bytes: int = 0  # an element read and written counts twice
    dot_flops: int = 0  # two for each product in tl.dot
    flops: int = 0  # others, of masked lanes too: one for each operation, exp2 and erf included


# -- memory ---------------------------------------------------------------------------------
class Shadow:
    """Which programs touched each element of a storage. They are numbered across all launches."""

    def __init__(self, size, written):
        self.written = np.full(size, written)
        self.writer = np.full(size, NOBODY, np.int64)
        self.first_reader = np.full(size, NOBODY, np.int64)  # of this launch, as is the next
        self.last_reader = np.full(size, NOBODY, np.int64)


class Argument:
    """A tensor as a kernel sees it: where its elements are, in units of its itemsize."""

    def __init__(self, name, tensor, region, shadow):
        self.name, self.tensor, self.shadow = name, tensor, shadow
        self.itemsize = tensor.element_size()
        self.real = tensor.data_ptr()
        self.base = (region << REGION) + MIDDLE
        self.first = tensor.storage_offset()  # in the storage, hence in the shadow
        reach = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        self.end = 1 + sum(reach) if tensor.numel() else 0
        self.covers = None  # all of [0, end)
        if tensor.numel() and self.end != tensor.numel() and not tensor.is_meta:
            covers = torch.zeros(self.end, dtype=torch.bool)
            covers.as_strided(tensor.shape, tensor.stride()).fill_(True)
            self.covers = covers.numpy()

    def inside(self, elements):
        inside = (elements >= 0) & (elements < self.end)
        if self.covers is not None:
            inside[inside] = self.covers[elements[inside]]
        return inside

    def place(self, element):
        """An element in words: its index, or how far outside it is."""
        shape, element = list(self.tensor.shape), int(element)
        if element < 0:
            return f"{-element} before the first element of {shape}"
        if element >= self.end:
            return f"{element - self.end + 1} past the last element of {shape}"
        index, rest = [], element
        order = sorted(range(len(shape)), key=lambda d: -self.tensor.stride(d))
        for d in order:
            index.append(rest // max(self.tensor.stride(d), 1))
            rest -= index[-1] * self.tensor.stride(d)
        if rest or any(i >= shape[d] for i, d in zip(index, order, strict=True)):
            return f"element {element} is between the rows of {shape}"
        return f"element {[index[order.index(d)] for d in range(len(shape))]} of {shape}"


class Sanitizer:
    """Watches the launches made inside it; programs(grid) selects which of a grid's to run."""

    def __init__(self, programs=lambda grid: np.ndindex(*grid)):
        self.programs = programs
        self.launches = []
        self._findings = {}
        self._shadows = {}  # (address of a storage, itemsize) -> Shadow
        self._unwritten = {}  # address of a storage from torch.empty -> that storage, kept alive
        self._arguments = []  # of the present launch, by region
        self._begun = self._program = 0  # the launch's first program and the present one
        self._overflow = None  # (file, line) of the present program's first
        self._loads_tile = False  # in a load of a tensor descriptor

    @property
    def findings(self):
        return list(self._findings.values())

    def __enter__(self):
        self._stack = ExitStack()
        self._stack.enter_context(_Allocations(self))
        for owner, name, watch in (
            (interpreter.GridExecutor, "__call__", self._watched_launch),
            (InterpreterBuilder, "create_load", self._watched_load),
            (InterpreterBuilder, "create_masked_load", self._watched_masked_load),
            (InterpreterBuilder, "create_descriptor_load", self._watched_descriptor_load),
            (InterpreterBuilder, "create_store", self._watched_store),
            (InterpreterBuilder, "create_masked_store", self._watched_masked_store),
            (InterpreterBuilder, "create_atomic_rmw", self._watched_atomic),
            (InterpreterBuilder, "create_atomic_cas", self._watched_atomic),
            (InterpreterBuilder, "binary_op", self._watched_binary),
            (InterpreterBuilder, "unary_op", self._counted),
            (InterpreterBuilder, "create_erf", self._counted),
            (InterpreterBuilder, "create_rsqrt", self._counted),
            (InterpreterBuilder, "create_fma", self._counted),
            (InterpreterBuilder, "create_dot", self._watched_dot),
            (interpreter.ReduceOps, "apply_impl", self._watched_reduce),
        ):
            method = watch(getattr(owner, name))
            self._stack.enter_context(mock.patch.object(owner, name, method))
        return self

    def __exit__(self, *error):
        self._stack.close()

    # -- tensors, as launchers make them
    def allocated(self, tensor):
        """Record that tensor is from torch.empty: unwritten, whatever was at its address before."""
        storage = tensor.untyped_storage()
        self._unwritten[storage.data_ptr()] = storage
        for key in [k for k in self._shadows if k[0] == storage.data_ptr()]:
            del self._shadows[key]

    def unwritten(self, tensor):
        """How many elements of tensor, which came from torch.empty, were never written."""
        if not tensor.numel() or tensor.untyped_storage().data_ptr() not in self._unwritten:
            return 0
        return int((~self._is_written(tensor)).sum())

    def hide(self, tensor):
        """Make a load from tensor a finding, as if its memory were unwritten."""
        self._is_written(tensor).fill_(False)

    def _is_written(self, tensor):
        """A bool for each element, which may be set."""
        written = torch.from_numpy(self._shadow(tensor).written)
        return written.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def written(self, tensor):
        """Record that torch has written to tensor."""
        address = tensor.untyped_storage().data_ptr()
        self._unwritten.pop(address, None)
        for (at, _), shadow in self._shadows.items():
            if at == address:
                shadow.written[:] = True

    def _shadow(self, tensor):
        if tensor.is_meta:
            return None
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), tensor.element_size()
        if key not in self._shadows:
            size = storage.nbytes() // tensor.element_size()
            self._shadows[key] = Shadow(size, storage.data_ptr() not in self._unwritten)
        return self._shadows[key]

    # -- launches
    def _watched_launch(self, original):
        def call(executor, *args, **kwargs):
            takes = inspect.signature(executor.fn).parameters
            options = mends.options_of(kwargs)
            kwargs = {k: v for k, v in kwargs.items() if k in takes}
            values = inspect.getcallargs(executor.fn, *args, **kwargs)
            self._arguments = []
            name = executor.fn.__name__
            scope = interpreter._patch_lang(executor.fn)
            try:
                values = {
                    k: v if k in executor.constexprs else self._argument(k, v)
                    for k, v in values.items()
                }
                grid = executor.grid(values) if callable(executor.grid) else executor.grid
                grid = (*grid, 1, 1)[:3]
                self.launches.append(Launch(name, grid))
                interpreter.interpreter_builder.set_grid_dim(*grid)
                self._begun = self._program + 1
                with options:
                    for index in self.programs(grid):
                        self._program += 1
                        self._overflow = None
                        interpreter.interpreter_builder.set_grid_idx(*map(int, index))
                        executor.fn(**values)
            finally:
                scope.restore()
            self._count_distinct()

        return call

    def _argument(self, name, value):
        """value as passed to a kernel; a tensor becomes an address in its region."""

        def convert(value):
            if not isinstance(value, torch.Tensor):
                return original(value)
            argument = Argument(name, value, 1 + len(self._arguments), self._shadow(value))
            self._arguments.append(argument)
            result = original(value)
            result.handle.data = np.array([argument.base], np.uint64)
            return result

        original = interpreter._implicit_cvt
        with mock.patch.object(interpreter, "_implicit_cvt", convert):
            return convert(value)

    def _count_distinct(self):
        launch = self.launches[-1]
        shadows = {id(a.shadow): (a.shadow, a.itemsize) for a in self._arguments}
        for shadow, size in shadows.values():
            if shadow is not None:
                touched = (shadow.last_reader >= self._begun).sum()
                touched += (shadow.writer >= self._begun).sum()
                launch.distinct_bytes += int(touched) * size

    # -- accesses
    def _access(self, pointers, mask, unmasked, store):
        """(the argument, its elements, their real addresses) for the valid lanes of mask.

        pointers and mask are arrays of one shape; those lanes come back as a mask.
        """
        addresses = pointers.astype(np.int64)
        lanes = np.flatnonzero(mask)
        if not lanes.size:
            return None, None, mask
        active = addresses.reshape(-1)[lanes]
        regions = active >> REGION
        argument = self._arguments[int(regions[0]) - 1]
        if (regions != regions[0]).any():
            self._found("outside", argument, "lanes of one access are in different tensors")
        elements, rest = np.divmod(active - argument.base, argument.itemsize)
        good = argument.inside(elements) & (rest == 0)
        if not good.all():
            at = int(elements[~good][0])
            kind = "overflow" if self._overflow else "unmasked" if unmasked else "outside"
            what = f"{'stores' if store else 'loads'} {argument.place(at)}"
            if rest.any():
                what += ", not at a multiple of the itemsize"
            self._found(kind, argument, what, self._overflow)
        mask = np.zeros(addresses.size, bool)
        mask[lanes[good]] = True
        return argument, elements[good], mask.reshape(addresses.shape)

    def _loaded(self, argument, elements):
        launch = self.launches[-1]
        launch.bytes_read += elements.size * argument.itemsize
        if (shadow := argument.shadow) is None:
            return
        at = elements + argument.first
        if not (good := shadow.written[at]).all() and not self._loads_tile:
            self._found("unwritten", argument, f"loads {argument.place(elements[~good][0])}")
        other = (shadow.writer[at] >= self._begun) & (shadow.writer[at] != self._program)
        if other.any():
            self._found(
                "race", argument,
                f"loads {argument.place(elements[other][0])}, which another program stores",
            )  # fmt: skip
        new = at[shadow.first_reader[at] < self._begun]
        shadow.first_reader[new] = self._program
        shadow.last_reader[at] = self._program

    def _stored(self, argument, elements, atomic=False):
        launch = self.launches[-1]
        launch.bytes_written += elements.size * argument.itemsize
        if (shadow := argument.shadow) is None:
            return
        at = elements + argument.first
        first, last = shadow.first_reader[at], shadow.last_reader[at]
        read = (last >= self._begun) & ((first != self._program) | (last != self._program))
        if read.any():
            self._found(
                "race", argument,
                f"stores {argument.place(elements[read][0])}, which another program loads",
            )  # fmt: skip
        writer = shadow.writer[at]
        twice = (writer >= self._begun) & (writer != self._program)
        if not atomic and twice.any():
            self._found(
                "two writers", argument,
                f"stores {argument.place(elements[twice][0])}, as another program does",
            )  # fmt: skip
        values, counts = np.unique(at, return_counts=True)
        if not atomic and len(values) < len(at):
            element = values[counts > 1][0] - argument.first
            what = f"two lanes of one store store {argument.place(element)}"
            self._found("two writers", argument, what)
        shadow.writer[at] = self._program
        shadow.written[at] = True

    def _watched_load(self, original):
        def create_load(builder, ptr, *rest):
            return self._load(builder, ptr, None, None, rest, {})

        return create_load

    def _watched_masked_load(self, original):
        self._load_really = original

        def create_masked_load(builder, ptr, mask, other, *rest, **options):
            return self._load(builder, ptr, mask, other, rest, options)

        return create_masked_load

    def _watched_descriptor_load(self, original):
        """A descriptor loads whole tiles: what it loads need not be written."""

        def create_descriptor_load(builder, *args):
            self._loads_tile = True
            try:
                return original(builder, *args)
            finally:
                self._loads_tile = False

        return create_descriptor_load

    def _load(self, builder, ptr, mask, other, rest, options):
        dtype = ptr.get_element_ty()
        if other is None:  # masked lanes are undefined on a GPU: make them so
            other = TensorHandle(_filled(ptr.data.shape, dtype, np.nan, 0x5A), dtype)
        wanted = np.ones(ptr.data.shape, bool) if mask is None else mask.data
        wanted = np.broadcast_to(wanted, ptr.data.shape)
        argument, elements, good = self._access(ptr.data, wanted, mask is None, store=False)
        if argument is None:
            return TensorHandle(np.broadcast_to(other.data, ptr.data.shape).copy(), dtype)
        self._loaded(argument, elements)
        if argument.tensor.is_meta:
            ones = _filled(ptr.data.shape, dtype, 1, 1)
            return TensorHandle(np.where(good, ones, other.data), dtype)
        real = TensorHandle(self._real(argument, ptr.data), ptr.dtype)
        good = TensorHandle(good, tl.int1)
        return self._load_really(builder, real, good, other, *rest, **options)

    def _watched_store(self, original):
        def create_store(builder, ptr, value, *rest):
            return self._store(builder, ptr, value, None, rest)

        return create_store

    def _watched_masked_store(self, original):
        self._store_really = original

        def create_masked_store(builder, ptr, value, mask, *rest):
            return self._store(builder, ptr, value, mask, rest)

        return create_masked_store

    def _store(self, builder, ptr, value, mask, rest):
        wanted = np.ones(ptr.data.shape, bool) if mask is None else mask.data
        wanted = np.broadcast_to(wanted, ptr.data.shape)
        argument, elements, good = self._access(ptr.data, wanted, mask is None, store=True)
        if argument is None:
            return None
        self._stored(argument, elements)
        if argument.tensor.is_meta:
            return None
        real = TensorHandle(self._real(argument, ptr.data), ptr.dtype)
        return self._store_really(builder, real, value, TensorHandle(good, tl.int1), *rest)

    def _watched_atomic(self, original):
        """Several programs may add to one element; any other load or store of it is a race."""

        def atomic(builder, *args):
            at, ptr = next((i, a) for i, a in enumerate(args) if isinstance(a, TensorHandle))
            masks = [a for a in args if isinstance(a, TensorHandle) and a.data.dtype == bool]
            wanted = np.broadcast_to(masks[0].data if masks else True, ptr.data.shape)
            argument, elements, good = self._access(ptr.data, wanted, not masks, store=True)
            if argument is None:
                return TensorHandle(np.zeros_like(args[at + 1].data), args[at + 1].dtype)
            self._stored(argument, elements, atomic=True)
            args = [TensorHandle(good, tl.int1) if masks and a is masks[0] else a for a in args]
            args[at] = TensorHandle(self._real(argument, ptr.data), ptr.dtype)
            return original(builder, *args)

        return atomic

    def _real(self, argument, pointers):
        return pointers - np.uint64(argument.base) + np.uint64(argument.real)

    # -- arithmetic
    def _watched_binary(self, original):
        def binary_op(builder, lhs, rhs, op):
            result = original(builder, lhs, rhs, op)
            data = result.data
            if lhs.dtype.is_floating():
                if data.dtype != bool:
                    self.launches[-1].flops += data.size
            elif data.dtype == np.int32 and op in (np.add, np.subtract, np.multiply):
                if self._overflow is None:
                    exact = op(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
                    if (exact != data).any():
                        self._overflow = _source()
            return result

        return binary_op

    def _counted(self, original):
        def op(builder, arg, *rest):
            result = original(builder, arg, *rest)
            if result.dtype.scalar.is_floating():
                self.launches[-1].flops += result.data.size
            return result

        return op

    def _watched_dot(self, original):
        def create_dot(builder, a, b, *rest):
            result = original(builder, a, b, *rest)
            self.launches[-1].dot_flops += 2 * result.data.size * a.data.shape[-1]
            return result

        return create_dot

    def _watched_reduce(self, original):
        def apply_impl(ops, inputs):
            if inputs[0].dtype.is_floating():
                self.launches[-1].flops += inputs[0].handle.data.size
            return original(ops, inputs)

        return apply_impl

    def _found(self, kind, argument, what, at=None):
        file, line = at or _source()
        kernel = self.launches[-1].kernel
        key = kind, kernel, file, line, argument.name
        self._findings.setdefault(key, Finding(*key, what))


class _Allocations(TorchDispatchMode):
    """Reports to the sanitizer what torch allocates and writes; ops run their Triton form."""

    def __init__(self, sanitizer):
        super().__init__()
        self.sanitizer = sanitizer

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "bert_fast" and op._opname in KERNELS:
            with self:
                return KERNELS[op._opname](*args)
        result = op(*args, **(kwargs or {}))
        if "empty" in op._opname:
            self.sanitizer.allocated(result)
        for t, a in zip(args, op._schema.arguments, strict=False):
            if a.alias_info and a.alias_info.is_write and isinstance(t, torch.Tensor):
                self.sanitizer.written(t)
        return result


def _filled(shape, dtype, number, integer):
    """An array of a Triton dtype: number if that is floating, else integer."""
    if dtype.is_floating():
        number = np.full(shape, number, np.float32)
        np_dtype = interpreter._get_np_dtype(dtype)
        return mends.encode(number, dtype) if np_dtype.kind == "u" else number.astype(np_dtype)
    return np.full(shape, integer, interpreter._get_np_dtype(dtype))


_BETWEEN = (os.path.dirname(triton.__file__), mends.__file__, __file__)  # a kernel and us


def _source():
    """(file, line) of the kernel statement being run, or of the helper's if it is in one."""
    frame = inspect.currentframe()
    while frame:
        file = frame.f_code.co_filename
        if not file.startswith(_BETWEEN):
            return os.path.basename(file), frame.f_lineno
        frame = frame.f_back
    return "?", 0
