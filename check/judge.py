"""How large an op's error may be, for the fuzzer and for `examine`, and so `make check` and the
mutants. tests/test_ops.py takes its layouts from here and has a simpler allowance of its own.

Truth is the definition in fp64 on the same inputs. Allowed are one ulp of each number, for rounding
the result once, and four times what fp32 arithmetic costs the definition, the largest of three:
its error when it runs in fp32; its error when each dot product is summed term by term, from either
end, as a GPU thread sums and a library that sums in parts does not; and how far it moves when its
inputs move by an fp32 ulp, which shows ill-conditioned inputs where the other two were lucky.

For an op that must round inside (attention rounds its probabilities) the cost is that of the
definition in the same dtype, both its error and how far it moves, once instead of four times. Its
gradients are not judged where the definition's overflow.

Where the truth is NaN, the result must be; a gradient may be infinite there, as autograd adds
infinities that cancel.
"""

import inspect
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast.kernels import launch
from bert_fast.kernels.spec import cast, is_float, tensors_of

EPS32 = torch.finfo(torch.float32).eps


def moved(inputs, eps, seed):
    """inputs with every float moved by up to eps of itself."""
    generator = torch.Generator().manual_seed(seed)

    def move(t):
        by = torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        return t + t * (2 * by - 1) * eps

    return {k: move(t) if is_float(t) else t for k, t in inputs.items()}


class InOrder(TorchDispatchMode):
    """Matrix products sum their dot products term by term: from the first to the last, or if
    backwards from the last to the first."""

    def __init__(self, backwards=False):
        super().__init__()
        self.backwards = backwards

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            a, b = args
            acc = a.new_zeros(*a.shape[:-1], b.shape[-1])
        elif func is torch.ops.aten.addmm.default and not kwargs:
            acc, a, b = args
            acc = acc.expand(len(a), b.shape[-1]).clone()
        else:
            return func(*args, **(kwargs or {}))
        terms = range(a.shape[-1])
        for k in reversed(terms) if self.backwards else terms:
            acc.addcmul_(a[..., k, None], b[..., k, None, :])
        return acc


def distance(result, truth):
    """The largest difference where truth is finite."""
    finite = truth.isfinite() & result.isfinite()
    apart = (result.double() - truth).abs()[finite]
    return apart.max().item() if apart.numel() else 0.0


class Judge:
    """Judges the outputs of an op on one set of inputs by its definition: judge(output)."""

    def __init__(self, spec, inputs, dtype):
        self.dtype = dtype
        exact = cast(inputs, torch.float64)
        truth = spec.ref(**exact)
        self.truth = tensors_of(truth)
        near = dtype if spec.rounds_inside else torch.float32
        weight = 1 if spec.rounds_inside and dtype != torch.float32 else 4
        versions = [spec.ref(**cast(inputs, near))]
        for backwards in (False, True) if near == torch.float32 else ():
            with InOrder(backwards):
                versions.append(spec.ref(**cast(inputs, near)))
        versions += [spec.ref(**moved(exact, torch.finfo(near).eps, seed)) for seed in range(4)]
        versions = [tensors_of(v) for v in versions]
        self.cost = [
            weight * max(distance(v[i], t) for v in versions) if is_float(t) else 0.0
            for i, t in enumerate(self.truth)
        ]
        # A gradient has the dtype of its input, which may differ from the op's.
        several = isinstance(truth, tuple)
        self.dtypes = [t.dtype for t in spec.ref(**inputs)] if several else [dtype]
        self.gradient = spec.gradient  # where autograd may add infinities that the op does not
        # Intermediate gradients in softmax may exceed the largest fp16, in stock and in the op.
        gradients = spec.rounds_inside and spec.gradient
        self.free = [~t.isfinite() & gradients for t in versions[0]]
        stock = versions if near == dtype else [tensors_of(spec.ref(**cast(inputs, dtype)))]
        pairs = [(s, t) for s, t in zip(stock[0], self.truth, strict=True) if is_float(t)]
        self.stock = max((self._error_of_stock(s, t) for s, t in pairs), default=0.0)

    def _error_of_stock(self, stock, truth):
        """At least half an ulp of the largest number, even if stock was exact by chance."""
        number = truth.to(self.dtype).isfinite()
        if not stock[number].isfinite().all():
            return torch.inf
        largest = truth[number].abs().max().item() if number.any() else 0.0
        return max(distance(stock, truth), torch.finfo(self.dtype).eps / 2 * largest)

    def __call__(self, output):
        """(error as a share of what is allowed, at most 1 if good; error in units of stock's own, 0
        if stock has none: no true value is finite in the dtype, or all are zeros).

        Errors without a size (shape, dtype, NaN, a wrong integer) are inf.
        """
        worst, error = 0.0, 0.0
        output = tensors_of(output)
        if len(output) != len(self.truth):
            return torch.inf, torch.inf
        given = zip(output, self.truth, self.cost, self.dtypes, self.free, strict=True)
        for ours, truth, cost, dtype, free in given:
            if ours.shape != truth.shape:
                return torch.inf, torch.inf
            if not is_float(truth):
                if ours.dtype != truth.dtype or not torch.equal(ours, truth):
                    return torch.inf, torch.inf
                continue
            if ours.dtype != dtype:
                return torch.inf, torch.inf
            if not truth.numel():
                continue
            rounded = truth.to(dtype)
            finite = rounded.isfinite()
            scale = truth[finite].abs().max().item() if finite.any() else 0.0
            tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            allowed = torch.finfo(dtype).eps * truth.abs() + cost + EPS32 * scale + tiny
            apart = (ours.double() - truth).abs()
            # A true value past the largest number may become that number or infinity.
            largest = torch.finfo(dtype).max
            past = rounded.isinf() & truth.isfinite() & (ours * truth.sign() >= largest)
            share = torch.where(finite, apart / allowed, torch.where(past, 0.0, torch.inf))
            share = share.masked_fill(truth.isinf() & (ours == rounded), 0.0)
            lost = ours.isfinite() if self.gradient else ~ours.isnan()
            share = torch.where(truth.isnan(), torch.where(lost, torch.inf, 0.0), share)
            share = share.masked_fill(free, 0.0)  # not judged there
            worst = max(worst, share.nan_to_num(torch.inf, torch.inf).max().item())
            error = max(error, distance(ours, truth))
        return worst, error / self.stock if self.stock else 0.0


