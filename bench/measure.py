"""Callables timed in turns, so that what disturbs the machine disturbs them all alike."""

import time
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

GRAPHED = 50e-6  # seconds; on a GPU, shorter calls are timed as the replay of a CUDA graph
LEAST, MOST = 3, 60  # rounds


class Skip(Exception):
    """Why a contender takes no part."""


@contextmanager
def noted(failures, name):
    """What is raised inside ends this contender and nothing else: failures[name] tells of it."""
    try:
        yield
    except Skip as skip:
        failures[name] = "skipped", str(skip)
    except Exception as error:  # of any kind: what a contender throws is a result too
        failures[name] = "error", _one_line(error)


def _one_line(error):
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


class CudaClock:
    """Time between events before and after a call, with none of its inputs in the L2 cache.

    Emptying the cache keeps the GPU busy for some 30 us, in which the host gets ahead: launching
    shows only where it takes longer than the work.
    """

    def __init__(self, device):
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.flushed = torch.empty(size, dtype=torch.int8, device=device)

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
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer stream is current again even where ending a broken capture raises.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            return run, f"plain launches, capture failed: {_one_line(error)}"
        return graph.replay, "CUDA graph"


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
        return tuple(np.percentile(np.median(draws, axis=1), (2.5, 97.5)).tolist())


def warm_up(run, clock, seconds):
    """The best time of run, called until three calls in a row gain less than 5 %, or time is up."""
    best = spent = clock(run)
    gainless = 0
    while gainless < 3 and spent < seconds:
        took = clock(run)
        gainless = 0 if took < 0.95 * best else gainless + 1
        best, spent = min(best, took), spent + took
    return best


def interleave(runs, clock, seconds, failures):
    """Time runs {name: callable} in rounds: {name: Timing}.

    Each is called once a round, and each round begins with another. The rounds take about
    `seconds`, but there are LEAST to MOST of them. What raises is in failures, and out.
    """
    warm, launched = {}, {}
    for name, run in runs.items():
        with noted(failures, name):
            warm[name] = warm_up(run, clock, seconds / 4)
            launched[name] = clock.launched(run, warm[name])
    names = list(launched)
    samples = {name: [] for name in names}
    rounds = int(seconds / sum(warm.values())) if names else 0
    for i in range(min(max(rounds, LEAST), MOST)):
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            if name not in failures:
                with noted(failures, name):
                    samples[name].append(clock(launched[name][0]))
    return {n: Timing(tuple(samples[n]), launched[n][1]) for n in names if n not in failures}


def ceilings(clock, device):
    """What this device reaches in this run: C, FLOP/s of a bf16 product of 8192 x 8192 matrices,
    and B, bytes/s read and written by a copy of 1 GiB."""
    a, b, c = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(3))
    x, y = (torch.zeros(2**30, dtype=torch.int8, device=device) for _ in range(2))
    work = {"C": 2 * 8192**3, "B": 2 * x.nbytes}
    runs = {"C": lambda: torch.mm(a, b, out=c), "B": lambda: y.copy_(x)}
    failures = {}
    timings = interleave(runs, clock, 0.5, failures)
    if failures:
        raise RuntimeError(f"bench: no ceilings: {failures}")
    return {name: work[name] / timings[name].median for name in work}
