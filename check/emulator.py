"""Executes compiled kernels without a GPU: their PTX, all threads of some programs at once.

A register is an array with an element for each thread, an instruction one or a few calls of numpy.
Threads that are at the same block of instructions run together, those that are behind first; but
where a warp or a program acts as one, it waits for all of its threads.

Memory      Addresses are those of CPU tensors. An access must be aligned, and inside a tensor that
            the launch was given. Shared memory holds NaN before it is written. What is copied
            asynchronously is NaN until it has been waited for: if it is read too early, or
            overwrites what is still to be read, the result shows it.
Arithmetic  see gpu_arithmetic.py
Not seen    races between threads, as all keep step; what ptxas makes of PTX

An instruction that no kernel has needed so far raises NotImplementedError.

Source      NVIDIA, Parallel Thread Execution ISA 9.0; of matrix descriptors, section 9.7.15.5
"""

import numpy as np
from gpu_arithmetic import (
    ARITHMETIC,
    COMPARISONS,
    DIVISIONS,
    F32,
    PREDICATE,
    REDUCTIONS,
    S32,
    U16,
    U32,
    U64,
    elements,
    flushed,
    from_16,
    tensor_core,
    to_16,
)
from gpu_memory import Barrier, Fault, swizzled
from ptx import Address, parse

WARP, WARPGROUP = 32, 128  # threads
COLLECTIVE = "shfl", "redux", "elect", "ldmatrix", "stmatrix", "mma", "wgmma"  # of a warp
TYPES = {
    f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
    for kind, code in (("s", "i"), ("u", "u"), ("b", "u"))
    for bits in (8, 16, 32, 64)
} | {"f32": F32, "pred": PREDICATE}
MODIFIERS = {"ftz", "rn", "approx", "full"}  # of floats, that ARITHMETIC or its caller heeds
SPINS = 1000  # how often a barrier is asked in vain
AT_ONCE = 2**15  # threads
PARAMETER = 4096  # bytes between the addresses of parameters, for kernels that take these


def unknown(instruction):
    """The error for an instruction, or a form of one, that no kernel has needed so far."""
    return NotImplementedError(
        f"emulator: no instruction {instruction.opcode} (line {instruction.line}); add it to"
        f" ARITHMETIC, or to do_{instruction.name} of check/emulator.py"
    )


