"""The benchmark on callables that cost nothing, and once as it is started from a shell."""

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_fast.kernels import SPECS
from bert_fast.kernels.launch import INTERPRET

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import cli
import contenders
import measure
import model_workloads
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
    return measure.interleave(runs, Clock(), seconds, failures), failures, "".join(log)


def test_each_round_calls_everyone_once_and_begins_with_another():
    _, _, log = timed(a=[1.0], b=[1.0], c=[1.0])
    assert log == "abcbcacab"


def test_rounds_fill_the_time_within_bounds():
    for seconds, rounds in ((0.0, measure.LEAST), (20.0, 10), (1e9, measure.MOST)):
        timings, _, _ = timed(seconds, a=[1.0], b=[1.0])
        assert len(timings["a"].samples) == len(timings["b"].samples) == rounds


def test_one_that_raises_in_a_round_is_out_and_the_others_go_on():
    timings, failures, log = timed(a=[1.0], b=[1.0, MemoryError("no more")])
    assert failures == {"b": ("error", "MemoryError: no more")}
    assert set(timings) == {"a"}
    assert log == "abbaa"


def test_warming_up_ends_when_nothing_is_gained_or_time_is_up():
    times = iter([9.0, 5.0, 3.0, 3.0, 3.0, 3.0, 1.0])
    assert measure.warm_up(lambda: next(times), Clock(), 100.0) == 3.0
    assert next(times) == 1.0
    times = iter([9.0, 5.0, 3.0])
    assert measure.warm_up(lambda: next(times), Clock(), 10.0) == 5.0


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


def rows_of(*contenders, dtype=torch.float16, unit=1.0, **options):
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
    workload = Workload("toy", dtype, contenders, "stock", lambda: problem)
    measured = rows.measure(workload, Clock(), 10.0, **options)
    assert all(tuple(row) == rows.ROW for row in measured)
    return {row["contender"]: row for row in measured}


STOCK = contender("stock", [4.0, 4.0, 3.0, 8.0, 9.0], 1.0 + 2**-10)


def test_ratios_are_those_of_the_medians_and_of_the_minima():
    ours = rows_of(STOCK, contender("ours", [2.0, 2.0, 1.0, 2.0, 9.0]))["ours"]
    assert (ours["status"], ours["rounds"]) == ("ok", 5)
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


def test_without_a_baseline_there_are_times_and_no_ratios():
    broken = Contender("stock", raising(RuntimeError("broken")))
    ours = rows_of(broken, contender("ours", [2.0]))["ours"]
    assert (ours["status"], ours["median_s"], ours["ratio_median"]) == ("ok", 2.0, None)


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
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_every_contender_of_an_op_gives_what_the_definition_gives(spec, backward):
    if backward and not op_workloads._differentiable(spec):
        pytest.skip("has no gradients")
    case = spec.cases[0]
    found = measured(
        op_workloads._workload(spec, case, torch.float32, CPU, False, backward=backward)
    )
    assert {row["status"] for row in found.values()} <= {"ok", "skipped"}, found
    assert all(row["error"]["max"] < 1e-3 for row in found.values() if row["status"] == "ok")
    names = {"definition", "ours", BASELINES[spec.name].name}
    assert all(found[name]["status"] == "ok" for name in names)


def test_a_backward_moves_each_input_and_gradient_once():
    case = {"T": 3, "K": 5, "N": 7}
    (spec,) = (s for s in SPECS if s.name == "linear")
    problem = op_workloads._backward_problem(spec, case, torch.float32, CPU)
    moved = 4 * (2 * (3 * 5 + 7 * 5 + 7) + 3 * 7)
    assert problem.work == {"C": 2.5 * 3 * 7 * (2 * 5 + 1), "B": moved}


def tiny(prepare, contenders, lengths="cola-128x3", dtype=torch.float32):
    lengths = replace(lengths_of(lengths), batches=1)
    problem = functools.partial(prepare, TINY, lengths, dtype, CPU, False)
    return Workload("tiny", dtype, contenders, "stock sdpa", problem)


@pytest.mark.skipif(INTERPRET, reason="the interpreter is not timed")
def test_every_way_to_run_the_model_gives_the_same_hidden_states():
    quick = (*contenders.INFERENCE[:7], contenders.INFERENCE[-1])
    found = measured(tiny(model_workloads._batches, quick))
    assert {name: row["status"] for name, row in found.items()} == {
        "stock sdpa": "ok", "stock eager": "ok", "sdpa math": "ok", "sdpa flash": "ok",
        "sdpa efficient": "skipped", "sdpa cudnn": "skipped", "FlashAttention unpadded": "skipped",
        "ours": "ok",
    }  # fmt: skip
    assert found["ours"]["sequences"] == 3
    assert found["ours"]["padded_to"] == 128


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
    seen = []
    problem = Problem(None, 0, 0, "", [torch.ones(1)], lambda e, b: None, {"C": 1.0, "B": 1.0})

    def build(problem):
        def run():
            seen.append(torch.backends.cuda.matmul.allow_tf32)
            return torch.ones(1)

        return lambda inputs: run

    it = Contender("it", build, lambda result, inputs: [result])
    for tf32 in (False, True):
        seen.clear()
        found = measured(Workload("w", torch.float32, (it,), "it", lambda: problem, tf32=tf32))
        assert set(seen) == {tf32}
        assert found["it"]["dtype"] == ("tf32" if tf32 else "float32")
    assert not torch.backends.cuda.matmul.allow_tf32


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
    assert "base full-128" in capsys.readouterr().out


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
        ("model --device cpu --workload tiny\tfull-128", "sizes are 6x384, base"),
        ("model --device cpu --workload base\tfull-128x0", "lengths docstrings,"),
        ("ops --device cpu --dtype tf32", "only a GPU multiplies in TF32"),
    ],
)
def test_a_workload_or_dtype_that_cannot_be_says_what_can(arguments, said, capsys, monkeypatch):
    words = [word.replace("\t", " ") for word in arguments.split(" ")]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as exit:
        cli.main("")
    told = capsys.readouterr().err
    assert (exit.value.code, told.count("\n"), said in told) == (2, 1, True)
