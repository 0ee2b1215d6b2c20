"""Math on loaded values that several ops share, in fp32 whatever dtype these were loaded from."""

from .launch import tl, triton


@triton.jit
def factor_of(t, PRECISION: tl.constexpr):
    """t as an operand of a tl.dot with that input_precision. In TF32 tensor cores truncate the last
    13 bits of their operands, always towards zero, which over twelve layers gives four times the
    error of rounding to nearest, ties away from zero, as here."""
    if PRECISION == "tf32":
        nearest = (t.to(tl.int32, bitcast=True) + 0x1000 & -0x2000).to(tl.float32, bitcast=True)
        t = tl.where(t == t, nearest, float("nan"))  # NaN might become a number
    return t


@triton.jit
def gelu_erf(z):
    """z * Phi(z), for results in fp32: relative error of some 1e-7, as far as 1 + erf has it."""
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def slope_erf(z):
    """Phi(z) + z * phi(z), the derivative of z * Phi(z), for results in fp32."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * _density(z)


@triton.jit
def slope_exp2(z):
    """The same for results of 16 bits: off by at most 4.2e-7, where half an ulp of fp16 is 2.4e-4
    at Phi(0). As gelu_exp2, with coefficients that minimise the largest error of Phi."""
    a = tl.abs(z)
    p = -0.000518868305 * a + 0.00738724705
    p = p * a - 0.0525380895
    p = p * a - 0.459276641
    p = p * a - 1.15108315
    p = p * a - 1.00000084
    tail = tl.exp2(p)  # Phi(-a)
    return tl.where(z > 0.0, 1.0 - tail, tail) + z * _density(z)


@triton.jit
def _density(z):
    """phi(z) = exp(-z^2 / 2) / sqrt(2 pi)"""
    return 0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z)


@triton.jit
def gelu_exp2(z):
    """z * Phi(z), for 16-bit results: off by at most 1.4e-6, and by less than rounding to fp16:
    0.7 times half an ulp and 6e-8.

    max(z, 0) - |z| Phi(-|z|), where log2 of Phi(-a) is a polynomial: a dozen instructions, a third
    of erf's. The coefficients minimise the error of the whole relative to the rounding error.
    """
    a = tl.abs(z)
    p = -0.00040682035 * a + 0.0066143439
    p = p * a - 0.050666305
    p = p * a - 0.46121281
    p = p * a - 1.1502644
    p = p * a - 1.0001055
    y = tl.maximum(z, 0.0) - a * tl.exp2(p)
    return tl.where(z == float("inf"), z, y)  # inf * 0 is NaN: right for -inf, as in the definition