class Machine:
    """Some programs of a launch; `do_NAME` executes an instruction.

    shared     bytes of shared memory of a program
    arguments  {parameter: int, float or TensorMap}
    programs   numbers of these programs, of `of` in all
    dependent  whether the launch before may be under way
    """

    def __init__(self, program, shared, memory, arguments, programs, of, dependent):
        self.program, self.memory, self.arguments = program, memory, arguments
        self.count = len(programs) * program.threads
        self.place = np.repeat(np.arange(len(programs)), program.threads)  # of a thread's program
        tid = np.tile(np.arange(program.threads, dtype=U32), len(programs))
        self.lane = tid.astype(S32) % WARP
        self.registers = {
            "%tid.x": tid,
            "%ctaid.x": np.array(programs, U32)[self.place],
            "%nctaid.x": np.full(self.count, of, U32),
        }
        self.symbols = {name: PARAMETER * i for i, name in enumerate(program.parameters, 1)}
        self.parameter_at = {address: name for name, address in self.symbols.items()}
        self.symbols |= {"global_smem": 0} | dict.fromkeys(program.strings, 0)
        self.size = -(-shared // 1024) * 1024
        self.shared = np.full(len(programs) * self.size, 0xFF, np.uint8)
        self.copies = []  # by cp.async, under way: (threads, their groups, offsets, bytes)
        self.groups = np.zeros(self.count, np.int64)  # how many each thread has committed
        self.barriers = {}  # by offset in self.shared
        self.spins = 0
        self.waits = np.full(self.count, dependent)  # threads that may access no memory yet
        self.at = np.zeros(self.count, np.int64)  # the block that each thread executes next
        self.mask = None  # bool [threads] of those that execute an instruction; None for all
        self.blocks = [[(self._handler(i), i) for i in block] for block in program.blocks]
        self.units = list(map(self._unit, program.blocks))

    def _handler(self, instruction):
        name = instruction.name
        if handler := getattr(self, f"do_{name}", None):
            return handler
        if name in ARITHMETIC:
            return self.arithmetic
        raise unknown(instruction)

    def _unit(self, block):
        """How many threads can only execute a block together."""
        if block and block[0].opcode.startswith("bar.sync"):
            return self.program.threads
        return WARP if any(i.name in COLLECTIVE for i in block) else 1

    def run(self):
        while (self.at < len(self.blocks)).any():
            block, active = self.next_block()
            self.mask = active = None if active.all() else active
            self.go_to(block + 1)
            for handler, i in self.blocks[block]:
                self.mask = active
                if i.guard is not None:
                    chosen = self.read(i.guard, PREDICATE) ^ i.negated
                    chosen = chosen if active is None else chosen & active
                    if not chosen.any():
                        continue
                    self.mask = None if chosen.all() else chosen
                try:
                    handler(i)
                except Fault as fault:
                    raise Fault(f"{i.line}: {fault}, {i.opcode}") from None

    def next_block(self):
        """(a block, which threads can execute it)"""
        ended = self.at == len(self.blocks)
        for block in np.unique(self.at[~ended]):
            there = self.at == block
            if (unit := self.units[block]) > 1:
                whole = (there | ended).reshape(-1, unit).all(1)
                there &= whole.repeat(unit)
            if there.any():
                return block, there
        lines = {self.blocks[block][0][1].line for block in np.unique(self.at[~ended])}
        raise Fault(f"{' and '.join(sorted(lines))}: threads wait for each other for ever")

    def go_to(self, block):
        self.at[slice(None) if self.mask is None else self.mask] = block

    # -- registers -----------------------------------------------------------------------------
    def read(self, x, dtype):
        """The numbers of a register, one for each thread, or of a constant."""
        if isinstance(x, int):
            if dtype == PREDICATE:
                return np.bool_(x)
            bits = x & (1 << 8 * dtype.itemsize) - 1
            return np.array(bits, f"u{dtype.itemsize}").view(dtype)[()]
        if x.startswith("!"):
            return ~self.read(x[1:], dtype)
        if x in self.symbols:
            return np.full(self.count, self.symbols[x], dtype)
        if x not in self.registers:
            raise Fault(f"register {x} is read before it is written")
        return self.registers[x].astype(f"u{dtype.itemsize}", copy=False).view(dtype)

    def each(self, x, dtype):
        """As read, but an array even of a constant, of the threads that execute this."""
        return np.broadcast_to(self.read(x, dtype), self.count)[self.threads]

    def of_16_bits(self, x, register, kind):
        """f16 or bf16 numbers in registers of 16 or 32 bits, which hold two each."""
        bits = np.broadcast_to(self.read(x, register), self.count)
        return from_16(np.ascontiguousarray(bits).view(U16), kind)

    @property
    def threads(self):
        return slice(None) if self.mask is None else np.flatnonzero(self.mask)

    def write(self, register, value):
        """A number for each thread; signed ones extend their sign into a wider register."""
        if register == "_":
            return
        bits = self.program.width(register)
        if bits > 1:
            size = bits // 8
            if value.itemsize != size:
                value = value.astype(f"{value.dtype.kind}{size}")
            value = value.view(f"u{size}")
        if self.mask is not None:
            value = np.where(self.mask, value, self.registers.get(register, value.dtype.type(0)))
        elif not value.shape:
            value = np.full(self.count, value)
        self.registers[register] = np.ascontiguousarray(value)

    def write_some(self, register, value):
        """A number for each thread that executes this."""
        every = np.zeros(self.count, value.dtype)
        every[self.threads] = value
        self.write(register, every)

    def together(self):
        """Raises Fault if only a part of a warp executes this."""
        if self.mask is not None:
            warps = self.mask.reshape(-1, WARP)
            if (warps.any(1) != warps.all(1)).any():
                raise Fault("only some threads of a warp execute this")

    # -- arithmetic ----------------------------------------------------------------------------
    def arithmetic(self, i):
        of_integers, of_floats = ARITHMETIC[i.name]
        is_float = "f" in i.parts[-1]
        further = set(i.parts[:-1]) - (MODIFIERS if is_float else set())
        if is_float and i.name == "div":
            of_floats = next(filter(None, map(DIVISIONS.get, i.parts)), None)
        if further or (is_float and of_floats is None):
            raise unknown(i)
        kind = i.parts[-1].removesuffix("x2")
        if kind in ("f16", "bf16"):
            register = U16 if kind == i.parts[-1] else U32  # that of x2 holds two numbers
            given = (self.of_16_bits(x, register, kind).astype(F32) for x in i.operands[1:])
            result = of_floats(*given)
            self.write(i.operands[0], to_16(result, kind).view(register))
            return
        dtype = TYPES[kind]
        given = [self.read(x, dtype) for x in i.operands[1:]]
        if dtype.kind != "f":
            self.write(i.operands[0], of_integers(*given))
        elif "ftz" in i.parts:
            self.write(i.operands[0], flushed(of_floats(*map(flushed, given))))
        else:
            self.write(i.operands[0], of_floats(*given))

    def do_mul(self, i):
        if "f" in i.parts[-1]:
            self.arithmetic(i)
        else:
            self.write(i.operands[0], self.product(i))

    def do_mad(self, i):
        product = self.product(i)
        self.write(i.operands[0], product + self.read(i.operands[3], product.dtype))

    def product(self, i):
        """Of two integers: its low or high half, or all of it."""
        dtype = TYPES[i.parts[-1]]
        a, b = (self.read(x, dtype) for x in i.operands[1:3])
        if "lo" in i.parts:
            return a * b
        if dtype.itemsize == 8:
            raise unknown(i)
        product = a.astype(f"{dtype.kind}8") * b.astype(f"{dtype.kind}8")
        if "wide" in i.parts:
            return product.astype(f"{dtype.kind}{2 * dtype.itemsize}")
        return (product >> product.dtype.type(8 * dtype.itemsize)).astype(dtype)

    def shift(self, i):
        dtype = TYPES[i.parts[-1]]
        bits = 8 * dtype.itemsize
        a, by = self.read(i.operands[1], dtype), self.read(i.operands[2], U32)
        fn = np.left_shift if i.name == "shl" else np.right_shift
        shifted = fn(a, np.minimum(by, bits - 1).astype(dtype))
        lost = (by >= bits) & (dtype.kind == "u")
        self.write(i.operands[0], np.where(lost, dtype.type(0), shifted))

    do_shl = do_shr = shift

    def do_bfe(self, i):
        """`length` bits from `start` on, with their sign."""
        dtype = TYPES[i.parts[-1]]
        to, a, start, length = i.operands
        bits = 8 * dtype.itemsize
        up, down = dtype.type(bits - start - length), dtype.type(bits - length)
        self.write(to, self.read(a, dtype) << up >> down)

    def do_selp(self, i):
        dtype = TYPES[i.parts[-1]]
        to, a, b, chosen = i.operands
        pair = self.read(a, dtype), self.read(b, dtype)
        self.write(to, np.where(self.read(chosen, PREDICATE), *pair))

    def do_setp(self, i):
        name, kind = i.parts[0], i.parts[-1].removesuffix("x2")
        to, *given = i.operands
        if kind != i.parts[-1]:  # two numbers, a predicate for each
            found = self.compared(name, *(self.of_16_bits(x, U32, kind) for x in given))
            found = found.reshape(-1, 2)
            for half, register in enumerate(to):
                self.write(register, found[:, half])
        elif kind in ("f16", "bf16"):
            self.write(to, self.compared(name, *(self.of_16_bits(x, U16, kind) for x in given)))
        else:
            self.write(to, self.compared(name, *(self.read(x, TYPES[kind]) for x in given)))

    @staticmethod
    def compared(name, a, b):
        """Of NaN false, but true if the name ends with u; num: neither is NaN."""
        if a.dtype.kind != "f":
            return COMPARISONS[name](a, b)
        unordered = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return unordered ^ (name == "num")
        if name in COMPARISONS:
            return COMPARISONS[name](a, b) & ~unordered
        return COMPARISONS[name[:-1]](a, b) | unordered

    def do_cvt(self, i):
        kind, source = i.parts[-2:]
        to, *given = i.operands
        if kind.endswith("x2"):
            high, low = (to_16(self.read(x, F32), kind[:-2]).astype(U32) for x in given)
            self.write(to, high << np.uint32(16) | low)
        elif kind in ("f16", "bf16"):
            self.write(to, to_16(self.read(*given, TYPES[source]), kind))
        elif source in ("f16", "bf16"):
            self.write(to, from_16(self.read(*given, U16), source).astype(TYPES[kind]))
        else:
            x = self.read(*given, TYPES[source])
            if x.dtype.kind == "f":
                raise unknown(i)
            self.write(to, x.astype(TYPES[kind]))

    def do_mov(self, i):
        to, source = i.operands
        dtype = TYPES[i.parts[-1]]
        if isinstance(to, tuple):
            part = dtype.itemsize // len(to)
            x = self.read(source, dtype)
            for k, register in enumerate(to):
                self.write(register, (x >> dtype.type(8 * part * k)).astype(f"u{part}"))
        elif isinstance(source, tuple):
            part = dtype.itemsize // len(source)
            parts = [self.read(x, np.dtype(f"u{part}")).astype(dtype) for x in source]
            self.write(to, sum(x << dtype.type(8 * part * k) for k, x in enumerate(parts)))
        else:
            self.write(to, self.read(source, dtype))

    def do_cvta(self, i):
        self.write(i.operands[0], self.read(i.operands[1], U64))

    # -- threads -------------------------------------------------------------------------------
    def do_bra(self, i):
        self.go_to(self.program.labels[i.operands[0]])

    def do_ret(self, i):
        self.go_to(len(self.blocks))

    def do_bar(self, i):
        """All are there, or next_block had not chosen it."""

    def do_call(self, i):
        texts = [text for name, text in self.program.strings.items() if "Message" in name]
        raise AssertionError(f"{i.line}: {' or '.join(texts)}")

    def do_trap(self, i):
        raise AssertionError(f"{i.line}: trap")

    def do_shfl(self, i):
        """The number of another thread of the warp."""
        self.together()
        to, x, by, clamp, _ = i.operands
        by, clamp, lane = self.read(by, S32), self.read(clamp, S32), self.lane
        segment = clamp >> 8 & 31
        most = lane & segment | clamp & 31 & ~segment
        source = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": lane & segment | by & ~segment,
        }[i.parts[1]]
        there = source >= most if i.parts[1] == "up" else source <= most
        threads = np.arange(self.count)
        to, found = to if isinstance(to, tuple) else (to, "_")
        x = self.read(x, U32)[np.where(there, threads - lane + source, threads)]
        self.write(to, x)
        self.write(found, there)

    def do_redux(self, i):
        self.together()
        dtype = TYPES[i.parts[-1]]
        x = self.read(i.operands[1], dtype).reshape(-1, WARP)
        self.write(i.operands[0], REDUCTIONS[i.parts[1]].reduce(x, 1, dtype=dtype).repeat(WARP))

    def do_elect(self, i):
        self.together()
        leader, chosen = i.operands[0]
        self.write(leader, np.zeros(self.count, U32))
        self.write(chosen, self.lane == 0)

    # -- loads, stores, copies -----------------------------------------------------------------
    def addresses(self, address):
        """uint64, of the threads that execute this."""
        return self.each(address.base, U64) + np.uint64(address.offset & (1 << 64) - 1)

    def offsets(self, address, width):
        """Where accesses of `width` bytes are in self.shared."""
        found = self.addresses(address).astype(U32).astype(np.int64)
        if (found % width).any():
            raise Fault(f"an access of {width} bytes to shared memory is not aligned to as many")
        if (found + width > self.size).any():
            raise Fault(f"an access past the {self.size} bytes of shared memory")
        return found + self.place[self.threads] * self.size

    def do_ld(self, i):
        to, source = i.operands
        dtype = TYPES[i.parts[-1]]
        if i.parts[0] == "param":
            self.write(to, self.parameter(source, dtype))
            return
        to = to if isinstance(to, tuple) else (to,)
        width = len(to) * dtype.itemsize
        if i.parts[0].startswith("shared"):
            found = self.shared[self.offsets(source, width)[:, None] + np.arange(width)]
        else:
            found = self.memory.load(self.global_addresses(source), width)
        found = found.view(dtype)
        for k, register in enumerate(to):
            self.write_some(register, found[:, k])

    def do_st(self, i):
        place, source = i.operands
        if i.parts[0] == "param":  # of a call
            return
        dtype = TYPES[i.parts[-1]]
        source = source if isinstance(source, tuple) else (source,)
        numbers = np.stack([self.each(x, dtype) for x in source], 1).view(np.uint8)
        width = numbers.shape[1]
        if i.parts[0].startswith("shared"):
            self.shared[self.offsets(place, width)[:, None] + np.arange(width)] = numbers
        else:
            self.memory.store(self.global_addresses(place), numbers)

    def parameter(self, source, dtype):
        """The argument at an address, which may be computed, and so another for each thread."""
        if source.base in self.arguments:
            return self.argument(source.base, dtype)
        addresses = self.each(source.base, U64)
        found = np.zeros(len(addresses), dtype)
        for address in np.unique(addresses):
            found[addresses == address] = self.argument(self.parameter_at[int(address)], dtype)
        every = np.zeros(self.count, dtype)
        every[self.threads] = found
        return every

    def argument(self, name, dtype):
        value = self.arguments[name]
        if isinstance(value, float):
            value = int(F32.type(value).view(U32))
        return self.read(value, dtype)

    def do_cp(self, i):
        kind = i.parts[1]
        if kind == "commit_group":
            self.groups[self.threads] += 1
        elif kind == "wait_group":
            self.finish_copies(i.operands[0])
        elif kind == "bulk":
            self.copy_boxes(*i.operands)
        else:
            self.copy(*i.operands)

    def copy(self, place, source, width, given):
        """cp.async of `width` bytes, or of as many zeros if none are given."""
        offsets = self.offsets(place, width)[:, None] + np.arange(width)
        given = self.each(given, U32)
        if not np.isin(given, (0, width)).all():
            raise Fault(f"a copy of {given.max()} of {width} bytes")
        found = np.zeros(offsets.shape, np.uint8)
        found[given > 0] = self.memory.load(self.global_addresses(source)[given > 0], width)
        self.shared[offsets] = 0xFF
        threads = np.arange(self.count)[self.threads]
        self.copies.append((threads, self.groups[threads], offsets, found))

    def finish_copies(self, under_way):
        """All that the threads have started, but for their last groups."""
        waits = np.zeros(self.count, bool)
        waits[self.threads] = True
        left = []
        for threads, groups, offsets, found in self.copies:
            done = waits[threads] & (groups + under_way < self.groups[threads])
            self.shared[offsets[done]] = found[done]
            if not done.all():
                left.append([part[~done] for part in (threads, groups, offsets, found)])
        self.copies = left

    def copy_boxes(self, place, source, barrier):
        """Boxes through tensor maps, one for each thread; they are there when their barrier is."""
        self.global_addresses(source)
        x, y = (self.each(c, S32) for c in source.coordinates)
        starts, barriers = self.offsets(place, 128), self.offsets(barrier, 8)
        for k, address in enumerate(self.each(source.base, U64)):
            tensor = self.arguments[self.parameter_at[int(address)]]
            box = tensor.box(int(x[k]), int(y[k]))
            inside = np.arange(box.size).reshape(box.shape)
            first = starts[k] // self.size * self.size
            at = first + swizzled(starts[k] - first + inside, tensor.pitch)
            self.shared[at] = 0xFF
            self.barriers[barriers[k]].boxes.append((at, box))

    def do_mbarrier(self, i):
        address = next(x for x in i.operands if isinstance(x, Address))
        places = self.offsets(address, 8)
        if i.parts[0] == "init":
            self.barriers |= {place: Barrier(i.operands[1]) for place in places}
        elif i.parts[0] == "inval":
            for place in places:
                del self.barriers[place]
        elif i.parts[:2] == ["arrive", "expect_tx"]:
            for place in places:
                self.barriers[place].arrive(i.operands[2])
        elif i.parts[:2] == ["try_wait", "parity"]:
            for place in np.unique(places):
                self.barriers[place].settle(self.shared)
            phases = np.array([self.barriers[place].phase for place in places])
            done = phases % 2 != self.each(i.operands[2], U32)
            self.spins = 0 if done.any() else self.spins + 1
            if self.spins == SPINS:
                raise Fault("waits for ever")
            self.write_some(i.operands[0], done)
        else:
            raise unknown(i)

    def do_fence(self, i):
        """Threads keep step, so it changes nothing."""

    def do_griddepcontrol(self, i):
        """The launches before this one have ended, but it must wait until it knows."""
        if i.parts[0] == "wait":
            self.waits[self.threads] = False

    def global_addresses(self, address):
        """As addresses, of an access to global memory."""
        if self.waits[self.threads].any():
            raise Fault("an access that does not wait for the launch before: wait_for_inputs()")
        return self.addresses(address)

    # -- matrices ------------------------------------------------------------------------------
    def rows(self, address):
        """[warps, 4, 8]: where the rows of four 8 x 8 matrices are in self.shared."""
        found = np.zeros(self.count, np.int64)
        found[self.threads] = self.offsets(address, 16)
        return found.reshape(-1, 4, 8)

    def do_ldmatrix(self, i):
        self.together()
        matrices = self.shared[self.rows(i.operands[1])[..., None] + np.arange(16)].view(U16)
        if "trans" in i.parts:
            matrices = np.ascontiguousarray(matrices.swapaxes(-1, -2))
        for k, register in enumerate(i.operands[0]):
            self.write(register, np.ascontiguousarray(matrices[:, k]).view(U32).reshape(-1))

    def do_stmatrix(self, i):
        self.together()
        place, registers = i.operands
        rows = self.rows(place)
        on = slice(None) if self.mask is None else self.mask[::WARP]
        for k, register in enumerate(registers):
            matrix = np.ascontiguousarray(self.read(register, U32)).view(U16).reshape(-1, 8, 8)
            if "trans" in i.parts:
                matrix = np.ascontiguousarray(matrix.swapaxes(-1, -2))
            self.shared[rows[on, k, :, None] + np.arange(16)] = matrix[on].view(np.uint8)

    def fragment(self, registers, kind):
        """[warps, 16, k] from four registers: rows g and g + 8 of the first half of k, then those
        of the second; g is lane / 4, and lane % 4 says which columns."""
        parts = np.stack([elements(self.read(x, U32), kind) for x in registers], 1)
        parts = parts.reshape(-1, 8, 4, 2, 2, parts.shape[-1])  # warp, g, lane % 4, half, g + 8, e
        return parts.transpose(0, 4, 1, 3, 2, 5).reshape(len(parts), 16, -1)

    def sums(self, registers):
        """fp32 [warps, 16, columns] from registers: two of row g, two of row g + 8, and so on."""
        parts = np.stack([self.read(x, F32) for x in registers], 1)
        parts = parts.reshape(-1, 8, 4, len(registers) // 4, 2, 2)  # warp, g, lane % 4, n, g + 8, e
        return parts.transpose(0, 4, 1, 3, 2, 5).reshape(len(parts), 16, -1)

    def write_sums(self, registers, sums):
        parts = sums.reshape(-1, 2, 8, len(registers) // 4, 4, 2).transpose(0, 2, 4, 3, 1, 5)
        for k, part in enumerate(np.ascontiguousarray(parts.reshape(self.count, -1).T)):
            self.write(registers[k], part)

    def do_mma(self, i):
        """d = a b + c for each warp; b is [k, 8]."""
        self.together()
        to, a, b, c = i.operands
        kind = i.parts[-2]
        a, acc = self.fragment(a, kind), self.sums(c)
        b = np.stack([elements(self.read(x, U32), kind) for x in b], 1)
        b = b.reshape(-1, 8, 4, 2, b.shape[-1]).transpose(0, 1, 3, 2, 4).reshape(len(a), 8, -1)
        self.write_sums(to, tensor_core(acc, a, b, self.program.arch))

    def do_wgmma(self, i):
        """d = a b + d for each warpgroup. Done at once, so waiting is nothing."""
        if i.parts[0] != "mma_async":
            return
        self.together()
        to, a, b, adds, _, _, *transposed = i.operands
        kind, (N, K) = i.parts[-1], map(int, i.parts[3].removeprefix("m64n").split("k"))
        if isinstance(a, tuple):
            a = self.fragment(a, kind).reshape(-1, 64, K)
        else:
            a = self.matrix(a, 64, K, kind, transposed[:1] == [1])
        b = self.matrix(b, N, K, kind, transposed[-1:] == [1])
        adds = np.broadcast_to(self.read(adds, PREDICATE), self.count)
        acc = np.zeros((len(a), 64, N), F32)
        if adds.any():
            acc = np.where(adds[::WARPGROUP, None, None], self.sums(to).reshape(acc.shape), acc)
        acc = tensor_core(acc, a, b, self.program.arch)
        self.write_sums(to, acc.reshape(-1, 16, N))

    def matrix(self, descriptors, rows, K, kind, transposed):
        """fp64 [warpgroups, rows, K] in shared memory."""
        size = 4 if kind == "tf32" else 2
        row, k = np.arange(rows)[:, None], np.arange(K)
        found = np.zeros((self.count // WARPGROUP, rows, K), f"u{size}")
        for group, d in enumerate(self.read(descriptors, U64)[::WARPGROUP].tolist()):
            if self.mask is not None and not self.mask[group * WARPGROUP]:
                continue
            start, lead, stride = ((d >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
            pitch = (16, 128, 64, 32)[d >> 62]
            if pitch == 16:
                at = row // 8 * stride + row % 8 * 16 + k * size // 16 * lead + k * size % 16
            elif transposed:
                each = pitch // size
                at = row // each * lead + k // 8 * stride + k % 8 * pitch + row % each * size
            else:
                at = row // 8 * stride + row % 8 * pitch + k * size
            at = swizzled(start + at, pitch)
            if at.max() + size > self.size:
                raise Fault(f"a matrix past the {self.size} bytes of shared memory")
            first = self.place[group * WARPGROUP] * self.size
            found[group] = self.shared.view(found.dtype)[(first + at) // size]
        if kind == "tf32":
            return elements(found, kind)[..., 0]
        return from_16(found, kind).astype(np.float64)


def execute(text, shared, programs, memory, arguments, dependent=False):
    """All programs of a launch.

    text       PTX
    shared     bytes of shared memory
    programs   how many
    arguments  int, float or TensorMap, in the order of the kernel's parameters
    dependent  whether it may start before the launch before has ended
    """
    program = parse(text)
    named = dict(zip(program.parameters, arguments, strict=True))
    step = max(AT_ONCE // program.threads, 1)
    with np.errstate(all="ignore"):
        for first in range(0, programs, step):
            some = range(first, min(first + step, programs))
            Machine(program, shared, memory, named, some, programs, dependent).run()
