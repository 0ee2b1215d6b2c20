"""Fixes for Triton's interpreter where its results differ from a GPU's.

With TRITON_INTERPRET=1 a kernel runs in numpy, which has no bf16 and no fp8: their values are
stored as raw bits. As shipped with Triton 3.6 to 3.9, the interpreter truncates where a GPU rounds,
adds and multiplies the raw bits as integers, computes TF32 products exactly, and ignores a launch's
request to check assertions. One fix is for speed, see `_mend_calls`.

A Mend has a probe, a small computation whose result on a GPU is known. `mend` applies only those
whose probe gives another result: what Triton has fixed itself is left alone.
Not fixed: exp2, rsqrt and division are exact here and good to 2 ulp on a GPU; sums are in numpy's
order, and in bf16 round once, where a GPU rounds at each step; a masked lane without `other` is
zero here and undefined on a GPU.

Source     PTX that Triton 3.6 and 3.9 emit for sm_90: cvt.rn.bf16x2.f32, cvt.rn.satfinite.e4m3x2
           and e5m2x2 (larger values, infinity too, become the largest finite one), and no cvt
           before a TF32 product, which reads the upper 19 bits. Fp8 formats: Micikevicius et al.,
           FP8 Formats for Deep Learning, 2022.
"""

import functools
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

FP8 = (tl.float8e5, tl.float8e5b16, tl.float8e4nv, tl.float8e4b8, tl.float8e4b15)
RAW = (tl.bfloat16, *FP8)  # dtypes that numpy lacks


# -- numbers --------------------------------------------------------------------------------
def decode(data, dtype):
    """Raw bits of a dtype of RAW as float32, exactly; data of any other dtype unchanged."""
    if dtype == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return _values(dtype)[data] if dtype in FP8 else data


def encode(x, dtype, toward_zero=False):
    """Floating x as raw bits of a dtype of RAW: to nearest even, or towards zero."""
    x = np.asarray(x, np.float32)
    return (_encode_bf16 if dtype == tl.bfloat16 else _encode_fp8)(x, dtype, toward_zero)


def _encode_bf16(x, _, toward_zero):
    bits = x.view(np.uint32)
    up = np.uint32(0) if toward_zero else np.uint32(0x7FFF) + (bits >> 16 & 1)
    return np.where(np.isnan(x), 0x7FFF, bits + up >> 16).astype(np.uint16)


@np.errstate(invalid="ignore")  # of signalling NaN
def _encode_fp8(x, dtype, toward_zero):
    """Larger values become the largest finite one, as with cvt.satfinite."""
    values = _values(dtype)[:128]
    values = values[np.isfinite(values)].astype(np.float64)
    if toward_zero:
        code = np.searchsorted(values, np.abs(x), side="right") - 1
    else:
        middle = (values[1:] + values[:-1]) / 2
        code = np.searchsorted(middle, np.abs(x), side="left")
        tie = np.abs(x) == middle[np.minimum(code, len(middle) - 1)]
        code += tie & (code % 2 == 1)
    fnuz = dtype in (tl.float8e4b8, tl.float8e5b16)  # one zero, and NaN where -0 would be
    sign = np.signbit(x) & ~(fnuz & (code == 0))
    nan = 0x80 if fnuz else 0x7F
    return np.where(np.isnan(x), nan, code | sign * 0x80).astype(np.uint8)


