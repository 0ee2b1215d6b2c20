"""Calls of the ops for tools that watch a whole process. Arguments:

small      small cases of every op, of attention_backward and layer_norm_backward too
profile    the first benchmark case of every op, each once while the profiler listens; says before
           which op launches each of our kernels, as one line of JSON
attention  attention's error against fp64 and the hash of its bits, as one line of JSON
"""

import hashlib
import json
import sys
from functools import partial
from unittest.mock import patch

import torch

from bert_fast.kernels import SPECS, launch
from bert_fast.kernels.spec import cast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = 4  # cases of an op: compute-sanitizer makes each some hundred times slower


def _call(spec, case):
    return partial(spec.fn, **spec.inputs(torch.bfloat16, DEVICE, **case))


def small():
    for spec in SPECS:
        for case in spec.cases[:SMALL]:
            _call(spec, case)()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def profile():
    calls = [(spec.name, _call(spec, spec.bench[0])) for spec in SPECS]
    kernel, ops = launch.triton.JITFunction, []
    run = kernel.run

    def noting(name):
        def noted_run(*args, **kwargs):
            ops.append(name)
            return run(*args, **kwargs)

        return noted_run

    with torch.no_grad():
        for name, call in calls:  # compiles
            with patch.object(kernel, "run", noting(name)):
                call()
        print(json.dumps({"ops": ops}), flush=True)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for _, call in calls:
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def attention():
    (spec,) = (s for s in SPECS if s.name == "attention")
    found = {}
    for D in (32, 64, 128):
        case = {"lengths": (128, 37, 384), "heads": 4, "D": D}
        torch.manual_seed(0)
        inputs = spec.inputs(torch.bfloat16, DEVICE, **case)
        with torch.no_grad():
            y, rounded = spec.fn(**inputs), spec.ref(**inputs)
            truth = spec.ref(**cast(inputs, torch.float64))
        error = (y.double() - truth).abs().max().item()
        bits = y.contiguous().view(torch.int16).cpu().numpy().tobytes()
        found[f"bfloat16 D={D}"] = {
            "error": error if error == error and error < float("inf") else None,
            "baseline_error": (rounded.double() - truth).abs().max().item(),
            "bits": hashlib.sha256(bits).hexdigest()[:16],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    {"small": small, "profile": profile, "attention": attention}[sys.argv[1]]()
