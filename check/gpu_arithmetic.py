"""The arithmetic of NVIDIA's GPUs in numpy, for emulator.py: an array has a number for each thread.

fma rounds once. Approximations err by as much as they may, for each operand otherwise, but are
exact where the result is a power of two. Tensor cores sum as they were measured to.

Source      NVIDIA, Parallel Thread Execution ISA 9.0, section 9.7; Xie et al., MMA-Sim, 2025, arXiv
            2511.10909, for tensor cores
"""

import numpy as np

U16, S32, U32, U64, F32 = map(np.dtype, ("u2", "i4", "u4", "u8", "f4"))
PREDICATE = np.dtype("?")


def noise(x):
    """From -1 to 1 for each fp32 number, always the same."""
    bits = x.view(U32) * np.uint32(2654435761)
    bits = (bits ^ bits >> np.uint32(15)) * np.uint32(2246822519)
    return (bits >> np.uint32(8)).astype(np.float64) / 2**23 - 1


def approximate(exact, x, bound):
    """fp64 `exact` as fp32, off by up to 2^bound of itself, depending on the operand x."""
    is_power = np.abs(np.frexp(exact)[0]) == 0.5
    return (exact * (1 + np.where(is_power, 0, noise(x) * 2.0**bound))).astype(F32)


def flushed(x):
    return np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(F32.type(0), x), x)


def truncated(x):
    """fp64 -> fp32, towards zero."""
    y = x.astype(F32)
    return np.where(np.abs(y) > np.abs(x), np.nextafter(y, F32.type(0)), y)


def to_16(x, kind):
    """fp32 -> the bits of f16 or bf16, to nearest even."""
    if kind == "f16":
        return x.astype(np.float16).view(U16)
    bits = x.view(U32)
    bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FFF), bits >> np.uint32(16)).astype(U16)


def from_16(bits, kind):
    return bits.view(np.float16) if kind == "f16" else (bits.astype(U32) << np.uint32(16)).view(F32)


def elements(bits, kind):
    """fp64 [..., n] of uint32 registers [...], as tensor cores read them: two of 16 bits, or one of
    tf32."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(F32).astype(np.float64)[..., None]
    halves = np.ascontiguousarray(bits).view(U16).reshape(*bits.shape, 2)
    return from_16(halves, kind).astype(np.float64)


def tensor_core(acc, a, b, arch):
    """acc + a b^T of fp32 [n, M, N], fp64 [n, M, K] and [n, N, K]. Products are exact. They and acc
    are truncated to 24 bits (sm_90: 25) below the largest exponent among them and added, and the
    sum is truncated to fp32. sm_80 takes K in two halves."""
    bits, parts = (24, 2) if arch < 90 else (25, 1)
    step = 1 + 2**21 // (acc[0].size * a.shape[-1])  # as much as stays in the cache
    for k in np.split(np.arange(a.shape[-1]), parts):
        acc = np.concatenate([
            _sum(acc[n : n + step], a[n : n + step, :, None, k], b[n : n + step, None, :, k], bits)
            for n in range(0, len(acc), step)
        ])  # fmt: skip
    return acc


def _sum(acc, a, b, bits):
    exponent = np.maximum((_exponent(a) + _exponent(b)).max(-1), _exponent(acc))
    down, up = np.exp2(bits - exponent.astype(np.float64)), np.exp2(exponent - np.float64(bits))
    terms = a * b
    terms *= down[..., None]
    np.trunc(terms, out=terms)
    return truncated((terms.sum(-1) + np.trunc(acc * down)) * up)


def _exponent(x):
    """Of each number, int16; of 0 less than of any product."""
    return np.where(x == 0, -400, np.frexp(x)[1] - 1).astype(np.int16)


def fused(a, b, c):
    """a * b + c, rounded once: exactly, but in one of 2^29 cases."""
    return (a.astype(np.float64) * b + c).astype(F32)


def exp2(x):
    x = flushed(x)
    return flushed(approximate(np.exp2(x.astype(np.float64)), x, -22.5))


def rsqrt(x):
    return approximate(1 / np.sqrt(x.astype(np.float64)), x, -22.9)


def full_quotient(a, b):
    """div.full: two roundings."""
    return (a * approximate(1 / b.astype(np.float64), b, -23).astype(np.float64)).astype(F32)


def whole_quotient(a, b):
    """Towards zero."""
    q = a // b
    return q + ((q < 0) & (q * b != a)).astype(q.dtype)


ARITHMETIC = {  # name: of integers, of floats
    "add": (np.add, np.add),
    "sub": (np.subtract, np.subtract),
    "mul": (np.multiply, np.multiply),
    "div": (whole_quotient, None),
    "rem": (np.fmod, None),
    "min": (np.minimum, np.fmin),  # which ignore NaN
    "max": (np.maximum, np.fmax),
    "neg": (np.negative, np.negative),
    "abs": (np.abs, np.abs),
    "fma": (None, fused),
    "ex2": (None, exp2),
    "rsqrt": (None, rsqrt),
    "and": (np.bitwise_and, None),
    "or": (np.bitwise_or, None),
    "xor": (np.bitwise_xor, None),
    "not": (np.bitwise_not, None),
}
DIVISIONS = {"full": full_quotient, "rn": np.divide}  # of floats
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip
REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
}  # fmt: skip
