"""The bert-fast command: as a process where that is the point, else in this one.

Bad checkpoints are copies of the shipped one, each with one thing broken.
"""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import transformers
import typer
from models import stock_model
from typer.testing import CliRunner

import bert_fast
from bert_fast import cli, doctor, kernels, swap
from bert_fast.checkpoints import SHIPPED
from bert_fast.encode import batches, encode, load, tokenize
from bert_fast.kernels.launch import INTERPRET

PROCESS = [sys.executable, "-m", "bert_fast"]
# Of different lengths, and not in their order.
TEXTS = [
    "Return the number of items.",
    "One.",
    "A context manager that closes the file, whatever happens inside of its block.",
    "Return True if the string ends with the suffix.",
]


def run(*args, **kwargs):
    return CliRunner().invoke(cli.main, [str(arg) for arg in args], **kwargs)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_at_a_terminal(monkeypatch, capsys, *args):
    """As `run`, with nothing piped in."""
    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(SystemExit) as ended:
        typer.main.get_command(cli.main).main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return types.SimpleNamespace(exit_code=ended.value.code, stdout=out, stderr=err)


def assert_one_line(result, *parts, code=2):
    """The result is an error: nothing on stdout, and on stderr a line that has the parts."""
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert str(part) in result.stderr


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the shipped checkpoint, to be broken."""
    return shutil.copytree(SHIPPED, tmp_path / "checkpoint")


def configure(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def stock():
    """What stock transformers makes of each of TEXTS alone, by pooling."""
    model = doctor.stock(SHIPPED)
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    with torch.inference_mode():
        hidden = [
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS
        ]
    return {
        "cls": torch.stack([h[0] for h in hidden]),
        "mean": torch.stack([h.mean(0) for h in hidden]),
    }


# -- as a process ---------------------------------------------------------------------------
def test_lines_of_stdin_become_one_json_document_and_all_chatter_goes_to_stderr(stock):
    args = ["embed", "--json", "--device", "cpu"]
    lines = "\n".join([TEXTS[0], "", *TEXTS[1:], "  "])
    done = subprocess.run(PROCESS + args, input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    embeddings = torch.tensor(document.pop("embeddings"))
    assert document == {
        "model": str(SHIPPED),
        "pooling": "cls",
        "dtype": "float32",
        "device": "cpu",
        "texts": TEXTS,
    }
    torch.testing.assert_close(embeddings, stock["cls"], rtol=0, atol=1e-5)
    skipped, model = done.stderr.splitlines()
    assert skipped == "2 blank texts skipped"
    assert model.startswith(f"model {SHIPPED} (shipped with bert_fast), 4 layers of ")


def test_a_process_ends_with_code_2_and_one_line(tmp_path):
    args = ["embed", "text", "--model", str(tmp_path / "none")]
    done = subprocess.run(PROCESS + args, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}/none: no such directory")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error_worth_a_word():
    process = subprocess.Popen(
        [*PROCESS, "embed", "--json", "text"],  # so short that Python would write it at its end
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 1
    assert said.startswith("model ")
    assert said.count("\n") == 1


# -- embed ----------------------------------------------------------------------------------
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_output_has_stock_embeddings_in_the_order_of_the_texts(stock, pooling, tmp_path, device):
    path = tmp_path / "name.without_npy"
    options = ("--pooling", pooling, "--output", path, "--device", device, "--batch-tokens", 30)
    result = run("embed", *TEXTS, *options)
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"pooling {pooling}" in result.stderr
    assert f"wrote float32{list(stock[pooling].shape)} to {path}" in result.stderr
    written = np.load(path)
    assert written.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(written), stock[pooling], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_that_of_the_arithmetic_and_of_nothing_that_comes_out(stock, dtype, tmp_path):
    path = tmp_path / "e.npy"
    result = run("embed", *TEXTS, "--dtype", dtype, "--output", path, "--device", "cpu")
    assert f"{dtype} on cpu" in result.stderr
    written = torch.from_numpy(np.load(path))
    assert written.dtype == torch.float32
    assert not torch.allclose(written, stock["cls"], rtol=0, atol=1e-5)
    similarity = torch.cosine_similarity(written, stock["cls"])
    assert (similarity > 0.999).all()


def test_table_has_the_numbers_and_no_more_rows_than_fit(stock, device):
    result = run("embed", *TEXTS, "--device", device)
    assert result.exit_code == 0
    _, *rows = result.stdout.splitlines()
    for row, text, numbers in zip(rows, TEXTS, stock["cls"], strict=True):
        assert row.split()[0] == text.split()[0]
        norm, *first = (float(x) for x in row.split()[-5:])
        assert norm == pytest.approx(numbers.norm().item(), abs=1e-3)
        assert first == pytest.approx(numbers[:4].tolist(), abs=1e-3)

    many = run("embed", *(f"text {i}" for i in range(cli.ROWS + 3)))
    assert len(many.stdout.splitlines()) == 1 + cli.ROWS
    assert "and 3 more; " in many.stderr


def test_a_terminal_obeys_nothing_in_a_text():
    result = run("embed", "one\x1b[31m two\x07\u202e")
    assert "one [31m two  " in result.stdout
    assert not {"\x1b", "\x07", "\u202e"} & set(result.stdout)


def test_markup_in_a_text_is_text():
    assert "[red]one[/]" in run("embed", "[red]one[/]").stdout


def test_lines_may_end_as_on_windows():
    texts = [json.loads(run("embed", "--json", input=f"One.{end}Two.{end}").stdout)["texts"]
             for end in ("\n", "\r\n")]  # fmt: skip
    assert texts == [["One.", "Two."]] * 2


def test_vectors_may_go_into_a_pipe():
    command = [*PROCESS, "embed", "One.", "--output", "/dev/stdout", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert np.load(io.BytesIO(done.stdout)).shape == (1, 128)


def test_a_dash_stands_for_stdin_among_the_arguments():
    result = run("embed", "first", "-", "last", "--json", input="\ufeffa\r\nb\u2028c")
    assert json.loads(result.stdout)["texts"] == ["first", "a", "b\u2028c", "last"]


def test_texts_that_are_cut_are_counted(checkpoint):
    config = transformers.BertConfig.from_pretrained(SHIPPED, max_position_embeddings=16)
    transformers.BertModel(config).save_pretrained(checkpoint)
    long = "word " * 20
    result = run("embed", long, "short", long + "other", "--json", "--model", checkpoint)
    assert "2 of 3 texts cut to the model's 16 tokens" in result.stderr
    first, _, third = json.loads(result.stdout)["embeddings"]
    assert first == pytest.approx(third, abs=1e-5)

    for words, is_cut in ((14, False), (15, True)):  # and [CLS] and [SEP]
        result = run("embed", "word " * words, "--model", checkpoint)
        assert ("1 of 1 texts cut" in result.stderr) == is_cut

    configure(checkpoint, "tokenizer_config.json", model_max_length=12)
    assert "cut to the model's 12 tokens" in run("embed", long, "--model", checkpoint).stderr


def test_a_checkpoint_may_have_any_head_or_none(tmp_path):
    plain = json.loads(run("embed", *TEXTS, "--json").stdout)["embeddings"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    for cls in (transformers.BertModel, transformers.BertForTokenClassification):
        cls.from_pretrained(SHIPPED).save_pretrained(tmp_path / cls.__name__)
        tokenizer.save_pretrained(tmp_path / cls.__name__)
        result = run("embed", *TEXTS, "--json", "--model", tmp_path / cls.__name__)
        assert json.loads(result.stdout)["embeddings"] == plain
        assert "shipped" not in result.stderr


@pytest.mark.parametrize("name", [cls.__name__ for cls in swap.ENCODERS])
def test_a_checkpoint_may_be_of_any_architecture(name, tmp_path):
    prefix = name.removesuffix("Model")
    stock = stock_model(f"{prefix}ForQuestionAnswering", vocab_size=8192)
    stock.save_pretrained(tmp_path)
    names = ["input_ids", "attention_mask"]  # without token types: not all have them
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED, model_input_names=names)
    tokenizer.save_pretrained(tmp_path)
    text = " ".join(TEXTS * 3)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 40  # there are 40 positions, less two in RoBERTa's family
    result = run("embed", text, "--model", tmp_path, "--json", "--device", "cpu")
    embedding = torch.tensor(json.loads(result.stdout)["embeddings"])
    limit = 40 - (2 if stock.config.model_type in ("roberta", "xlm-roberta", "camembert") else 0)
    cut = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
    with torch.inference_mode():
        expected = stock.base_model(**cut).last_hidden_state[:, 0]
    torch.testing.assert_close(embedding, expected, rtol=0, atol=1e-5)

    fast, _ = load(str(tmp_path), head="ForQuestionAnswering")
    assert type(fast) is getattr(bert_fast, f"{prefix}ForQuestionAnswering")
    with torch.inference_mode():
        expected = stock(**cut).start_logits
        torch.testing.assert_close(fast(**cut).start_logits, expected, rtol=0, atol=1e-5)


def test_a_checkpoint_of_2019_does_not_say_that_it_is_a_bert(checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    del config["model_type"]
    path.write_text(json.dumps(config))
    assert run("embed", "text", "--model", checkpoint).exit_code == 0


def test_long_work_shows_its_progress_on_a_terminal_alone():
    args = ("embed", *"abcdefgh", "--batch-tokens")
    assert "embedding" in run(*args, 1, env={"FORCE_COLOR": "1"}).stderr
    assert "embedding" not in run(*args, 1000, env={"FORCE_COLOR": "1"}).stderr
    assert len(run(*args, 1).stderr.splitlines()) == 1


def test_batches_have_each_text_once_and_keep_to_their_size():
    lengths = [3, 9, 1, 40, 9, 2, 2, 30]
    found = batches(lengths, 30)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert found[0] == [3]  # longer than a batch: alone
    for batch in found[1:]:
        assert len(batch) * max(lengths[i] for i in batch) <= 30
    assert len(found) == 4


# -- bad input ------------------------------------------------------------------------------
BROKEN = {
    "no config.json": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "cut config.json": (lambda d: cut(d / "config.json"), "cannot read config.json"),
    "GPT-2": (
        lambda d: configure(d, model_type="gpt2"),
        "is a gpt2 model; give one of bert, camembert, distilbert, electra, roberta, xlm-roberta",
    ),
    "the weights of another architecture": (
        lambda d: configure(d, model_type="roberta"),
        "69 of the encoder's 69 weights are not in it",
    ),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        "cannot read the weights (OSError: Error no file named model.safetensors",
    ),
    "cut weights": (lambda d: cut(d / "model.safetensors"), "cannot read the weights (Safetensor"),
    "empty weights": (
        lambda d: (d / "model.safetensors").write_bytes(b""),
        "cannot read the weights (Safetensor",
    ),
    "weights of fewer layers": (
        lambda d: configure(d, num_hidden_layers=5),
        "16 of the encoder's 85 weights are not in it (encoder.layer.4.",
    ),
    "weights of other shapes": (
        lambda d: configure(d, max_position_embeddings=77),
        "1 weights do not fit its config.json (embeddings.position_embeddings.weight must be [77,",
    ),
    "heads that do not divide": (
        lambda d: configure(d, num_attention_heads=3),
        "cannot read the weights (ValueError: The hidden size",
    ),
    "no tokenizer": (
        lambda d: [path.unlink() for path in d.glob("tokenizer*")],
        "has no vocabulary (tokenizer.json or vocab.txt)",
    ),
    "cut tokenizer.json": (lambda d: cut(d / "tokenizer.json"), "cannot read the tokenizer (JSON"),
    "a tokenizer.json without a tokenizer": (
        lambda d: (d / "tokenizer.json").write_text("{}"),
        "cannot read the tokenizer (KeyError",
    ),
    "a tokenizer.json of another kind": (
        lambda d: (d / "tokenizer.json").write_text("[]"),
        "cannot read the tokenizer (TypeError",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_checkpoint_that_is_not_whole_is_named_in_one_line(broken, checkpoint):
    damage, message = BROKEN[broken]
    damage(checkpoint)
    result = run("embed", "text", "--model", checkpoint)
    assert_one_line(result, f"error: {checkpoint}: {message}")


def test_pickled_weights_that_are_not_whole_are_named(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    path = checkpoint / "pytorch_model.bin"
    torch.save(doctor.stock(SHIPPED).state_dict(), path)
    whole = path.read_bytes()
    assert run("embed", "text", "--model", checkpoint).exit_code == 0
    for content in (whole[: len(whole) // 2], b"", b"no pickle"):
        path.write_bytes(content)
        assert_one_line(run("embed", "text", "--model", checkpoint), "cannot read the weights")


def test_a_tokenizer_of_a_larger_model_is_named(checkpoint):
    config = transformers.BertConfig.from_pretrained(SHIPPED, vocab_size=99)
    transformers.BertModel(config).save_pretrained(checkpoint)
    result = run("embed", "text", "--model", checkpoint)
    assert_one_line(result, "the tokenizer has 8192 tokens and the model 99")


USAGE = {
    "--model someone/some-bert": ("someone/some-bert: no such directory, nor a model that",),
    f"--model {__file__}": (f"{__file__}: is a file; give the directory",),
    "--dtype int8": ("'--dtype'", "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
    "--pooling max": ("'--pooling'", "'max' is not one of 'cls', 'mean'"),
    "--device gpu": ("--device must be cpu, cuda or cuda:N, got gpu",),
    "--device mps": ("--device must be cpu, cuda or cuda:N, got mps",),
    "--device cuda:99": ("--device cuda:99: torch", "GPUs; give cpu, or see what"),
    "--batch-tokens 0": ("'--batch-tokens'",),
    "--bogus": ("No such option", "--bogus"),
    "--json --output x.npy": ("--json and --output: give one",),
    "--output none/x.npy": ("--output none/x.npy: there is no directory none; create it",),
    "--output .": ("--output .: is a directory; give a file",),
}


@pytest.mark.parametrize("usage", USAGE)
def test_bad_usage_is_named_in_one_line(usage):
    assert_one_line(run("embed", "text", *usage.split()), *USAGE[usage])


def test_a_place_that_may_not_be_written_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert_one_line(run("embed", "text", "--output", tmp_path / "x.npy"), "may not be written")


def test_no_text_at_all_is_named(monkeypatch, capsys):
    assert_one_line(run("embed"), "no text: 0 given")
    assert_one_line(run("embed", " ", ""), "no text: 2 given, of which 0 are not blank")
    assert_one_line(run_at_a_terminal(monkeypatch, capsys, "embed"), "no text: give TEXT")


def test_text_that_is_not_utf_8_is_named():
    assert_one_line(run("embed", input=b"\xff\xfe"), "texts must be UTF-8 ('utf-8' codec can't")
    assert_one_line(run("embed", "\udcff"), "texts must be UTF-8 ('utf-8' codec can't")


def test_only_debug_shows_a_traceback(tmp_path):
    args = ("embed", "text", "--model", tmp_path)
    assert_one_line(run(*args))
    debug = run(*args, "--debug")
    assert debug.exit_code == 2
    assert "Traceback (most recent call last)" in debug.stderr
    assert debug.stderr.splitlines()[-1].startswith(f"error: {tmp_path}: has no config.json")


def test_a_head_that_is_none_is_answered_with_those_there_are():
    with pytest.raises(ValueError) as raised:
        load(str(SHIPPED), head="ForNothing")
    said = str(raised.value)
    assert said.startswith("load: head must be one of ForMaskedLM, ForMultipleChoice, ")
    assert said.endswith(", LMHeadModel, or None, got 'ForNothing'")


def test_no_texts_have_no_embeddings():
    model, tokenizer = load(str(SHIPPED))
    ids, truncated = tokenize([], tokenizer, 512)
    assert (ids, truncated) == ([], 0)
    assert encode(ids, model).shape == (0, model.config.hidden_size)


def test_embeddings_are_float32_on_the_cpu_whatever_the_defaults():
    model, tokenizer = load(str(SHIPPED))
    ids, _ = tokenize(TEXTS, tokenizer, 512)
    expected = encode(ids, model)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(encode(ids, model), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_fault_of_our_own_is_one_line_with_another_code(monkeypatch):
    def load(*args):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(cli, "load", load)
    assert_one_line(run("embed", "text"), "RuntimeError: two lines; --debug shows where", code=1)


def test_control_c_is_quiet(monkeypatch):
    def load(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", load)
    result = run("embed", "text")
    assert (result.exit_code, result.output) == (130, "")


def test_help_and_version_load_nothing(monkeypatch):
    monkeypatch.delattr(cli, "load")
    assert run("--version").stdout == f"bert_fast {bert_fast.__version__}\n"
    assert run().stdout == run("--help").stdout
    for command in ("embed", "doctor", "demo"):
        assert command in run("--help").stdout
        assert "--debug" in run(command, "--help").stdout
    assert_one_line(run("embd"), "No such command 'embd'")


def test_every_option_is_in_lower_case():
    """typer 0.27 takes a metavar that is the option's name in capitals for the option itself."""
    group = typer.main.get_command(cli.main)
    commands = [group, *group.commands.values()]
    options = [
        name for command in commands for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-")
    ]  # fmt: skip
    assert {"--device", "--file", "--version"} <= set(options)
    assert [name for name in options if name != name.lower()] == []


