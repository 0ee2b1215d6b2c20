"""transformers' own tests of a model, on bert_fast's classes and on accelerated stock models.

    python tests/hf_tests.py CHECKOUT [--model bert] [-k EXPRESSION]

CHECKOUT is a checkout of transformers, whose own library and tests are run, three times:

    stock        as they are: what passes here has to pass twice more
    classes      with transformers.BertModel and its family replaced by the classes of bert_fast
    accelerated  with every encoder accelerated as soon as it is constructed

Most of those tests compare a model with itself, and would not see a forward that is wrong. So in
the last two each forward on the kernels is also compared with a stock twin: a copy of the encoder,
restored, on a copy of the inputs.

This file is the command and, by `pytest -p hf_tests`, the plugin of the three runs.
"""

import argparse
import collections
import copy
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

MODES = ("stock", "classes", "accelerated")
BY_DESIGN = {  # tests that may fail on our classes, and why
    "test_inherits_generation_mixin":
        "it reads the names of a class's own bases; ours inherit GenerationMixin through stock's",
}  # fmt: skip
TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


# -- the command ----------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description="transformers' own tests, on bert_fast")
    parser.add_argument("checkout", type=Path, help="of transformers, at a version that we support")
    parser.add_argument("--model", action="append", help="a folder of tests/models; repeatable")
    parser.add_argument("-k", dest="expression", help="as for pytest")
    options = parser.parse_args()
    models = options.model or ["bert"]
    files = [f"tests/models/{model}/test_modeling_{model}.py" for model in models]
    for file in ("src/transformers/__init__.py", *files):
        if not (options.checkout / file).is_file():
            parser.error(f"{options.checkout} is not a checkout of transformers: no {file} in it")
    runs = {mode: _run(mode, options, files) for mode in MODES}
    print()
    for mode, run in runs.items():
        count = collections.Counter(outcome for outcome, _ in run["tests"].values())
        print(f"{mode:12}", ", ".join(f"{n} {outcome}" for outcome, n in sorted(count.items())))
        if mode != "stock":
            print(f"{'':12} {run['compared']} forwards on the kernels, each compared with a twin")
            for reason, n in sorted(run["stock"].items(), key=lambda item: -item[1]):
                print(f"{'':12} {n} stock forwards: {reason}")
    broken = 0
    for test in (t for t, (outcome, _) in runs["stock"]["tests"].items() if outcome == "passed"):
        for mode in MODES[1:]:
            outcome, why = runs[mode]["tests"].get(test, ("not run", ""))
            if outcome == "passed":
                continue
            print(f"\n{mode}: {test} {outcome}, and passes on stock\n  {why}")
            if mode == "classes" and (reason := BY_DESIGN.get(test.rpartition("::")[2])):
                print(f"  by design: {reason}")
            else:
                broken += 1
    idle = [mode for mode in MODES[1:] if not runs[mode]["compared"]]
    if idle:
        print(f"\nno forward ran on the kernels: {', '.join(idle)}")
    return int(bool(broken or idle or not runs["stock"]["tests"]))


