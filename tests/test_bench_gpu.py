"""What `make gpu` does, with tools that only pretend: no GPU is needed."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import cli
import gpu
import measure
import nvidia_tools
import process
import result_schema
import results
import sensors
import tune

from bert_fast.kernels import SPECS, launch
from bert_fast.kernels.launch import HAS_TRITON, INTERPRET

KNOWN = {
    "type": "cuda", "name": "NVIDIA Toy", "backend": "triton", "cores": 2, "threads": 2,
    "load": None, "capability": "9.0", "multiprocessors": 132,
}  # fmt: skip


# -- processes ------------------------------------------------------------------------------
def test_what_takes_too_long_is_killed_with_all_that_it_started(tmp_path):
    mark = tmp_path / "alive"
    script = f"(sleep 1; touch {mark}) & echo begun; sleep 60"
    started = time.monotonic()
    assert process.run_limited(["sh", "-c", script], 0.3) == (None, ["begun"])
    assert time.monotonic() - started < 5
    time.sleep(1)
    assert not mark.exists()


def test_output_and_status_come_back():
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    returncode, lines = process.run_limited([sys.executable, "-c", code], 20)
    assert (returncode, sorted(lines)) == (3, ["err", "out"])


@pytest.mark.parametrize("xdist", [False, True])
def test_tests_that_are_killed_have_said_what_failed(xdist, tmp_path, monkeypatch):
    if xdist:
        pytest.importorskip("xdist", reason="pytest-xdist is no part of .[test]")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: xdist)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 2)  # each worker takes seconds to start
    (tmp_path / "test_it.py").write_text(
        "import time\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_slow(): time.sleep(float(open('slow').read()))\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "slow").write_text("0")
    ran = gpu.run_tests(60, ["test_it.py"])
    assert ran["returncode"] == 1
    assert ran["failed"] == ["FAILED test_it.py::test_wrong - assert 1 == 2"]
    (tmp_path / "slow").write_text("60")
    ran = gpu.run_tests(20, ["test_it.py"])
    assert (ran["returncode"], ran["summary"]) == (None, "killed after 20 s")
    (failed,) = ran["failed"]
    assert "test_it.py::test_wrong" in failed


def test_the_tests_that_a_gpu_runs_are_there():
    assert all((gpu.ROOT / path).exists() for path in gpu.TESTS)


# -- parts ----------------------------------------------------------------------------------
@pytest.fixture
def parts(monkeypatch):
    """Runs of parts that only write their file; `ran` has (part, limit) of each, `until` when it is
    to end, and `fate` is the exit status of those that do not pass, None for one that is killed.
    Neither tests nor sanitize end before the other has begun."""
    ran, until, fate, both = [], [], {}, threading.Barrier(2, timeout=5)

    def run_limited(command, limit):
        options = dict(itertools.pairwise(command))
        part = options["--part"]
        if part in ("tests", "sanitize"):
            both.wait()
        ran.append((part, limit))
        until.append(float(options["--until"]))
        status = fate.get(part, 0)
        path = Path(options["--folder"]) / results.file_name(KNOWN, part)
        found = results.Results(path, KNOWN, part)
        if status is not None:
            found.add(complete=True, passed=status == 0)
        return status, [f"{part} ran"]

    monkeypatch.setattr(gpu, "run_limited", run_limited)
    monkeypatch.setattr(results, "commit", lambda: "abc")
    return SimpleNamespace(ran=ran, until=until, fate=fate)


def test_parts_run_in_turn_within_nine_minutes_each_with_a_file(parts, tmp_path):
    assert gpu.run_all(KNOWN, tmp_path, gpu.ALL) == 0
    ran = [part for part, _ in parts.ran]
    assert set(ran[:2]) == {"tests", "sanitize"} and ran[2:] == ["bench", "tune", "ncu"]
    limits = dict(parts.ran)
    assert sum(max(limits[part] for part in turn) for turn in gpu.TURNS) <= gpu.ALL < 9 * 60
    for part in gpu.LIMITS:
        assert result_schema.read(tmp_path / results.file_name(KNOWN, part))["part"] == part


def test_a_part_is_told_when_it_ends_before_python_has_started(parts, tmp_path):
    before = time.time()
    gpu.run_all(KNOWN, tmp_path, gpu.ALL)
    limits = [limit for _, limit in parts.ran]
    for until, limit in zip(parts.until, limits, strict=True):
        assert until == pytest.approx(before + limit - gpu.MARGIN, abs=5)


def test_what_has_passed_before_a_part_begins_is_part_of_its_time(monkeypatch, tmp_path):
    ends = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.launch, "missing", lambda device: None)
    monkeypatch.setattr(gpu, "device_of", lambda device: KNOWN)
    monkeypatch.setattr(gpu, "_tests", lambda results, end: ends.append(end) or True)
    for options, seconds in ((["--until", str(time.time() + 7)], 7), ([], gpu.ALONE)):
        arguments = ["bench", "gpu", "--part", "tests", "--folder", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        assert cli.main("") == 0
        assert gpu.left(ends[-1]) == pytest.approx(seconds, abs=2)


def test_a_part_that_is_killed_costs_that_part_alone_and_is_all_that_runs_again(
    parts, tmp_path, capsys
):
    parts.fate["bench"] = None
    assert gpu.run_all(KNOWN, tmp_path, gpu.ALL) == 1
    said = capsys.readouterr().out
    assert "bench: killed after" in said
    assert "parts that did not pass: bench" in said
    assert {part for part, _ in parts.ran} == gpu.LIMITS.keys()
    parts.ran.clear(), parts.fate.clear()
    assert gpu.run_all(KNOWN, tmp_path, gpu.ALL) == 0
    assert [part for part, _ in parts.ran] == ["bench"]


def test_a_part_that_failed_is_not_run_again_and_still_fails(parts, tmp_path, capsys):
    parts.fate["tests"] = 1
    assert gpu.run_all(KNOWN, tmp_path, gpu.ALL) == 1
    parts.ran.clear()
    assert gpu.run_all(KNOWN, tmp_path, gpu.ALL) == 1
    assert parts.ran == []
    assert "tests: FAILED before" in capsys.readouterr().out


def test_other_sources_are_not_done_and_a_table_that_tune_wrote_is(parts, tmp_path, monkeypatch):
    path = tmp_path / results.file_name(KNOWN, "tests")
    gpu.run_all(KNOWN, tmp_path, gpu.ALL)
    monkeypatch.setattr(results, "commit", lambda: "abc-dirty")
    assert gpu.done_before(path)["passed"]
    monkeypatch.setattr(gpu, "sources", lambda: "others")
    assert gpu.done_before(path) is None
    older = json.loads(path.read_text())
    del older["environment"]
    path.write_text(json.dumps(older))
    assert gpu.done_before(path) is None


def test_a_file_that_was_cut_off_is_written_anew(parts, tmp_path):
    path = tmp_path / results.file_name(KNOWN, "tests")
    path.write_text('{"schema": 2, "par')
    assert gpu.run_all(KNOWN, tmp_path, gpu.ALL) == 0
    assert result_schema.read(path)["passed"]


def test_without_time_left_a_part_is_not_begun(parts, tmp_path, capsys):
    assert gpu.run_all(KNOWN, tmp_path, gpu.MARGIN) == 1
    assert parts.ran == []
    assert "run it with PART=tests" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, known",
    [("gpu --part nosuch", "'sanitize'"), ("gpu", "finds no GPU here"), ("tune", "needs a GPU")],
)
def test_a_wrong_part_and_a_machine_without_a_gpu_are_refused(
    arguments, known, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments.split()])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        cli.main("")
    said = capsys.readouterr().err
    assert (exit.value.code, said.count("\n"), known in said) == (2, 1, True)


def test_a_table_is_written_from_the_file_of_a_run_elsewhere(tmp_path, monkeypatch, capsys):
    files, table = gpu.ROOT / "bench" / "results", tmp_path / "table.json"

    def written_from(name):
        arguments = ["bench", "tune", "--from", str(files / name), "--table", str(table)]
        monkeypatch.setattr(sys, "argv", arguments)
        return cli.main("")

    with pytest.raises(SystemExit) as exit:
        written_from("cpu-amd-epyc-2026-11-24.json")
    assert exit.value.code == 2 and not table.exists()
    assert "chose no configuration; give the file of a run of tune" in capsys.readouterr().err
    assert written_from("nvidia-h200-2026-11-27-tune.json") == 0
    made = json.loads(table.read_text())
    assert (made["gpu"], made["capability"], made["multiprocessors"]) == ("NVIDIA H200", "9.0", 132)
    assert ("attention", "D=128 itemsize=2") in launch.read_table(table, "NVIDIA H200")


def test_the_line_of_a_workload_says_what_failed():
    rows = [
        {"workload": "base", "dtype": "tf32", "contender": c, "baseline": "sdpa", "status": s,
         "ratio_median": x, "reason": r}
        for c, s, x, r in (
            ("sdpa", "ok", 1.0, None), ("compile", "ok", 1.5, None), ("flex", "skipped", None, "?"),
            ("eager", "error", None, "OutOfMemoryError: 60 GiB"), ("ours", "ok", 2.0, None),
            ("ours, without graphs", "ok", 1.8, None),  # is no rival
        )
    ]  # fmt: skip
    assert cli.line(rows) == (
        "base tf32: ours 2.00 x sdpa; best other compile 1.50; 1 error eager; 1 skipped"
        "\n    eager: OutOfMemoryError: 60 GiB"
    )


def test_what_matters_most_is_measured_first_and_every_dtype_is():
    plan = gpu.plan()
    names = [(item.name, item.precision) for item, _, _ in plan]
    assert len(names) == len(set(names))
    assert names[: len(gpu.HEAD)] == [(name, "bfloat16") for name in gpu.HEAD]
    assert {dtype for _, dtype in names[:10]} == {"bfloat16", "float32", "tf32"}
    assert {dtype for _, dtype in names} == set(gpu.DTYPES)
    labels = [  # what docs/performance.md waits for
        (spec.label(spec.bench[n]), "bfloat16")
        for spec in SPECS if spec.name in ("attention", "linear", "qkv")
        for n in range(min(6, len(spec.bench)))
    ]  # fmt: skip
    assert max(map(names.index, labels)) < names.index(("large squad-384", "bfloat16")) < 56
    backwards = [n for n, (item, _, _) in enumerate(plan) if item.kind == "backward"]
    ahead = [n for n in backwards if n < names.index(("large squad-384", "bfloat16"))]
    ops = {names[n][0].partition("(")[0] for n in ahead}
    assert ops == {"attention", "layer_norm"}  # which have kernels
    assert backwards[len(ahead) :] == list(range(len(plan)))[len(ahead) - len(backwards) :]


def test_every_name_of_the_stages_is_measured():
    names = {item.name.partition("(")[0] for item, _, _ in gpu.plan()}
    assert {name.removesuffix(" backward") for _, of, _ in gpu.STAGES for name in of} == names


def test_in_brief_a_model_has_its_strongest_rivals_alone():
    for item, names, _ in gpu.plan():
        known = {c.name for c in item.contenders}
        if item.kind == "inference" and item.name != "12x32 batch-1-short":
            assert set(names) - {"ours, training graphs"} <= known
        if item.kind == "training":
            assert "ours, training graphs" in known & set(names)
        if item.kind in ("inference", "training"):
            assert "ours" in names
            assert ("stock eager" in names) == (item.name in gpu.HEAD)
        else:
            assert names is None


@pytest.mark.parametrize("seconds", [gpu.LIMITS["bench"], gpu.ALONE])
def test_with_time_the_head_is_measured_again_with_everyone(seconds, monkeypatch):
    ran = []

    def run(results, todo, device, dtypes, budget, brief, hurried=False):
        ran.append((len(todo), budget, hurried))
        assert hurried or all(names is None for _, names, _ in todo)
        return True

    monkeypatch.setattr(cli, "run", run)
    assert gpu._bench(None, time.monotonic() + seconds)
    if seconds < gpu.ALONE:
        assert ran == [(len(gpu.plan()), pytest.approx(seconds, abs=5), True)]
    else:
        assert [(count, hurried) for count, _, hurried in ran] == [
            (len(gpu.plan()), True), (len(gpu.HEAD), False)
        ]  # fmt: skip
        assert ran[0][1] == pytest.approx(seconds / 2, abs=5)


# -- NVIDIA's tools -------------------------------------------------------------------------
@pytest.fixture
def tool(tmp_path, monkeypatch):
    """tool(name, script): a program on the PATH."""

    def make(name, script):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return make


@pytest.mark.parametrize(
    "script, status, reason",
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", "ok", None),
        ("echo '========= RACECHECK SUMMARY: 0 hazards'", "ok", None),
        (
            "echo '========= Invalid __global__ read of size 2 bytes'\n"
            "echo '========= ERROR SUMMARY: 1 error'; exit 9",
            "FAILED", "exit status 9: ERROR SUMMARY: 1 error",
        ),
        ("echo '========= Device not supported'; exit 1", "skipped", "Device not supported"),
        ("echo Traceback; exit 1", "FAILED", "exit status 1: Traceback"),
        ("exit 0", "FAILED", "exit status 0: no output"),  # it never came to a summary
        ("sleep 20", "skipped", "killed after 1 s"),
        ("echo '========= Invalid __global__ read of size 2 bytes'; sleep 20", "FAILED",
         "killed after 1 s"),
    ],
)  # fmt: skip
def test_what_the_sanitizer_says_is_what_the_part_says(script, status, reason, tool):
    tool("compute-sanitizer", script)
    found = nvidia_tools.sanitize("memcheck", 1.0)
    assert (found["status"], found["reason"]) == (status, reason)
    assert found["findings"] == ["Invalid __global__ read of size 2 bytes"] * ("Invalid" in script)
    result_schema.check([found], result_schema.SCHEMA["properties"]["sanitize"])


def test_tools_that_are_not_there_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_tools.sanitize("memcheck", 1.0)["status"] == "skipped"
    assert nvidia_tools.ncu(1.0) == {
        "status": "skipped", "reason": "ncu is not on the PATH", "kernels": []
    }  # fmt: skip


def test_the_compilers_are_compared_before_the_sanitizer_takes_its_time(monkeypatch):
    order, found = [], results.Results(None, KNOWN, "sanitize")

    def ptx(seconds):
        order.append(("ptx", seconds))
        return []

    def sanitize(tool, seconds):
        order.append((tool, seconds))
        return {"tool": tool, "status": "skipped", "reason": "?", "findings": [], "seconds": 0.0}

    monkeypatch.setattr(gpu, "ptx", ptx)
    monkeypatch.setattr(gpu, "sanitize", sanitize)
    assert gpu._sanitize(found, time.monotonic() + 60)
    of = [(tool, pytest.approx(seconds, abs=5)) for tool, seconds in order]
    assert of == [("ptx", 30), ("memcheck", 30), ("racecheck", 60)]  # none took any time


def test_the_sanitizer_sees_each_tensor_as_an_allocation_and_the_small_cases(tool, tmp_path):
    tool("compute-sanitizer", f"echo $PYTORCH_NO_CUDA_MEMORY_CACHING $@ > {tmp_path / 'log'}")
    nvidia_tools.sanitize("racecheck", 5.0)
    said = (tmp_path / "log").read_text()
    assert said.startswith("1 --tool racecheck --error-exitcode 9")
    assert said.split()[-2:] == [nvidia_tools.EXERCISE, "small"]


PRETENDED = """
echo '{{"float16 D=64": {{"error": {error}, "baseline_error": 1.0, "bits": "{bits}"}}}}'
"""


@pytest.mark.parametrize(
    "error, bits, status, reason",
    [
        (1.0, "aa", "ok", None),
        (1.0, "bb", "ok", "other bits than triton's ptxas in float16 D=64"),
        (2.5, "bb", "FAILED", "wrong in float16 D=64"),
        ("null", "bb", "FAILED", "wrong in float16 D=64"),
    ],
)
def test_a_ptx_compiler_that_makes_attention_wrong_is_found(
    error, bits, status, reason, tool, monkeypatch
):
    first = tool("ptxas", "echo 'release 12.8, V12.8.93'")
    second = tool("ptxas-13", "echo 'release 13.0, V13.0.48'")
    python = tool(
        "python", 'case "$TRITON_PTXAS_PATH" in *ptxas-13)'
        + PRETENDED.format(error=error, bits=bits) + ";; *)"
        + PRETENDED.format(error=1.0, bits="aa") + ";; esac",
    )  # fmt: skip
    monkeypatch.setattr(nvidia_tools.sys, "executable", str(python))
    found = nvidia_tools.ptx(10.0, [first, second])
    result_schema.check(found, result_schema.SCHEMA["properties"]["ptx"])
    assert [entry["version"] for entry in found] == ["12.8.93", "13.0.48"]
    assert (found[0]["status"], found[0]["reason"]) == ("ok", None)
    assert (found[1]["status"], found[1]["reason"]) == (status, reason)


def test_compilers_run_beside_each_other_and_one_that_is_too_slow_is_skipped(tool, monkeypatch):
    python = tool("python", 'case "$TRITON_PTXAS_PATH" in *slow) sleep 20;; *) sleep 1;'
                  + PRETENDED.format(error=1.0, bits="aa") + ";; esac")  # fmt: skip
    monkeypatch.setattr(nvidia_tools.sys, "executable", str(python))
    paths = [tool(name, "echo V12.8.93") for name in ("a", "b", "c", "slow")]
    started = time.monotonic()
    found = nvidia_tools.ptx(2.5, paths)
    assert time.monotonic() - started < 5
    assert [entry["status"] for entry in found] == ["ok", "ok", "ok", "skipped"]
    assert found[-1]["reason"] == "killed after 2 s"


def test_a_single_ptx_compiler_is_said_to_have_no_second(tool, monkeypatch):
    python = tool("python", "echo 'Segmentation fault'; exit 139")
    monkeypatch.setattr(nvidia_tools.sys, "executable", str(python))
    found = nvidia_tools.ptx(10.0, [tool("ptxas", "echo V12.8.93")])
    assert [entry["status"] for entry in found] == ["FAILED", "skipped"]
    assert found[0]["reason"] == "Segmentation fault"


def test_counters_of_ncu_become_numbers(tool):
    names = ",".join(f'"{name}"' for name in nvidia_tools.METRICS)
    tool("ncu", f"""
