"""One compiled kernel: what its machine code holds, and its predicted time on a GPU.

The model's assumptions, so that a wrong prediction can be traced:

Ceilings   On every GPU the share of the datasheet that an H200 was measured to reach: 0.90 of its
           memory bandwidth in a large copy (4.3 of 4.8 TB/s) and 0.79 of its dense bf16 rate in
           an 8192^3 product (780 of 989 TFLOP/s). TF32 has half that rate. Clocks are boost clocks.
Work       FLOPs and bytes are those that the op declares in Spec.cost: each byte moves once.
L2         moves what each program loads and stores, at 0.90 of 5120 bytes a cycle (NVIDIA A100
           whitepaper; Hopper has as many slices), in parallel with all else. It bounds tiles of
           128 x 128: on an H100 they took 1.06 (K = 3072) and 1.02 (K = 4096) times as long,
           1.3 where prologue and epilogue matter (K = 768).
Launches   If an op launches several kernels, its bytes are divided by what their accesses would
           move, and its FLOPs go to the kernels with products.
Trips      Code outside the hot loops runs once, code that ends in a trap never. A hot loop
           runs as often as the declared work requires: its FLOPs per trip are those of tl.dot in
           the source (a loop of products is not unrolled), else its bytes those of its accesses.
           Of several hot loops, for masked and unmasked tiles, the one that needs the fewest
           instructions for its work stands for all.
Pipes      An SM issues four warp instructions a cycle. Floating-point adds and multiplies, other
           arithmetic, and MUFU with conversions have the lanes of the CUDA programming guide's
           throughput table. The busiest of these gives the time `compute`.
Tensor     A wgmma reads its operands from shared memory, 128 bytes a cycle: with 16 or 32 columns
           that is the limit. Those whose first operand is in registers are not that narrow.
Overlap    memory, tensor and compute run at once, but each warp goes through them in turn: with
           w warps on a scheduler, 1/w of all but the longest is not hidden.
Tail       The busiest SM decides: ceil(programs / SMs) programs. One SM moves at most 64 bytes a
           cycle.
Launch     2 us from one launch to the next: start, first loads, last stores. Not measured.

Not in the model: bank conflicts, shared memory other than for wgmma, L1 hits, L2 misses, masked
lanes, latency that too few warps expose, clocks that drop under load, programs of unequal length.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Target:
    """An architecture to compile kernels for."""

    triton: GPUTarget
    shared: int  # bytes that one program can have
    warps: int  # that a scheduler holds; a multiprocessor has four
    programs: int  # that a multiprocessor holds

    @property
    def nvidia(self):
        return self.triton.backend == "cuda"


TARGETS = {  # CUDA programming guide, technical specifications; CDNA 3 instruction set guide
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10, 16, 32),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 << 10, 12, 24),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10, 16, 32),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10, 16, 32),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 << 10, 12, 24),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10, 8, 32),
}

COPY, PRODUCT = 0.90, 0.79  # share of the datasheet that a copy and a product reach
LAUNCH = 2e-6  # seconds


@dataclass(frozen=True)
class Gpu:
    arch: str
    multiprocessors: int
    clock: float  # Hz
    fp32: int  # lanes of a multiprocessor for floating-point adds and products
    bandwidth: float  # bytes/s of the datasheet
    tensor: float  # dense bf16 FLOP/s of the datasheet
    l2: int = 5120  # bytes of a cycle

    @property
    def lanes(self):
        """Threads per cycle that each pipe of an SM takes."""
        return {"issue": 128, "fp32": self.fp32, "imad": 64, "alu": 64, "mufu": 16}


GPUS = {  # NVIDIA's datasheets of the SXM and HGX forms
    "A100": Gpu("sm_80", 108, 1.41e9, 64, 2.039e12, 312e12),
    "H100": Gpu("sm_90", 132, 1.98e9, 128, 3.35e12, 989e12),
    "H200": Gpu("sm_90", 132, 1.98e9, 128, 4.8e12, 989e12),
    "B200": Gpu("sm_100", 148, 1.965e9, 128, 7.7e12, 2250e12, 2 * 5120),  # two dies
}


# -- what the machine code holds ------------------------------------------------------------
@dataclass(frozen=True)
class Resources:
    """One kernel's resources. Instruction counts are per warp."""

    kernel: str
    warps: int  # of a program
    registers: int  # of a thread
    stack: int  # bytes of a thread
    shared: int  # bytes of a program
    resident: int  # programs that fit on a multiprocessor
    spills: dict  # {"hot": instructions in hot loops, "cold": elsewhere}
    tensor: dict  # {opcode: instructions} of the tensor cores
    serial: int  # of those, wgmma in a hot loop that each wait for the one before
    dots: tuple  # what the source multiplies: bf16, f16, tf32, f32 if exactly, ...
    once: dict  # {pipe: instructions} outside of hot loops; "loads" and "stores" of global memory,
    # {bits a thread: instructions}, without loads of one value; "bytes" that a program may move,
    # and those of them, "ahead", that it loads for trips to come
    trip: dict  # of one trip of the hot loop, the same and "flops" of a program; {} for no loop


