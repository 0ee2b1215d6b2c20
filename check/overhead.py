"""The time that Python takes to launch one forward, which a GPU of any speed waits for.

A stub replaces the GPU's driver: models on the CPU run through the kernels' launchers and Triton,
which compiles for sm_90 and then launches nothing. So the time is that of the model's code and of
PyTorch's and Triton's dispatch, without a GPU; the driver itself takes one to two microseconds more
per launch. Times are CPU time of this thread, not wall-clock time.
"""

import contextlib
import time

import torch
import transformers
import triton
from rich.console import Console
from triton.backends.compiler import GPUTarget

import bert_fast
from bert_fast import coverage, encoder, modeling
from bert_fast.kernels import launch
from bert_fast.kernels.launch import INTERPRET

H100 = {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "max_num_regs": 65536,
        "warpSize": 32}  # fmt: skip


class StubDriver:
    """What Triton's launch path queries from a driver."""

    launches = 0

    class utils:
        load_binary = staticmethod(lambda *args: (0, 0, 64, 0, 1024))
        get_device_properties = staticmethod(lambda device: H100)

    @staticmethod
    def launcher_cls(*args):
        def launch(*args):
            StubDriver.launches += 1

        return launch

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


def install():
    """Replace the driver by the stub, permanently in this process."""
    triton.runtime.driver.set_active(StubDriver())
    modeling.directly = directly
    launch.arch = lambda: 90
    encoder._stays_on_device = lambda device: True


@contextlib.contextmanager
def directly(device, tensors):
    """launch.directly, as for a GPU."""
    launch._thread.direct = "cuda"
    yield
    launch._thread.direct = None


def timed(run, rounds):
    """The median of `rounds` runs, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return sorted(times)[rounds // 2]


def measure(layers, rounds):
    """{"launches": per forward, "forward": seconds, "checks": seconds of these in coverage}."""
    config = transformers.BertConfig(vocab_size=1000, num_hidden_layers=layers)
    model = transformers.BertModel(config, add_pooling_layer=False).to(torch.bfloat16).eval()
    bert_fast.accelerate(model)
    ids, mask = torch.randint(1000, (1, 128)), torch.ones(1, 128, dtype=torch.long)
    with torch.inference_mode():
        model(ids, mask)  # compiles
        StubDriver.launches = 0
        model(ids, mask)
        return {
            "launches": StubDriver.launches,
            "forward": timed(lambda: model(ids, mask), rounds),
            "checks": timed(lambda: coverage.reason_of_model(model), rounds),
        }


def add_arguments(command):
    command.add_argument("--layers", type=int, default=12, help="of 768, as BERT-base; default 12")
    command.add_argument("--rounds", type=int, default=200, help="default 200")


def main(options, specs):
    if INTERPRET:
        raise SystemExit("check overhead: the interpreter compiles nothing; unset TRITON_INTERPRET")
    install()
    torch.set_num_threads(1)
    found = measure(options.layers, options.rounds)
    forward, checks, launches = found["forward"] * 1e6, found["checks"] * 1e6, found["launches"]
    Console().print(
        f"{forward:,.0f} us for a forward of {options.layers} layers: {checks:,.0f} us of checks,"
        f" {launches} launches of {(forward - checks) / launches:.1f} us"
    )
    return 0
