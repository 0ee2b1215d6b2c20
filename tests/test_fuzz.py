"""The fuzzer: its cases are the same each time, fail where they should, and shrink."""

import argparse
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from bert_fast.kernels import SPECS, gelu
from bert_fast.kernels.gelu import gelu_ref
from bert_fast.kernels.launch import INTERPRET

if not INTERPRET:
    pytest.skip("the fuzzer is for kernels in the interpreter", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[1] / "check"))

import fuzz
from judge import is_packed
from mutants import mutants_of

CASES = 500


def test_random_cases():
    """CI's share. A failure here is repeated by the line that is printed with it."""
    summary = fuzz.campaign(CASES, 0, SPECS, jobs=2)
    lines = [f"{wrong}: {fuzz.command(fuzz.shrink(drawn))}" for drawn, wrong in summary["failures"]]
    assert not lines, "\n".join(lines)
    assert sum(row["cases"] for row in summary["ops"]) == CASES
    assert {row["op"] for row in summary["ops"]} == {s.name for s in SPECS}


def test_a_case_is_the_same_each_time_and_survives_json():
    for spec in SPECS:
        for number in range(20):
            drawn = fuzz.case_of(number, 7, [spec])
            assert drawn == fuzz.case_of(number, 7, [spec])
            again = json.loads(shlex.split(fuzz.command(drawn))[2].removeprefix("CASE="))
            a, b = fuzz.inputs_of(spec, drawn), fuzz.inputs_of(spec, again)
            assert a.keys() == b.keys()
            for name, t in a.items():
                assert not isinstance(t, torch.Tensor) or torch.equal(
                    t.nan_to_num(), b[name].nan_to_num()
                )


@pytest.mark.parametrize("name", fuzz.MAGNITUDES)
def test_magnitudes_are_what_they_say(name):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    t = fuzz.MAGNITUDES[name](torch.randn(64, 64), generator).abs()
    typical, largest = t.median(), t.max()
    assert {
        "plain": 0.1 < typical < 2,
        "large": 50_000 < largest <= 65_504,
        "small": largest < 1e-5,
        "subnormal": 0 < largest < torch.finfo(torch.float32).smallest_normal,
        "outliers": largest > 60 * typical,
        "spread": largest > 1e5 * typical or typical < 1e-5 * largest or largest > 1000,
    }[name]


def test_a_bug_in_a_kernel_is_found_and_shrunk():
    (spec,) = (s for s in SPECS if s.name == "gelu")
    bias_forgotten = next(m for m in mutants_of(spec) if m.before.startswith("z += "))
    with bias_forgotten.in_place():
        cases = [fuzz.case_of(n, 0, [spec]) for n in range(30)]
        failing = next(drawn for drawn in cases if fuzz.run(drawn)[0])
        small = fuzz.shrink(failing)
        assert fuzz.run(small)[0]
    assert fuzz.run(small)[0] is None
    assert small == {
        "op": "gelu", "case": {"shape": [1]}, "dtype": "float32", "layout": "contiguous",
        "magnitude": "plain", "poison": "none", "seed": 0,
    }  # fmt: skip


FOUND = (  # by long runs: faults of the judge, and of the last the op's
    {"op": "attention", "case": {"lengths": [16, 5], "D": 200},
     "dtype": "float32", "layout": "contiguous", "magnitude": "outliers",
     "poison": "none", "seed": 1613293050},
    {"op": "attention", "case": {"lengths": [65, 33, 2], "D": 200, "scale": 3.0},
     "dtype": "float32", "layout": "contiguous", "magnitude": "outliers",
     "poison": "none", "seed": 1686744301},
    {"op": "attention", "case": {"lengths": [1, 31], "heads": 3, "D": 256},
     "dtype": "float32", "layout": "contiguous", "magnitude": "outliers",
     "poison": "none", "seed": 1527411931},
    {"op": "gelu", "case": {"shape": [2], "scale": 100.0},
     "dtype": "bfloat16", "layout": "contiguous", "magnitude": "plain",
     "poison": "none", "seed": 532881998},
    {"op": "gelu", "case": {"shape": [2], "bias": False, "scale": 100.0},
     "dtype": "bfloat16", "layout": "contiguous", "magnitude": "plain",
     "poison": "nan", "seed": 955164990},
    {"op": "attention_backward", "case": {"lengths": [1], "lengths_k": [2], "scale": 0.0},
     "dtype": "float16", "layout": "contiguous", "magnitude": "spread",
     "poison": "none", "seed": 0},
    {"op": "attention_backward",
     "case": {"lengths": [0, 1, 1, 1], "D": 1, "lengths_k": [16, 64, 1, 2]},
     "dtype": "float16", "layout": "contiguous", "magnitude": "spread",
     "poison": "none", "seed": 1651010136},
    {"op": "attention", "case": {"lengths": [1], "dropout_p": 1.0},
     "dtype": "float32", "layout": "contiguous", "magnitude": "plain",
     "poison": "nan", "seed": 0},
)  # fmt: skip


def test_layer_norm_backward_is_not_asked_for_two_columns():
    """dx is zero there but for eps, and the rounding errors of the kernel's x_hat are not those of
    autograd's: with any other number of columns the judge sees the derivative."""
    (spec,) = (s for s in SPECS if s.name == "layer_norm_backward")
    columns = {fuzz.case_of(n, 0, [spec])["case"]["shape"][-1] for n in range(300)}
    assert {1, 3, 768} < columns
    assert 2 not in columns


@pytest.mark.parametrize("drawn", FOUND, ids=lambda drawn: drawn["op"])
def test_what_long_runs_found_passes(drawn):
    assert fuzz.run(drawn)[0] is None


def test_rows_past_num_tokens_that_are_written_are_found():
    (spec,) = (s for s in SPECS if s.name == "gelu")
    cases = (fuzz.case_of(n, 0, [spec]) for n in range(300))
    drawn = next(
        c for c in cases if c["poison"] == "rows" and is_packed(spec, fuzz.inputs_of(spec, c))
    )
    (goes_on,) = (
        m for m in mutants_of(spec)
        if m.change.endswith("if row >= tl.load(num_tokens_ptr):  ->  if False:")
    )  # fmt: skip
    assert fuzz.run(drawn)[0] is None
    with goes_on.in_place():
        assert fuzz.run(drawn)[0] == "rows past num_tokens are written"


def test_a_failure_is_reported_with_its_line(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "run", lambda drawn: ("all wrong", torch.inf, torch.inf))
    summary = {
        "cases": 1, "seed": 0, "ops": [],
        "failures": [(fuzz.case_of(0, 0, SPECS), "all wrong")],
    }  # fmt: skip
    monkeypatch.setattr(fuzz, "campaign", lambda *args: summary)
    options = argparse.Namespace(case=None, cases=1, seed=0, jobs=1, json=None, arch=None)
    assert fuzz.main(options, SPECS) == 1
    assert "make fuzz CASE='{" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gelu_of_every_number_of_16_bits(dtype):
    """All 65,536: within an ulp of the exact value, and NaN and infinities where they belong."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    exact = gelu_ref(x.double())
    ours = gelu(x)
    number = exact.isfinite()
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours[exact.isposinf()], x[exact.isposinf()])
    apart = (ours.double() - exact)[number].abs()
    # The definition itself: 1 + erf cancels where x is very negative, in fp32 by 6e-8 times |x|.
    allowed = torch.finfo(dtype).eps * exact[number].abs() + 2e-7 * x.double()[number].abs()
    allowed += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (apart <= allowed).all()
