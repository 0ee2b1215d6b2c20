"""What every op needs: Triton or a stand-in, registration with torch, row views, errors.

This is the only module that knows whether Triton is installed.
"""

import contextlib
import functools
import json
import math
import threading
import warnings
from pathlib import Path

import torch


class _Absent:
    """Stands for triton and tl where they cannot be installed, so that op files still import."""

    def __getattr__(self, name):
        return self

    def __call__(self, fn=None, **options):
        return self if fn is None else fn


try:
    import triton
    import triton.language as tl
    from triton.language.target_info import cuda_capability_geq
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a CPU build of torch, macOS, Windows: the CPU implementations remain
    triton = tl = TensorDescriptor = cuda_capability_geq = _Absent()
try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # there is no Triton, or it is a build for AMD alone
    gdc_launch_dependents = gdc_wait = None

HAS_TRITON = not isinstance(triton, _Absent)
INTERPRET = HAS_TRITON and bool(triton.knobs.runtime.interpret)
if INTERPRET:
    from .interpreter import mend

    mend()
MIN_CAPABILITY = (8, 0)  # NVIDIA; older GPUs lack bf16 tensor cores and cp.async

LIB = torch.library.Library("bert_fast", "FRAGMENT")
_ready = set()  # devices known to run kernels, as checking takes 1 us
KERNELS = {}  # the Triton form of each op by name, for checks that compile it without a GPU
COMPOSED = {}  # likewise the ops that are composed of others on every device
WARP_SIZE = 64 if torch.version.hip else 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of inputs; all ops accumulate in fp32


@torch.compiler.assume_constant_result  # dynamo need not trace the driver queries
def missing(device):
    """Why the ops cannot run on device, and what to do; None where they can."""
    device = torch.device(device)
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"no kernels for {device.type} tensors; CUDA, ROCm and CPU have them"
    if not HAS_TRITON:
        return "triton is not installed; pip install triton"
    if INTERPRET:
        return "TRITON_INTERPRET=1 runs kernels on the CPU only; unset it to use the GPU"
    if torch.version.hip is None and _capability(device) < MIN_CAPABILITY:
        major, minor = _capability(device)
        return f"the kernels need an NVIDIA GPU of sm_80 or newer, this one is sm_{major}{minor}"
    return None


_capability = functools.cache(torch.cuda.get_device_capability)


CPU = {}
with contextlib.suppress(AttributeError, RuntimeError):  # not in older torch
    CPU = torch.cpu.get_capabilities()
AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
INTEL = CPU.get("cpu_name", "").startswith("Intel")  # only there does MKL use AVX-512


@functools.cache
def cpu_multiplies(dtype, few=False):
    """Whether products of dtype are fastest in that dtype on this CPU; few: for a few rows.

    Without 16-bit instructions, and most CPUs have none for fp16, they take four to seven times as
    long as in fp32. But where oneDNN emulates bf16, with AVX-512, a few rows take less time than
    converting their weight to fp32."""
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if short is None:
        return True
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported", None)
    emulated = dtype == torch.bfloat16 and AVX512 and not CPU.get("avx512_bf16", True)
    return supported is not None and supported() and (few or not emulated)


def for_products(*tensors):
    """Tensors (or None) of one dtype, in fp32 if their CPU has no fast products in it."""
    first = tensors[0]
    if first.device.type != "cpu" or cpu_multiplies(first.dtype):
        return tensors
    return tuple(t if t is None else t.float() for t in tensors)


def backend(device):
    """What runs the ops on device: "triton", "interpreter" or "pytorch".

    Raises RuntimeError, saying what to do, if nothing can.
    """
    if reason := missing(device):
        raise RuntimeError(f"bert_fast: {reason}")
    if torch.device(device).type == "cuda":
        return "triton"
    return "interpreter" if INTERPRET else "pytorch"