def _run(mode, options, files):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "outcomes.json")
        paths = (Path(__file__).parent, options.checkout.resolve() / "src")
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "BERT_FAST_HF_MODE": mode,
            "BERT_FAST_HF_OUT": str(out),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "pytest", "-p", "hf_tests", "-q", "--tb=no", *files]
        command += ["-k", options.expression] if options.expression else []
        done = subprocess.run(
            command, cwd=options.checkout, env=env, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode not in (0, 1):  # all passed, or some failed
            sys.exit(f"{done.stdout}\nhf_tests: the run on {mode} broke off")
        return json.loads(out.read_text())


# -- the plugin -----------------------------------------------------------------------------
MODE = os.environ.get("BERT_FAST_HF_MODE")
tests = {}
stock = collections.Counter()
compared = 0


def pytest_configure():
    if MODE == "stock":
        return
    from bert_fast import modeling

    _watch(modeling._Encoder, modeling.Calls)
    (_replace if MODE == "classes" else _accelerate)(modeling.STOCK)


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed:
        why = str(report.longrepr[2] if report.skipped else report.longreprtext)
        tests[report.nodeid] = (report.outcome, "".join(why.strip().splitlines()[-1:]))


def pytest_sessionfinish(session):
    found = {"tests": tests, "compared": compared, "stock": stock}
    Path(os.environ["BERT_FAST_HF_OUT"]).write_text(json.dumps(found))


def _replace(classes):
    """Give ours where transformers' lazy modules are asked for a class of its: users find classes
    there, and so do the Auto classes. Some of the tests import transformers a second time."""
    import transformers

    fast_of = {old: fast for fast, old in classes.items()}
    lazy = type(transformers)
    look_up = lazy.__getattr__

    def look_up_ours(self, name):
        value = look_up(self, name)
        if isinstance(value, type) and value in fast_of:
            value = fast_of[value]
            setattr(self, name, value)
        return value

    lazy.__getattr__ = look_up_ours
    for module in [m for m in sys.modules.values() if isinstance(m, lazy)]:
        for old in fast_of:
            vars(module).pop(old.__name__, None)  # found before


def _accelerate(classes):
    import bert_fast

    def wrap(cls):
        init = cls.__init__

        @functools.wraps(init)
        def accelerated(self, *args, **kwargs):
            init(self, *args, **kwargs)
            if type(self) is cls:
                bert_fast.accelerate(self)

        cls.__init__ = accelerated

    for fast, old in classes.items():
        if hasattr(fast, "architecture"):
            wrap(old)


def _watch(encoder, calls):
    """Compare each forward on the kernels with a stock twin's, and count the stock forwards."""
    run_on_kernels, count = encoder._run_on_kernels, calls.count

    def counted(self, reason):
        if reason is not None:
            stock[reason] += 1
        return count(self, reason)

    def beside_a_twin(self, inputs, kwargs):
        global compared
        if torch.compiler.is_compiling() or _is_fake(self) or _drops(self):
            return run_on_kernels(self, inputs, kwargs)
        twin, given = _twin(self, inputs)
        output = run_on_kernels(self, inputs, kwargs)
        with torch.no_grad():
            expected = twin(**given, **kwargs)
        _compare(output, expected, inputs)
        compared += 1
        return output

    encoder._run_on_kernels, calls.count = beside_a_twin, counted


def _is_fake(model):
    return any(
        p.device.type == "meta" or type(p.data) is not torch.Tensor for p in model.parameters()
    )


def _drops(model):
    """Whether a dropout is active, in which a twin would drop other places."""
    return any(
        isinstance(m, torch.nn.Dropout) and m.training and m.p > 0 for m in model.modules()
    )


@torch.no_grad()
def _twin(model, inputs):
    """A stock copy of model, and of the inputs, in which our forward will fill the cache."""
    import bert_fast

    given = {
        name: copy.deepcopy(value.detach() if isinstance(value, torch.Tensor) else value)
        for name, value in inputs._asdict().items()
        if value is not None
    }
    return bert_fast.restore(copy.deepcopy(model)), given


@torch.no_grad()
def _compare(output, expected, inputs):
    """Hidden states at the tokens, and what the pooler makes of a first token that is there."""
    names = getattr(expected, "keys", lambda: range(len(expected)))()
    assert len(names) == len(output), f"{len(output)} outputs, and stock has {list(names)}"
    for name in names:
        ours, theirs = output[name], expected[name]
        assert type(ours) is type(theirs) or not isinstance(theirs, torch.Tensor), name
        pairs = zip(ours, theirs) if isinstance(theirs, tuple) else [(ours, theirs)]
        for a, b in pairs:
            if isinstance(b, torch.Tensor):
                _assert_close(a, b, inputs.attention_mask, name)


def _assert_close(a, b, mask, name):
    assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.shape}, stock {b.shape}"
    if mask is not None:
        there = mask.to(a.device).bool()
        there = there if a.ndim == 3 else there[:, 0]
        a, b = a[there], b[there]
    tolerance = TOLERANCES.get(a.dtype, 0)
    torch.testing.assert_close(
        a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


if __name__ == "__main__":
    sys.exit(main())