echo '{{"ops": ["attention", "gelu"]}}'
echo '==PROF== Profiling'
echo '"ID","Kernel Name",{names}'
echo '"","",'
echo '"0","_forward_kernel","1,250","71.5","80","50","128","n/a"'
""")
    found = nvidia_tools.ncu(5.0)
    result_schema.check(found, result_schema.SCHEMA["properties"]["ncu"])
    assert found["kernels"] == [{
        "op": "attention", "kernel": "_forward_kernel", "ns": 1250.0, "compute %": 71.5,
        "memory %": 80.0, "occupancy %": 50.0, "registers": 128.0, "local accesses": None,
    }]  # fmt: skip
    tool("ncu", "sleep 20")
    assert nvidia_tools.ncu(1.0)["reason"] == "killed after 1 s"
    tool("ncu", "echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1")
    assert nvidia_tools.ncu(5.0) == {
        "status": "skipped", "reason": "ERROR== ERR_NVGPUCTRPERM", "kernels": []
    }  # fmt: skip


# -- sensors --------------------------------------------------------------------------------
class Nvml:
    """A driver whose counter of energy goes up by a joule a call, and which tells no power."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM = NVML_TEMPERATURE_GPU = 0
    millijoules = 0

    def nvmlDeviceGetClockInfo(self, handle, which):
        return 1980

    def nvmlDeviceGetTemperature(self, handle, which):
        return 40

    def nvmlDeviceGetPowerUsage(self, handle):
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self.millijoules


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    known = sensors.Sensors(torch.device("cpu"))
    known.nvml, known.handle = Nvml(), "handle"
    return known