def _values(dtype):
    """The values of the 256 codes of an fp8 dtype, float32."""
    code = np.arange(256)
    mantissa = code % 2**dtype.fp_mantissa_width / 2**dtype.fp_mantissa_width
    exponent = code % 128 // 2**dtype.fp_mantissa_width
    size = np.where(exponent == 0, 2 * mantissa, 1 + mantissa)
    values = np.where(code < 128, size, -size) * 2.0 ** (exponent - dtype.exponent_bias)
    if dtype == tl.float8e5:
        values[[0x7C, 0xFC]] = np.inf, -np.inf
        values[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    elif dtype == tl.float8e4nv:
        values[[0x7F, 0xFF]] = np.nan
    elif dtype != tl.float8e4b15:  # which has neither infinity nor NaN
        values[0x80] = np.nan
    return values.astype(np.float32)


def _numpy(dtype):
    return interpreter._get_np_dtype(dtype)


def _number(value, dtype):
    """A TensorHandle of dtype that holds value converted, for probes."""
    data = np.array([value], np.float32)
    return TensorHandle(encode(data, dtype) if dtype in RAW else data.astype(_numpy(dtype)), dtype)


def _value(handle):
    return decode(handle.data, handle.dtype.scalar).item()


# -- casts ----------------------------------------------------------------------------------
def _convert_float(data, src, dst, rounding_mode):
    """Bits of data, floating numbers of dtype src, as dtype dst."""
    data = decode(data.view(_numpy(src)), src)
    if dst in RAW:
        return encode(data, dst, rounding_mode == ir.ROUNDING_MODE.RTZ)
    return data.astype(_numpy(dst)).view(f"u{_numpy(dst).itemsize}")


def _cast_impl(self, src, dst_type):
    data = decode(src.data, src.dtype.scalar)
    dst = dst_type.scalar
    with np.errstate(over="ignore", invalid="ignore"):  # to infinity, as on a GPU
        return TensorHandle(encode(data, dst) if dst in RAW else data.astype(_numpy(dst)), dst)


def _mend_casts():
    interpreter._convert_float = _convert_float
    InterpreterBuilder.cast_impl = _cast_impl


def _casts_are_broken():
    builder = interpreter.interpreter_builder
    wanted = (
        (1 + 2**-8 + 2**-9, tl.float32, tl.bfloat16, 1 + 2**-7),
        (1 + 2**-8, tl.float32, tl.bfloat16, 1.0),  # a tie, to even
        (3.0, tl.int32, tl.bfloat16, 3.0),
        (0.33, tl.float32, tl.float8e4nv, 0.34375),
        (1.99, tl.float32, tl.float8e5, 2.0),  # the carry reaches the exponent
        (1e9, tl.float32, tl.float8e4nv, 448.0),
    )
    rounding = ir.ROUNDING_MODE.RTNE

    def cast(x, dst):
        if dst in FP8:
            return builder.create_fp_to_fp(x, dst, rounding)
        return builder.cast_impl(x, dst)

    return any(_value(cast(_number(x, src), dst)) != y for x, src, dst, y in wanted)


# -- arithmetic -----------------------------------------------------------------------------
def _rounded(result, dtype):
    """A TensorHandle of dtype for a numeric result, of int1 for a boolean one."""
    if result.dtype == bool:
        return TensorHandle(result, tl.int1)
    return TensorHandle(encode(result, dtype), dtype)


def _mend_arithmetic():
    """Computed in fp32, then rounded, as a bf16 instruction does."""

    def fixed(original, operands):
        def op(self, *args):
            dtype = args[operands - 1].dtype.scalar
            if dtype != tl.bfloat16:
                return original(self, *args)
            return _rounded(args[-1](*(decode(a.data, dtype) for a in args[:-1])), dtype)

        return op

    for name, operands in (("unary_op", 1), ("binary_op", 2)):
        original = getattr(InterpreterBuilder, name)
        setattr(InterpreterBuilder, name, fixed(original, operands))
    clampf, fma = InterpreterBuilder.create_clampf, InterpreterBuilder.create_fma

    def fixed_clampf(self, x, low, high, propagate_nans):
        if x.dtype.scalar != tl.bfloat16:
            return clampf(self, x, low, high, propagate_nans)
        wide = (self.cast_impl(t, tl.float32) for t in (x, low, high))
        return self.cast_impl(clampf(self, *wide, propagate_nans), tl.bfloat16)

    def fixed_fma(self, x, y, z):
        if z.dtype.scalar != tl.bfloat16:
            return fma(self, x, y, z)
        x, y, z = (decode(t.data, tl.bfloat16).astype(np.float64) for t in (x, y, z))
        return _rounded(x * y + z, tl.bfloat16)

    InterpreterBuilder.create_clampf, InterpreterBuilder.create_fma = fixed_clampf, fixed_fma


def _arithmetic_is_broken():
    builder = interpreter.interpreter_builder
    x, y = _number(-1.5, tl.bfloat16), _number(0.25, tl.bfloat16)
    return (
        _value(builder.create_fadd(x, y)) != -1.25
        or _value(builder.unary_op(x, np.negative)) != 1.5
        or _value(builder.create_fma(x, x, y)) != 2.5
        or not builder.create_fcmpOLT(x, y).data.item()
    )


# -- reductions -----------------------------------------------------------------------------
def _mend_reductions():
    for ops in (interpreter.ReduceOps, interpreter.ScanOps):

        def apply_impl(self, inputs, original=ops.apply_impl):
            if all(t.dtype != tl.bfloat16 for t in inputs):
                return original(self, inputs)
            wide = tuple(
                self.to_tensor(decode(t.handle.data, t.dtype), tl.float32)
                if t.dtype == tl.bfloat16 else t
                for t in inputs
            )  # fmt: skip
            results = original(self, wide)
            alone = not isinstance(results, (list, tuple))
            results = [results] if alone else results
            narrow = [
                self.to_tensor(encode(r.handle.data, t.dtype).reshape(r.shape), t.dtype)
                if t.dtype == tl.bfloat16 and r.dtype == tl.float32 else r
                for r, t in zip(results, inputs)
            ]  # fmt: skip
            return narrow[0] if alone else narrow

        ops.apply_impl = apply_impl


def _reductions_are_broken():
    data = encode(np.array([-2.0, 1.0, 3.5, 0.5]), tl.bfloat16)
    x = tl.tensor(TensorHandle(data, tl.bfloat16), tl.block_type(tl.bfloat16, [4]))
    wanted = (
        (tl.standard._sum_combine, 3.0),
        (tl.standard._elementwise_max, 3.5),
        (tl.standard._elementwise_min, -2.0),
    )
    got = ((interpreter.ReduceOps(0, fn, False).apply(x), y) for fn, y in wanted)
    return any(_value(result.handle) != y for result, y in got)


# -- products -------------------------------------------------------------------------------
def tf32(x):
    """float32 x truncated, not rounded, to the 10 mantissa bits that a TF32 tensor core reads."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """d + a b. In exact fp32 one chain of sums starting from d, as without tensor cores. Otherwise
    exact products of the operands as a tensor core reads them, summed in fp64 and rounded to the
    dtype of d. BLAS would sum in an order that depends on the tile and on the position in it, and
    a b would not equal (b^T a^T)^T, as it does on a GPU.

    tf32x3 and the like differ from fp32 by less than the order of a sum does: exact here.
    """
    factors = [decode(t.data, t.dtype.scalar) for t in (a, b)]
    dtype = a.dtype.scalar
    if dtype == tl.float32 and input_precision == ir.INPUT_PRECISION.IEEE:
        return TensorHandle(_chain(*factors, d.data), tl.float32)
    if dtype == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
        factors = [tf32(np.ascontiguousarray(t)) for t in factors]
    product = np.matmul(*factors, dtype=np.float64).astype(d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _chain(a, b, d):
    """Each product is rounded, unlike in an fma, which numpy lacks."""
    terms = np.empty((a.shape[-1] + 1, *d.shape), np.float32)
    terms[0] = d
    a, b = np.moveaxis(a, -1, 0)[..., None], np.moveaxis(b, -2, 0)[..., None, :]
    np.multiply(a, b, out=terms[1:])
    return np.add.reduce(terms, 0)  # sequential, as it is not over the last dimension


def _mend_dot():
    InterpreterBuilder.create_dot = _create_dot


def _dot_is_broken():
    zero = TensorHandle(np.zeros((1, 1), np.float32), tl.float32)

    def square(x, dtype, precision):
        x = TensorHandle(_number(x, dtype).data.reshape(1, 1), dtype)
        return _value(interpreter.interpreter_builder.create_dot(x, x, zero, precision, 0))

    return (
        square(-1.5, tl.bfloat16, ir.INPUT_PRECISION.IEEE) != 2.25
        or square(480.0, tl.float8e5, ir.INPUT_PRECISION.IEEE) != 512.0**2
        or square(1 + 2**-12, tl.float32, ir.INPUT_PRECISION.TF32) != 1.0
    )


# -- numpy 2.4 ------------------------------------------------------------------------------
def _mend_index():
    """int() of a one-element array no longer works if it has a dimension."""
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def _index_is_broken():
    scope = interpreter._LangPatchScope()
    interpreter._patch_lang_tensor(tl.tensor, scope)
    try:
        return tl.tensor(_number(3, tl.int32), tl.int32).__index__() != 3
    except TypeError:
        return True
    finally:
        scope.restore()


# -- options of a launch --------------------------------------------------------------------
@contextmanager
def options_of(launch):
    """Applies a launch's compilation options inside; other keywords are ignored."""
    builder = interpreter.interpreter_builder
    before = builder.options
    said = {k: launch[k] for k in ("debug", "sanitize_overflow") if k in launch}
    builder.options = replace(before, **said)
    try:
        yield
    finally:
        builder.options = before


def _mend_options():
    original = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        with options_of(kwargs):
            return original(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = call


@triton.jit
def _asserts(truth: tl.constexpr):
    tl.device_assert(truth, "not so")


def _options_are_forgotten():
    try:
        _asserts[(1,)](truth=False, debug=True)
    except Exception as error:  # the interpreter's own, around an AssertionError
        return "not so" not in str(error)
    return True


# -- calls of device functions --------------------------------------------------------------
def _mend_calls():
    """A launch patches the language's functions with the interpreter's until it ends. Each call of
    one jit function by another did so again, which was a fifth of a kernel's time."""
    patch = interpreter._patch_lang
    patched = set()  # which of tl and tl.core the current launch has patched

    class Scope(interpreter._LangPatchScope):
        def restore(self):
            patched.clear()
            super().restore()

    @functools.cache
    def languages(fn):
        return {v for v in fn.__globals__.values() if v is tl or v is tl.core}

    def patch_once(fn):
        if patched and languages(fn) <= patched:
            return Scope()
        patched.update(languages(fn))
        return patch(fn)

    interpreter._LangPatchScope, interpreter._patch_lang = Scope, patch_once


@triton.jit
def _nothing():
    pass


@triton.jit
def _call_nothing(times: tl.constexpr):
    for _ in tl.static_range(times):
        _nothing()


def _calls_are_slow():
    counts = []
    original = interpreter._patch_builtin
    try:
        for times in (1, 2):
            counts.append(0)

            def count(*args):
                counts[-1] += 1
                return original(*args)

            interpreter._patch_builtin = count
            _call_nothing[(1,)](times=times)
    finally:
        interpreter._patch_builtin = original
    return counts[0] != counts[1]


# -- all of them ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Mend:
    what: str
    broken: Callable  # () -> whether the probe comes out wrong
    apply: Callable  # ()


MENDS = (
    Mend("casts of bf16 and fp8", _casts_are_broken, _mend_casts),
    Mend("arithmetic in bf16", _arithmetic_is_broken, _mend_arithmetic),
    Mend("reductions of bf16", _reductions_are_broken, _mend_reductions),
    Mend("tl.dot of bf16, fp8 and TF32", _dot_is_broken, _mend_dot),
    Mend("loop bounds under numpy 2.4", _index_is_broken, _mend_index),
    Mend("device_assert under debug=True", _options_are_forgotten, _mend_options),
    Mend("calls of device functions", _calls_are_slow, _mend_calls),
)


def mend():
    """Apply those of MENDS that are needed, and return them; a second call finds nothing to do.

    Raises RuntimeError if a fix does not help: this version of Triton is unknown to us.
    """
    needed = [m for m in MENDS if m.broken()]
    for m in needed:
        m.apply()
        if m.broken():
            raise RuntimeError(
                f"bert_fast: the interpreter of Triton {triton.__version__} is wrong in {m.what}, "
                "and our mend does not help; unset TRITON_INTERPRET or take Triton 3.6 to 3.9"
            )
    return tuple(m.what for m in needed)