def define(schema, outputs, launch, plain):
    """Register bert_fast::<schema> and return the op.

    outputs(*args) allocates what the op returns, contiguous, never a view of an argument. It also
    serves fake tensors, so shapes, strides and dtypes of results are stated once.
    launch(out, *args) fills them with Triton: on CUDA, and on the CPU under TRITON_INTERPRET=1.
    Otherwise plain(*args) is the op on the CPU: PyTorch, optimised for the packed layout.

    Registered with plain Library calls, as torch.library.custom_op adds about 7 us per op call.
    """

    def kernel(*args):
        out = outputs(*args)
        launch(out, *args)
        return out

    def kernel_on_its_device(*args):
        device = one_device(op, args)
        if device not in _ready:
            if reason := missing(device):
                raise RuntimeError(f"bert_fast::{name}: {reason}")
            _ready.add(device)
        if device.index == torch.cuda.current_device():  # entering a device takes 3 us
            return kernel(*args)
        with torch.cuda.device(device):
            return kernel(*args)

    def fake(*args):
        one_device(op, args)
        return outputs(*args)

    def call(*args):
        if torch.compiler.is_compiling() or _thread.direct is None:
            return op(*args)
        return implementations[_thread.direct](*args)

    name = schema.partition("(")[0]
    KERNELS[name] = kernel
    on_cpu = kernel if INTERPRET else plain
    implementations = {"cuda": kernel, "cpu": on_cpu}
    LIB.define(schema)
    LIB.impl(name, kernel_on_its_device, "CUDA")
    LIB.impl(name, on_cpu, "CPU")
    _without_autocast(name, "cpu")
    torch.library.register_fake(f"bert_fast::{name}", fake, lib=LIB)
    op = getattr(torch.ops.bert_fast, name).default  # the closures above use it
    return call


# Private to torch; in a version without them all ops are dispatched.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_is_profiled = getattr(torch.autograd, "_profiler_enabled", lambda: True)


class _Thread(threading.local):
    direct = None  # device type whose ops bypass the dispatcher in this thread


_thread = _Thread()


@contextlib.contextmanager
def directly(device, tensors):
    """Ops called inside bypass torch's dispatcher, which takes 10 us per call, unless something
    intercepts there: a mode, the profiler, autocast, a compiler, or a tensor subclass among
    tensors. The caller guarantees that all are on device, which has kernels."""
    if (
        torch.compiler.is_compiling()
        or _modes()
        or _is_profiled()
        or torch.is_autocast_enabled(device.type)
        or not all(type(t) is torch.Tensor for t in tensors)
    ):
        yield
        return
    before = _thread.direct
    _thread.direct = device.type
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield
    finally:
        _thread.direct = before


def one_device(op, args):
    """The device of the tensors among args of op. Raises ValueError if there are several: a kernel
    would treat an address on another device as one of its own."""
    found = None
    for i, a in enumerate(args):
        if isinstance(a, torch.Tensor):
            if found is None:
                found, first = a.device, i
            elif a.device != found:
                names = [argument.name for argument in op._schema.arguments]
                raise ValueError(
                    f"{op._opname}: tensors must be on one device, got {names[first]} on {found}"
                    f" and {names[i]} on {a.device}"
                )
    return found


def define_plain(schema, outputs, plain):
    """Register an op composed of PyTorch and other ops on every device: a backward without a kernel
    of its own. On a GPU it does not read the number of tokens, as it would have to wait."""
    name = schema.partition("(")[0]
    COMPOSED[name] = plain
    LIB.define(schema)
    LIB.impl(name, plain, "CompositeExplicitAutograd")
    _without_autocast(name, "cpu")
    _without_autocast(name, "cuda")
    torch.library.register_fake(f"bert_fast::{name}", outputs, lib=LIB)
    return getattr(torch.ops.bert_fast, name).default


def _without_autocast(name, device):
    """An op computes in the dtypes it is given: autocast is off for the torch ops inside it.
    Kernels on a GPU do not need this, which takes some 10 us."""

    def call(*args):
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.bert_fast, name)(*args)

    LIB.impl(name, call, f"Autocast{device.upper()}")


def is_recorded():
    """Whether autograd records calls: never in inference mode, a mode that dynamo cannot query."""
    return torch.is_grad_enabled() and (
        torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()
    )


def once_differentiable(backward, sources=lambda ctx: ctx.saved_tensors):
    """A backward whose gradients are not differentiable: a second derivative, however requested, is
    an error. With torch's once_differentiable it is not if the incoming gradients do not require
    grad; and as no path leads from its error node to the forward's inputs,
    torch.autograd.functional returns zeros for a Hessian.

    sources  ctx -> tensors (or None) on which the gradients depend, besides the incoming ones
    """

    def once(ctx, *grads):
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        if _is_batched(grads):
            raise RuntimeError(
                "bert_fast: the backward of the kernels takes no batch of gradients"
                " (is_grads_batched, vectorize=True); bert_fast.restore(model) has one that does"
            )
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            given = backward(ctx, *grads)
        found = given if isinstance(given, tuple) else (given,)
        tensors = [t for t in found if t is not None]
        known = [t for t in (*grads, *sources(ctx)) if t is not None and t.requires_grad]
        if known and tensors:
            refused = iter(_Refused.apply(tensors, *known))
            found = tuple(t if t is None else next(refused) for t in found)
        return found if isinstance(given, tuple) else found[0]

    return once