def analyse(kernel, target):
    """Resources of a triton CompiledKernel."""
    meta, source = kernel.metadata, kernel.asm["ttir"]
    code, labels, registers, stack = (_sass if target.nvidia else _gcn)(kernel)
    hot, others = flow(code, labels)
    running = [*others, *(i for loop in hot for i in loop)]
    dots, flops = dots_of(source)

    threads = meta.num_warps * target.triton.warp_size

    def work(part):
        pipes = Counter(pipe for i in part for pipe in _pipes(i.opcode))
        found = {kind: Counter(width(i.opcode, kind) for i in part) for kind in _ACCESS}
        for counts in found.values():
            del counts[0]
        bytes_of = {
            kind: threads * sum(bits * n for bits, n in counts.items()) // 8
            for kind, counts in found.items()
        }
        return {
            **pipes,
            "loads": dict(found["load"]),
            "stores": dict(found["store"]),
            "bytes": bytes_of["load"] + bytes_of["store"],
            "ahead": bytes_of["ahead"],
        }

    trips = [work(loop) | {"flops": flops} for loop in hot if not dots or _multiplies(loop)]
    kind = "flops" if dots else "bytes"
    trips = [t for t in trips if t[kind]]
    once = work(others)
    of_one_value = Counter(
        int(bits) for bits in re.findall(r"tt\.load .*: !tt\.ptr<[a-z]+(\d+)", source)
    )
    once["loads"] = dict(Counter(once["loads"]) - of_one_value)
    reserved = 1024 if target.nvidia else 0  # of shared memory, for each program
    on_scheduler = min(target.warps, 512 // (-(-registers // 8) * 8))
    return Resources(
        kernel=meta.name,
        warps=meta.num_warps,
        registers=registers,
        stack=stack,
        shared=meta.shared,
        resident=min(
            target.programs,
            4 * on_scheduler // meta.num_warps,
            (target.shared + reserved) // max(meta.shared + reserved, 1),
        ),
        spills={
            "hot": sum(i.spills for loop in hot for i in loop),
            "cold": sum(i.spills for i in others),
        },
        tensor=dict(Counter(i.opcode for i in running if _TENSOR.match(i.opcode))),
        serial=max(map(_serial, hot), default=0),
        dots=dots,
        once=once,
        trip=min(trips, key=lambda t: t["issue"] / t[kind], default={}),
    )


def _serial(loop):
    """wgmma of a loop, if there is a wait for each of them: so ptxas compiles a function in which
    other instructions define registers that a wgmma adds to (its warning C7515)."""
    products = sum(bool(_WGMMA.match(i.opcode)) for i in loop)
    waits = sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in loop)
    return products if waits >= products > 4 else 0


