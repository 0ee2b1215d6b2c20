"""The benchmark on callables that cost nothing, and once as it is started from a shell."""

import contextlib
import functools
import inspect
import itertools
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import masking_utils

from bert_fast import encode
from bert_fast.kernels import SPECS, launch
from bert_fast.kernels.launch import INTERPRET

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import cli
import contenders
import measure
import model_workloads
import op_peers
import op_workloads
import rows
from lengths import LENGTHS, lengths_of
from model_workloads import gate
from op_peers import BASELINES, OTHERS
from workloads import Contender, Problem, Workload

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """Takes a run at its word: each call returns the seconds that it claims."""

    def __call__(self, run):
        return run()

    def launched(self, run, seconds):
        return run.in_rounds, None

    def stream(self):
        return contextlib.nullcontext()


class Run:
    """A second to warm up with, then the given times over and over; log gets its name for each."""

    def __init__(self, name, times, log):
        self.name, self.times, self.log = name, itertools.cycle(times), log

    def __call__(self):
        return 1.0

    def in_rounds(self):
        self.log.append(self.name)
        if isinstance(taken := next(self.times), Exception):
            raise taken
        return taken


def timed(seconds=0.0, **times):
    log, failures = [], {}
    runs = {name: Run(name, of, log) for name, of in times.items()}
    timings = measure.interleave(runs, Clock(), seconds, failures, graphed=True)
    return timings, failures, "".join(log)


def test_each_round_calls_everyone_once_and_begins_with_another():
    _, _, log = timed(a=[1.0], b=[1.0], c=[1.0])
    assert log == "abcbcacab" * 2


def test_rounds_fill_the_time_within_bounds():
    for seconds, rounds in ((0.0, measure.LEAST), (20.0, 10), (1e9, measure.MOST)):
        timings, _, _ = timed(seconds, a=[1.0], b=[1.0])
        assert len(timings["a"].samples) == len(timings["b"].samples) == rounds


def test_one_that_raises_in_a_round_is_out_and_the_others_go_on():
    timings, failures, log = timed(a=[1.0], b=[1.0, MemoryError("no more")])
    assert failures == {"b": ("error", "MemoryError: no more")}
    assert set(timings) == {"a"}
    assert log == "abba" + "aaaa"


def test_warming_up_ends_when_nothing_is_gained_or_time_is_up():
    times = iter([9.0, 5.0, 3.0, 3.0, 3.0, 3.0, 1.0])
    assert measure.warm_up(lambda: next(times), Clock(), 100.0) == 3.0
    assert next(times) == 1.0
    times = iter([9.0, 6.0, 5.0, 3.0])
    assert measure.warm_up(lambda: next(times), Clock(), 10.0) == 5.0


def test_a_first_call_that_compiles_does_not_end_the_warm_up():
    times = iter([600.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    assert measure.warm_up(lambda: next(times), Clock(), 10.0) == 1.0


def test_what_runs_out_of_memory_lets_go_of_it_and_is_not_run_again(monkeypatch):
    """By the time that the others get it, neither its own tensors nor its results are held."""

    class Tensor:
        pass

    def run(own):
        held.extend(map(weakref.ref, (own, taken := Tensor())))
        raise torch.OutOfMemoryError(f"60 GiB beside {taken}")

    held, freed, failures = [], [], {}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append([t() for t in held]))
    runs = {"it": functools.partial(run, Tensor()), "other": lambda: 1.0}
    assert set(measure.interleave(runs, Clock(), 0.0, failures)) == {"other"}
    assert failures["it"][0] == "error"
    assert freed == [[None, None]]


def test_memory_is_given_back_after_running_out_of_it_alone(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    for error, times in (
        (measure.Skip("?"), 0), (ValueError("?"), 0), (torch.OutOfMemoryError("?"), 1)
    ):  # fmt: skip
        with measure.noted({}, "it"):
            raise error
        assert len(emptied) == times


def test_an_interval_of_the_least_rounds_contains_the_median_of_most_machines():
    """Of samples from one distribution, its own median lies within in nine of ten cases."""
    draws = np.random.default_rng(0).standard_normal((200, measure.LEAST))
    intervals = (measure.Timing(tuple(samples)).interval for samples in draws)
    assert sum(low <= 0 <= high for low, high in intervals) >= 180


# -- CUDA graphs, on a GPU that is pretended ------------------------------------------------
@pytest.fixture
def cuda(monkeypatch):
    """A GPU's clock; `mode` is what waiting for the GPU does now, `graphs` what was captured."""
    seen = SimpleNamespace(mode="default", graphs=[])

    def wait():
        if seen.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    @contextlib.contextmanager
    def capture(graph, stream):
        seen.graphs.append((graph, stream))
        yield

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(seen, "mode", mode))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: "replayed"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "outer")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    seen.wait, seen.clock = wait, object.__new__(measure.CudaClock)
    seen.clock._stream = "inner"
    return seen


