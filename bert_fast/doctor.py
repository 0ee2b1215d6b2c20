"""What bert_fast runs on here, whether its numbers are right, and what to do about each problem.

`examine` returns the document that `bert-fast doctor --json` prints:

    versions  {bert_fast, python, torch, triton, transformers, cuda, rocm, driver}; null: absent
    cpu       {threads, capability}
    gpus      [{name, capability, memory_gib, tuned_on}], the last one the GPU on which launch
              configurations were measured, the same or another of its chip; null: defaults
    backends  {cpu, cuda}, each {backend, reason}; one of the two is null
    checks    [{subject, case, device, dtype, error, share, raised, passed}]: the largest error, and
              the largest share of what is allowed; both null where a result is not finite
    problems  [{problem, remedy}]
    passed    whether every check did
"""

import functools
import itertools
import math
import os
import platform
import shutil
import subprocess

import torch
import transformers

from . import __version__, kernels
from .checkpoints import SHIPPED
from .encode import load
from .kernels.launch import DTYPES, HAS_TRITON, INTERPRET, table_for, triton
from .swap import report

CASES = 2  # per op: the typical one and its first edge case
TEXTS = ("This is an example sentence.", "This one is longer, so that the first is padded.")
LIKE_STOCK = 1e-5  # for the shipped checkpoint in float32, whose hidden states are of order 1


def examine(track=iter):
    """The document above. `track` wraps the list of checks as they run, for a progress bar."""
    versions, gpus = _versions(), _gpus()
    backends = {device: _backend(device) for device in ("cpu", "cuda")}
    todo = [what for device, found in backends.items() for what in _todo(device, found["backend"])]
    checks = [_check(*what) for what in track(todo)]
    return {
        "versions": versions,
        "cpu": {
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": gpus,
        "backends": backends,
        "checks": checks,
        "problems": [
            {"problem": problem, "remedy": remedy}
            for problem, remedy in _problems(versions, gpus, backends, checks)
        ],
        "passed": all(check["passed"] for check in checks),
    }


# -- what is here ---------------------------------------------------------------------------
def _versions():
    return {
        "bert_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "driver": _driver(),
    }


def _driver():
    """The version of NVIDIA's driver, which torch does not expose; None if there is none."""
    if (smi := shutil.which("nvidia-smi")) is None:
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True)
    versions = said.stdout.split()  # one for each GPU
    return versions[0] if said.returncode == 0 and versions else None


def _gpus():
    found = []
    for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count())):
        name, capability = gpu.name, f"{gpu.major}.{gpu.minor}"
        found.append(
            {
                "name": name,
                "capability": capability,
                "memory_gib": round(gpu.total_memory / 2**30, 1),
                "tuned_on": table_for(name, capability, gpu.multi_processor_count)[1],
            }
        )
    return found


def _backend(device):
    if device == "cuda" and not torch.cuda.is_available():
        return {"backend": None, "reason": f"torch {torch.__version__} sees no GPU"}
    reason = kernels.missing(device)
    return {"backend": None if reason else kernels.backend(device), "reason": reason}


# -- are its numbers right ------------------------------------------------------------------
def _todo(device, backend):
    """Each check on device: its subject, and the function that returns its error and share."""
    if backend is None:
        return
    for spec, dtype, i in itertools.product(kernels.SPECS, DTYPES, range(CASES)):
        case = spec.cases[i]
        about = {"subject": spec.name, "case": case, "device": device, "dtype": _name(dtype)}
        yield about, functools.partial(_error_of_op, spec, case, dtype, device)
    about = {"subject": "shipped checkpoint", "case": None, "device": device, "dtype": "float32"}
    yield about, functools.partial(_error_of_checkpoint, device)


def _check(about, measure):
    error = share = math.nan
    raised = None
    try:
        error, share = (x.item() for x in measure())
    except Exception as problem:  # whatever an op raises is a finding
        raised = f"{type(problem).__name__}: {problem}"
    return {
        **about,
        "error": error if math.isfinite(error) else None,
        "share": share if math.isfinite(share) else None,
        "raised": raised,
        "passed": share <= 1,
    }


