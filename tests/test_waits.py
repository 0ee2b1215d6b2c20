"""A forward on a GPU without gradients waits for nothing, and uses no row that nobody wrote.

On a GPU torch itself says where it waits. Without one the forward runs on tensors without values,
through the launchers and up to the kernels: who asks for a value fails.
"""

import pytest
import torch
from models import B, S, assert_ran_fast, ids_of, masks, stock_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import bert_fast
from bert_fast import encoder
from bert_fast.inputs import CACHE
from bert_fast.kernels import launch
from bert_fast.kernels.launch import COMPOSED, HAS_TRITON, INTERPRET, KERNELS

if HAS_TRITON:
    from triton.runtime import JITFunction

GPU = torch.cuda.is_available() and not INTERPRET
META = torch.device("meta")
MODELS = {  # name of a class -> changes to its config
    "BertModel": {},
    "RobertaModel": {},
    "ElectraModel": {},
    "DistilBertModel": {},
    "BertForSequenceClassification": {},
    "BertLMHeadModel": {"is_decoder": True, "add_cross_attention": True},
}
if INTERPRET:  # slow, and an op is the same in all of them
    MODELS = {name: MODELS[name] for name in ("BertModel", "BertLMHeadModel")}
KINDS = ("none", "full", "right", "left", "holes", "a row of zeros", "all zeros")
WITH_ROWS_PAST_T = ("a row of zeros", "all zeros") if INTERPRET else KINDS[2:]


def inputs_of(name, kind, device):
    inputs = {"input_ids": ids_of(device), "attention_mask": masks(device)[kind]}
    if "add_cross_attention" in MODELS[name]:
        inputs["encoder_hidden_states"] = torch.randn(B, S, 64, generator=torch.manual_seed(2))
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].to(device)
        inputs["encoder_attention_mask"] = masks(device)["left"]
    return inputs


# -- waits ----------------------------------------------------------------------------------
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
FROM_HOST = (torch.tensor, torch.as_tensor)
WRITES_AT = (torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class SaysCuda(TorchFunctionMode):
    """Tensors on the meta device say that they are on a GPU, and what is to be there is on meta."""

    def __torch_function__(self, fn, types, args=(), kwargs=None):
        if fn == torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        if fn == torch.Tensor.get_device:
            return 0
        kwargs = kwargs or {}
        if fn != torch.device:
            args, kwargs = tree_map_only(
                torch.device, lambda d: META if d.type == "cuda" else d, (args, kwargs)
            )
        result = fn(*args, **kwargs)
        if fn in FROM_HOST:
            assert not (result.is_meta and result.numel()), "copies from the host"
        return result


class NoWaiting(TorchDispatchMode):
    """Ops run their Triton form. Two ways to wait need no value of a tensor: they fail here."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "bert_fast":
            with self:
                return (KERNELS | COMPOSED)[op._opname](*args)
        result = op(*args, **(kwargs or {}))
        if op in COPIES:
            other = args[0] if op is COPIES[0] else args[1]
            assert other.device == result.device, f"copies from {other.device} to {result.device}"
        if op in WRITES_AT:
            indices = [i for i in args[1] if i is not None]
            assert all(i.dtype != torch.bool for i in indices), f"{op} counts what is true"
        return result


@pytest.fixture
def without_values(monkeypatch):
    """(model, inputs) -> nothing: model(**inputs) as on a GPU, but for the kernels, and where there
    are gradients its backward."""
    if not HAS_TRITON or INTERPRET or GPU:
        pytest.skip("of launchers, without a GPU")
    monkeypatch.setattr(launch, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "arch", lambda: 90)
    monkeypatch.setattr(launch, "multiprocessors", lambda: 132)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **kwargs: None)

    def forward_and_backward(model, inputs):
        model.to(META)
        inputs = {k: t if t is None else t.to(META) for k, t in inputs.items()}
        with SaysCuda(), NoWaiting():
            last = model(**inputs)[0]
            assert last.is_meta
            if last.requires_grad:
                # Tensor.backward would leave SaysCuda.
                run = torch.autograd.Variable._execution_engine.run_backward
                run((last,), (last.detach(),), False, False, (), True, accumulate_grad=True)

    return forward_and_backward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_forward_asks_for_no_value(name, kind, without_values):
    fast = bert_fast.accelerate(stock_model(name, **MODELS[name]))
    without_values(fast, inputs_of(name, kind, "cpu"))
    assert_ran_fast(fast)


@torch.no_grad()
def test_attention_in_another_model_asks_for_no_value(without_values):
    model = stock_model("AlbertModel", attn_implementation="bert_fast")
    without_values(model, inputs_of("BertModel", "right", "cpu"))
    assert bert_fast.report(model).attention.fast_calls == 2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_nor_does_a_step_of_training_where_no_shape_may_depend_on_data(
    name, dropout, without_values, monkeypatch
):
    monkeypatch.setattr(encoder, "_stays_on_device", lambda device: True)
    fast = bert_fast.accelerate(stock_model(name, **MODELS[name])).train()
    for m in fast.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = dropout
    without_values(fast, inputs_of(name, "holes", "cpu"))
    assert_ran_fast(fast)
    assert sum(p.grad is not None for p in fast.parameters()) > 20


def test_a_forward_that_reads_a_value_is_found(without_values):
    """With gradients T is read."""
    fast = bert_fast.accelerate(stock_model())
    without_values(fast, inputs_of("BertModel", "none", "cpu"))
    with pytest.raises(RuntimeError, match="item"):
        without_values(fast, inputs_of("BertModel", "right", "cpu"))


@pytest.mark.skipif(not GPU, reason="torch says so of a GPU alone")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_forward_does_not_wait_for_the_gpu(name, kind):
    fast = bert_fast.accelerate(stock_model(name, "cuda", **MODELS[name]))
    inputs = inputs_of(name, kind, "cuda")
    fast(**inputs)  # compiles, and looks at buffers
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_ran_fast(fast)


# -- rows that nobody wrote -----------------------------------------------------------------
def tensors(output):
    """All in an output of a model, those of its caches too."""
    output = dict(output)
    caches = output.pop(CACHE, None)
    layers = [
        layer
        for cache in (caches and (caches.self_attention_cache, caches.cross_attention_cache)) or ()
        for layer in cache.layers
    ]
    return [*tree_leaves(output), *(t for layer in layers for t in (layer.keys, layer.values))]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_past_the_tokens_reach_nothing(name, gradients, device, monkeypatch):
    """T stays on the device, on a CPU too, and memory that nobody wrote is NaN."""
    fast = bert_fast.accelerate(stock_model(name, device, **MODELS[name]))
    for kind in WITH_ROWS_PAST_T:
        results = []
        for static in (True, False):
            monkeypatch.setattr(encoder, "_stays_on_device", lambda device, s=static: s)
            fast.zero_grad()
            with torch.set_grad_enabled(gradients):
                out = fast(**inputs_of(name, kind, device), output_hidden_states=not gradients)
            results.append(tensors(out))
            if gradients:
                out[0].square().sum().backward()
                results[-1] += [p.grad for p in fast.parameters() if p.grad is not None]
        largest = max(t.abs().max().item() for t in results[1] if t.numel())
        for ours, theirs in zip(*results, strict=True):  # of keys' biases gradients are rounding
            torch.testing.assert_close(ours, theirs, atol=1e-5 * max(largest, 1), rtol=1e-4)
    assert_ran_fast(fast)