def test_a_short_call_is_timed_as_the_replay_of_a_graph(cuda):
    run, note = cuda.clock.launched(lambda: None, 70e-6)
    assert (run(), note, cuda.mode) == ("replayed", "CUDA graph", "default")
    assert [stream for _, stream in cuda.graphs] == ["inner"]
    run = object()
    assert cuda.clock.launched(run, measure.GRAPHED) == (run, None)


def test_what_waits_for_the_gpu_is_not_captured_and_says_so(cuda):
    run, note = cuda.clock.launched(cuda.wait, 70e-6)
    assert (run, cuda.graphs, cuda.mode) == (cuda.wait, [], "default")
    assert note.startswith("plain launches, it waits for the GPU: RuntimeError: called a sync")


def test_a_capture_that_fails_for_another_reason_is_named(cuda):
    def run():
        raise RuntimeError("operation not permitted")

    assert cuda.clock.launched(run, 70e-6) == (
        run, "plain launches, capture failed: RuntimeError: operation not permitted"
    )  # fmt: skip
    assert cuda.mode == "default"


@pytest.mark.parametrize("kind", ["op", "backward", "inference", "training", "encode"])
def test_ops_are_captured_and_models_pay_for_their_launches(kind):
    launched = []

    class Graphs(Clock):
        def launched(self, run, seconds):
            launched.append(run.name)
            return super().launched(run, seconds)

    rows_of(STOCK, kind=kind, clock=Graphs())
    assert launched == ["stock"] * (kind in ("op", "backward"))


def test_the_interval_contains_the_median_and_shrinks_with_samples():
    for count in (5, 20, 500):
        samples = np.random.default_rng(count).lognormal(size=count)
        timing = measure.Timing(tuple(samples))
        low, high = timing.interval
        assert low <= timing.median <= high
        assert min(samples) <= low < high <= max(samples)
    assert high - low < 0.5


# -- rows -----------------------------------------------------------------------------------
def contender(name, times, *result, **options):
    def bind(inputs):
        if inputs == "checked":
            return lambda: torch.tensor(result or (1.0,))
        return Run(name, times, [])

    return Contender(name, lambda problem: bind, lambda result, inputs: [result], **options)


def rows_of(*contenders, dtype=torch.float16, unit=1.0, kind="op", clock=None, **options):
    problem = Problem(
        subject=None,
        timed="timed",
        checked="checked",
        checked_on="one number",
        truth=[torch.tensor([1.0], dtype=torch.float64)],
        gate=lambda error, baseline: gate(error, baseline, dtype),
        unit=unit,
        work={"C": 12.0, "B": 30.0},
        tokens=20,
        layers=2,
    )
    workload = Workload("toy", dtype, contenders, "stock", lambda: problem, kind=kind)
    measured = rows.measure(workload, clock or Clock(), 10.0, **options)
    assert all(tuple(row) == rows.ROW for row in measured)
    return {row["contender"]: row for row in measured}


STOCK = contender("stock", [4.0, 4.0, 3.0, 8.0, 9.0], 1.0 + 2**-10)


def test_ratios_are_those_of_the_medians_and_of_the_minima():
    ours = rows_of(STOCK, contender("ours", [2.0, 2.0, 1.0, 2.0, 9.0]))["ours"]
    assert (ours["status"], ours["rounds"]) == ("ok", 6)
    assert (ours["median_s"], ours["min_s"]) == (2.0, 1.0)
    assert (ours["ratio_median"], ours["ratio_min"]) == (2.0, 3.0)
    assert ours["valid_tokens_per_s"] == 10.0
    assert (ours["us_per_layer"], ours["added_us_per_layer"]) == (1e6, -1e6)


def test_the_share_is_of_the_ceiling_that_takes_longer():
    ours = rows_of(STOCK, contender("ours", [2.0]), ceilings={"C": 10.0, "B": 20.0})["ours"]
    assert (ours["share"], ours["share_of"]) == (0.75, "B")


def test_errors_stand_beside_those_of_the_baseline():
    ours = rows_of(STOCK, contender("ours", [2.0], 1.0 - 2**-11))["ours"]
    assert ours["error"] == {"max": 2**-11, "rms": 2**-11}
    assert ours["baseline_error"] == {"max": 2**-10, "rms": 2**-10}


@pytest.mark.parametrize(
    "apart, dtype, status",
    [
        (1.15 * 2**-10, torch.float16, "ok"),
        (1.25 * 2**-10, torch.float16, "FAILED"),
        (1.25 * 2**-10, torch.float32, "FAILED"),
        (float("nan"), torch.float16, "error"),
    ],
)
def test_a_result_too_far_from_fp64_has_no_speed(apart, dtype, status):
    ours = rows_of(STOCK, contender("ours", [2.0], 1.0 + apart), dtype=dtype)["ours"]
    assert ours["status"] == status
    assert (ours["ratio_median"] is None) == (status != "ok")
    assert (ours["valid_tokens_per_s"] is None) == (status != "ok")