# -- doctor ---------------------------------------------------------------------------------
def diagnosis(code):
    result = run("doctor", "--json")
    assert result.exit_code == code, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def problem_of(found, start):
    [problem] = [p for p in found["problems"] if p["problem"].startswith(start)]
    return problem


@pytest.fixture
def one_op(monkeypatch):
    """Leaves doctor one op, the function it is given for layer_norm."""

    def become(fn):
        spec = next(spec for spec in kernels.SPECS if spec.name == "layer_norm")
        fn.__name__ = spec.name
        monkeypatch.setattr(kernels, "SPECS", (dataclasses.replace(spec, fn=fn),))

    return become


def test_doctor_checks_every_op_in_every_dtype_and_the_checkpoint(device):
    found = diagnosis(code=0)
    assert found.keys() == {
        "versions", "cpu", "gpus", "backends", "checks", "problems", "passed"
    }  # fmt: skip
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"][device]["backend"] == kernels.backend(device)
    assert found["passed"] is True
    here = [check for check in found["checks"] if check["device"] == device]
    for spec in kernels.SPECS:
        assert sum(check["subject"] == spec.name for check in here) == 2 * 3
    assert here[-1]["subject"] == "shipped checkpoint"
    assert all(check["passed"] and 0 <= check["share"] <= 1 for check in here)
    assert max(check["error"] for check in here) > 0


def test_doctor_says_the_same_to_a_reader(one_op):
    one_op(lambda *args, **kwargs: kernels.layer_norm(*args, **kwargs))
    said = run("doctor")
    assert said.exit_code == 0
    for word in (torch.__version__, "backend on cpu", "layer_norm", "of the allowed", "ok"):
        assert word in said.stdout
    assert "FAILED" not in said.stdout


def test_doctor_finds_an_op_that_is_wrong_by_little(one_op, capsys):
    one_op(lambda *args, **kwargs: kernels.layer_norm(*args, **kwargs) * 1.01)
    found = diagnosis(code=1)
    assert not any(c["passed"] for c in found["checks"] if c["subject"] == "layer_norm")
    problem = problem_of(found, "wrong on cpu")
    assert "layer_norm in float32, layer_norm in float16" in problem["problem"]
    assert "shipped checkpoint" not in problem["problem"]
    assert "bert-fast doctor --json" in problem["remedy"]
    cli._print_diagnosis(found)
    assert "FAILED" in capsys.readouterr().out


def test_doctor_reports_an_op_that_is_not_finite_and_one_that_raises(one_op, capsys):
    def overflows_without_residual(*args, residual=None, **kwargs):
        y = kernels.layer_norm(*args, residual=residual, **kwargs)
        return y * float("nan") if residual is None else y

    one_op(overflows_without_residual)
    found = diagnosis(code=1)
    first, second, *_ = found["checks"]
    assert first["passed"]
    assert [second[key] for key in ("error", "share", "raised")] == [None] * 3
    cli._print_diagnosis(found)
    assert "not finite" in capsys.readouterr().out

    def fails(*args, **kwargs):
        raise RuntimeError("no compiler")

    one_op(fails)
    found = diagnosis(code=1)
    assert found["checks"][0]["raised"] == "RuntimeError: no compiler"
    assert "RuntimeError: no compiler" in problem_of(found, "wrong on cpu")["problem"]


def test_doctor_does_not_take_the_stock_forward_for_the_kernels(monkeypatch):
    def load_with_a_hook(*args, **kwargs):
        model, tokenizer = load(*args, **kwargs)
        model.encoder.layer[0].register_forward_pre_hook(lambda *args: None)
        return model, tokenizer

    monkeypatch.setattr(kernels, "SPECS", ())
    monkeypatch.setattr(doctor, "load", load_with_a_hook)
    [check, *_] = diagnosis(code=1)["checks"]
    assert check["raised"].startswith("RuntimeError: the stock forward ran: encoder.layer.0: hooks")


@pytest.mark.parametrize(
    "reason, problem, remedy",
    [
        ("triton is not installed; pip install triton", "triton is not installed", "pip install"),
        ("this one is sm_75", "this one is sm_75", "the stock forward runs"),
    ],
)
def test_doctor_names_a_gpu_that_the_kernels_do_not_run_on(
    monkeypatch, capsys, reason, problem, remedy
):
    missing = kernels.missing
    gpu = {"name": "Old GPU", "capability": "7.5", "memory_gib": 16.0, "tuned_on": None}
    monkeypatch.setattr(kernels, "SPECS", ())
    monkeypatch.setattr(doctor, "_gpus", lambda: [gpu])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(kernels, "missing", lambda d: reason if d == "cuda" else missing(d))
    found = diagnosis(code=0)
    assert found["gpus"] == [gpu]
    assert found["backends"]["cuda"] == {"backend": None, "reason": reason}
    assert remedy in problem_of(found, problem)["remedy"]
    cli._print_diagnosis(found)
    assert "Old GPU, sm 7.5, 16.0 GiB" in capsys.readouterr().out


