"""Callables timed in turns, so that what disturbs the machine disturbs them all alike."""

import gc
import time
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from bert_fast.kernels import linear

GRAPHED = 2e-3  # seconds of a call by plain launches: of an op, fewer may be the host's alone
# Rounds. The median lies between the extremes of six with 97 %, between those of three with 75 %.
LEAST, MOST = 6, 60


class Skip(Exception):
    """Why a contender takes no part."""


@contextmanager
def noted(failures, name, *held):
    """What is raised inside ends this contender and nothing else: failures[name] tells of it, and
    the dicts `held` let go of it."""
    out_of_memory = False
    try:
        yield
    except Skip as skip:
        failures[name] = "skipped", str(skip)
    except Exception as error:  # of any kind: what a contender throws is a result too
        failures[name] = "error", one_line(error)
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        traceback.clear_frames(error.__traceback__)  # which hold what it had allocated
    if name in failures:
        for of in held:
            of.pop(name, None)
    if out_of_memory:
        gc.collect()  # the others get the memory that this one ran out of
        torch.cuda.empty_cache()


def one_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# -- clocks ---------------------------------------------------------------------------------
class CpuClock:
    """Wall time of a call."""

    def __call__(self, run):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def launched(self, run, seconds):
        return run, None

    def stream(self):
        return nullcontext()


class CudaClock:
    """Time between events before and after a call, with none of its inputs in the L2 cache.

    Emptying the cache keeps the GPU busy for some 80 us, in which the host gets ahead: a launch or
    a replay does not show, many launches do where they take longer than the work.

    All work is on one stream, not the default one: a backward is captured on that of its forward.
    """

    def __init__(self, device):
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28)
        self.flushed = torch.empty(size, dtype=torch.int8, device=device)
        self._stream = torch.cuda.Stream(device)

    def stream(self):
        self._stream.wait_stream(torch.cuda.default_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def __call__(self, run):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def launched(self, run, seconds):
        """run as it is to be timed, knowing that it takes about `seconds`, and a note on that."""
        if seconds >= GRAPHED:
            return run, None
        try:
            replay, _ = captured(run, self._stream)
        except Skip as skip:
            return run, f"plain launches, {skip}"
        except RuntimeError as error:
            return run, f"plain launches, capture failed: {one_line(error)}"
        return replay, "CUDA graph"


def captured(run, stream):
    """run() as a CUDA graph: (what replays it, the result that a replay fills).

    Raises Skip if run waits for the GPU. To try all the same would spoil the process: torch 2.11
    leaves its random generator capturing.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise Skip(f"it waits for the GPU: {one_line(error)}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    # The outer stream is current again even where ending a broken capture raises.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream):
        result = run()
    return graph.replay, result


def clock_of(device):
    return CudaClock(device) if device.type == "cuda" else CpuClock()


# -- the loop -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Timing:
    samples: tuple[float, ...]  # seconds, a call each
    note: str | None = None

    @property
    def median(self):
        return float(np.median(self.samples))

    @property
    def min(self):
        return min(self.samples)

    @property
    def interval(self):
        """Bootstrap 95 % interval of the median."""
        draws = np.random.default_rng(0).choice(self.samples, (2000, len(self.samples)))
        return _middle(np.median(draws, axis=1))

    def ratio_interval(self, base):
        """The same of base.median / self.median, the rounds being drawn for both at once: what
        slowed a whole round down slowed both."""
        rounds = min(len(self.samples), len(base.samples))
        draws = np.random.default_rng(0).integers(rounds, size=(2000, rounds))
        ours, theirs = (np.median(np.array(t.samples)[draws], axis=1) for t in (self, base))
        return _middle(theirs / ours)


def _middle(values):
    return tuple(np.percentile(values, (2.5, 97.5)).tolist())


def warm_up(run, clock, seconds):
    """The best time of run, called until three calls in a row gain less than 5 %, or so many
    seconds after the first are up."""
    best, spent, gainless = clock(run), 0.0, 0  # the first call may compile for minutes
    while gainless < 3 and spent < seconds:
        took = clock(run)
        gainless = 0 if took < 0.95 * best else gainless + 1
        best, spent = min(best, took), spent + took
    return best


def interleave(runs, clock, seconds, failures, graphed=False):
    """Time runs {name: callable} in rounds: {name: Timing}.

    Each is called once a round, and each round begins with another. The rounds take about
    `seconds`, but there are LEAST to MOST of them. What raises is in failures, and out of runs.

    graphed  whether short calls are timed as the replay of a CUDA graph, where there are any
    """
    warm, launched = {}, {}
    for name in list(runs):
        with noted(failures, name, runs, warm, launched):
            warm[name] = warm_up(runs[name], clock, seconds / 4)
            launched[name] = (
                clock.launched(runs[name], warm[name]) if graphed else (runs[name], None)
            )
    names = list(launched)
    samples = {name: [] for name in names}
    rounds = int(seconds / sum(warm.values())) if names else 0
    for i in range(min(max(rounds, LEAST), MOST)):
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            if name not in failures:
                with noted(failures, name, runs, launched):
                    samples[name].append(clock(launched[name][0]))
    return {n: Timing(tuple(samples[n]), launched[n][1]) for n in names if n not in failures}


CEILING_SIZES = {"cuda": (8192, 2**30), "cpu": (2048, 2**28)}  # of a matrix; bytes of a copy


def ceilings(clock, device, dtypes, sizes=None):
    """What this device reaches in this run: {"B": bytes/s, "C": {dtype: FLOP/s}}.

    B  read and written by a copy: of 1 GiB, on a CPU of 256 MiB
    C  a product of two 8192 x 8192 matrices, on a CPU 2048 x 2048, in each of dtypes

    dtypes  names: "float32", "tf32", "float16", "bfloat16"

    Raises RuntimeError if one of them cannot be measured.
    """
    n, size = sizes or CEILING_SIZES[device.type]
    products = [lambda: torch.mm(a, b, out=c)]
    if device.type == "cpu":
        products.append(lambda: linear(a, b))  # oneDNN: on AMD, torch's MKL reaches half
    x, y = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    reached = {"B": 2 * size / _median(lambda: y.copy_(x), clock), "C": {}}
    for name in dtypes:
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        # Not zeros, on which a GPU is faster than on any data
        a, b, c = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
        with tf32(name == "tf32"):
            reached["C"][name] = 2 * n**3 / min(_median(product, clock) for product in products)
    return reached


def _median(run, clock, seconds=0.3):
    failures = {}
    timings = interleave({"it": run}, clock, seconds, failures)
    if failures:
        raise RuntimeError(f"bench: no ceilings: {failures['it'][1]}")
    return timings["it"].median


@contextmanager
def tf32(allowed):
    """Whether fp32 products may be TF32 inside, for torch and for the kernels, which ask it."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if allowed else "none"
    if not allowed and matmul.fp32_precision == "tf32":  # torch.backends' own, which none inherits
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