class _Refused(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx, tensors, *sources):
        return tuple([t.view_as(t) for t in tensors])  # one may be an input

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "bert_fast: a second derivative is asked for, and the kernels have the first alone;"
            " bert_fast.restore(model) and attn_implementation='eager' have them all"
        )


_batched = [  # private names, which torch may change
    getattr(torch._C._functorch, name)
    for name in ("is_batchedtensor", "is_legacy_batchedtensor")
    if hasattr(torch._C._functorch, name)
]


def _is_batched(grads):
    """Whether a backward runs under vmap, torch.func's or autograd's own."""
    return any(t is not None and any(ask(t) for ask in _batched) for t in grads)


def head(num_tokens, *tensors):
    """The first num_tokens rows of each tensor (or None); all of them if num_tokens is None."""
    if num_tokens is None:
        return tensors
    count = int(num_tokens)
    return tuple(t if t is None else t[:count] for t in tensors)


def with_room(t, M):
    """t [T, ...] extended to M rows, the further ones uninitialised; contiguous."""
    if t.shape[0] == M:
        return t.contiguous()
    out = t.new_empty(M, *t.shape[1:])
    out[: len(t)] = t
    return out


def pad_rows(t, M):
    """t [T, ...] extended to M rows with zeros: a gradient, which others are added to."""
    out = with_room(t, M)
    if t.shape[0] < M:
        out[len(t) :] = 0
    return out


def zeros_past(num_tokens, *tensors):
    """Each tensor [T, ...] (or None) with zeros from row num_tokens on, if that is not None: for
    gradients as above, without reading the number on the host."""
    if num_tokens is None:
        return tensors

    def filled(t):
        past = torch.arange(t.shape[0], device=t.device) >= num_tokens
        return t.masked_fill(past.view(-1, *[1] * (t.ndim - 1)), 0)

    return tuple(t if t is None else filled(t) for t in tensors)


# -- launches -------------------------------------------------------------------------------
_compiled = {}  # what `start` has launched: (compiled kernel, its constexprs)
_free = {}  # id: (kernel, for each argument whether it is do_not_specialize)
_run = HAS_TRITON and triton.JITFunction.run
FUSED = {"enable_fp_fusion": True}  # a * b + c as one instruction; off by default from Triton 3.10
DEPENDENT = False  # whether a kernel may start before the one before it ends, where GPUs allow that
COMPILED = tl.constexpr(not INTERPRET)


@triton.jit
def wait_for_inputs():
    """The first statement of every kernel: no access to memory may come before it.

    With DEPENDENT, on sm_90 and newer, programs start when all of the kernel before have been
    started, not when these have ended; here they wait until these have ended and what they wrote
    can be read. Without DEPENDENT, and on other GPUs, it does nothing.
    """
    if COMPILED and cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


def start(kernel, programs, *args, **options):
    """kernel[(programs,)](*args, **options), in 6 us instead of 15.

    args     all that are not constexpr: tensors, descriptors of them, None, integers, floats
    options  the constexprs, num_warps and num_stages

    Triton itself works out at every launch which compiled kernel to use. Here they are cached by a
    key that is at least as fine as Triton's: it has the value of an integer, where Triton only
    specialises on 1 and on multiples of 16, unless the kernel says do_not_specialize. On AMD Triton
    also specialises on the size of tensors, so there, and where its run is patched, it launches.
    """
    always = FUSED
    if is_dependent := DEPENDENT and not INTERPRET and depends(arch()):
        always = FUSED | {"launch_pdl": True}
    if INTERPRET or torch.version.hip or triton.JITFunction.run is not _run:
        kernel[(programs,)](*args, **options, **always)
        return
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    key = [id(kernel), device, is_dependent]  # hashing the kernel would hash its source
    if id(kernel) not in _free:
        _free[id(kernel)] = kernel, [p.do_not_specialize for p in kernel.params]
    for a, is_free in zip(args, _free[id(kernel)][1]):
        if a is None or type(a) is float:
            key.append(type(a))
        elif type(a) is int:
            key.append(a >> 31 if is_free else a)
        elif type(a) is TensorDescriptor:
            key.append(a.base.dtype)
            key.append(tuple(a.block_shape))
        else:
            key.append(a.dtype)
            key.append(a.data_ptr() % 16)
    key += options
    key += options.values()  # a function among them, too, is hashed by its source
    found = _compiled.get(key := tuple(key))
    if found is None:
        if len(_compiled) >= 10000:  # e.g. ever new strides
            _compiled.clear()
        compiled = kernel[(programs,)](*args, **options, **always)
        if compiled is None:  # one of Triton's hooks took the launch
            return
        _compiled[key] = compiled, [options[name] for name in kernel.arg_names[len(args) :]]
        return
    compiled, constants = found
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    stream = driver.get_current_stream(device)
    metadata = compiled.launch_metadata((programs, 1, 1), stream, *args, *constants)
    compiled.run(
        programs, 1, 1, stream, compiled.function, compiled.packed_metadata, metadata, *hooks,
        *args, *constants,
    )  # fmt: skip


# -- configurations -------------------------------------------------------------------------
TABLES = Path(__file__).with_name("tuned")  # a file for each GPU, written by `python bench tune`
FLAGS = {"PERSISTENT"}  # entries of a configuration that are 0 or 1
OF_A_BATCH = {"T", "Tk", "M", "B", "S", "tokens", "rows", "programs", "max_seqlen"}


def slug(name):
    """A GPU's name as a file name: nvidia-h200 for NVIDIA H200."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def configuration(op, default, fixed=(), rows=None, **key):
    """How to launch op on the current GPU: its table's entry for key, else default.

    default  {name: integer}: tile sizes, num_warps, num_stages
    fixed    names in default that correctness depends on: always as in default
    rows     number of rows in this call, for an op with several configurations of the same bits. A
             table has an entry for each power of two, used for up to that many rows; `bench tune`
             rejects configurations that change a bit.
    key      what the choice depends on. It must name nothing about the batch (ValueError): the
             configuration decides the order of sums, and that order a sequence's bits.
    """
    if wrong := OF_A_BATCH & key.keys():
        raise ValueError(
            f"configuration: {op}'s key must name nothing of the batch, got {', '.join(wrong)}"
        )
    if INTERPRET or not _gpus():
        return default
    tuned = _tuned(torch.cuda.current_device(), op, bucket(rows), tuple(key.items()))
    if tuned is None:
        return default
    if tuned.keys() != default.keys():
        _warn(f"{op}, {written(key, rows)}: must have {', '.join(default)}, got {', '.join(tuned)}")
        return default
    return {**tuned, **{name: default[name] for name in fixed}}


ROWS = (128, 16384)  # numbers of rows are clamped to this range


def bucket(rows):
    """The number of rows whose table entry is used for rows."""
    return None if rows is None else next_power_of_2(min(max(rows, ROWS[0]), ROWS[1]))


def product_key(N, K, itemsize, precision):
    """The key of a product with a weight [N, K]."""
    key = {"N": N, "K": K, "itemsize": itemsize}
    return key if itemsize == 2 else key | {precision: 1}


def written(key, rows=None):
    """A key as in a table: D=64 N=768 rows<=1024 for {"N": 768, "D": 64} and 1000 rows."""
    words = [f"{name}={value}" for name, value in sorted(key.items())]
    return " ".join(words if rows is None else [*words, f"rows<={bucket(rows)}"])


_gpus = functools.cache(torch.cuda.is_available)


@functools.cache  # every launch calls this, and it takes as long as a launch
def _tuned(index, op, rows, key):
    return _table(index).get((op, written(dict(key), rows)))


@functools.cache
def _table(index):
    """{(op, key): configuration} of a GPU; {} without a table, or with an invalid one."""
    gpu = torch.cuda.get_device_properties(index)
    path, of = table_for(gpu.name, f"{gpu.major}.{gpu.minor}", gpu.multi_processor_count)
    return read_table(path, of) if path else {}


def table_for(name, capability, multiprocessors):
    """(path of the table for a GPU, the GPU it was made on): its own, else that of a GPU of the
    same capability and number of multiprocessors, as an H100 and an H200 have: the same chip with
    another memory. (None, None) without."""
    own = TABLES / f"{slug(name)}.json"
    if own.exists():
        return own, name
    for path in sorted(TABLES.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not of this GPU
            made = json.loads(path.read_text())
            if (made["capability"], made["multiprocessors"]) == (capability, multiprocessors):
                return path, made["gpu"]
    return None, None


def read_table(path, gpu):
    """{(op, key): configuration} of the table in path, if it is for gpu. If it is for another or
    broken, {} and a warning that says what is wrong."""
    try:
        content = json.loads(path.read_text())
        for name, wanted in (("schema", 1), ("gpu", gpu)):
            if content[name] != wanted:
                raise ValueError(f"{name} must be {wanted!r}, got {content[name]!r}")
        table = {
            (op, key): config
            for op, keys in content["configurations"].items()
            for key, config in keys.items()
        }
        for (op, key), config in table.items():
            for name, value in config.items():
                number = value if type(value) is int else -1
                if name in FLAGS:
                    good, want = number in (0, 1), "0 or 1"
                elif name == "num_stages":
                    good, want = number >= 1, "1 or more"
                else:
                    good, want = number >= 1 and not number & (number - 1), "a power of two"
                if not good:
                    raise ValueError(f"{op}, {key}, {name}: must be {want}, got {value!r}")
        return table
    except KeyError as error:
        _warn(f"{path}: {error} is missing")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _warn(f"{path}: {error}")
    return {}


@functools.cache  # each warning once, though launches repeat it thousands of times
def _warn(what):
    warnings.warn(
        f"bert_fast: tuned configurations are not used, {what};"
        " `python bench tune` writes the table anew",
        stacklevel=3,
    )


def ceil_div(a, b):  # triton.cdiv takes 5 us on the host, as does its next_power_of_2
    return -(-a // b)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()


def warps(elements):
    """Warps for a row of so many elements, at 16 per thread: two 16-byte accesses in fp16. With one
    an H200 takes 2 to 9 % longer. At most 16 warps."""
    return min(max(elements // (16 * WARP_SIZE), 1), 16)


def rows(t):
    """t [..., N] as ([M, N] with unit column stride, its row stride); None as (None, 0).

    A view where there is one, else a copy.
    """
    if t is None:
        return None, 0
    if t.ndim != 2:
        t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    stride, unit = t.stride()
    return (t, stride) if unit == 1 else (t.contiguous(), t.shape[1])


def arch():
    """The current GPU's architecture: 90 for sm_90, "gfx942" for that; 80 in the interpreter."""
    return 80 if INTERPRET else _arch(triton.runtime.driver.active.get_current_device())


