"""Calls of the ops for tools that watch a whole process. Arguments:

small      small cases of every op, of attention_backward and layer_norm_backward too
profile    the first benchmark case of every op, each once while the profiler listens; says before
           which op launches each of our kernels, as one line of JSON
attention  the error of attention and of its gradients against fp64 and the hash of their bits, as
           one line of JSON: products whose operands stay in registers, which one PTX compiler may
           get wrong
"""

import hashlib
import json
import math
import sys
from functools import partial
from unittest.mock import patch

import torch

from bert_fast.kernels import SPECS, launch
from bert_fast.kernels.spec import cast, tensors_of

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
    """Few cases: a PTX compiler takes seconds for each."""
    cases = [("attention", {"D": D}) for D in (32, 64, 128)]
    found = {}
    for name, how in (*cases, ("attention_backward", {"D": 64, "dropout_p": 0.1})):
        (spec,) = (s for s in SPECS if s.name == name)
        case = {"lengths": (128, 37, 384), "heads": 4, **how}
        found[f"{name} bfloat16 D={how['D']}"] = _compared(spec, case)
    print(json.dumps(found))


def _compared(spec, case):
    torch.manual_seed(0)
    inputs = spec.inputs(torch.bfloat16, DEVICE, **case)
    with torch.no_grad():
        ours, rounded = (tensors_of(f(**inputs)) for f in (spec.fn, spec.ref))
        truth = tensors_of(spec.ref(**cast(inputs, torch.float64)))
    error, baseline = (
        torch.stack([(y.double() - t).abs().max() for y, t in zip(of, truth)]).max().item()
        for of in (ours, rounded)
    )
    bits = b"".join(y.contiguous().view(torch.int16).cpu().numpy().tobytes() for y in ours)
    return {
        "error": error if math.isfinite(error) else None,
        "baseline_error": baseline,
        "bits": hashlib.sha256(bits).hexdigest()[:16],
    }


if __name__ == "__main__":
    {"small": small, "profile": profile, "attention": attention}[sys.argv[1]]()
