"""Every fault of an op that the interpreter can find, the quickest checks first.

    next(faults(spec), None)        None, or the first fault, in words
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from judge import LAYOUTS, Judge, distance, further_rows, is_float, laid_out, varied
from sanitizer import Sanitizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.errors import InterpreterError

from bert_fast.kernels.launch import DTYPES
from bert_fast.kernels.spec import cast, tensors_of

LARGE = 2**26  # bytes; larger tensors have no memory under Phantoms


class Phantoms(TorchDispatchMode):
    """Large tensors made inside it are on the meta device: shapes and strides without memory."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(a.name == "device" for a in op._schema.arguments):
            phantom = op(*args, **{**kwargs, "device": "meta"})
            if phantom.nbytes > LARGE:
                return phantom
        return op(*args, **kwargs)


class SaysCpu(TorchFunctionMode):
    """Tensors report the CPU as their device, so that ops accept phantoms with small ones."""

    def __torch_function__(self, fn, types, args=(), kwargs=None):
        if fn == torch.Tensor.device.__get__:
            return torch.device("cpu")
        return fn(*args, **(kwargs or {}))


def extremes(grid):
    """The first, the last and some programs in between, if a grid is too large to run."""
    count = math.prod(grid)
    some = {0, 1, count // 2, count - 2, count - 1} & set(range(count))
    return [np.unravel_index(i, grid) for i in sorted(some)]


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def call(spec, inputs, hidden=(), **options):
    """(result, Sanitizer) of one call of the op's kernels without gradients.

    hidden  tensors no element of which may be loaded
    """
    with torch.no_grad(), Sanitizer(**options) as watched:
        for t in hidden:
            watched.hide(t)
        result = spec.fn(**inputs)
    return result, watched


def faults(spec):
    """Yields the faults of spec, in words."""
    yield from faults_of_values(spec, call)
    for case in spec.huge:
        for dtype in DTYPES[:2]:
            yield from of_size(spec, case, dtype)
    yield from of_strides(spec, spec.cases[0])


def faults_of_values(spec, call):
    """Those that show at sizes that can be run. call is as above: what runs the op's kernels."""
    yield from _faults_of(spec, plan(spec), call)
    for variant in spec.variants:
        of_variant = [(c, DTYPES[i % 3], "contiguous") for i, c in enumerate(spec.cases)]
        with varied(variant):
            for fault in _faults_of(spec, of_variant, call):
                yield f"{fault}, {variant}"
    yield from of_infinity(spec, spec.cases[0], call)
    yield from of_tf32(spec, spec.cases[0], call)
    for variant in spec.variants:
        with varied(variant):
            yield from of_tf32(spec, spec.cases[0], call)
    yield from of_traps(spec, call)


def _faults_of(spec, planned, call):
    for case, dtype, layout in planned:
        yield from of_case(spec, case, dtype, layout, call)
    for case in (*spec.cases[:2], *_empty(spec)) if spec.packed else ():
        yield from of_rows_past_num_tokens(spec, case, call)
        yield from of_more_tokens_than_rows(spec, case, call)


def examine(spec):
    return next(faults(spec), None)


def plan(spec):
    """(case, dtype, layout): every case in fp32, which hides least, and in one other dtype; the
    first two in every layout."""
    layouts, others = list(LAYOUTS), DTYPES[1:]
    for i, case in enumerate(spec.cases):
        yield case, DTYPES[0], layouts[0]
        yield case, others[i % len(others)], layouts[0]
    for i, layout in enumerate(layouts[1:] * (len(spec.cases) > 0)):
        yield spec.cases[i % 2 % len(spec.cases)], DTYPES[(i + 1) % len(DTYPES)], layout


def inputs_of(spec, case, dtype, layout="contiguous", seed=0):
    torch.manual_seed(seed)
    return laid_out(spec.inputs(dtype, "cpu", **case), layout)


def of_case(spec, case, dtype, layout, call=call):
    inputs = inputs_of(spec, case, dtype, layout)
    result, watched = call(spec, inputs)
    share, _ = Judge(spec, inputs, dtype)(result)
    where = f"{spec.label(case)}, {name_of(dtype)}, {layout}"
    for finding in watched.findings:
        yield f"{finding} ({where})"
    for t in result if isinstance(result, tuple) else (result,):
        if count := watched.unwritten(t):
            yield f"{where}: {count} elements of the result are not written"
    if not share <= 1:
        yield f"{where}: the error is {share:.2g} times what is allowed"


def _empty(spec):
    """The first case without tokens: it has only rows past num_tokens."""
    for case in spec.cases:
        rows = inputs_of(spec, case, torch.float16)[spec.packed[0]]
        if rows is not None and not len(rows):
            return (case,)
    return ()


def of_rows_past_num_tokens(spec, case, call=call):
    inputs = inputs_of(spec, case, torch.float16)
    expected, _ = call(spec, inputs)
    further = further_rows(spec, inputs)
    packed = [name for name in spec.packed if inputs[name] is not None]
    hidden = [further[name][len(inputs[name]) :] for name in packed]
    result, watched = call(spec, further, hidden)
    where = f"{spec.label(case)}, rows past num_tokens"
    for finding in watched.findings:
        yield f"{finding} ({where})"
    if not torch.equal(result[: len(expected)], expected):
        yield f"{where}: they reach the result"
    past = result[len(expected) :]
    if count := past.numel() - watched.unwritten(past):
        yield f"{where}: {count} elements of them are written in the result"


def of_more_tokens_than_rows(spec, case, call=call):
    """A num_tokens out of range: all rows are tokens, and nothing past them is touched."""
    inputs = inputs_of(spec, case, torch.float16)
    expected, _ = call(spec, inputs)
    further = further_rows(spec, inputs, rows=0)
    if "num_tokens" in further:
        further["num_tokens"] = further["num_tokens"] + 1000
    result, watched = call(spec, further)
    where = f"{spec.label(case)}, num_tokens beyond the rows"
    for finding in watched.findings:
        yield f"{finding} ({where})"
    if not torch.equal(result, expected):
        yield f"{where}: they change the result"


def of_infinity(spec, case, call=call):
    """Infinity or NaN in a row: it stays in that row, and gives what the definition gives."""
    inputs = inputs_of(spec, case, torch.float16)
    for name in spec.packed:
        for fill in (torch.inf, torch.nan) if is_float(t := inputs[name]) else ():
            filled = {**inputs, name: t.clone()}
            filled[name][0] = fill
            result, _ = call(spec, filled)
            share, _ = Judge(spec, filled, torch.float16)(result)
            if not share <= 1:
                where = f"{spec.label(case)}, {fill} in {name}"
                yield f"{where}: the error is {share:.2g} times what is allowed"


class InTF32(TorchDispatchMode):
    """Matrix products take their operands in TF32, rounded to nearest."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            args = map(nearest_tf32, args)
        elif func is torch.ops.aten.addmm.default:
            args = args[0], *map(nearest_tf32, args[1:])
        return func(*args, **(kwargs or {}))


def nearest_tf32(t):
    return (t.contiguous().view(torch.int32) + 0x1000 & -0x2000).view(torch.float32)


ALL_ONES = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # NaN that rounds to zero


def of_tf32(spec, case, call=call):
    """Where torch may multiply in TF32, an op does, and errs by at most half again as much as its
    definition on rounded operands, less than truncated ones would. NaN stays NaN."""
    inputs = inputs_of(spec, case, torch.float32)
    truth = tensors_of(spec.ref(**cast(inputs, torch.float64)))
    with InTF32():
        rounded = tensors_of(spec.ref(**inputs))
    products = [not torch.equal(*pair) for pair in zip(rounded, tensors_of(spec.ref(**inputs)))]
    if not any(products):
        return
    not_a_number = {
        name: torch.where(torch.arange(t.numel()).view(t.shape) == 1, ALL_ONES, t)
        if is_float(t) else t
        for name, t in inputs.items()
    }  # fmt: skip
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        ours = tensors_of(call(spec, inputs)[0])
        lost = tensors_of(call(spec, not_a_number)[0])
    finally:
        matmul.fp32_precision = before
    for i, exact in enumerate(truth):
        if not products[i]:
            continue
        share = distance(ours[i], exact) / distance(rounded[i], exact)
        if not 0.3 < share <= 1.5:
            yield f"{spec.label(case)}, TF32: the error is {share:.2g} times the definition's"
    for i, wanted in enumerate(tensors_of(spec.ref(**not_a_number))):
        if not torch.equal(lost[i].isnan(), wanted.isnan()):
            yield f"{spec.label(case)}, TF32: NaN is elsewhere than in the definition"


def of_traps(spec, call=call):
    """Keywords that must end a launch in an assertion, whichever program encounters them."""
    for keywords in spec.traps:
        inputs = {**inputs_of(spec, spec.cases[0], torch.float32), **keywords}
        try:
            call(spec, inputs)
        except (AssertionError, InterpreterError) as error:  # which wraps one raised in a helper
            if "AssertionError" in repr(error):
                continue
            raise
        (name,) = keywords
        yield f"{spec.label(spec.cases[0])}, {name} {keywords[name].flatten()[0]}: no assertion"


def of_size(spec, case, dtype=torch.float16):
    """Sizes at which an offset passes 2^31: some programs of each launch, nothing allocated."""
    with SaysCpu(), Phantoms():
        inputs = spec.inputs(dtype, "cpu", **case)
        _, watched = call(spec, inputs, programs=extremes)
    for finding in watched.findings:
        yield f"{finding} ({spec.label(case)})"


def of_strides(spec, case):
    """Likewise with few elements, 2^30 apart along one dimension of one input: the stride fits in
    32 bits, its product with an index does not."""
    inputs = inputs_of(spec, case, torch.float16)
    for name, t in inputs.items():
        for dim in range(t.ndim) if isinstance(t, torch.Tensor) else ():
            stride = list(t.stride())
            stride[dim] = 2**30
            with SaysCpu():
                apart = torch.empty_strided(t.shape, stride, dtype=t.dtype, device="meta")
                _, watched = call(spec, {**inputs, name: apart})
            for finding in watched.findings:
                yield f"{finding} ({spec.label(case)}, {name} with strides {stride})"


# -- cost -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cost:
    """A Spec's declared cost of a case, and what its launches did."""

    case: dict
    dtype: torch.dtype
    flops: int  # declared, like the next field
    bytes: int
    done: int  # floating-point operations, one for exp2 or erf
    distinct: int  # bytes of elements touched, once each
    moved: int  # bytes of all loads and stores, repeated ones included

    def __str__(self):
        return (
            f"{self.flops:,} FLOP declared, {self.done:,} done; {self.bytes:,} bytes declared, "
            f"{self.distinct:,} distinct, {self.moved:,} moved"
        )

    @property
    def wrong(self):
        if not 0.9 * self.done <= self.flops <= 1.1 * self.done:
            return "FLOP declared and done are not within 10 %"
        if not 0.95 * self.distinct <= self.bytes <= 1.05 * self.moved:
            return "bytes declared are not between the distinct and the moved ones, within 5 %"
        return None


def costs(spec):
    """A Cost for each dtype, for the Spec's case of whole tiles."""
    result = []
    for dtype in DTYPES:
        _, watched = call(spec, inputs_of(spec, spec.whole, dtype))
        flops, moved = spec.cost(dtype.itemsize, **spec.whole)
        result.append(
            Cost(
                spec.whole, dtype, flops, moved,
                done=sum(n.flops + n.dot_flops for n in watched.launches),
                distinct=sum(n.distinct_bytes for n in watched.launches),
                moved=sum(n.bytes_read + n.bytes_written for n in watched.launches),
            )
        )  # fmt: skip
    return result