# -- variants -------------------------------------------------------------------------------
def varied(variant):
    """Launches inside use `variant`, entries of a configuration that select other code, as a tuned
    table may; where a configuration has such entries."""
    original = launch.configuration

    def configuration(op, default, fixed=(), rows=None, **key):
        config = original(op, default, fixed, rows, **key)
        return config | {name: n for name, n in variant.items() if name in config}

    return patch.object(launch, "configuration", configuration)


# -- layouts --------------------------------------------------------------------------------
# A layout takes a tensor and its index among the inputs: no two strides may agree by chance.
def contiguous(t, i):
    return t


def rows_apart(t, i):
    return torch.nn.functional.pad(t, (0, 1 + i))[..., : t.shape[-1]] if t.ndim > 1 else t


def columns_apart(t, i):
    return t.repeat_interleave(2 + i, dim=-1)[..., :: 2 + i]


def columns_first(t, i):
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def batch_inside(t, i):
    return t.movedim(0, -2).contiguous().movedim(-2, 0) if t.ndim > 2 else t


_LAYOUTS = contiguous, rows_apart, columns_apart, columns_first, batch_inside
LAYOUTS = {f.__name__: f for f in _LAYOUTS}


def laid_out(inputs, layout):
    """inputs with each tensor in a layout of LAYOUTS, given by name."""
    return {
        k: LAYOUTS[layout](t, i) if isinstance(t, torch.Tensor) else t
        for i, (k, t) in enumerate(inputs.items(), start=1)
    }


def is_packed(spec, inputs):
    """Whether the packed inputs have a row for each token, so that further rows can be added."""
    if not spec.packed or inputs[spec.packed[0]] is None:
        return False
    typical = spec.inputs(torch.float32, "cpu", **spec.cases[0])[spec.packed[0]]
    return inputs[spec.packed[0]].ndim == typical.ndim


def further_rows(spec, inputs, fill=torch.nan, rows=3):
    """inputs with rows of fill appended to every packed one, and num_tokens set accordingly.

    NaN, or an index outside every table, reveals reads of these rows. With 0 every op computes a
    number, which reveals writes, as memory from torch.empty is filled with NaN.
    """
    first = inputs[spec.packed[0]]
    further = dict(inputs)
    for name in spec.packed:
        if (t := inputs[name]) is not None:
            value = 2**30 if fill and not is_float(t) else fill
            further[name] = torch.cat((t, t.new_full((rows, *t.shape[1:]), value)))
    if "num_tokens" in inspect.signature(spec.fn).parameters:
        further["num_tokens"] = torch.tensor(
            [len(first)], dtype=torch.int32, device=first.device
        )
    return further
