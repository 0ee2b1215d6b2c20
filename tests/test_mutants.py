"""Mutants: made of every kernel, found by the checks, and never left in place."""

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from bert_fast.kernels import SPECS, layer_norm
from bert_fast.kernels.launch import INTERPRET

if not INTERPRET:
    pytest.skip("mutants run in the interpreter", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[1] / "check"))

import mutants
from examine import of_rows_past_num_tokens
from mutants import OPERATORS, Verdict, campaign, mutants_of, problems, sample, verdict

EVERY = [m for s in SPECS for m in mutants_of(s)]
SAMPLE = 12


def one(op, text):
    """The mutant of an op whose change has the text in it."""
    (mutant,) = (m for m in EVERY if m.op == op and text in m.change)
    return mutant


def test_a_sample_of_the_mutants_is_found():
    """CI's share; `make mutants` is all of them."""
    chosen = sample([m for m in EVERY if not m.proof], SAMPLE, seed=0)
    verdicts = campaign(chosen, jobs=2)
    assert len(verdicts) == SAMPLE
    assert not list(problems(chosen, verdicts, EVERY))


def test_every_operator_makes_mutants_and_every_op_has_some():
    assert len(EVERY) > 60
    assert {m.operator for m in EVERY} == OPERATORS.keys()
    assert {m.op for m in EVERY} == {s.name for s in SPECS}
    assert len({(m.op, m.change, m.line) for m in EVERY}) > 0.95 * len(EVERY)


def test_a_backward_in_the_same_file_is_not_looked_at_for_the_forward():
    (node,) = ast.parse(
        "class _F:\n"
        "    def forward(ctx, x): return _op(x)\n"
        "    def backward(ctx, dy): return _op_backward(dy)"
    ).body
    names = {n.id for n in mutants._forward(node) if isinstance(n, ast.Name)}
    assert names == {"_op", "x"}


def test_a_sample_is_even_and_the_same_each_time():
    possible = Counter((m.op, m.operator) for m in EVERY)
    chosen = sample(EVERY, len(possible), seed=1)
    assert chosen == sample(EVERY, len(possible), seed=1)
    assert chosen != sample(EVERY, len(possible), seed=2)
    counts = Counter((m.op, m.operator) for m in chosen)
    assert all(counts[kind] >= min(1, possible[kind]) for kind in possible)


def test_a_mutant_is_in_place_inside_and_gone_after():
    torch.manual_seed(0)
    args = torch.randn(3, 64), torch.randn(64), torch.randn(64)
    with torch.no_grad():
        before = layer_norm(*args)
        bias_dropped = "operand dropped: x_hat * weight + bias  ->  x_hat * weight"
        with one("layer_norm", bias_dropped).in_place():
            assert torch.allclose(layer_norm(*args), before - args[2], atol=1e-6)
        assert torch.equal(layer_norm(*args), before)


@pytest.mark.parametrize("op", ["gelu", "layer_norm"])
def test_rows_past_num_tokens_that_a_kernel_reads_and_writes_are_found(op):
    (spec,) = (s for s in SPECS if s.name == op)
    with one(op, "condition: if row >= tl.load(num_tokens_ptr):  ->  if False:").in_place():
        found = "\n".join(of_rows_past_num_tokens(spec, spec.cases[0]))
    assert "unwritten, x_ptr: loads element [4, 0] of [7, " in found
    assert f"{3 * spec.cases[0]['shape'][1]} elements of them are written in the result" in found


def test_a_mutant_that_does_not_end_is_stopped():
    def endless(spec):
        while True:
            pass

    said = verdict(EVERY[0], examine=endless, seconds=0.2)
    assert (said.killed, said.by) == (True, "does not end")


def test_what_is_amiss_is_said(monkeypatch):
    proved = next(m for m in EVERY if m.proof)
    other = next(m for m in EVERY if not m.proof)
    (said,) = problems([other], [Verdict(False)], EVERY)
    assert said.startswith("survives without proof: kernels/")
    (said,) = problems([proved], [Verdict(True, "raises", "an error")], EVERY)
    assert said.startswith("proved equivalent, yet killed: ")
    assert not list(problems([other, proved], [Verdict(True), Verdict(False)], EVERY))
    monkeypatch.setitem(mutants.PROOFS, "no such change", "because")
    assert list(problems([], [], EVERY)) == ["proof of what is no mutant: no such change"]


def test_an_op_that_fails_as_it_is_stops_the_campaign(monkeypatch):
    monkeypatch.setattr(mutants, "_baseline", _fails)
    with pytest.raises(RuntimeError, match="check mutants: gelu fails as it is: all wrong"):
        campaign([m for m in EVERY if m.op == "gelu"][:1], jobs=1)


def _fails(name):
    return "all wrong", 0.0


def test_the_command_exits_with_1_where_a_mutant_survives(monkeypatch, capsys):
    monkeypatch.setattr(mutants, "campaign", lambda chosen, jobs: [Verdict(False)] * len(chosen))
    options = type("Options", (), {"sample": 5, "seed": 0, "jobs": 1, "json": None})
    assert mutants.main(options, SPECS) == 1
    assert "survives without proof" in capsys.readouterr().out