def test_what_the_driver_does_not_tell_is_none(driver):
    assert driver.read() == {"sm_mhz": 1980, "temperature_c": 40, "power_w": None}
    cpu = sensors.Sensors(torch.device("cpu"))
    assert (cpu.read(), cpu.joules(), cpu.reason) == (None, None, "not a GPU")
    assert cpu.peak_bytes(lambda: 1 / 0) is None


@pytest.mark.parametrize("call_s", [7e-3, 1e-4])
def test_energy_is_what_the_counter_moved_by_over_the_calls_between_two_of_its_steps(
    call_s, driver, monkeypatch
):
    """A hundred watts, in a counter that moves every 83 ms: a third of what is measured."""
    now, calls = [0.335], []  # just behind a step

    def run(took=call_s):
        calls.append(took)
        now[0] += took
        driver.nvml.millijoules = 83 * 100 * int(now[0] / 0.083)

    run(0.0)
    monkeypatch.setattr(sensors.time, "monotonic", lambda: now[0])
    assert driver.energy_of(run, call_s, 0.3) == pytest.approx(100 * call_s, rel=0.06)
    assert 0.3 < sum(calls) < 0.6
    assert driver.energy_of(run, call_s, 0.0) is None


def test_a_counter_that_stands_still_tells_no_energy(driver, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(sensors.time, "monotonic", lambda: 0.1 * next(ticks))
    assert driver.energy_of(lambda: None, 0.01, 0.3) is None


# -- tuning ---------------------------------------------------------------------------------
DEFAULT = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


def test_the_climb_ends_at_the_best_and_takes_nothing_wrong():
    def time_of(config):
        if config["num_stages"] > 3:
            raise measure.Skip("OutOfResources")
        if config["num_warps"] == 8:
            raise ValueError("error 1, at most 0.1 is allowed")
        return 1 + abs(config["BLOCK_N"] - 256) / 256 + abs(config["num_stages"] - 3)

    best, record = tune.climb(DEFAULT, (), time_of, deadline=1e9)
    assert best == {"BLOCK_N": 256, "num_warps": 4, "num_stages": 3}
    of = {tuple(entry["config"].values()): entry["status"] for entry in record}
    assert len(of) == len(record)
    assert of[64, 4, 2] == "default"
    assert of[256, 4, 3] == "chosen"
    assert of[64, 8, 2] == "wrong"
    assert of[256, 4, 4] == "refused"


def test_a_gain_within_the_noise_changes_nothing():
    times = {64: 1.0, 128: 0.99, 32: 1.5}
    best, record = tune.climb(
        {"BLOCK_N": 64}, (), lambda config: times.get(config["BLOCK_N"], 9.0), deadline=1e9
    )
    assert best == {"BLOCK_N": 64}
    assert {entry["status"] for entry in record} == {"default", "slower"}


def test_a_flag_is_turned_and_a_number_doubled_and_halved():
    config = {"PERSISTENT": 0, "BLOCK_N": 64, "num_warps": 16, "num_stages": 1}
    changes = [dict(c.items() - config.items()) for c in tune.neighbours(config, ())]
    assert changes == [
        {"PERSISTENT": 1}, {"BLOCK_N": 32, "num_warps": 8},
        {"BLOCK_N": 32}, {"BLOCK_N": 128}, {"num_warps": 8}, {"num_stages": 2},
    ]  # fmt: skip
    of_a_side = tune.neighbours({"BLOCK_M": 64, "BLOCK_D": 64, "num_warps": 4}, ("BLOCK_D",))
    assert list(of_a_side)[:2] == [
        {"BLOCK_M": 32, "BLOCK_D": 64, "num_warps": 2},
        {"BLOCK_M": 128, "BLOCK_D": 64, "num_warps": 8},
    ]
    assert list(tune.neighbours({"PERSISTENT": 1}, ())) == [{"PERSISTENT": 0}]


def test_fixed_numbers_and_time_bound_the_climb():
    seen = []
    tune.climb(DEFAULT, ("BLOCK_N",), lambda c: seen.append(c) or 1.0, deadline=1e9)
    assert {config["BLOCK_N"] for config in seen} == {64}
    ticks = itertools.count()
    _, record = tune.climb(DEFAULT, (), lambda c: 1.0, deadline=2, clock=lambda: next(ticks))
    assert len(record) == 4  # the default, and three that began in time


@pytest.mark.skipif(INTERPRET or not HAS_TRITON, reason="nothing is compiled")
def test_what_is_compiled_ahead_is_in_the_cache_and_was_not_launched(tmp_path, monkeypatch):
    """The same kernel is not compiled again, another configuration is."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "check"))
    import aot

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (spec,) = (s for s in tune.SPECS if s.name == "linear")
    case, cpu = {"T": 256, "K": 64, "N": 64}, torch.device("cpu")
    calls = [("linear", case), ("linear", case)]
    (wanted,) = tune.asked(lambda: aot.compile_all(spec, case, torch.float16, ["sm_90"]))
    config = {"PERSISTENT": 0, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
    config |= {"num_warps": 4, "num_stages": 2}
    driver = aot.Driver(aot.TARGETS["sm_90"].triton)

    def compiled():
        return len(list(tmp_path.rglob("*.cubin")))

    with mock.patch.object(aot.triton.runtime.driver, "_active", driver), aot.OnKernels():
        start = compiled()
        tune.compile_only(calls, torch.float16, cpu, wanted, config)
        assert compiled() == start + 1
        tune.compile_only(calls, torch.float16, cpu, wanted, config)
        assert compiled() == start + 1
        tune.compile_only(calls, torch.float16, cpu, wanted, config | {"num_stages": 3})
        assert compiled() == start + 2
        tune.compile_only(calls, torch.float16, cpu, wanted, config | {"PERSISTENT": 1})
        assert compiled() == start + 3


@pytest.fixture
def ahead(monkeypatch):
    """An Ahead of one thread, whose `done` has the arguments of what was compiled. It compiles as
    soon as `go` is set."""
    done, go = [], threading.Event()

    def compile_only(*args):
        go.wait(30)
        done.append(args)
        raise RuntimeError("out of registers")  # said by whoever launches it

    monkeypatch.setattr(tune, "compile_only", compile_only)
    ahead = tune.Ahead("cuda", 1, pool=lambda n, mp_context: ThreadPoolExecutor(n))
    ahead.done, ahead.go = done, go
    yield ahead
    go.set()
    ahead.close()


OF_TOY, CASES = ("toy", "N=1"), [(SimpleNamespace(name="toy"), {"T": T}) for T in (1, 2)]


def test_a_candidate_is_compiled_once_for_all_cases_and_waited_for(ahead):
    config = {"BLOCK_N": 64}
    for _ in range(2):
        ahead.ask(OF_TOY, CASES, torch.float16, [config])
    threading.Timer(0.1, ahead.go.set).start()
    ahead.wait(OF_TOY, config, time.monotonic() + 30)
    calls = [("toy", {"T": 1}), ("toy", {"T": 2})]
    assert ahead.done == [(calls, torch.float16, "cuda", OF_TOY, config)]
    ahead.wait(OF_TOY, {"BLOCK_N": 32}, 0.0)  # nobody asked


def test_what_is_not_compiled_by_its_deadline_is_refused_and_dropped(ahead):
    configs = [{"BLOCK_N": n} for n in (64, 128)]
    other = ("toy", "N=2"), CASES, torch.float16, configs[:1]
    ahead.ask(OF_TOY, CASES, torch.float16, configs)
    ahead.ask(*other)
    begun = time.monotonic()
    with pytest.raises(measure.Skip, match="not compiled in time"):
        ahead.wait(OF_TOY, configs[0], begun + 0.1)
    assert 0.1 <= time.monotonic() - begun < 5
    ahead.drop(OF_TOY)
    ahead.go.set()
    ahead.wait(other[0], configs[0], begun + 30)
    assert [(args[3], args[4]) for args in ahead.done] == [  # the second was not begun
        (OF_TOY, configs[0]), (other[0], configs[0])
    ]  # fmt: skip


def test_the_time_of_the_keys_is_shared_out_when_the_first_candidate_is_compiled(ahead):
    ahead.started(0.0)  # nothing is asked for
    ahead.ask(OF_TOY, CASES, torch.float16, [{"BLOCK_N": n} for n in (64, 128)])
    threading.Timer(0.1, ahead.go.set).start()
    ahead.started(time.monotonic() + 30)
    assert ahead.done


@pytest.mark.skipif(not HAS_TRITON, reason="nothing is launched")
def test_what_a_launch_asks_for_is_found_without_a_launch(monkeypatch):
    """Nor is it compiled, which takes a second each."""
    launched = []
    monkeypatch.setattr(launch.triton.JITFunction, "run", lambda *a, **k: launched.append(1))

    def fn():
        launch.configuration("toy", {"BLOCK_N": 64}, fixed=("BLOCK_N",), N=1)
        launch.triton.JITFunction.run("kernel")

    assert tune.asked(fn) == {("toy", "N=1"): ({"BLOCK_N": 64}, ("BLOCK_N",))}
    assert launched == []


TUNED = ("attention", "layer_norm", "gelu", "linear", "qkv")  # ops that ask for a configuration


@pytest.mark.parametrize("spec", [s for s in SPECS if s.name in TUNED], ids=lambda s: s.name)
def test_inputs_to_compile_for_have_the_layout_and_no_values(spec, monkeypatch):
    wanted, devices = spec.inputs(torch.float16, "cpu", **spec.cases[0]), []

    def inputs(dtype, device, **case):
        devices.append(device)
        return spec.inputs(dtype, device, **case)

    monkeypatch.setattr(tune, "SPECS", (dataclasses.replace(spec, inputs=inputs),))
    _, got = tune._call_of(spec.name, spec.cases[0], torch.float16, torch.device("cpu"))
    assert devices == ["meta"]
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if torch.is_tensor(value):
            layout = [(t.shape, t.stride(), t.dtype, t.device) for t in (got[name], value)]
            assert layout[0] == layout[1]
        else:
            assert got[name] == value


def test_a_compiler_that_takes_a_process_down_ends_compiling_ahead_alone():
    pool = mock.Mock(submit=mock.Mock(side_effect=BrokenProcessPool))
    ahead = tune.Ahead("cuda", 2, pool=lambda n, mp_context: pool)
    for config in ({"BLOCK_N": 64}, {"BLOCK_N": 32}):
        ahead.ask(("toy", ""), [(SimpleNamespace(name="toy"), {})], torch.float16, [config])
        ahead.wait(("toy", ""), config, 0.0)
    assert pool.submit.call_count == 1
    ahead.close()


class TunedClock:
    """A second for BLOCK_N 64, half of that for 128: by plain launches all take a minute."""

    def __call__(self, run):
        run()
        return 64 / launch_of[-1] if isinstance(run, functools.partial) else 60.0

    def launched(self, run, seconds):
        return functools.partial(run), None


launch_of = []  # BLOCK_N of each call of toy


def toy(x):
    config = launch.configuration("toy", {"BLOCK_N": 64, "num_warps": 4}, N=x.shape[-1])
    launch_of.append(config["BLOCK_N"])
    return x + (config["BLOCK_N"] > 128)  # larger tiles are wrong


TOY = SimpleNamespace(
    fn=toy, ref=lambda x: x, bench=({"T": 3}, {"T": 5}),
    inputs=lambda dtype, device, T: {"x": torch.ones(T, 768, dtype=dtype, device=device)},
)  # fmt: skip


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """kernels/tuned/ in another place, and a GPU called NVIDIA Toy."""
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(launch, "_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(name="NVIDIA Toy", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    forget()
    yield tmp_path / "nvidia-toy.json"
    forget()


def forget():
    """As in a new process."""
    for cached in (launch._table, launch._tuned, launch._warn):
        cached.cache_clear()


def tune_toy(found, path, spec=TOY, seconds=60.0):
    end = time.monotonic() + seconds
    return tune.tune(found, TunedClock(), torch.device("cpu"), end, path, (spec,), DTYPE)


DTYPE = (torch.float32,)


def test_the_table_is_written_after_each_key(tables, monkeypatch):
    """What was chosen stays chosen if the run is killed in the next key."""
    problem, problems = tune.problem, []

    def second_is_killed(spec, case, dtype, device):
        problems.append(case)
        if case["N"] == 1024:
            raise KeyboardInterrupt
        return problem(spec, case, dtype, device)

    monkeypatch.setattr(tune, "problem", second_is_killed)
    spec = SimpleNamespace(**{
        **vars(TOY), "bench": ({"N": 768}, {"N": 1024}),
        "inputs": lambda dtype, device, N: {"x": torch.ones(3, N, dtype=dtype, device=device)},
    })  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        tune_toy(results.Results(None, KNOWN, "tune"), tables, spec)
    assert problems == [{"N": 768}, {"N": 1024}]
    assert launch.read_table(tables, "NVIDIA Toy").keys() == {("toy", "N=768")}


def test_the_compilers_are_asked_for_this_key_and_the_next_two(tables, monkeypatch):
    """What is asked for early stands in the way of what the climb asks for next."""
    log = []

    class Logged(tune.Ahead):
        def ask(self, wanted, where, dtype, configs):
            log.append((wanted[1], next(iter(configs))["BLOCK_N"]))

        def drop(self, wanted):
            log.append(f"dropped {wanted[1]}")

    def by_length(x):
        config = launch.configuration("toy", {"BLOCK_N": 8}, N=len(x))
        launch_of.append(config["BLOCK_N"])
        return x

    monkeypatch.setattr(tune, "Ahead", Logged)
    cases = tuple({"T": T} for T in (1, 2, 3, 4))
    spec = SimpleNamespace(**{**vars(TOY), "fn": by_length, "bench": cases})
    tune_toy(results.Results(None, KNOWN, "tune"), tables, spec)
    first = log[: log.index("dropped N=1")]
    assert first[:3] == [("N=1", 8), ("N=2", 8), ("N=3", 8)]  # the default first
    assert ("N=4", 8) not in first
    assert [entry for entry in log if entry[0] == "d"] == [f"dropped N={n}" for n in (1, 2, 3, 4)]


def test_nothing_is_tuned_after_the_end(tables):
    found = results.Results(None, KNOWN, "tune")
    assert tune_toy(found, tables, seconds=-1.0) == {}
    assert "tune" not in found.content


def test_a_search_that_was_cut_short_is_done_again_after_the_others(tables, monkeypatch):
    """The first waits for the compilers to start, which leaves it little of its part."""
    climbed = []

    def climb(default, fixed, time_of, deadline, ahead):
        if not climbed:
            time.sleep(max(deadline - time.monotonic(), 0) + 0.01)
        climbed.append(default)
        return default, [tune._tried(default, float(len(climbed)), "default")]

    monkeypatch.setattr(tune, "climb", climb)
    cases = ({"T": 1}, {"T": 2})
    fn = lambda x: launch.configuration("toy", {"BLOCK_N": 8}, N=len(x)) and x  # noqa: E731
    spec = SimpleNamespace(**{**vars(TOY), "fn": fn, "bench": cases})
    found = results.Results(None, KNOWN, "tune")
    tune_toy(found, tables, spec, seconds=2.0)
    assert [(e["key"], e["seconds"]) for e in found.content["tune"]] == [("N=2", 2.0), ("N=1", 3.0)]


@pytest.mark.parametrize("seconds, dtypes", [(60, 1), (gpu.ALONE, 2)])
def test_bf16_alone_is_tuned_where_time_is_short(seconds, dtypes, monkeypatch):
    asked, found = [], results.Results(None, KNOWN, "tune")

    def tuned(results, clock, device, end, path, dtypes):
        asked.append((dtypes, path.name))
        return {}

    monkeypatch.setattr(gpu.tune, "tune", tuned)
    monkeypatch.setattr(gpu, "clock_of", lambda device: None)
    assert gpu._tune(found, time.monotonic() + seconds)
    assert asked == [((torch.bfloat16, torch.float32)[:dtypes], "nvidia-toy.json")]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_every_op_can_be_tuned(spec):
    """Gradients are several results; one of them that is wrong is found."""
    device = torch.device("cpu")
    fn, inputs, truths, limits = tune.problem(spec, spec.cases[0], torch.float32, device)

    def wrong_in_the_last(**inputs):
        *first, last = tune.tensors_of(fn(**inputs))
        return (*first, last + 1)

    class Clock(TunedClock):
        def __call__(self, run):
            run()
            return 1.0

    def time_of(fn):
        ahead = tune.Ahead(device, 0)
        problems = [(fn, inputs, truths, limits)]
        return tune.time_on(problems, (spec.name, "N=1"), Clock(), 0.01, ahead, 1e9)({})

    assert time_of(fn) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="is allowed"):
        time_of(wrong_in_the_last)


def test_what_was_tuned_is_what_launchers_read(tables, tmp_path):
    found = results.Results(tmp_path / "tune.json", KNOWN, "tune")
    chosen = tune_toy(found, tables)
    assert chosen == {"toy": {"N=768": {"BLOCK_N": 128, "num_warps": 8}}}
    toy(torch.ones(2, 768))
    assert launch_of[-1] == 128
    toy(torch.ones(2, 1024))  # no such key
    assert launch_of[-1] == 64
    content = result_schema.read(tmp_path / "tune.json")
    assert {e["status"] for e in content["tune"]} >= {"default", "chosen", "wrong"}
    assert tune.chosen_in(content) == (KNOWN, chosen)


def by_rows(x):
    config = launch.configuration("by_rows", {"BLOCK_N": 64}, rows=len(x), N=x.shape[-1])
    launch_of.append(config["BLOCK_N"])
    return x + (config["BLOCK_N"] > 64) * 1e-7  # an ulp more, in half the time


@pytest.mark.parametrize("other_bits", [False, True])
def test_a_choice_by_rows_gives_the_bits_of_the_default(other_bits, tables):
    def fn(x):
        return by_rows(x) if other_bits else by_rows(x).round()

    toy = SimpleNamespace(**{**vars(TOY), "fn": fn, "bench": ({"T": 3}, {"T": 300})})
    found = results.Results(None, KNOWN, "tune")
    chosen = tune_toy(found, tables, toy)
    wrong = {e["reason"] for e in found.content["tune"] if e["status"] == "wrong"}
    if other_bits:
        assert chosen == {} and wrong == {"other bits than the default's"}
        assert not tables.exists()
        return
    assert chosen["by_rows"].keys() == {"N=768 rows<=128", "N=768 rows<=512"}
    tables.unlink()
    tune.write_table(tables, KNOWN, {"by_rows": {"N=768 rows<=512": {"BLOCK_N": 256}}})
    for rows, block in ((1, 64), (256, 64), (257, 256), (512, 256), (513, 64)):
        by_rows(torch.ones(rows, 768))
        assert launch_of[-1] == block


def test_a_later_table_keeps_the_other_keys(tables):
    tune.write_table(tables, KNOWN, {"toy": {"N=1": {"BLOCK_N": 1}}})
    tune.write_table(tables, KNOWN, {"toy": {"N=2": {"BLOCK_N": 2}}})
    assert launch.read_table(tables, "NVIDIA Toy").keys() == {("toy", "N=1"), ("toy", "N=2")}


def test_what_is_faster_alone_but_not_in_the_same_rounds_is_not_chosen(tables, monkeypatch):
    monkeypatch.setattr(tune, "gain", lambda *args: 1.0)
    found = results.Results(None, KNOWN, "tune")
    assert tune_toy(found, tables) == {}
    assert "chosen" not in {entry["status"] for entry in found.content["tune"]}


def of_toy(**config):
    tables = {"toy": {"N=768": config}}
    return json.dumps({"schema": 1, "gpu": "NVIDIA Toy", "configurations": tables})


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "Expecting property name"),
        ('{"schema": 2}', "schema must be 1, got 2"),
        ('{"schema": 1, "configurations": {}}', "'gpu' is missing"),
        ('{"schema": 1, "gpu": "NVIDIA A100", "configurations": {}}', "gpu must be 'NVIDIA Toy'"),
        ('{"schema": 1, "gpu": "NVIDIA Toy", "configurations": 3}', "no attribute 'items'"),
        (of_toy(BLOCK_N=96), "toy, N=768, BLOCK_N: must be a power of two, got 96"),
        (of_toy(BLOCK_N=64.0), "toy, N=768, BLOCK_N: must be a power of two, got 64.0"),
        (of_toy(BLOCK_N="64"), "toy, N=768, BLOCK_N: must be a power of two, got '64'"),
        (of_toy(num_stages=0), "toy, N=768, num_stages: must be 1 or more, got 0"),
        (of_toy(PERSISTENT=2), "toy, N=768, PERSISTENT: must be 0 or 1, got 2"),
        (of_toy(PERSISTENT=True), "toy, N=768, PERSISTENT: must be 0 or 1, got True"),
        (of_toy(BLOCK_M=8), "toy, N=768: must have BLOCK_N, num_warps, got BLOCK_M"),
    ],
)
def test_a_corrupt_or_foreign_table_is_named_once_and_defaults_are_used(text, said, tables):
    tables.write_text(text)
    with pytest.warns(UserWarning) as warned:
        toy(torch.ones(2, 768))
        toy(torch.ones(2, 768))
    assert launch_of[-1] == 64
    assert len(warned) == 1
    assert said in str(warned[0].message)
    assert "`python bench tune` writes the table anew" in str(warned[0].message)


def test_a_gpu_without_a_table_takes_that_of_the_same_chip(tables):
    other = {"name": "NVIDIA Other"}
    more = {"multiprocessors": 148}
    for n, device in enumerate((other | more, other | {"capability": "8.0"}, other)):
        path = tables.with_name(f"other-{n}.json")
        tune.write_table(path, KNOWN | device, {"op": {"D=64": {"BLOCK_N": 8 << n}}})
    tables.with_name("a-broken-one.json").write_text('{"capability": ')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch.configuration("op", {"BLOCK_N": 64}, D=64) == {"BLOCK_N": 32}
        tune.write_table(tables, KNOWN, {"op": {"D=64": {"BLOCK_N": 16}}})
        forget()
        assert launch.configuration("op", {"BLOCK_N": 64}, D=64) == {"BLOCK_N": 16}
    assert results.environment(KNOWN | other | more)["tuned"]


def test_fixed_numbers_are_those_of_the_default_whatever_a_table_says(tables):
    tune.write_table(tables, KNOWN, {"op": {"D=64": {"BLOCK_D": 32, "num_warps": 8}}})
    default = {"BLOCK_D": 64, "num_warps": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = launch.configuration("op", default, fixed=("BLOCK_D",), D=64)
    assert got == {"BLOCK_D": 64, "num_warps": 8}


def test_a_key_names_nothing_of_the_batch():
    with pytest.raises(ValueError, match="must name nothing of the batch, got T"):
        launch.configuration("op", DEFAULT, T=5, D=64)


def test_without_a_gpu_there_are_defaults(tables, monkeypatch):
    tune.write_table(tables, KNOWN, {"op": {"D=64": {"BLOCK_N": 32}}})
    monkeypatch.setattr(launch, "_gpus", lambda: False)
    assert launch.configuration("op", {"BLOCK_N": 64}, D=64) == {"BLOCK_N": 64}


def test_the_profiler_listens_to_warm_calls_alone_and_is_told_whose_kernels_they_are(
    monkeypatch, capsys
):
    import exercise

    events, kernel = [], SimpleNamespace(run=lambda *args: events.append("kernel"))

    def of(name, launches):
        def inputs(dtype, device, **case):
            events.append("inputs")
            return {}

        def fn():
            for _ in range(launches):
                kernel.run()

        return SimpleNamespace(name=name, fn=fn, inputs=inputs, bench=({},))

    monkeypatch.setattr(exercise, "SPECS", (of("pack", 2), of("gelu", 1)))
    monkeypatch.setattr(exercise.launch, "triton", SimpleNamespace(JITFunction=kernel))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, functools.partial(events.append, name))
    exercise.profile()
    assert events == ["inputs"] * 2 + ["kernel"] * 3 + ["start"] + ["kernel"] * 3 + ["stop"]
    assert json.loads(capsys.readouterr().out) == {"ops": ["pack", "pack", "gelu"]}


def test_bits_are_hashed_the_same_each_time(capsys):
    import exercise

    exercise.attention()
    first, again = capsys.readouterr().out, exercise.attention() or capsys.readouterr().out
    assert first == again
    for case in json.loads(first).values():
        assert case["error"] <= 2 * case["baseline_error"]
        assert len(case["bits"]) == len(hashlib.sha256().hexdigest()[:16])