_TENSOR = re.compile(r"[A-Z]*MMA\b|v_s?mfma")
_ACCESS = {
    "load": re.compile(r"LDG\b|LDGSTS|UTMALDG|UBLKCP|(global|buffer)_load_"),
    "store": re.compile(r"STG\b|UTMASTG|(global|buffer)_store_"),
    "ahead": re.compile(r"LDGSTS"),
}
_WIDTH = {
    256: re.compile(r"UTMA|UBLKCP|\.256\b"),  # a descriptor's whole tile, or 256 bits
    128: re.compile(r"\.128\b|x4$|b128$"),
    96: re.compile(r"x3$|b96$"),
    64: re.compile(r"\.64\b|x2$|b64$"),
    8: re.compile(r"\.[US]8\b|byte|[iu_b]8$"),
    16: re.compile(r"\.[US]16\b|short|d16|[iu_b]16$"),
}
_WGMMA = re.compile(r"HGMMA\.64x(\d+)x")
_PIPES = {
    "fp32": re.compile(r"(F(FMA|ADD|MUL)|H(FMA|ADD|MUL)2|IMAD)\w*"),
    "imad": re.compile(r"IMAD"),  # by half of the fp32 lanes where there are 128
    "alu": re.compile(
        r"F(SETP|MNMX|SEL|2FP|2IP)|I(ADD|SETP|MNMX|ABS|2FP)|VI|LOP|PLOP|SHF|LEA|PRMT|SEL"
    ),
    "mufu": re.compile(r"MUFU|F2F\b|F2I\b|I2F\b|POPC|FLO"),
}


def width(opcode, kind):
    """Bits per thread that an instruction loads from, or stores to, global memory."""
    if not _ACCESS[kind].match(opcode):
        return 0
    return next((bits for bits, pattern in _WIDTH.items() if pattern.search(opcode)), 32)


def _pipes(opcode):
    return ("issue", *(pipe for pipe, pattern in _PIPES.items() if pattern.match(opcode)))


def _multiplies(loop):
    """Whether it holds the products of a tl.dot: on tensor cores, or exact ones of fp32."""
    exact = sum(i.opcode.startswith("FFMA") for i in loop)
    return exact > len(loop) // 4 or any(_TENSOR.match(i.opcode) for i in loop)


_DOT = re.compile(
    r"tt\.dot %[^:]*?(?:inputPrecision = (\w+))? : "
    r"tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x"
)


def dots_of(source):
    """The operand dtypes of a kernel's ttir dots, and the FLOPs of one trip of its largest loop."""
    kinds, around, flops = set(), [], Counter()
    for number, line in enumerate(source.splitlines()):
        indent = len(line) - len(line.lstrip())
        if around and line.lstrip().startswith("}") and indent == around[-1][1]:
            around.pop()
        if "scf.for" in line or line.lstrip().startswith("} do {"):
            around.append((number, indent))
        if dot := _DOT.search(line):
            precision, M, K, dtype, N = dot.groups()
            kinds.add(precision if precision and dtype == "f32" else dtype)
            flops[around[-1] if around else None] += 2 * int(M) * int(K) * int(N)
    return tuple(sorted(kinds)), max((n for loop, n in flops.items() if loop), default=0)


# -- instructions and loops -----------------------------------------------------------------
@dataclass(frozen=True)
class Instruction:
    opcode: str
    to: str | None = None  # label where it may jump
    falls: bool = True  # whether the next one may follow
    exits: bool = False
    spills: bool = False


