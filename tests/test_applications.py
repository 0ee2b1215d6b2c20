"""Every block of docs/applications.md runs on the kernels, and prints what stock does.

In the folder where they run, small models with random heads stand under the names on the page.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import transformers

import bert_fast
from bert_fast.checkpoints import SHIPPED

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "applications.md").read_text()
SECTIONS = dict(
    re.findall(r"^## ([^\n]+)\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
)
SHELL = "".join(re.findall(r"^```shell\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)).splitlines()
# name on the page: the class it has there, and what its config says
CHECKPOINTS = {
    "textattack/bert-base-uncased-SST-2": ("BertForSequenceClassification", {}),
    "deepset/bert-base-cased-squad2": ("BertForQuestionAnswering", {}),
    "typeform/distilbert-base-uncased-mnli": (
        "DistilBertForSequenceClassification",
        {"label2id": {"ENTAILMENT": 0, "NEUTRAL": 1, "CONTRADICTION": 2},
         "id2label": {0: "ENTAILMENT", 1: "NEUTRAL", 2: "CONTRADICTION"}},
    ),
    "dslim/bert-base-NER": (
        "BertForTokenClassification",
        {"label2id": {"O": 0, "B-PER": 1, "B-LOC": 2},
         "id2label": {0: "O", 1: "B-PER", 2: "B-LOC"}},
    ),
    "bert-base-multilingual-cased": ("BertForPreTraining", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    for name, (cls, labels) in CHECKPOINTS.items():
        torch.manual_seed(0)
        cls = getattr(transformers, cls)
        names = ["input_ids", "attention_mask"]
        if cls.config_class is transformers.BertConfig:
            names.append("token_type_ids")
            model = cls.from_pretrained(SHIPPED, **labels)
        else:
            model = cls(cls.config_class(
                vocab_size=8192, dim=64, hidden_dim=100, n_layers=2, n_heads=4, **labels
            ))  # fmt: skip
        for key, parameter in model.named_parameters():
            if key.startswith(("classifier", "qa_outputs")):
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED, model_input_names=names)
        tokenizer.save_pretrained(folder / name)
    (folder / "notes.txt").write_text("It was written by Ada Lovelace, in 1843.\n")
    return folder


def run(code):
    """The names that a block leaves; drawn weights are the same each time."""
    torch.manual_seed(0)
    names = {}
    exec(compile(code, "docs/applications.md", "exec"), names)
    return names


def numbers_and_words(printed):
    parts = re.split(r"(-?\d+\.\d+(?:e-?\d+)?)", printed)
    return [float(x) for x in parts[1::2]], parts[::2]


def test_the_page_has_every_application():
    assert len(SECTIONS) == PAGE.count("\n## ") == PAGE.count("```python") == 8
    for name in CHECKPOINTS:
        assert f'"{name}"' in PAGE


@pytest.mark.parametrize("section", SECTIONS)
def test_a_block_prints_what_stock_does(section, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = run(SECTIONS[section])
    model = names.get("model") or next(
        x.model for x in names.values() if isinstance(x, transformers.Pipeline)
    )
    swapped = bert_fast.report(model).swapped
    assert swapped
    for part in swapped:
        assert part.fast_calls > 0
        # transformers 5.0 gives the first step of a generation a cache_position
        steps = ("a step that reads a cache", "keyword cache_position")
        assert all(reason.startswith(steps) for reason in part.stock_calls)
    ours = capsys.readouterr().out
    assert ours

    bert_fast.restore(model)
    monkeypatch.setattr(bert_fast, "accelerate", lambda model: model)
    for name in (
        "AutoModelForQuestionAnswering", "AutoModelForSequenceClassification", "BertModel",
    ):  # fmt: skip
        monkeypatch.setattr(bert_fast, name, getattr(transformers, name))
    monkeypatch.setattr("bert_fast.encode.load", stock_load)
    stock = run(SECTIONS[section].replace("print(bert_fast.report(model))", ""))
    assert not any(
        bert_fast.report(x).swapped for x in stock.values() if isinstance(x, torch.nn.Module)
    )
    ours, _, _ = ours.partition("bert_fast report")
    (a, words), (b, others) = map(numbers_and_words, (ours, capsys.readouterr().out))
    assert words == others
    assert a == pytest.approx(b, abs=2e-4)


def stock_load(name):
    model = transformers.BertModel.from_pretrained(name, add_pooling_layer=False)
    return model, transformers.AutoTokenizer.from_pretrained(name)


@pytest.mark.parametrize("command", SHELL)
def test_a_command_runs(command, folder):
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout
