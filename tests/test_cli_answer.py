"""bert-fast answer: as a process where that is the point, else in this one."""

import json
import subprocess

import pytest
import torch
import transformers
from test_cli import PROCESS, assert_one_line, run, run_at_a_terminal

import bert_fast
from bert_fast.checkpoints import SHIPPED

QUESTION = "Who wrote it?"
CONTEXT = "\r\nIt was written by Ada Lovelace,\r\nin 1843, [bold]a century[/] before."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The shipped one with a random head."""
    folder = tmp_path_factory.mktemp("answerer")
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering.from_pretrained(SHIPPED)
    torch.nn.init.normal_(model.qa_outputs.weight, std=0.2)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(checkpoint):
    """What bert_fast.answer finds, from the best on."""
    model = bert_fast.BertForQuestionAnswering.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return bert_fast.answer(QUESTION, CONTEXT, model, tokenizer, top_k=3)


def found(result):
    assert result.exit_code == 0, result.stderr
    return [tuple(a.values()) for a in json.loads(result.stdout)["answers"]]


def approximately(answers):
    return [(a.text, pytest.approx(a.score, abs=1e-5), a.start, a.end) for a in answers]


def test_stdin_of_a_process_becomes_one_json_document(checkpoint, answers):
    args = ["answer", QUESTION, "--model", str(checkpoint), "--json", "--device", "cpu"]
    done = subprocess.run(PROCESS + args, input=CONTEXT.encode(), capture_output=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    [best] = document.pop("answers")
    assert document == {
        "model": str(checkpoint), "dtype": "float32", "device": "cpu", "question": QUESTION
    }  # fmt: skip
    assert best == dict(answers[0]._asdict(), score=pytest.approx(answers[0].score, abs=1e-5))
    assert done.stderr.decode().startswith(f"model {checkpoint}, 4 layers of 128, float32 on cpu")


def test_a_process_without_a_model_ends_with_code_2_and_one_line():
    args = [*PROCESS, "answer", "Who?"]
    done = subprocess.run(args, input="Ada.", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --model is required: give a BERT with a question-answering head; the checkpoint"
        " that bert_fast ships has none\n"
    )


def test_places_hold_wherever_the_text_comes_from(checkpoint, answers, tmp_path, device):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\xef\xbb\xbf" + CONTEXT.encode())
    args = ("answer", QUESTION, "--model", checkpoint, "--top-k", 3, "--json", "--device", device)
    expected = approximately(answers)
    assert found(run(*args, "--context", CONTEXT)) == expected
    assert found(run(*args, "--file", path)) == expected
    assert found(run(*args, input=CONTEXT.encode())) == expected


def test_table_has_a_row_for_each_answer(checkpoint, answers):
    args = ("answer", QUESTION, "--context", CONTEXT, "--model", checkpoint, "--top-k", 3)
    _, *rows = run(*args, "--device", "cpu").stdout.splitlines()
    for row, answer in zip(rows, answers, strict=True):
        score, start, end, *words = row.split()
        assert (int(start), int(end), words) == (answer.start, answer.end, answer.text.split())
        assert float(score) == pytest.approx(answer.score, abs=1e-4)


def test_there_may_be_no_answer(checkpoint):
    args = ("answer", QUESTION, "--context", CONTEXT, "--model", checkpoint, "--null-threshold")
    assert "(no answer)" in run(*args, -100).stdout
    assert "(no answer)" not in run(*args, 100).stdout


def test_dtype_is_that_of_the_arithmetic(checkpoint):
    args = ("answer", QUESTION, "--context", CONTEXT, "--model", checkpoint, "--dtype", "bfloat16")
    assert "bfloat16 on cpu" in run(*args, "--device", "cpu").stderr


# -- bad input ------------------------------------------------------------------------------
USAGE = {
    f"--context text --model {SHIPPED}": (
        f"{SHIPPED}: has no head of BertForQuestionAnswering (qa_outputs.bias, qa_outputs.weight",
    ),
    "--context text --file x --model x": ("--context and --file: give one of them, got both",),
    "--file none.txt --model x": ("--file none.txt: No such file or directory; give a file",),
    "--file . --model x": ("--file .: Is a directory; give a file",),
    "--context text --model none/none": ("none/none: no such directory, nor a model",),
    "--context text --model x --top-k 0": ("'--top-k'",),
    "--context text --model x --dtype int8": ("'int8' is not one of",),
    "--context text --model x --device gpu": ("--device must be cpu, cuda or cuda:N, got gpu",),
    "--context text": ("--model is required: give a BERT with a question-answering head",),
}


@pytest.mark.parametrize("usage", USAGE)
def test_bad_usage_is_named_in_one_line(usage):
    assert_one_line(run("answer", "Who?", *usage.split()), *USAGE[usage])


def test_texts_that_cannot_be_used_are_named(checkpoint, monkeypatch, capsys):
    model = ("--model", checkpoint)
    assert_one_line(run("answer", " ", "--context", "text", *model), "QUESTION is blank")
    assert_one_line(run("answer", "Who?", "--context", " ", *model), "--context is blank")
    assert_one_line(run("answer", "Who?", *model, input=""), "standard input is blank")
    assert_one_line(run("answer", "Who?", *model, input=b"\xff"), "standard input must be UTF-8")
    assert_one_line(run("answer", "\udcff", *model, input="a"), "QUESTION must be UTF-8")
    long = run("answer", "who " * 400, "--context", "text", *model)
    assert long.exit_code == 2
    assert "leave no room for context" in long.stderr.splitlines()[-1]
    alone = run_at_a_terminal(monkeypatch, capsys, "answer", "Who?", *model)
    assert_one_line(alone, "no context: give --context TEXT, --file FILE")


def test_only_debug_shows_a_traceback():
    args = ("answer", "Who?", "--context", "text")
    assert "Traceback" not in run(*args).stderr
    assert "Traceback (most recent call last)" in run(*args, "--debug").stderr
