"""`python check`: what a person types, and what the page on writing a kernel promises."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from bert_fast.kernels import SPECS
from bert_fast.kernels.launch import INTERPRET

if not INTERPRET:
    pytest.skip("these checks are for kernels in the interpreter", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
OPS = ", ".join(s.name for s in SPECS)


def check(*args, root=ROOT, **env):
    """A process of its own."""
    command = [sys.executable, root / "check", *map(str, args)]
    env = {**os.environ, "PYTHONSAFEPATH": "1", "COLUMNS": "120", **env}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture
def said_here(monkeypatch, capsys):
    """check(*args), in this process: (exit code, what it printed, what went to stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["check", *args])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "check"), run_name="__main__")
        return stopped.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "args, said",
    [
        (["op", "layernorm"], f"no op layernorm; there are {OPS}"),
        (["op"], f"op: give one op, of {OPS}"),
        (["fuzz", "--op", "softmax"], f"no op softmax; there are {OPS}"),
        (["aot", "--arch", "sm_70"], "argument --arch: invalid choice: 'sm_70' (choose from"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_ones(args, said, said_here):
    code, _, stderr = said_here(*args)
    assert code == 2
    assert stderr.startswith(f"check: {said}")
    assert stderr.count("\n") == 1
    if "--arch" in args:
        for arch in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"):
            assert arch in stderr


def test_help_has_a_whole_sentence_for_each_command(said_here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, stdout, _ = said_here("--help")
    assert code == 0
    listed = stdout.partition("positional")[2]
    said = re.findall(r"^    (\w+) {2,}(\S.*)$", listed, re.MULTILINE)
    assert [command for command, _ in said] == [
        "op", "fuzz", "mutants", "aot", "compiled", "forward", "overhead",
    ]  # fmt: skip
    for command, sentence in said:
        assert sentence.endswith("."), (command, sentence)


def test_each_command_says_how_it_wants_the_interpreter(said_here):
    done = check("op", "gelu", TRITON_INTERPRET="0")
    assert done.returncode == 1
    assert "set TRITON_INTERPRET=1" in done.stderr
    for command in ("aot", "compiled", "overhead"):
        said, *_ = said_here(command)  # sys.exit prints it and makes the code 1
        assert "unset TRITON_INTERPRET" in said


@pytest.mark.parametrize("layers", [1, 3])
def test_overhead_counts_the_launches_of_a_forward(layers):
    done = check("overhead", "--layers", layers, "--rounds", 3, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    launches = 4 + 7 * layers  # pack is two, embedding and unpack
    assert f"us for a forward of {layers} layers" in done.stdout
    assert f", {launches} launches of " in done.stdout


# -- docs/new_kernel.md ---------------------------------------------------------------------
@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project, with the page's op in it, as its reader makes it."""
    root = tmp_path_factory.mktemp("project")
    page = (ROOT / "docs" / "new_kernel.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for folder in ("check", "tests"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copytree(ROOT / "bert_fast", root / "bert_fast")
    shutil.copytree(ROOT / "kernels", root / "bert_fast" / "kernels")
    shutil.copy(ROOT / "pyproject.toml", root)
    kernels = root / "bert_fast" / "kernels"
    (kernels / "rms_norm.py").write_text("\n\n".join(blocks))
    shown = re.findall(r"^    (from \.rms_norm import .*)$", page, re.MULTILINE)
    assert "from .rms_norm import rms_norm" in shown
    imports = "".join(f"    {line}\n" for line in shown)
    init = (kernels / "__init__.py").read_text()
    for before, after in (
        ("    SPECS = (", f"{imports}\n    SPECS = (RMS_NORM, "),
        ("__all__ = [", '__all__ = ["rms_norm", '),
    ):
        assert init.count(before) == 1
        init = init.replace(before, after)
    (kernels / "__init__.py").write_text(init)
    return root


@contextmanager
def broken(project, right, wrong):
    """The project with something wrong in its kernel."""
    file = project / "bert_fast" / "kernels" / "rms_norm.py"
    whole = file.read_text()
    kernel, rest = whole.split("def _config(", 1)
    assert kernel.count(right) == 1
    try:
        file.write_text(kernel.replace(right, wrong) + "def _config(" + rest)
        yield
    finally:
        file.write_text(whole)


def test_the_page_on_a_new_kernel_ends_with_a_green_check(project):
    done = check("op", "rms_norm", root=project, PYTHONPATH=str(project))
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = re.findall(r"^ (.*?) +(good|BAD) ", done.stdout, re.MULTILINE)
    assert [name for name, verdict in verdicts if verdict == "good"] == [
        "sanitizer and values", "measured cost", "fuzzer", "mutants", "tests, kernels",
        "tests, CPU form", "compiled", "executed",
    ]  # fmt: skip


def test_a_kernel_that_would_end_the_process_is_told_of(project):
    with broken(project, "mask=mask_n)", "mask=None)"):
        done = check("op", "rms_norm", root=project, PYTHONPATH=str(project))
    assert done.returncode == 1, done.stderr
    assert re.search(r"^ sanitizer and values +BAD ", done.stdout, re.MULTILINE)
    assert "two writers, y_ptr: stores element [1, 0] of [4, 768]" in done.stdout
    assert "left out: fuzzer, mutants and tests of the kernels." in done.stdout


@pytest.mark.parametrize(
    "right, wrong, found",
    [
        ("tl.program_id(0).to(tl.int64)", "tl.program_id(0)", "overflow, x_ptr"),
        (" / N + eps)", " / N)", "times what is allowed"),
    ],
)
def test_what_the_page_says_to_break_is_found(project, right, wrong, found):
    code = (
        "import sys; sys.path[0:0] = ['check']; from examine import examine;"
        "from bert_fast.kernels import SPECS, rms_norm; assert SPECS[0].fn is rms_norm;"
        "print(examine(SPECS[0]))"
    )
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(project)}
    with broken(project, right, wrong):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=project, env=env, capture_output=True, text=True
        )
    assert found in done.stdout, done.stdout + done.stderr