@pytest.mark.parametrize(
    "apart, dtype, unit, status",
    [
        (9e-6, torch.float32, 1.0, "ok"),
        (1.1e-5, torch.float32, 1.0, "FAILED"),
        (1.1e-5, torch.float32, 2.0, "ok"),
        (9e-6, torch.float16, 1.0, "FAILED"),
    ],
)
def test_fp32_may_always_differ_by_1e5th_of_the_unit(apart, dtype, unit, status):
    exact, ours = contender("stock", [4.0], 1.0 + 2**-23), contender("ours", [2.0], 1.0 + apart)
    assert rows_of(exact, ours, dtype=dtype, unit=unit)["ours"]["status"] == status


def test_a_wrong_baseline_fails_and_excuses_nobody():
    definition = contender("definition", [9.0], 1.0 + 2**-10, gated=False)
    wrong = contender("stock", [4.0], 1.5)
    found = rows_of(definition, wrong, contender("ours", [2.0], 1.25))
    assert [row["status"] for row in found.values()] == ["ok", "FAILED", "FAILED"]
    assert found["definition"]["ratio_median"] is None
    found = rows_of(contender("definition", [9.0], 1.5, gated=False), STOCK)
    assert found["stock"]["status"] == "ok"


def test_a_result_of_another_shape_is_not_broadcast():
    assert rows_of(STOCK, contender("ours", [2.0], 1.0, 1.0))["ours"]["status"] == "error"


def raising(error):
    def build(problem):
        raise error

    return build


@pytest.mark.parametrize(
    "error, status, reason",
    [
        (measure.Skip("not installed"), "skipped", "not installed"),
        (torch.OutOfMemoryError("60 GiB\nin all"), "error", "OutOfMemoryError: 60 GiB"),
    ],
)
def test_what_cannot_be_built_is_a_row_with_the_reason(error, status, reason):
    measured = rows_of(STOCK, Contender("ours", raising(error)), contender("other", [1.0]))
    assert (measured["ours"]["status"], measured["ours"]["reason"]) == (status, reason)
    assert measured["other"]["ratio_median"] == 4.0


def test_without_a_baseline_there_are_times_no_ratios_and_nothing_is_ok():
    """Nothing says how large an error may be: here it is 97."""
    broken = Contender("stock", raising(torch.OutOfMemoryError("60 GiB")))
    ours = rows_of(broken, contender("ours", [2.0], 98.0))["ours"]
    assert (ours["status"], ours["reason"]) == ("error", rows.UNJUDGED)
    assert (ours["median_s"], ours["ratio_median"], ours["valid_tokens_per_s"]) == (2.0, None, None)


@pytest.mark.parametrize("result, status", [(1.0 + 2**-11, "ok"), (98.0, "FAILED")])
def test_without_a_baseline_the_definition_judges(result, status):
    broken = Contender("stock", raising(torch.OutOfMemoryError("60 GiB")))
    definition = contender("definition", [9.0], 1.0 + 2**-10, gated=False)
    ours = rows_of(definition, broken, contender("ours", [2.0], result))["ours"]
    assert (ours["status"], ours["ratio_median"]) == (status, None)


def test_a_baseline_that_is_not_timed_bounds_errors_all_the_same():
    late = contender("stock", [4.0, MemoryError("no more")], 1.0 + 2**-10)
    found = rows_of(late, contender("ours", [2.0]), contender("off", [2.0], 98.0))
    assert [row["status"] for row in found.values()] == ["error", "ok", "FAILED"]


def test_the_definition_is_there_for_its_error_and_not_timed():
    definition = contender("definition", [1.0], 1.0 + 2**-12, gated=False)
    found = rows_of(definition, STOCK)["definition"]
    assert (found["status"], found["error"]["max"], found["median_s"]) == ("ok", 2**-12, None)
    assert found["reason"] == "not timed: there for its error"
    alone = replace(definition, name="stock")  # the baseline, where an op has no other
    assert rows_of(alone)["stock"]["median_s"] == 1.0


def test_dynamo_is_reset_once_before_what_it_compiles_and_not_between(monkeypatch):
    events = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: events.append("reset"))

    def compiled(name):
        it = contender(name, [1.0], slow=True)
        return replace(it, build=lambda problem: events.append(name) or it.build(problem))

    rows_of(STOCK, compiled("a"), compiled("b"))
    assert events == ["reset", "a", "b"]
    events.clear()
    rows_of(STOCK, compiled("a"), in_haste=True)
    rows_of(STOCK)
    assert events == []


class Told:
    """Sensors of a GPU on which a call of `forgetful` runs out of memory."""

    energy = 0

    def read(self):
        return None

    def peak_bytes(self, run):
        if run.name == "forgetful":
            raise torch.OutOfMemoryError("60 GiB")
        return 1

    def energy_of(self, run, call_s, seconds):
        self.energy += 1
        return 2.0