def flow(code, labels):
    """The hot loops, each a list of its instructions; and a list of the others that can run.

    A hot loop is a natural loop of the flow graph with no other inside it. Polling a barrier is
    not one. Code that never reaches an exit (a failed assertion) does not run.
    """
    after = [
        [n + 1] * (i.falls and n + 1 < len(code)) + ([labels[i.to]] if i.to in labels else [])
        for n, i in enumerate(code)
    ]
    before = [[] for _ in code]
    for n, following in enumerate(after):
        for m in following:
            before[m].append(n)
    ends = [n for n, i in enumerate(code) if i.exits]
    live = _reached([0], after) & _reached(ends, before)
    dominators = _dominators(sorted(live), before)
    bodies = {}
    for n in live:
        for head in after[n]:
            if dominators[n] >> head & 1:
                bodies.setdefault(head, {head}).update(_reached([n], before, {head}) & live)
    loops = [b for b in bodies.values() if not _polls([code[n] for n in b])]
    hot = [b for b in loops if not any(inner < b for inner in loops)]
    others = live.difference(*hot)
    return [[code[n] for n in sorted(b)] for b in hot], [code[n] for n in sorted(others)]


def _reached(starts, edges, stops=frozenset()):
    found, todo = {*starts, *stops}, [n for n in starts if n not in stops]
    while todo:
        for n in edges[todo.pop()]:
            if n not in found:
                found.add(n)
                todo.append(n)
    return found


def _dominators(nodes, before):
    """{node: its dominators, as a bit mask}; the first node is the entry."""
    everything = (1 << nodes[-1] + 1) - 1
    masks = dict.fromkeys(nodes, everything)
    masks[nodes[0]] = 1 << nodes[0]
    settled = False
    while not settled:
        settled = True
        for n in nodes[1:]:
            mask = everything
            for m in before[n]:
                mask &= masks.get(m, everything)
            if (mask := mask | 1 << n) != masks[n]:
                masks[n], settled = mask, False
    return masks


def _polls(loop):
    return len(loop) <= 8 and any(i.opcode.startswith("SYNCS") for i in loop)


_SASS = re.compile(r"^(?:(\S+):|\s+/\*\w{4,}\*/ +(@\S+ )? *([A-Z][\w.]*)([^;]*);)", re.M)


