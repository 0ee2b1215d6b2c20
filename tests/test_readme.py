"""The README's commands and code blocks run, as a reader would run them.

They name bert-base-uncased; in the folder where they run here, a directory of that name stands for
it, with the shipped checkpoint in it, since tests do not reach the hub.
"""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from bert_fast.checkpoints import SHIPPED

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


SHELL = [line.partition("  #")[0].strip() for b in blocks("shell") for line in b.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(SHIPPED, folder / "bert-base-uncased")
    (folder / "lines.txt").write_text("One line.\nAnd a second, longer line.\n")
    return folder


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[-2][:40])
def test_python_block_runs(code, folder):
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", [c for c in SHELL if c.startswith("bert-fast")])
def test_shell_command_runs(command, folder):
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    if "--output" in command:
        assert (folder / "vectors.npy").exists()


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {c.split()[1] for c in SHELL if c.startswith("make")}
    assert named
    assert named <= targets


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("file", ["coverage", "inputs"])
def test_every_reason_for_the_stock_forward_is_on_the_page(file):
    page = (ROOT / "docs" / "compatibility.md").read_text()
    reasons = []
    for node in ast.walk(ast.parse((ROOT / "bert_fast" / f"{file}.py").read_text())):
        value = node.value if isinstance(node, ast.Return) else None
        parts = value.values if isinstance(value, ast.JoinedStr) else [value]
        said = [p.value for p in parts if isinstance(p, ast.Constant)]
        said = [text.strip(" :,(") for text in said if isinstance(text, str)]
        reasons += [max(said, key=len)] if said else []
    assert len(reasons) > 2
    assert [reason for reason in reasons if reason not in page] == []