def test_what_runs_out_of_memory_as_it_is_built_is_not_timed():
    called = []

    class Names(Clock):
        def __call__(self, run):
            called.append(getattr(run, "name", None))
            return super().__call__(run)

    forgetful = contender("forgetful", [1.0])
    found = rows_of(STOCK, forgetful, sensors=Told(), clock=Names())
    assert found["forgetful"]["reason"] == "OutOfMemoryError: 60 GiB"
    assert "stock" in called
    assert "forgetful" not in called


def test_energy_is_left_out_in_haste():
    assert rows_of(STOCK, sensors=Told())["stock"]["energy_j"] == 2.0
    assert rows_of(STOCK, sensors=Told(), in_haste=True)["stock"]["energy_j"] is None


def test_in_haste_slow_builds_are_left_out():
    slow = contender("slow", [1.0], slow=True)
    hurried = rows_of(STOCK, slow, in_haste=True)
    assert (hurried["slow"]["status"], hurried["stock"]["status"]) == ("skipped", "ok")
    assert rows_of(STOCK, slow)["slow"]["status"] == "ok"


# -- workloads ------------------------------------------------------------------------------
def test_every_peer_is_of_an_op_that_there_is():
    assert BASELINES.keys() | OTHERS.keys() <= {spec.name for spec in SPECS}


def test_lengths_have_the_figures_that_are_published():
    squad, wikipedia, cola = (
        LENGTHS[name].draw(1000, 32) for name in ("squad-384", "wikipedia-512", "cola-128")
    )
    assert np.percentile(squad, (10, 50, 90)) == pytest.approx((107, 159, 260), rel=0.02)
    assert squad.mean() == pytest.approx(172, rel=0.02)
    assert 1 - wikipedia.mean() / 512 == pytest.approx(0.48, abs=0.01)
    assert 1 - wikipedia.clip(max=128).mean() / 128 == pytest.approx(0.17, abs=0.01)
    assert 1 - cola.mean() / 128 == pytest.approx(0.89, abs=0.01)


def test_lengths_are_the_same_each_time_and_take_another_number_of_sequences():
    for name in ("squad-384", "wikipedia-512"):
        again = [LENGTHS[name].draw(2, 8) for _ in range(2)]
        assert np.array_equal(*again)
    assert lengths_of("full-128x8").sequences == 8
    assert lengths_of("full-128").sequences == LENGTHS["full-128"].sequences
    with pytest.raises(ValueError, match="no lengths nosuchx8; there are docstrings,"):
        lengths_of("nosuchx8")


# -- workloads, as they are, on small inputs ------------------------------------------------
@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another on a busy machine take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CPU = torch.device("cpu")
TINY = model_workloads.Shape(2, 32, 2, vocabulary=100)


def measured(workload, in_haste=True):
    """{contender: row}, those that take long to build left out."""
    found = rows.measure(workload, measure.CpuClock(), 0.0, in_haste=in_haste)
    return {row["contender"]: row for row in found}


@pytest.mark.skipif(INTERPRET, reason="the interpreter is not timed")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("spec", [s for s in SPECS if not s.gradient], ids=lambda s: s.name)
def test_every_contender_of_an_op_gives_what_the_definition_gives(spec, backward):
    if backward and not op_workloads._differentiable(spec):
        pytest.skip("has no gradients")
    case = spec.cases[0]
    found = measured(
        op_workloads._workload(spec, case, torch.float32, CPU, False, backward=backward)
    )
    assert {row["status"] for row in found.values()} <= {"ok", "skipped"}, found
    assert all(row["error"]["max"] < 1e-3 for row in found.values() if row["status"] == "ok")
    names = {"definition", "ours"}
    if not (backward and spec.name == "dropout"):  # F.dropout's are of other places
        names.add(BASELINES[spec.name].name)
    assert all(found[name]["status"] == "ok" for name in names)


@pytest.mark.skipif(INTERPRET, reason="the interpreter is not timed")
def test_the_peer_of_pack_takes_every_mask_that_is_timed():
    (spec,) = (s for s in SPECS if s.name == "pack")
    for case in (*spec.cases, *spec.bench):
        found = measured(op_workloads._workload(spec, case, torch.float32, CPU, False))
        assert {row["status"] for row in found.values()} == {"ok"}, (case, found)


def test_cublas_is_asked_for_by_name_for_the_product_alone(monkeypatch):
    """With a bias torch takes cuBLASLt. What follows is added outside of the clock's sight."""
    (spec,) = (s for s in SPECS if s.name == "linear")
    (peer,) = (c for c in OTHERS["linear"] if c.name == "cuBLAS product")
    inputs = spec.inputs(torch.float32, CPU, T=3, K=5, N=7, gelu=True, residual=True)
    with pytest.raises(measure.Skip, match="on a GPU alone"):
        peer.build(None)(inputs)
    preferred = ["default"]

    def preferred_blas_library(name=None):
        if name:
            preferred.append(name)
        return preferred[-1]

    linear, seen = torch.nn.functional.linear, []
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred_blas_library)
    monkeypatch.setattr(
        op_peers.F, "linear", lambda *args: seen.append((preferred[-1], len(args))) or linear(*args)
    )
    product = op_peers._without_lt(inputs["x"], inputs["weight"])
    assert (seen, preferred[-1]) == ([("cublas", 2)], "default")
    (result,) = peer.collect(product, inputs)
    assert torch.allclose(result, spec.ref(**inputs), atol=1e-5)


