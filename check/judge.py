"""How large an op's error may be. Tests, the fuzzer and the mutants ask here.

Truth is the definition in fp64 on the same inputs. Allowed are one ulp of each number, for rounding
the result once, and four times what fp32 arithmetic costs the definition, the largest of three:
its error when it runs in fp32; that when each dot product is summed one term after the other, from
either end, as a thread of a GPU sums and a library that sums in parts does not; and what it moves
when its inputs move by an fp32 ulp, which says how ill-conditioned they are where the others were
lucky.

An op that must round inside (attention rounds its probabilities) is held to the definition in the
same dtype, both terms taken in that dtype, once instead of four times. Of its gradients nothing is
promised where that one overflows.
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
    """Dot products in products of matrices are summed one term after the other: from the first to
    the last, or where backwards from the last to the first."""

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
    """The definition's verdict on one set of inputs of an op: judge(output) of what the op gave.

    run(fn, inputs) -> output; another one than the plain call may give gradients.
    """

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
        # Gradients have the dtype of what they are of, which may not be that of the op.
        several = isinstance(truth, tuple)
        self.dtypes = [t.dtype for t in spec.ref(**inputs)] if several else [dtype]
        # Gradients within softmax pass the largest fp16 on the way, stock's as well as the op's.
        gradients = spec.rounds_inside and spec.gradient
        self.free = [~t.isfinite() & gradients for t in versions[0]]
        stock = versions if near == dtype else [tensors_of(spec.ref(**cast(inputs, dtype)))]
        pairs = [(s, t) for s, t in zip(stock[0], self.truth, strict=True) if is_float(t)]
        self.stock = max((self._error_of_stock(s, t) for s, t in pairs), default=0.0)

    def _error_of_stock(self, stock, truth):
        """At least half an ulp of the largest number, which chance may spare it."""
        number = truth.to(self.dtype).isfinite()
        if not stock[number].isfinite().all():
            return torch.inf
        largest = truth[number].abs().max().item() if number.any() else 0.0
        return max(distance(stock, truth), torch.finfo(self.dtype).eps / 2 * largest)

    def __call__(self, output):
        """(error as a share of what is allowed, at most 1; error in units of stock's own, 0 where
        stock makes none: no truth is a number of the dtype, or all are zeros).

        What is wrong beyond measure (shape, dtype, NaN, an integer) is inf.
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
            # A truth past the largest number may come out as that number or as infinity.
            largest = torch.finfo(dtype).max
            past = rounded.isinf() & truth.isfinite() & (ours * truth.sign() >= largest)
            share = torch.where(finite, apart / allowed, torch.where(past, 0.0, torch.inf))
            share = share.masked_fill(truth.isnan() | free, 0.0)  # nothing is promised there
            share = share.masked_fill(truth.isinf() & (ours == rounded), 0.0)
            worst = max(worst, share.nan_to_num(torch.inf).max().item())
            error = max(error, distance(ours, truth))
        return worst, error / self.stock if self.stock else 0.0


# -- variants -------------------------------------------------------------------------------
def varied(variant):
    """Launches inside have `variant`, numbers of a configuration, where it has such numbers: what a
    tuned table may say, where that takes other code."""
    original = launch.configuration

    def configuration(op, default, fixed=(), rows=None, **key):
        config = original(op, default, fixed, rows, **key)
        return config | {name: n for name, n in variant.items() if name in config}

    return patch.object(launch, "configuration", configuration)


# -- layouts --------------------------------------------------------------------------------
# A layout takes a tensor and its place among the inputs: no two strides may agree by chance.
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
    """inputs with each tensor laid out by a layout of LAYOUTS."""
    return {
        k: LAYOUTS[layout](t, i) if isinstance(t, torch.Tensor) else t
        for i, (k, t) in enumerate(inputs.items(), start=1)
    }


def is_packed(spec, inputs):
    """Whether the packed inputs have a row for each token, so that there may be further ones."""
    if not spec.packed or inputs[spec.packed[0]] is None:
        return False
    typical = spec.inputs(torch.float32, "cpu", **spec.cases[0])[spec.packed[0]]
    return inputs[spec.packed[0]].ndim == typical.ndim


def further_rows(spec, inputs, fill=torch.nan, rows=3):
    """inputs with rows of fill behind those of every packed one, and num_tokens to say so.

    NaN, or an index outside every table, shows what is read of them. Of 0 every op makes a number,
    which shows where it is written, as memory from torch.empty is NaN meanwhile.
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