def test_doctor_says_on_which_gpu_launch_configurations_were_measured(monkeypatch, capsys):
    a, b = (
        types.SimpleNamespace(
            name=name, major=9, minor=0, total_memory=80 << 30, multi_processor_count=count
        )
        for name, count in (("NVIDIA H100 80GB HBM3", 132), ("NVIDIA H100 PCIe", 114))
    )
    monkeypatch.setattr(kernels, "SPECS", ())
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", [a, b].__getitem__)
    found = diagnosis(code=0)
    assert [gpu["tuned_on"] for gpu in found["gpus"]] == ["NVIDIA H200", None]
    cli._print_diagnosis(found)
    said = capsys.readouterr().out
    assert "measured on NVIDIA H200" in said and "defaults, not measured on this chip" in said


def test_doctor_names_a_driver_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(kernels, "SPECS", ())
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    monkeypatch.setattr(doctor, "_gpus", list)
    assert "CUDA_VISIBLE_DEVICES" in problem_of(diagnosis(code=0), "driver 570.1 of")["remedy"]


@pytest.mark.parametrize(
    "code, said, driver",
    [(0, "570.1\n570.1\n", "570.1"), (0, "", None), (9, "has failed because", None)],
)
def test_doctor_knows_the_driver_where_nvidia_smi_tells_it(monkeypatch, code, said, driver):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(
        "subprocess.run", lambda args, **_: subprocess.CompletedProcess(args, code, stdout=said)
    )
    assert doctor._driver() == driver