def test_a_smoke_test_is_of_small_cases():
    found = {w.name.removesuffix(" backward") for w in op_workloads.ops(torch.float32, CPU, True)}
    assert found == {spec.label(spec.whole) for spec in SPECS if not spec.gradient}


@pytest.mark.parametrize(
    "op, case, numbers",
    [
        ("linear", {"T": 3, "K": 5, "N": 7}, 2 * (15 + 35) + 7 + 21),
        ("linear", {"T": 3, "K": 5, "N": 7, "residual": True}, 2 * (15 + 35) + 7 + 21),
        ("linear", {"T": 3, "K": 5, "N": 7, "gelu": True}, 2 * (15 + 35 + 7) + 21),
        ("layer_norm", {"shape": (3, 5)}, 4 * 15 + 2 * 5 + 5),  # x, residual, dy; dx; three of 5
        ("dropout", {"shape": (3, 5), "p": 0.1}, 2 * 15),  # dy; dx
        ("gelu", {"shape": (3, 5)}, 3 * 15 + 2 * 5),
        ("attention", {"lengths": (3,), "heads": 2, "D": 4}, 8 * 24),  # q, k, v, o, dy; dq, dk, dv
    ],
)
def test_a_backward_moves_what_it_needs_once(op, case, numbers):
    (spec,) = (s for s in SPECS if s.name == op)
    problem = op_workloads._backward_problem(spec, case, torch.float32, CPU)
    assert problem.work["B"] == 4 * numbers


def test_a_backward_of_attention_is_five_products_and_of_others_four():
    (spec,) = (s for s in SPECS if s.name == "linear")
    problem = op_workloads._backward_problem(spec, {"T": 3, "K": 5, "N": 7}, torch.float32, CPU)
    assert problem.work["C"] == 2 * 3 * 7 * (2 * 5 + 1)
    case = {"lengths": (3,), "heads": 2, "D": 4}
    (spec,) = (s for s in SPECS if s.name == "attention")
    forward = op_workloads._problem(spec, case, torch.float32, CPU).work["C"]
    backward = op_workloads._backward_problem(spec, case, torch.float32, CPU).work["C"]
    assert backward == 2.5 * forward  # five products, of two


def test_gradients_are_drawn_where_they_are_used(monkeypatch):
    generator, devices = torch.Generator, []
    monkeypatch.setattr(torch, "Generator", lambda device: devices.append(device) or generator())
    y = torch.ones(3, 5, dtype=torch.float64)
    first, again = (op_workloads._gradient_of(y, torch.bfloat16) for _ in range(2))
    assert devices == [y.device, y.device]
    assert torch.equal(first, again)
    assert torch.equal(first, first.bfloat16().double())


def tiny(prepare, contenders, lengths="cola-128x3", dtype=torch.float32, batches=1):
    lengths = replace(lengths_of(lengths), batches=batches)
    problem = functools.partial(prepare, TINY, lengths, dtype, CPU, False)
    return Workload("tiny", dtype, contenders, "stock sdpa", problem)


@pytest.mark.skipif(INTERPRET, reason="the interpreter is not timed")
def test_every_way_to_run_the_model_gives_the_same_hidden_states():
    quick = tuple(c for c in contenders.INFERENCE if c.name != "onnxruntime")
    found = measured(tiny(model_workloads._batches, quick))
    assert {name for name, row in found.items() if row["status"] == "ok"} == {
        "stock sdpa", "stock eager", "sdpa math", "sdpa flash", "ours, frozen", "ours"
    }  # fmt: skip
    assert {row["status"] for row in found.values()} == {"ok", "skipped"}
    assert found["ours"]["sequences"] == 3
    assert found["ours"]["padded_to"] == 128


@pytest.mark.skipif(INTERPRET, reason="the interpreter is not timed")
@pytest.mark.parametrize("lengths", ["cola-128x3", "docstringsx3", "full-128x2"])
def test_stock_as_a_graph_for_each_shape_gives_stock_s_hidden_states(lengths):
    """Recorded is what ran on the tensors that were there: a replay runs it on them again."""
    recorded = []

    def capture(run):
        recorded.append(run)
        result = run()

        def replay():
            result.last_hidden_state.copy_(run().last_hidden_state)

        return replay, result

    def forward(problem):
        return contenders.graphed(problem, capture)

    models = (contenders.SDPA, contenders.Model("graphs", forward))
    ways = tuple(model.inference() for model in models)
    workload = tiny(model_workloads._batches, ways, lengths, batches=2)
    assert measured(workload)["graphs"]["status"] == "ok"
    recorded.clear()
    problem = workload.prepare()
    stock, graphs = (contenders.bound(m.forward(problem))(problem.timed) for m in models)
    first, again = (contenders.at_tokens(graphs(), problem.timed) for _ in range(2))
    assert all(map(torch.equal, first, again))
    truth = contenders.at_tokens(stock(), problem.timed)
    torch.testing.assert_close(first, truth, rtol=1e-4, atol=1e-4)
    assert len(recorded) == (2 if lengths.startswith("docstrings") else 1)
    masks = {run.keywords["attention_mask"] is None for run in recorded}
    assert masks == {lengths.startswith("full")}


@pytest.mark.parametrize("lengths, masked", [("full-128x2", False), ("cola-128x3", True)])
def test_stock_as_a_graph_has_no_mask_where_nothing_is_padded(lengths, masked, monkeypatch):
    """Also where transformers takes capturing for tracing, and makes a mask of ones, as 5.17."""
    monkeypatch.setattr(masking_utils, "_ignore_bidirectional_mask_sdpa", lambda *_, **__: False)
    sdpa, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watched(q, k, v, attn_mask=None, **options):
        seen.append(attn_mask is not None)
        return sdpa(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    problem = tiny(model_workloads._batches, (), lengths).prepare()
    seen.clear()
    forward = contenders.graphed(problem, lambda run: (lambda: None, run()))
    forward(**problem.timed[0])
    assert seen == [masked] * TINY.layers


def looped(q, k, v, cu_seqlens, _, longest, __):
    """What FlashAttention's kernel computes."""
    assert longest == cu_seqlens.diff().max()
    parts = [t.split(cu_seqlens.diff().tolist()) for t in (q, k, v)]
    heads_first = (
        torch.nn.functional.scaled_dot_product_attention(*(t.transpose(0, 1) for t in qkv))
        for qkv in zip(*parts)
    )
    return torch.cat([o.transpose(0, 1) for o in heads_first])


def test_the_unpadded_model_is_stock_without_padding_and_names_its_kernel():
    def forward(problem):
        return contenders.unpadded(problem, looped, "a loop")

    unpadded = contenders.Model("unpadded", forward, trains=True)
    both = (contenders.SDPA, unpadded)
    found = measured(tiny(model_workloads._batches, tuple(m.inference() for m in both)))
    assert (found["unpadded"]["status"], found["unpadded"]["implementation"]) == ("ok", "a loop")
    steps = tuple(map(model_workloads._training, both))
    found = measured(tiny(model_workloads._step, steps))
    assert (found["unpadded"]["status"], found["unpadded"]["implementation"]) == ("ok", "a loop")


def test_a_backend_that_does_not_take_the_inputs_is_skipped_and_a_crash_is_not():
    def refuse(text):
        raise RuntimeError(text)

    for text in ("No available kernel. Aborting execution.", "No viable backend for it"):
        with pytest.raises(measure.Skip, match="does not take these inputs"):
            contenders.forced("math", CPU, functools.partial(refuse, text))()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        contenders.forced("math", CPU, functools.partial(refuse, "illegal memory access"))()


@pytest.mark.skipif(INTERPRET, reason="the interpreter is not timed")
def test_a_training_step_with_wrong_gradients_fails():
    def off(problem):
        forward = contenders.SDPA.forward(problem)

        def wrong(**batch):
            return 1.001 * forward(**batch)

        wrong.model = forward.model
        return wrong

    models = (contenders.SDPA, contenders.OURS, contenders.Model("off", off))
    found = measured(tiny(model_workloads._step, tuple(map(model_workloads._training, models))))
    assert {name: row["status"] for name, row in found.items()} == {
        "stock sdpa": "ok", "ours": "ok", "off": "FAILED"
    }  # fmt: skip


def test_a_step_changes_the_weights_when_timed_and_not_when_checked():
    problem = tiny(model_workloads._step, ()).prepare()
    weights = []

    def forward(problem):
        made = contenders.SDPA.forward(problem)
        weights.append(made.model.embeddings.word_embeddings.weight)
        return made

    stepper = model_workloads._training(contenders.Model("it", forward))
    bind = stepper.build(problem)
    before = weights[0].clone()
    bind(problem.checked)()
    assert torch.equal(weights[0], before)
    bind(problem.timed)()
    assert not torch.equal(weights[0], before)


def test_dropout_is_of_timed_steps_alone():
    """Those that are checked have a definition."""
    problem = tiny(model_workloads._step, ()).prepare()
    seen = []

    def forward(problem):
        made = contenders.OURS.forward(problem)
        dropouts = [m for m in made.model.modules() if isinstance(m, torch.nn.Dropout)]

        def watched(**batch):
            seen.append({m.p for m in dropouts})
            return made(**batch)

        watched.model = made.model
        return watched

    bind = model_workloads._training(contenders.Model("it", forward), 0.1).build(problem)
    for batches in (problem.checked, problem.timed, problem.checked):
        bind(batches)()
    assert seen == [{0.0}, {0.1}, {0.0}]


def test_a_contender_that_drops_no_probabilities_has_no_row_with_dropout():
    wanted = model_workloads.workload("train-with-dropout 6x384 full-128x8", torch.float32, CPU)
    assert wanted.kind == "training"
    (unpadded,) = (c for c in wanted.contenders if c.name == "FlashAttention unpadded")
    with pytest.raises(measure.Skip, match="drops no probabilities"):
        unpadded.build(None)


def test_texts_are_encoded_frozen_and_rows_say_in_which_batches():
    names = [contender.name for contender in model_workloads.ENCODERS]
    assert names[-1] == "ours, frozen"
    assert "8,192" in model_workloads._encode(SimpleNamespace(subject=(None,) * 4)).implementation
    assert inspect.signature(encode.encode).parameters["batch_tokens"].default == 8192


def test_ceilings_are_work_over_time():
    class Seconds(Clock):
        def __call__(self, run):
            run()
            return 2.0

        def launched(self, run, seconds):
            return run, None

    reached = measure.ceilings(Seconds(), CPU, ["float32", "bfloat16"], sizes=(64, 1000))
    assert reached == {"B": 1000.0, "C": {"float32": 64**3, "bfloat16": 64**3}}


def test_tf32_is_allowed_where_it_is_asked_for_alone():
    seen, before = [], torch.backends.cuda.matmul.fp32_precision
    problem = Problem(None, 0, 0, "", [torch.ones(1)], lambda e, b: None, {"C": 1.0, "B": 1.0})

    def build(problem):
        def run():
            seen.append(launch.fp32_precision())
            return torch.ones(1)

        return lambda inputs: run

    it = Contender("it", build, lambda result, inputs: [result])
    for tf32 in (False, True):
        seen.clear()
        found = measured(Workload("w", torch.float32, (it,), "it", lambda: problem, tf32=tf32))
        assert set(seen) == {"tf32" if tf32 else "none"}
        assert found["it"]["dtype"] == ("tf32" if tf32 else "float32")
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_a_row_in_fp32_is_not_tf32_whatever_torch_has_been_told():
    torch.backends.fp32_precision = "tf32"
    try:
        with measure.tf32(False):
            assert launch.fp32_precision() == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = torch.backends.fp32_precision = "none"


def test_inputs_without_memory_are_rows_too():
    def prepare():
        raise torch.OutOfMemoryError("60 GiB")

    found = measured(Workload("w", torch.float32, (STOCK,), "stock", prepare))
    assert found["stock"]["status"] == "error"
    assert found["stock"]["reason"] == "OutOfMemoryError: 60 GiB"


def test_a_ratio_s_interval_draws_whole_rounds():
    """What slowed both down in the same rounds widens the intervals of the times, not this one."""
    base = measure.Timing((2.0, 2.0, 20.0, 20.0, 2.0, 20.0))
    ours = measure.Timing((1.0, 1.0, 10.0, 10.0, 1.0, 10.0))
    assert ours.interval == (1.0, 10.0)
    assert ours.ratio_interval(base) == (2.0, 2.0)


# -- the command line -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, known",
    [
        ("ops --only nosuch", "layer_norm"),
        ("model --only nosuch", "6x384 docstrings"),
        ("model --only nosuch", "stock eager"),
        ("nosuch", "'model'"),
        ("ops --dtype nosuch", "'bfloat16'"),
        ("ops --device nosuch", "'cuda'"),
    ],
)
def test_an_unknown_name_lists_the_known_ones_on_one_line(arguments, known, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments.split()])
    with pytest.raises(SystemExit) as exit:
        cli.main("")
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("bench: ")
    assert "nosuch" in said
    assert known in said


