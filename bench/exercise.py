"""Calls of the ops for tools that watch a whole process. Arguments:

small      small cases of every op, with their gradients
profile    one benchmark case of every op, each once while the profiler listens
attention  attention's error against fp64 and the hash of its bits, as one line of JSON
"""

import hashlib
import json
import sys

import torch

from bert_fast.kernels import SPECS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = 4  # cases of an op: compute-sanitizer makes each some hundred times slower


def _call(spec, dtype, case, gradients=False):
    inputs = spec.inputs(dtype, DEVICE, **case)
    if gradients:
        inputs = {
            k: v.requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in inputs.items()
        }
    y = spec.fn(**inputs)
    if gradients and torch.is_tensor(y) and y.requires_grad:
        y.float().sum().backward()
    return y


def small():
    for spec in SPECS:
        for case in spec.cases[:SMALL]:
            _call(spec, torch.float16, case, gradients=True)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def profile():
    with torch.no_grad():
        for spec in SPECS:
            _call(spec, torch.bfloat16, spec.bench[0])  # compiles
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for spec in SPECS:
            _call(spec, torch.bfloat16, spec.bench[0])
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def attention():
    (spec,) = (s for s in SPECS if s.name == "attention")
    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        for D in (32, 64, 128):
            case = {"lengths": (128, 37, 384), "heads": 4, "D": D}
            torch.manual_seed(0)
            inputs = spec.inputs(dtype, DEVICE, **case)
            wide = {
                k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
                for k, v in inputs.items()
            }
            with torch.no_grad():
                y, rounded, truth = spec.fn(**inputs), spec.ref(**inputs), spec.ref(**wide)
            error = (y.double() - truth).abs().max().item()
            bits = y.contiguous().view(torch.int16).cpu().numpy().tobytes()
            found[f"{str(dtype).removeprefix('torch.')} D={D}"] = {
                "error": error if error == error and error < float("inf") else None,
                "baseline_error": (rounded.double() - truth).abs().max().item(),
                "bits": hashlib.sha256(bits).hexdigest()[:16],
            }
    print(json.dumps(found))


if __name__ == "__main__":
    {"small": small, "profile": profile, "attention": attention}[sys.argv[1]]()