def test_doctor_names_a_machine_that_others_keep_busy(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.getloadavg", lambda: (8.0, 0, 0), raising=False)
    assert not list(doctor.busy())
    monkeypatch.setattr("os.getloadavg", lambda: (8.1, 0, 0), raising=False)
    [(problem, _)] = doctor.busy()
    assert "a load of 8.1 on 8 CPUs" in problem
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert not list(doctor.busy())


# -- demo -----------------------------------------------------------------------------------
@pytest.mark.skipif(INTERPRET, reason="32 docstrings take minutes in Triton's interpreter")
def test_demo_shows_the_embedding_the_difference_the_report_and_a_speed(monkeypatch, device):
    monkeypatch.setattr(cli, "_speed", lambda fast, stock, batch: "not measured here")
    result = run("demo", "--device", device)
    assert result.exit_code == 0, result.output
    embed = run("embed", cli.SENTENCE, "--json", "--device", device)
    [row] = json.loads(embed.stdout)["embeddings"]
    assert " ".join(f"{x:+.6f}" for x in row[:8]) in result.stdout
    apart = re.findall("(.*)  (?:the sentence alone|32 docstrings in a batch)\n", result.stdout)
    assert len(apart) == 2
    assert 0 < max(map(float, apart)) < 1e-5
    assert "3 fast calls" in result.stdout
    assert result.stdout.count("not measured here") == 2


def test_speed_is_the_ratio_of_the_times(monkeypatch):
    """Of stock calls that take three seconds and fast ones that take two, by a made-up clock."""
    class Model:
        device = torch.device("cpu")

        def __init__(self, seconds):
            self.seconds = seconds

        def __call__(self, attention_mask):
            clock[0] += self.seconds

    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    said = cli._speed(Model(2), Model(3), {"attention_mask": torch.tensor([[1, 1, 0]])})
    assert said == "1.5x by medians, 1.5x by minima of 2 rounds; 1 tokens/s"