@pytest.mark.skipif(INTERPRET, reason="the interpreter is not timed")
def test_what_the_budget_does_not_allow_is_skipped_and_said(capsys, monkeypatch, tmp_path):
    path = tmp_path / "result.json"
    arguments = f"bench model --device cpu --budget 1e-9 --output {path}".split()
    monkeypatch.setattr(sys, "argv", arguments)
    assert cli.main("") == 0
    measured = json.loads(path.read_text())["rows"]
    assert {row["status"] for row in measured} == {"skipped"}
    assert "budget of 1e-09 s" in measured[0]["reason"]
    assert {row["workload"] for row in measured} == set(model_workloads.PLANS["cpu"])
    count = len(model_workloads.PLANS["cpu"])
    said = f"skipped: {count} of {count} workloads, the budget of 1e-09 s is used up"
    assert said in capsys.readouterr().out


@pytest.fixture
def told(monkeypatch):
    """told(names, budget, done=(), **options): [(name, in_haste)] of what cli.run measures of
    workloads that take as many seconds as their names say, and the Results that it fills."""
    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])

    def run(names, budget, done=(), reached=1, **options):
        began, found = [], SimpleNamespace(content={"rows": list(done)}, added=[])

        def measure(item, clock, seconds, ceilings, only, in_haste, sensors):
            began.append((item.name, in_haste))
            now[0] += float(item.name)
            return [rows._row(item, STOCK, "ok", None)]

        def add(rows):
            found.added.append(len(rows))
            found.content["rows"] += rows

        found.add = add
        found.content["ceilings"] = reached and {"B": 1.0, "C": {"float16": 1.0}}
        monkeypatch.setattr(cli, "measure", measure)
        todo = [
            (Workload(name, torch.float16, (STOCK,), "stock", None), None, 1.0) for name in names
        ]
        cli.run(found, todo, CPU, ["float16"], budget, brief=True, **options)
        return began, found

    return run


def test_without_memory_for_the_ceilings_there_are_rows_without_shares(told, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("60 GiB")

    monkeypatch.setattr(cli, "ceilings", full)
    began, found = told(["1"], None, reached=None)
    assert began == [("1", False)]
    assert found.content["ceilings"] is None
    assert "no ceilings: OutOfMemoryError: 60 GiB" in capsys.readouterr().out


def test_nothing_begins_that_would_take_longer_than_what_is_left(told):
    began, found = told(["5", "1", "4", "1.0", "1.1", "1.2"], 15.5)
    assert [name for name, _ in began] == ["5", "1", "4", "1.0"]
    assert [row["status"] for row in found.content["rows"]] == ["ok"] * 4 + ["skipped"] * 2
    assert found.added[-1] == 2  # one file is written for all that is skipped


def test_from_half_of_the_budget_on_it_is_in_haste(told):
    began, _ = told(["3", "3.0", "3.00", "3.000"], 12.0)
    assert [in_haste for _, in_haste in began] == [False, False, False, True]
    began, _ = told(["3", "4"], None, hurried=True)
    assert [in_haste for _, in_haste in began] == [True, True]


def test_what_was_measured_before_is_not_overwritten_by_being_skipped(told):
    done = [{**dict.fromkeys(rows.ROW), "workload": "2", "dtype": "float16", "status": "ok"}]
    _, found = told(["9", "2", "3"], 10.0, done)
    of = [(row["workload"], row["status"]) for row in found.content["rows"]]
    assert of == [("2", "ok"), ("9", "ok"), ("3", "skipped")]


def test_a_run_as_a_module_writes_its_file_and_leaves_kernels_unimportable(tmp_path):
    path = tmp_path / "result.json"
    code = (  # what `python -m bench` does, and then a question
        "import importlib.util, runpy, sys\n"
        "try: runpy.run_module('bench', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "assert importlib.util.find_spec('kernels') is None\n"
    )
    arguments = f"ops --device cpu --quick --only pack --output {path}".split()
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONSAFEPATH")}
    env["OMP_NUM_THREADS"] = "1"
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, check=True)
    content = json.loads(path.read_text())
    assert content["schema"] == 2
    assert content["device"]["type"] == "cpu"
    assert content["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"date", "git commit", "ceilings"} <= content.keys()
    ours = [row for row in content["rows"] if row["contender"] == "ours"]
    assert [row["workload"].partition("(")[0] for row in ours] == ["pack", "unpack", "unpack"]
    assert all(row["status"] == "ok" and row["error"]["max"] == 0 for row in ours)
    assert all(row["ratio_median"] > 0 for row in ours)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("model --device cpu --workload nosuch", "sizes are 6x384, base"),
        ("model --device cpu --workload base", "lengths docstrings,"),
        ("model --device cpu --workload nosuch", "with train or train-with-dropout before them"),
        ("model --device cpu --workload tiny\tfull-128", "sizes are 6x384, base"),
        ("model --device cpu --workload base\tfull-128x0", "lengths docstrings,"),
        ("model --device cpu --workload encode\tsquad-384", "or encode docstrings;"),
        ("model --device cpu --workload encode", "or encode docstrings;"),
        ("ops --device cpu --dtype tf32", "only a GPU multiplies in TF32"),
        ("ops --device cpu --seconds nan", "--seconds: must be a number of seconds above 0, got n"),
        ("ops --device cpu --seconds -1", "--seconds: must be a number of seconds above 0, got -1"),
        ("ops --device cpu --seconds many", "must be a number of seconds above 0, got many"),
        ("ops --device cpu --budget inf", "--budget: must be a number of seconds above 0, got inf"),
    ],
)
def test_a_workload_or_dtype_that_cannot_be_says_what_can(arguments, said, capsys, monkeypatch):
    words = [word.replace("\t", " ") for word in arguments.split(" ")]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as exit:
        cli.main("")
    told = capsys.readouterr().err
    assert (exit.value.code, told.count("\n"), said in told) == (2, 1, True)