def _sass(kernel):
    """Instructions, {label: index}, registers, bytes of stack."""
    name = kernel.metadata.name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cubin")
        path.write_bytes(kernel.asm["cubin"])
        used, text = (
            subprocess.run([tool(name), flag, path], capture_output=True, text=True, check=True)
            for name, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    usage = re.search(rf"Function {name}:\s+REG:(\d+) STACK:(\d+)", used.stdout)
    listing = text.stdout.partition(f"\n.text.{name}:\n")[2].partition("\t.section\t")[0]
    code, labels = [], {}
    for label, guard, opcode, operands in _SASS.findall(listing):
        if label:
            labels[label] = len(code)
            continue
        kind = opcode.partition(".")[0]
        jump = re.fullmatch(r"(.*?)(?:`\(([^)]+)\))? *", operands)
        jumps = kind in ("BRA", "JMP", "CALL") and jump[2]
        always = not guard and (kind != "BRA" or not jump[1].strip())
        code.append(Instruction(
            opcode,
            to=jump[2] if jumps else None,
            falls=kind not in ("BRA", "JMP", "BRX", "EXIT", "RET") or not always,
            exits=kind == "EXIT",
            spills=kind in ("LDL", "STL"),
        ))  # fmt: skip
    return code, labels, int(usage[1]), int(usage[2])


_GCN = re.compile(r"^(?:([.\w$]+):|\t([a-z]\w+)([^;\n]*)(;.*)?)", re.M)


def _gcn(kernel):
    """The same for AMD's assembly."""
    text, name = kernel.asm["amdgcn"], kernel.metadata.name
    listing = text.partition(f"\n{name}:")[2].partition("\n.Lfunc_end")[0]
    code, labels = [], {}
    for label, opcode, operands, comment in _GCN.findall(listing):
        if label:
            labels[label] = len(code)
            continue
        jumps = opcode == "s_branch" or opcode.startswith("s_cbranch")
        code.append(Instruction(
            opcode,
            to=operands.strip() if jumps else None,
            falls=opcode not in ("s_branch", "s_endpgm", "s_trap", "s_setpc_b64"),
            exits=opcode == "s_endpgm",
            spills=opcode.startswith("scratch_") or "Folded" in comment,
        ))  # fmt: skip
    registers, stack = (
        int(re.search(rf"\.{key}:\s+(\d+)", text)[1])
        for key in ("vgpr_count", "private_segment_fixed_size")
    )
    return code, labels, registers, stack


def tool(name):
    """The path of one of NVIDIA's tools, as Triton finds it."""
    try:
        return getattr(triton.knobs.nvidia, name).path
    except RuntimeError:
        variable = f"TRITON_{name.upper().replace('-', '_')}_PATH"
        raise FileNotFoundError(
            f"{name} is missing. The triton wheel brings it: pip install --force-reinstall triton;"
            f" or point {variable} at that of pip install nvidia-cuda-{_PACKAGES[name]}"
        ) from None


_PACKAGES = {
    "ptxas": "nvcc", "ptxas-blackwell": "nvcc", "nvdisasm": "nvdisasm", "cuobjdump": "cuobjdump"
}  # fmt: skip


# -- time -----------------------------------------------------------------------------------
def trips_of(resources, programs, flops, moved):
    """How often the hot loop runs, from the work of one program."""
    r = resources
    if not r.trip:
        return 0.0
    kind, total = ("flops", flops) if r.dots else ("bytes", moved)
    return max(total / programs - r.once.get(kind, 0), 0) / r.trip[kind]


def _tensor(flops, r, gpu):
    """Seconds that the tensor cores take for so many FLOPs of bf16 or equivalent."""
    if not r.tensor:
        return 0.0
    seconds = flops / (gpu.tensor * PRODUCT)
    if columns := [int(n) for op in r.tensor for n in _WGMMA.findall(op)]:
        N = min(columns)  # each is a product of 64 x N x 16, of 2 * 64 * 16 and 2 * N * 16 bytes
        each = (16 + N / 4) / gpu.clock
        seconds = max(seconds, flops / (2 * 64 * N * 16) * each / gpu.multiprocessors)
    return seconds


def predict(resources, gpu, programs, flops, moved):
    """The time of one launch: {"seconds", "bound", "memory", "tensor", "compute", "L2"}.

    The last four are seconds of each alone; bound names the limiting one, or "launch".
    """
    r = resources
    trips = trips_of(r, programs, flops, moved)
    busiest = math.ceil(programs / gpu.multiprocessors)
    tail = busiest * gpu.multiprocessors / programs
    used = min(programs, gpu.multiprocessors)
    products = max((_PRODUCTS.get(kind, 1) for kind in r.dots), default=1)
    cycles = max(
        (r.once.get(pipe, 0) + trips * r.trip.get(pipe, 0)) * r.warps * 32 / lanes
        for pipe, lanes in gpu.lanes.items()
    )
    terms = {
        "memory": moved / min(gpu.bandwidth * COPY, used * 64 * gpu.clock),
        "tensor": _tensor(flops * products * tail, r, gpu),
        "compute": busiest * cycles / gpu.clock,
    }
    bound = max(terms, key=terms.get)
    on_scheduler = max(min(r.resident, busiest) * r.warps / 4, 1)
    seconds = terms[bound] + (sum(terms.values()) - terms[bound]) / on_scheduler
    once = r.once.get("bytes", 0) - r.once.get("ahead", 0)
    accessed = programs * (once + trips * r.trip.get("bytes", 0))
    l2 = accessed / (gpu.l2 * gpu.clock * COPY)
    if l2 > seconds:
        seconds, bound = l2, "L2"
    return {
        "seconds": LAUNCH + seconds,
        "bound": bound if seconds > LAUNCH else "launch",
        **terms,
        "L2": l2,
    }


_PRODUCTS = {"tf32": 2, "bf16x6": 6}  # bf16 products that take as long
