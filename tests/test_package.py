"""The package as installed: what the wheel holds, what an import brings, life without triton."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

ROOT = pathlib.Path(__file__).parent.parent
IGNORED = (".*", "__pycache__", "build", "*.egg-info")  # others may be writing the second
ENV = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "TRITON_INTERPRET")}


def python(code, cwd):
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=ENV, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_wheel_is_pure_python_and_has_the_kernels_and_the_checkpoint(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*IGNORED))
    subprocess.run([*pip, "--no-index", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "bert_fast/__init__.py", "bert_fast/py.typed", "bert_fast/kernels/attention.py",
        "bert_fast/checkpoint/model.safetensors", "bert_fast/checkpoint/README.md",
    ):  # fmt: skip
        assert name in names
    packages = {n.partition("/")[0] for n in names if not n.partition("/")[0].endswith("dist-info")}
    assert packages == {"bert_fast"}


def test_it_imports_from_the_root_of_the_repository():
    """There, `kernels` would be the folder, which transformers takes for another distribution."""
    for first in ("bert_fast", "transformers.models.bert.modeling_bert"):
        code = f"import {first}, bert_fast; print(bert_fast.kernels.attention.__module__)"
        assert python(code, ROOT) == "bert_fast.kernels.attention"


def test_an_import_brings_nothing_that_only_the_shell_needs(tmp_path):
    code = """
import sys, torch, transformers
from transformers import BertModel
before = set(sys.modules)
import bert_fast
print(*sorted({m.partition(".")[0] for m in set(sys.modules) - before}))
"""
    brought = set(python(code, tmp_path).split())
    assert brought - {"triton"} == {"bert_fast", "transformers"}  # and its other architectures


def test_without_triton_the_cpu_path_runs_and_a_gpu_is_told_what_to_install(tmp_path):
    code = """
import sys
sys.modules["triton"] = None  # as where it cannot be installed
import torch, transformers, bert_fast
from bert_fast.kernels import launch
config = transformers.BertConfig(
    vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
stock = transformers.BertModel(config).eval()
ids = torch.arange(8)[None]
with torch.no_grad():
    theirs = stock(ids)[0]
    ours = bert_fast.accelerate(stock)(ids)[0]
assert (ours - theirs).abs().max() < 1e-5
assert bert_fast.report(stock).swapped[0].fast_calls == 1
assert launch.backend("cpu") == "pytorch"
print(launch.missing("cuda"))
"""
    assert python(code, tmp_path) == "triton is not installed; pip install triton"
