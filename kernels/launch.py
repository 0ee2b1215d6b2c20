"""What every op needs: Triton or word of its absence, registration with torch, row views, errors.

This is the one module that knows whether Triton is there.
"""

import functools

import torch


class _Absent:
    """Stands for triton and tl where they cannot be installed, so that op files still import."""

    def __getattr__(self, name):
        return self

    def __call__(self, fn):
        return fn


try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the CPU implementations remain
    triton = tl = _Absent()

HAS_TRITON = not isinstance(triton, _Absent)
INTERPRET = HAS_TRITON and bool(triton.knobs.runtime.interpret)
if INTERPRET:
    from .interpreter import mend

    MENDED = mend()
MIN_CAPABILITY = (8, 0)  # of an NVIDIA GPU; older ones lack bf16 tensor cores and cp.async

LIB = torch.library.Library("bert_fast", "FRAGMENT")
KERNELS = {}  # the Triton form of each op by name, for checks that compile it without a GPU
WARP_SIZE = 64 if torch.version.hip else 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that ops take; all accumulate in fp32


@torch.compiler.assume_constant_result  # dynamo need not trace what it asks the driver
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


def backend(device):
    """What runs the ops on device: "triton", "interpreter" or "pytorch".

    Raises RuntimeError, saying what to do, where nothing does.
    """
    if reason := missing(device):
        raise RuntimeError(f"bert_fast: {reason}")
    if torch.device(device).type == "cuda":
        return "triton"
    return "interpreter" if INTERPRET else "pytorch"


def define(schema, outputs, launch, plain):
    """Register bert_fast::<schema> and return the op.

    outputs(*args) allocates what the op returns. Fake tensors ask it too, so the shapes and
    dtypes of results are said once. launch(out, *args) fills them with Triton: on CUDA, and on
    the CPU under TRITON_INTERPRET=1. Else plain(*args) is the op on the CPU: PyTorch, made fast
    for the packed layout.

    Plain Library calls, since torch.library.custom_op adds about 7 us to every op call.
    """

    def kernel(*args):
        out = outputs(*args)
        launch(out, *args)
        return out

    def kernel_on_its_device(*args):
        first = next(a for a in args if a is not None)
        if reason := missing(first.device):
            raise RuntimeError(f"bert_fast::{name}: {reason}")
        with torch.cuda.device_of(first):
            return kernel(*args)

    name = schema.partition("(")[0]
    KERNELS[name] = kernel
    LIB.define(schema)
    LIB.impl(name, kernel_on_its_device, "CUDA")
    LIB.impl(name, kernel if INTERPRET else plain, "CPU")
    torch.library.register_fake(f"bert_fast::{name}", outputs, lib=LIB)
    return getattr(torch.ops.bert_fast, name).default


def define_plain(schema, outputs, plain):
    """Register an op that is PyTorch on every device: the backwards that have no kernel yet."""
    name = schema.partition("(")[0]
    LIB.define(schema)
    LIB.impl(name, plain, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bert_fast::{name}", outputs, lib=LIB)
    return getattr(torch.ops.bert_fast, name).default


def empty(shape, like, num_tokens=None):
    """Contiguous, uninitialised, or zeros where rows past num_tokens stay as they are."""
    return (like.new_empty if num_tokens is None else like.new_zeros)(shape)


def head(num_tokens, *tensors):
    """The first num_tokens rows of each tensor (or None); all of them if num_tokens is None."""
    if num_tokens is None:
        return tensors
    count = int(num_tokens)
    return tuple(t if t is None else t[:count] for t in tensors)


def pad_rows(t, M):
    """t [T, ...] with rows of zeros up to M."""
    if len(t) == M:
        return t
    out = t.new_zeros(M, *t.shape[1:])
    out[: len(t)] = t
    return out


def warps(elements):
    """For a tile of so many elements, at 8 a thread: one 16-byte access of fp16. At most 16."""
    return min(max(elements // (8 * WARP_SIZE), 1), 16)


def rows(t):
    """t [..., N] as ([M, N] with unit column stride, its row stride); None as (None, 0).

    A view where there is one, else a copy.
    """
    if t is None:
        return None, 0
    t = t.reshape(-1, t.shape[-1])
    t = t if t.stride(1) == 1 else t.contiguous()
    return t, t.stride(0)


def show(t):
    """t in an error message: float16[4, 768]; with its device where that is not the CPU."""
    if not isinstance(t, torch.Tensor):
        return repr(t)
    device = "" if t.device.type == "cpu" else f" on {t.device}"
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}{device}"


def check_num_tokens(op, num_tokens, x):
    """Raise unless num_tokens is None or one integer beside x [T, ...]."""
    if num_tokens is None:
        return
    if num_tokens.numel() != 1 or num_tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: num_tokens must be int32[1] or int64[1], got {show(num_tokens)}")
    if num_tokens.device != x.device:
        raise ValueError(f"{op}: num_tokens must be on {x.device}, got {show(num_tokens)}")