@functools.cache
def _arch(device):
    return triton.runtime.driver.active.get_current_target().arch


def depends(arch):
    """Whether kernels can be launched as DEPENDENT."""
    return isinstance(arch, int) and arch >= 90


def multiplies_from_shared_memory(arch):
    """Whether tensor cores read operands from shared memory, as on sm_90 and sm_100, and not from
    registers."""
    return isinstance(arch, int) and 90 <= arch < 120


def multiprocessors():
    """The number of SMs of the current GPU; in the interpreter 132, as on an H100."""
    return 132 if INTERPRET else _multiprocessors(triton.runtime.driver.active.get_current_device())


@functools.cache
def _multiprocessors(device):
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    return properties["multiprocessor_count"]


def fp32_precision():
    """What torch has been told of its own fp32 products: "tf32", "ieee", or "none", nothing.
    (`allow_tf32` says less, and raises if fp32_precision has been set.)"""
    return torch.backends.cuda.matmul.fp32_precision


def precision(t):
    """input_precision of a tl.dot of t: exact, except in fp32 where torch may use TF32 too."""
    if t.dtype != torch.float32 or fp32_precision() != "tf32":
        return "ieee"
    gpu = arch()
    return "tf32" if isinstance(gpu, int) or gpu == "gfx942" else "ieee"  # of AMD's, only that one


def is_exact(itemsize, precision):
    """Whether products are exact fp32, which NVIDIA's tensor cores do not compute."""
    return itemsize == 4 and precision == "ieee"


def show(t):
    """t in an error message: float16[4, 768]; with its device if that is not the CPU."""
    if isinstance(t, torch.dtype):
        return str(t).removeprefix("torch.")
    if not isinstance(t, torch.Tensor):
        return repr(t)
    device = "" if t.device.type == "cpu" else f" on {t.device}"
    return f"{show(t.dtype)}{list(t.shape)}{device}"


def check_num_tokens(op, num_tokens):
    """Raise unless num_tokens is None or one integer."""
    if num_tokens is None:
        return
    if num_tokens.numel() != 1 or num_tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: num_tokens must be int32[1] or int64[1], got {show(num_tokens)}")


def check_rows(op, x):
    """Raise for more rows than the product kernels can index."""
    if x.shape[0] >= 2**31:
        raise ValueError(f"{op}: x must have less than 2^31 rows, got {show(x)}")
