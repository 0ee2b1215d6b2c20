"""Math on loaded values that two ops share. All in fp32, whatever the values came from."""

from .launch import tl, triton


@triton.jit
def gelu_erf(z):
    """z * Phi(z), for results in fp32: a relative error of some 1e-7 as far as 1 + erf has one."""
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_exp2(z):
    """z * Phi(z), for results of 16 bits: off by at most 1.4e-6, and by less than rounding to fp16
    is: 0.7 times half an ulp and 6e-8.

    max(z, 0) - |z| Phi(-|z|), where log2 of Phi(-a) is a polynomial: a dozen instructions, a third
    of erf's. Its coefficients are fitted to the error of the whole over what rounding leaves.
    """
    a = tl.abs(z)
    p = -0.00040682035 * a + 0.0066143439
    p = p * a - 0.050666305
    p = p * a - 0.46121281
    p = p * a - 1.1502644
    p = p * a - 1.0001055
    y = tl.maximum(z, 0.0) - a * tl.exp2(p)
    return tl.where(z == float("inf"), z, y)  # inf * 0 is NaN: right for -inf, as in the definition