def _error_of_op(spec, case, dtype, device):
    """Checks against the definition in float64. Allowed are one ulp of each number and four times
    what fp32 costs the definition; where an op rounds inside, what its dtype costs the definition,
    plus the ulp if it returns gradients, products of what it rounds."""
    torch.manual_seed(0)
    inputs = spec.inputs(dtype, device, **case)
    exact = _results(spec.ref, inputs, torch.float64)
    rounds_inside = spec.rounds_inside and dtype != torch.float32
    plain = _results(spec.ref, inputs, dtype if rounds_inside else torch.float32)
    errors, shares = [], []
    for ours, truth, other in zip(_results(spec.fn, inputs), exact, plain, strict=True):
        allowed = torch.zeros_like(truth)  # indices are exact
        if truth.is_floating_point():
            cost, ulp = (other - truth).abs().max(), torch.finfo(ours.dtype).eps * truth.abs()
            allowed += torch.finfo(torch.float32).eps * truth.abs().max()
            allowed += cost if rounds_inside else 4 * cost
            allowed += 0 if rounds_inside and not spec.gradient else ulp
        error = (ours.double() - truth).abs()
        errors.append(error.max())
        shares.append((error / allowed).where(error != 0, 0).max())
    return torch.stack(errors).max(), torch.stack(shares).max()


def _results(fn, inputs, dtype=None):
    """fn's outputs as a tuple, its floating inputs cast to dtype if given."""
    out = fn(
        **{
            k: t.to(dtype) if dtype and torch.is_tensor(t) and t.is_floating_point() else t
            for k, t in inputs.items()
        }
    )
    return out if isinstance(out, tuple) else (out,)


def _error_of_checkpoint(device):
    model, tokenizer = load(SHIPPED, device=device)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt").to(device)
    error = difference(model, stock(SHIPPED).to(device), inputs)
    if reasons := report(model).swapped[0].stock_calls:
        raise RuntimeError(f"the stock forward ran: {', '.join(reasons)}")
    return error, error / LIKE_STOCK


def stock(name):
    """The stock encoder of a checkpoint, in float32 on the CPU."""
    cls = transformers.BertModel
    return cls.from_pretrained(name, add_pooling_layer=False, dtype=torch.float32)


@torch.inference_mode()
def difference(model, other, inputs):
    """The largest difference between the last hidden states of two models, over the tokens."""
    apart = model(**inputs).last_hidden_state - other(**inputs).last_hidden_state
    return apart[inputs["attention_mask"].bool()].abs().max()


def _name(dtype):
    return str(dtype).removeprefix("torch.")


# -- what to do about it --------------------------------------------------------------------
def _problems(versions, gpus, backends, checks):
    """(problem, remedy) of each."""
    if gpus and (reason := backends["cuda"]["reason"]):
        problem, _, remedy = reason.partition("; ")
        yield problem, remedy or "use a newer GPU; on this one the stock forward runs"
    if versions["driver"] and not gpus:
        yield (
            f"driver {versions['driver']} of NVIDIA is here, torch {versions['torch']} sees no GPU",
            "install a torch built for CUDA, no newer than the driver supports, and look at"
            " CUDA_VISIBLE_DEVICES",
        )
    if INTERPRET:
        yield (
            "TRITON_INTERPRET=1: Triton's interpreter runs the kernels, very slowly",
            "unset it, unless you develop kernels",
        )
    for device in backends:
        failed = [c for c in checks if c["device"] == device and not c["passed"]]
        if failed:
            names = dict.fromkeys(f"{c['subject']} in {c['dtype']}" for c in failed)
            raised = dict.fromkeys(c["raised"] for c in failed if c["raised"])
            yield (
                f"wrong on {device}: {'; '.join((', '.join(names), *raised))}",
                f"trust no result on {device}, use transformers' own classes, and report this with"
                " the output of bert-fast doctor --json",
            )
    yield from busy()


def busy():
    """(problem, remedy) if other processes take the CPUs that OpenMP's threads rely on.

    A thread that spins at a barrier then takes the time slice of the one it waits for. At a load of
    3.7 on 2 CPUs, a forward of 6 layers of 384 took 3.0 s, and 0.65 s with OMP_WAIT_POLICY=PASSIVE.
    """
    load, cpus = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0, os.cpu_count()
    if load > cpus and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        yield (
            f"the machine is busy, with a load of {load:.1f} on {cpus} CPUs, and slow for it",
            "set OMP_WAIT_POLICY=PASSIVE in the environment",
        )
