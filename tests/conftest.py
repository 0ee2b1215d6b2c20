"""Where tests run: on the GPU if there is one, else on the CPU's own implementations, or with
TRITON_INTERPRET=1 on the Triton kernels in the interpreter. `make test` does the last two.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests make the checkpoints they need

import pytest
import torch

from bert_fast.kernels.launch import INTERPRET

GPU = torch.cuda.is_available() and not INTERPRET


def pytest_addoption(parser):
    parser.addoption("--op", metavar="OP", help="the tests of test_ops.py for this op alone")


def pytest_collection_modifyitems(config, items):
    if op := config.getoption("--op"):
        params = [getattr(item, "callspec", None) and item.callspec.params for item in items]
        items[:] = [
            item for item, of in zip(items, params) if of and "spec" in of and of["spec"].name == op
        ]


@pytest.fixture
def device():
    return "cuda" if GPU else "cpu"


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN (integers: their maximum): a result that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tf32():
    """Products of fp32 may be TF32, as torch's current switch has it."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.fixture
def sums_without_place(monkeypatch):
    """The interpreter's tl.dot adds up K at once, however long its tile is. Here it is as on a GPU:
    a chain over K, of sums of 16 products."""
    if not INTERPRET:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def in_steps(self, a, b, d, *options):
        for k in range(0, a.data.shape[1], 16):
            step = slice(k, k + 16)
            parts = TensorHandle(a.data[:, step], a.dtype), TensorHandle(b.data[step], b.dtype)
            d = create_dot(self, *parts, d, *options)
        return d

    monkeypatch.setattr(InterpreterBuilder, "create_dot", in_steps)
