"""The benchmark on callables that cost nothing, and once as it is started from a shell."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_fast.kernels import SPECS
from bert_fast.kernels.launch import INTERPRET

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import cli
import measure
import rows
from model_workloads import LENGTHS, gate
from op_workloads import PEERS
from workloads import Contender, Problem, Workload

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """Takes a run at its word: each call returns the seconds that it claims."""

    def __call__(self, run):
        return run()

    def launched(self, run, seconds):
        return run.in_rounds, None


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
    assert PEERS.keys() <= {spec.name for spec in SPECS}


def test_squad_lengths_have_the_percentiles_that_are_published():
    drawn = LENGTHS["squad-384"].draw(1000, 32)
    assert np.percentile(drawn, (10, 50, 90)) == pytest.approx((107, 159, 260), rel=0.02)
    assert drawn.mean() == pytest.approx(172, rel=0.02)


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


def test_tests_that_take_too_long_are_killed_and_the_result_says_so():
    ran = cli.run_tests(0.05)
    assert (ran["returncode"], ran["summary"]) == (None, "killed after 0.05 s")
    assert ran["seconds"] < 10


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
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, check=True)
    content = json.loads(path.read_text())
    assert content["schema"] == 1
    assert content["device"]["type"] == "cpu"
    assert content["versions"]["torch"] == torch.__version__
    assert {"date", "git commit", "ceilings"} <= content.keys()
    ours = [row for row in content["rows"] if row["contender"] == "ours"]
    assert [row["workload"].partition("(")[0] for row in ours] == ["pack", "unpack"]
    assert all(row["status"] == "ok" and row["error"]["max"] == 0 for row in ours)
    assert all(row["ratio_median"] > 0 for row in ours)
