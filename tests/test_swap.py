"""What is swapped, what falls back and is named, what fails and says why; weights and checkpoints.

A call that falls back must agree with the stock model to the last bit.
"""

import copy
import functools
import gc
import pickle
import sys
import threading
import types
import weakref

import pytest
import torch
import transformers
from models import (
    HEADS,
    B,
    S,
    assert_ran_fast,
    assert_ran_stock,
    config_of,
    fast_calls,
    ids_of,
    masks,
    stock_model,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import bert_fast
from bert_fast import encode
from bert_fast.kernels.launch import INTERPRET


# -- what the kernels do not cover ----------------------------------------------------------
class Wrapped(torch.nn.Module):
    """An adapter around a Linear, as LoRA makes it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.low = base, torch.nn.Linear(base.in_features, 2, bias=False)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + self.low(x).sum(-1, keepdim=True)


def wrap(model):
    attention = model.encoder.layer[1].attention.self
    attention.value = Wrapped(attention.value).to(model.device)


def replace_forward(model):
    dense = model.encoder.layer[0].intermediate.dense
    dense.forward = lambda x: torch.nn.functional.linear(x, dense.weight * 2)


def custom_attention(model):
    def attention(module, q, k, v, mask, **kwargs):
        return v.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("test_identity", attention)
    model.config._attn_implementation = "test_identity"


class OwnEmbeddings(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(99, 64)

    def forward(self, input_ids, **others):
        return self.table(input_ids)


class OwnEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(64, 64)

    def forward(self, hidden_states, *args, **kwargs):
        output = transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions
        return output(last_hidden_state=self.dense(hidden_states))


def own_words(model):
    words = torch.nn.Sequential(torch.nn.Embedding(99, 64), torch.nn.Tanh())
    model.set_input_embeddings(words.to(model.device))


def delete_a_bias(model):
    """Set to None without deleting it, it would stay among the parameters."""
    dense = model.encoder.layer[0].output.dense
    del dense.bias
    dense.bias = None


def own_embeddings(model):
    model.embeddings = OwnEmbeddings().to(model.device)


def own_encoder(model):
    model.encoder = OwnEncoder().to(model.device)


def masks_of_its_own(model):
    """Causal ones."""
    made = type(model)._create_attention_masks

    def create(**inputs):
        mask, of_encoder = made(model, **inputs)
        causal = torch.ones(S, S, dtype=torch.bool, device=model.device).tril()[None, None]
        return causal if mask is None else mask & causal, of_encoder

    model._create_attention_masks = create


CALLS = {
    "output_attentions": {"output_attentions": True},
    "3-D attention_mask": {"attention_mask": torch.ones(B, S, S)},
    "4-D attention_mask": {"attention_mask": torch.ones(B, 1, S, S, dtype=torch.bool)},
    "keyword is_causal": {"is_causal": True},
    "attention_mask of another length": {"attention_mask": torch.ones(B, S + 2)},
    "output_hidden_states with gradients": {"output_hidden_states": True},
    "token_type_ids of a shape that stock broadcasts": {"token_type_ids": torch.arange(S) % 2},
    "token_type_ids of a shape": {"token_type_ids": torch.arange(B)[:, None] % 2},
    "position_ids of a shape": {"position_ids": torch.arange(B)[:, None]},
}
MODELS = {
    "torch.float64 weights": ({}, lambda m: m.double()),
    "value: test_swap.Wrapped": ({}, wrap),
    "intermediate.dense: forward replaced": ({}, replace_forward),
    "attn_implementation test_identity": ({}, custom_attention),
    "transformers.activations.": ({"hidden_act": "gelu_new"}, None),
    "torch.nn.modules.activation.ReLU": ({"hidden_act": "relu"}, None),
    "heads of 320": ({"hidden_size": 320, "num_attention_heads": 1}, None),
    "embeddings.word_embeddings: torch.nn.modules.container.Sequential": ({}, own_words),
    "embeddings: test_swap.OwnEmbeddings": ({}, own_embeddings),
    "encoder: test_swap.OwnEncoder": ({}, own_encoder),
    "hidden size 8224": ({"hidden_size": 8224, "num_hidden_layers": 0}, None),
    "output.dense: no bias or weight": ({}, delete_a_bias),
    "max_norm": ({}, lambda m: setattr(m.embeddings.word_embeddings, "max_norm", 1.0)),
}


@pytest.mark.parametrize("reason", CALLS)
def test_a_call_that_is_not_covered_runs_stock_and_is_named(reason, device):
    stock = stock_model(device=device)
    stock.config._attn_implementation = "eager"
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    keywords = {k: v.to(device) if torch.is_tensor(v) else v for k, v in CALLS[reason].items()}
    ours, theirs = (m(ids_of(device), **keywords) for m in (fast, stock))
    assert_ran_stock(fast, reason)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        pairs = zip(ours[key], value) if isinstance(value, tuple) else [(ours[key], value)]
        assert all(torch.equal(a, b) for a, b in pairs), key


@pytest.mark.parametrize("reason", MODELS)
def test_a_model_that_is_not_covered_runs_stock_and_is_named(reason, device):
    changes, change = MODELS[reason]
    stock = stock_model(device=device, **changes)
    if change:
        change(stock)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    if "forward replaced" in reason:
        replace_forward(fast)  # a copy's replacement would hold the original's weight
    assert reason in bert_fast.report(fast).swapped[0].reason
    mask = masks(device)["right"]
    ours, theirs = (m(ids_of(device), mask)[0] for m in (fast, stock))
    assert_ran_stock(fast, reason)
    assert torch.equal(ours, theirs)


@pytest.mark.skipif(
    not hasattr(transformers.BertModel, "_create_attention_masks"), reason="no such method there"
)
def test_a_model_that_makes_masks_of_its_own_runs_stock_and_is_named(device):
    stock = stock_model(device=device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    for m in (stock, fast):
        masks_of_its_own(m)
    mask = masks(device)["right"]
    ours, theirs = (m(ids_of(device), mask)[0] for m in (fast, stock))
    assert_ran_stock(fast, "_create_attention_masks replaced")
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_attention_function_in_the_place_of_transformers_runs(
    implementation, device, monkeypatch
):
    stock = stock_model(device=device, attn_implementation=implementation)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    fast(ids_of(device))
    assert_ran_fast(fast)

    def attention(module, q, k, v, mask, **kwargs):
        return v.transpose(1, 2).contiguous(), None

    if implementation == "eager":
        module = sys.modules[transformers.BertModel.__module__]
        monkeypatch.setattr(module, "eager_attention_forward", attention)
    else:
        functions = transformers.AttentionInterface._global_mapping
        monkeypatch.setitem(functions, implementation, attention)
    ours, theirs = (m(ids_of(device))[0] for m in (fast, stock))
    assert torch.equal(ours, theirs)
    assert fast_calls(fast)[0][1], "stock has run"


def test_a_child_that_is_none_is_no_child(device):
    stock = stock_model(device=device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    fast.encoder.layer[0].register_module("adapter", None)
    fast.embeddings.register_module("further", None)
    assert torch.equal(fast(ids_of(device))[0], bert_fast.accelerate(stock)(ids_of(device))[0])
    assert_ran_fast(fast)


@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_global_backward_hooks_run(kind, device):
    fast = bert_fast.accelerate(stock_model(device=device))
    seen = []
    register = getattr(torch.nn.modules.module, f"register_module_{kind}")
    handle = register(lambda *_: seen.append(1))
    try:
        fast(ids_of(device))[0].sum().backward()
    finally:
        handle.remove()
    assert len(seen) > 20
    assert_ran_stock(fast, "global module hooks")


def test_token_types_may_have_a_row_that_is_not_trained(device):
    stock = stock_model(device=device)
    table = torch.nn.Embedding(2, 64, padding_idx=0).to(device)
    stock.embeddings.token_type_embeddings = table
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    for m in (stock, fast):
        m(ids_of(device), token_type_ids=ids_of(device) % 2)[0].square().sum().backward()
    assert_ran_fast(fast)
    ours, theirs = (m.embeddings.token_type_embeddings.weight.grad for m in (fast, stock))
    assert not ours[0].any() and not theirs[0].any()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_model_that_its_modules_know_is_freed(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    fast.encoder.layer[0].owner = [fast]
    alive = weakref.ref(fast)
    with torch.no_grad():
        fast(ids_of(device))
    assert_ran_fast(fast)
    del fast
    gc.collect()
    assert alive() is None


def test_positions_of_one_row_run_stock_in_a_distilbert(device):
    stock = stock_model("DistilBertModel", device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    positions = torch.arange(S, device=device).flip(0)
    ours, theirs = (m(ids_of(device), position_ids=positions)[0] for m in (fast, stock))
    assert_ran_stock(fast, "position_ids of a shape that stock broadcasts")
    assert torch.equal(ours, theirs)


def test_a_decoder_with_another_encoder_runs_stock_and_is_named(device):
    stock = stock_model(device=device, is_decoder=True, add_cross_attention=True, use_cache=False)
    own_encoder(stock)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    memory = torch.ones(B, 3, 64, device=device)
    ours, theirs = (m(ids_of(device), encoder_hidden_states=memory)[0] for m in (fast, stock))
    assert_ran_stock(fast, "encoder: test_swap.OwnEncoder")
    assert bert_fast.report(fast).swapped[0].layers == 0
    assert torch.equal(ours, theirs)


def test_with_embeddings_of_its_own_a_model_has_the_positions_of_its_config():
    fast = bert_fast.accelerate(stock_model("RobertaModel"))
    tokenizer = types.SimpleNamespace(model_max_length=1000)
    assert encode.positions(fast, tokenizer) == 38  # two rows are padding's
    own_embeddings(fast)
    assert encode.positions(fast, tokenizer) == 40


def gradient(model, ids):
    def loss(weights):
        return torch.func.functional_call(model, weights, (ids,))[0][..., :9].square().sum()

    weights = {name: p.detach() for name, p in model.named_parameters()}
    return torch.func.grad(loss)(weights)["encoder.layer.0.output.dense.weight"]


def tangent(model, ids):
    embeds = model.get_input_embeddings()(ids).detach()
    run = lambda x: model(inputs_embeds=x)[0]  # noqa: E731
    return torch.func.jvp(run, (embeds,), (torch.ones_like(embeds),))[1]


def tangent_of_dual(model, ids):
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(embeds, torch.ones_like(embeds))
        return torch.autograd.forward_ad.unpack_dual(model(inputs_embeds=dual)[0]).tangent


def mapped(model, ids):
    return torch.vmap(lambda one: model(one[None])[0])(ids)


@pytest.mark.parametrize("transform", [gradient, tangent, tangent_of_dual, mapped])
def test_transforms_of_torch_func_give_what_stock_gives_and_are_named(transform, device):
    stock = stock_model(device=device, attn_implementation="eager")
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    assert torch.equal(transform(fast, ids_of(device)), transform(stock, ids_of(device)))
    assert_ran_stock(fast, "torch.func or forward-mode AD")
    fast(ids_of(device))
    assert fast_calls(fast)[0][0] == 1


def test_weights_of_mixed_dtypes_are_named():
    fast = bert_fast.accelerate(stock_model())
    fast.encoder.layer[1].output.LayerNorm.double()
    (swapped,) = bert_fast.report(fast).swapped
    assert swapped.reason.startswith("encoder.layer.1.output.LayerNorm: torch.float64 on cpu")


@pytest.mark.parametrize("where", ["encoder.layer.0.attention.self.query", "embeddings", "encoder"])
def test_hooks_on_modules_run(where, device):
    fast = bert_fast.accelerate(stock_model(device=device))
    seen = []
    fast.get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    fast(ids_of(device))
    assert seen
    assert_ran_stock(fast, f"{where}: hooks")


def test_hooks_on_the_model_run_beside_the_kernels(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    seen = []
    fast.register_forward_hook(lambda *_: seen.append(1))
    fast.register_forward_pre_hook(lambda *_: seen.append(2))
    fast(ids_of(device))
    assert sorted(seen) == [1, 2]
    assert_ran_fast(fast)


def test_after_attentions_were_recorded_once_the_kernels_run_again(device):
    stock = stock_model(device=device)
    stock.config._attn_implementation = "eager"
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    with torch.no_grad():
        ours, theirs = (m(ids_of(device), output_attentions=True) for m in (fast, stock))
        assert len(ours.attentions) == 2
        for a, b in zip(ours.attentions, theirs.attentions, strict=True):
            assert torch.equal(a, b)
        fast(ids_of(device))
    ((count, _),) = fast_calls(fast)
    assert count == 1


def test_an_outer_model_that_records_hidden_states_gets_them(device):
    fast = bert_fast.accelerate(stock_model("BertForMaskedLM", device))
    stock = stock_model("BertForMaskedLM", device)
    ours, theirs = (m(ids_of(device), output_hidden_states=True) for m in (fast, stock))
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(a, b)


def test_a_model_on_the_meta_device_runs_stock():
    fast = bert_fast.accelerate(stock_model(device="meta"))
    assert fast(ids_of("meta"))[0].shape == (B, S, 64)
    assert_ran_stock(fast, "no kernels for meta tensors")


def test_a_reason_is_logged_once(device, caplog):
    fast = bert_fast.accelerate(stock_model(device=device)).double()
    for _ in range(3):
        fast(ids_of(device))
    assert [r.getMessage() for r in caplog.records if r.name == "bert_fast"] == [
        "bert_fast: the stock forward runs: torch.float64 weights"
    ]
    assert fast_calls(fast) == [(0, {"torch.float64 weights": 3})]


# -- bad input ------------------------------------------------------------------------------
BAD = {
    "give input_ids or inputs_embeds, one of them; got neither": {"input_ids": None},
    "give input_ids or inputs_embeds, one of them; got both": {
        "inputs_embeds": torch.zeros(B, S, 64)
    },
    "attention_mask must be [5, 23] like input_ids, got [3, 23]": {
        "attention_mask": torch.ones(3, S)
    },
    "attention_mask must be [5, 23] like input_ids, got [23]": {"attention_mask": torch.ones(S)},
    "attention_mask must be [5, 23] like input_ids, got [1, 23]": {
        "attention_mask": torch.ones(1, S)
    },
    "the model has 40 positions (max_position_embeddings), input_ids has 41": {
        "input_ids": torch.zeros(2, 41).long()
    },
    "input_ids must be [batch, length], got [23]": {"input_ids": torch.zeros(S).long()},
    "token_type_ids must be [5, 23] like input_ids, got [5, 7]": {
        "token_type_ids": torch.zeros(B, 7).long()
    },
    "position_ids must be [5, 23] like input_ids, got [7]": {"position_ids": torch.arange(7)},
    "input_ids has length 0; the pooler needs a first position": {
        "input_ids": torch.zeros(B, 0).long()
    },
    "input_ids must be int32 or int64 [B, S], got float32": {"input_ids": torch.zeros(B, S)},
    "input_ids is on meta and the model on": {"input_ids": ids_of().to("meta")},
    "input_ids must be a tensor, got list": {"input_ids": [[1, 2]]},
    "position_ids must be a tensor, got range": {"position_ids": range(S)},
}
BAD_IDS = {
    "input_ids must be in 0 to 98, the rows of its table; got 99": {"input_ids": ids_of() + 1},
    "input_ids must be in 0 to 98, the rows of its table; got -1": {"input_ids": ids_of() - 1},
    "token_type_ids must be in 0 to 1, the rows of its table; got 2": {
        "token_type_ids": ids_of(high=3)
    },
    "position_ids must be in 0 to 39, the rows of its table; got 40": {
        "position_ids": torch.full((B, S), 40)
    },
}


def assert_error(message, keywords, device):
    fast = bert_fast.accelerate(stock_model(device=device))
    keywords = {"input_ids": ids_of(), **keywords}
    keywords = {
        k: v.to(device) if torch.is_tensor(v) and v.device.type == "cpu" else v
        for k, v in keywords.items()
    }
    with pytest.raises(ValueError) as caught:
        fast(**keywords)
    assert message in str(caught.value)


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_an_error_that_says_why(message, device):
    assert_error(message, BAD[message], device)


@pytest.mark.skipif(
    INTERPRET or torch.cuda.is_available(), reason="a kernel answers with a device-side assertion"
)
@pytest.mark.parametrize("message", BAD_IDS)
def test_an_id_outside_its_table_is_an_error_that_says_which(message):
    assert_error(message, BAD_IDS[message], "cpu")


@pytest.mark.skipif(
    INTERPRET or torch.cuda.is_available(), reason="a kernel answers with a device-side assertion"
)
@pytest.mark.parametrize("name", ["BertModel", "RobertaModel"])
def test_a_table_may_be_resized_after_an_id_outside_it(name):
    fast = bert_fast.accelerate(stock_model(name))
    with pytest.raises(ValueError) as kept:
        fast(ids_of() + 1)
    fast.resize_token_embeddings(100)
    fast(ids_of() + 1).last_hidden_state.sum().backward()
    assert fast.get_input_embeddings().weight.grad.shape == (100, 64)
    assert "input_ids must be in 0 to 98" in str(kept.value)


def test_an_empty_batch_gives_an_empty_result(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    out = fast(ids_of(device)[:0], torch.ones(0, S, device=device))
    assert out.last_hidden_state.shape == (0, S, 64)
    assert out.pooler_output.shape == (0, 64)


# -- accelerate, restore, report ------------------------------------------------------------
def test_accelerate_finds_bert_inside_anything_and_restore_gives_it_back(device):
    stock = stock_model("BertForSequenceClassification", device)
    before = copy.deepcopy(stock.state_dict())
    parameters = list(stock.parameters())
    model = torch.nn.Sequential(torch.nn.ModuleDict({"encoder": stock}))
    assert bert_fast.accelerate(model) is model
    assert type(stock.bert) is bert_fast.BertModel
    with torch.no_grad():
        stock(ids_of(device))
    assert bert_fast.restore(model) is model
    assert type(stock.bert) is transformers.BertModel
    assert type(stock) is transformers.BertForSequenceClassification
    assert all(a is b for a, b in zip(parameters, stock.parameters(), strict=True))
    after = stock.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    reference = stock_model("BertForSequenceClassification", device)
    assert vars(stock.bert).keys() == vars(reference.bert).keys()
    assert torch.equal(stock(ids_of(device))[0], reference(ids_of(device))[0])


@pytest.mark.parametrize("name", HEADS)
def test_restore_makes_each_class_the_stock_class(name):
    fast = getattr(bert_fast, name)(config_of())
    bert_fast.restore(fast)
    assert {type(m).__module__.partition(".")[0] for m in fast.modules()} <= {
        "transformers", "torch",
    }  # fmt: skip


def test_accelerating_twice_or_restoring_an_untouched_model_does_nothing_and_says_so(caplog):
    model = stock_model()
    bert_fast.restore(model)
    bert_fast.accelerate(model)
    bert_fast.accelerate(model)
    assert "restore: nothing of bert_fast in it" in caplog.text
    assert "accelerate: already accelerated, nothing to do" in caplog.text


def test_accelerate_without_a_bert_names_what_it_found():
    config = transformers.MPNetConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=9
    )
    with pytest.raises(ValueError) as caught:
        bert_fast.accelerate(transformers.MPNetModel(config))
    assert "looked for transformers.BertModel inside MPNetModel, or CamembertModel," in str(
        caught.value
    )
    assert "found MPNetModel" in str(caught.value)
    with pytest.raises(ValueError, match="found no such module"):
        bert_fast.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got str"):
        bert_fast.accelerate("bert-base-uncased")


def compiled(model):
    model.forward = torch.compile(model.forward, backend="eager")


def hooked(model):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model, hooks.ModelHook())


def curried(model):
    model.forward = functools.partial(model.forward, return_dict=True)


def undo(model):
    if hasattr(model, "_hf_hook"):
        hooks = pytest.importorskip("accelerate.hooks")
        hooks.remove_hook_from_module(model)
    else:
        del model.forward


@pytest.mark.parametrize("replace", [compiled, hooked, curried])
def test_a_forward_replaced_before_is_named_and_undone_it_is_not_in_the_way(
    replace, device, caplog
):
    stock = stock_model(device=device)
    model = torch.nn.ModuleDict({"inside": copy.deepcopy(stock)})
    replace(stock)  # on a GPU, compiled is not the bits of plain
    replace(model["inside"])
    bert_fast.accelerate(model)
    assert "inside does not run on the kernels: its forward was replaced" in caplog.text
    (swapped,) = bert_fast.report(model).swapped
    assert (swapped.reason, swapped.backend) == ("forward replaced on the module", None)
    expected = stock(ids_of(device))[0]
    assert torch.equal(model["inside"](ids_of(device))[0], expected)

    undo(model["inside"])
    bert_fast.accelerate(model)
    assert bert_fast.report(model).swapped[0].reason is None
    model["inside"](ids_of(device))
    assert_ran_fast(model)
    replace(bert_fast.restore(model)["inside"])
    bert_fast.restore(bert_fast.accelerate(model))  # the forward that was replaced is stock's
    assert torch.equal(model["inside"](ids_of(device))[0], expected)


class Decorated(bert_fast.BertModel):
    @torch.no_grad()
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_forward_of_a_subclass_hides_nothing(caplog):
    model = Decorated(config_of("BertModel")).eval()
    bert_fast.accelerate(model, frozen=True)
    assert "does not run" not in caplog.text
    assert bert_fast.report(model).swapped[0].reason is None


@pytest.mark.parametrize("replace", [compiled, hooked, curried])
def test_a_forward_replaced_later_runs_the_kernels_and_stands_in_the_way_of_restore(
    replace, device
):
    stock = stock_model(device=device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    replace(fast)
    assert bert_fast.report(fast).swapped[0].reason is None
    with torch.no_grad():
        fast(ids_of(device))
    with pytest.raises(ValueError, match="restore: the model would go on calling bert_fast"):
        bert_fast.restore(fast)
    assert type(fast) is bert_fast.BertModel
    undo(fast)
    bert_fast.restore(fast)
    assert "forward" not in vars(fast)
    assert torch.equal(fast(ids_of(device))[0], stock(ids_of(device))[0])


def test_a_model_without_parameters_runs_and_is_reported(device):
    """Whoever computes weights, or freezes them as buffers, leaves plain tensors."""
    stock = stock_model(device=device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    for module in fast.modules():
        for name in list(module._parameters):
            setattr(module, name, module._parameters.pop(name).data)
    ours, theirs = (m(ids_of(device))[0] for m in (fast, stock))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    (found,) = bert_fast.report(fast).swapped
    assert (found.reason, found.dtype, found.fast_calls) == (None, "float32", 1)


def test_report_tells_what_ran_where(device):
    model = bert_fast.accelerate(stock_model("BertForMaskedLM", device))
    model(ids_of(device))
    model(ids_of(device), output_attentions=True)
    (swapped,) = bert_fast.report(model).swapped
    assert swapped.path == "bert"
    assert swapped.layers == 2
    assert swapped.backend == bert_fast.kernels.backend(device)
    assert (swapped.fast_calls, swapped.stock_calls) == (1, {"output_attentions": 1})
    text = str(bert_fast.report(model))
    assert "1 fast calls" in text
    assert "1 calls on the stock forward: output_attentions" in text
    assert "stock, not accelerated" in str(bert_fast.report(stock_model()))
    assert "no BertModel" in str(bert_fast.report(torch.nn.Linear(1, 1)))


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
def test_buffers_of_embeddings_that_say_something_else_are_stock_s(name, device):
    """Positions that begin anew past the table are how people read longer texts."""
    stock = stock_model(device=device).eval()
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    ids = ids_of(device)
    long = torch.cat((ids, ids), 1).repeat(1, 2)[:, :60]
    for m in (stock, fast):
        m(ids)
        length = 100 if name == "position_ids" else 40
        usual = torch.arange(length, device=device)[None] % 40
        setattr(m.embeddings, name, usual if name == "position_ids" else usual * 0 + 1)
    assert_ran_fast(fast)
    inputs = long if name == "position_ids" else ids
    with torch.no_grad():
        torch.testing.assert_close(fast(inputs)[0], stock(inputs)[0], atol=0, rtol=0)
    assert f"embeddings.{name} with other numbers" in str(bert_fast.report(fast))
    with torch.no_grad():
        getattr(fast.embeddings, name).copy_(torch.zeros(1) if "type" in name else usual)
    (now,) = bert_fast.report(fast).swapped
    assert (now.reason is None) == (name == "token_type_ids")


def test_a_forward_that_was_replaced_on_a_class_is_asked(device, monkeypatch):
    stock = stock_model(device=device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    monkeypatch.setattr(type(stock.encoder.layer[0].output), "forward", lambda self, h, x: x)
    with torch.no_grad():
        ours, theirs = (m(ids_of(device))[0] for m in (fast, stock))
    assert torch.equal(ours, theirs)
    assert "forward replaced on BertOutput" in bert_fast.report(fast).swapped[0].reason


@pytest.mark.parametrize("where", ["model", "layers", "layer"])
def test_other_methods_that_were_replaced_are_asked(where, device, monkeypatch):
    stock = stock_model(device=device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    if where == "model":
        forward = transformers.BertModel.forward

        def of_zeros(self, input_ids, **kwargs):
            return forward(self, input_ids * 0, **kwargs)

        monkeypatch.setattr(transformers.BertModel, "forward", of_zeros)
    else:
        for m in (stock, fast):
            layer = m.encoder.layer[0]
            owner = layer if where == "layer" else type(layer)
            monkeypatch.setattr(owner, "feed_forward_chunk", lambda *args: args[-1])
    with torch.no_grad():
        ours, theirs = (m(ids_of(device))[0] for m in (fast, stock))
    assert torch.equal(ours, theirs)
    assert fast_calls(fast)[0][0] == 0
    assert "replaced" in bert_fast.report(fast).swapped[0].reason


def test_attention_that_was_made_causal_by_hand_is_stock_s(device):
    stock = stock_model(device=device)
    for layer in stock.encoder.layer:
        layer.attention.self.is_causal = True
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    with torch.no_grad():
        assert torch.equal(fast(ids_of(device))[0], stock(ids_of(device))[0])
    assert_ran_stock(fast, "encoder.layer.0: attention.self.is_causal is True")


def test_a_weight_on_meta_is_stock_s_error():
    fast = bert_fast.accelerate(stock_model())
    fast.encoder.layer[1].output.LayerNorm.to("meta")
    assert "beside torch.float32 on the model's device" in bert_fast.report(fast).swapped[0].reason
    with pytest.raises(RuntimeError, match="meta"):
        fast(ids_of())


def test_a_default_device_is_of_no_effect():
    fast, ids, mask = bert_fast.accelerate(stock_model()), ids_of(), masks()["right"]
    for given in ((ids,), (ids, mask)):
        expected = fast(*given).last_hidden_state
        with torch.device("meta"):
            last = fast(*given).last_hidden_state
            last.sum().backward()
        assert torch.equal(last, expected)
    assert_ran_fast(fast)


def test_gradients_may_be_on_in_inference_mode(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    with torch.inference_mode(), torch.enable_grad():
        ours = fast(ids_of(device), masks(device)["right"])[0]
    with torch.no_grad():
        expected = fast(ids_of(device), masks(device)["right"])[0]
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_longer_buffers_of_positions_are_noticed_where_it_is_compiled(device):
    stock = stock_model(device=device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    torch.compiler.reset()
    results = []
    for m in (stock, fast):
        m.embeddings.position_ids = torch.arange(99, device=device)[None] % 7
        with torch.no_grad():
            results.append(torch.compile(m, backend="eager")(ids_of(device))[0])
    torch.compiler.reset()
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_hooks_in_the_encoder_are_run_where_it_is_compiled(device):
    stock = stock_model(device=device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    results = []
    torch.compiler.reset()  # what is compiled for a model without hooks is taken for one with
    for m in (stock, fast):
        m.encoder.layer[0].register_forward_hook(lambda module, args, output: output * 0)
        with torch.no_grad():
            results.append(torch.compile(m, backend="eager")(ids_of(device))[0])
    torch.compiler.reset()
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_report_tells_of_a_plain_call(device):
    fast = bert_fast.accelerate(stock_model(device=device, attn_implementation="eager"))
    assert bert_fast.report(fast).swapped[0].reason is None
    fast.config.output_attentions = True
    assert bert_fast.report(fast).swapped[0].reason == "output_attentions"
    decoder = bert_fast.accelerate(stock_model(is_decoder=True, add_cross_attention=True))
    assert bert_fast.report(decoder).swapped[0].reason is None


def test_a_subclass_is_not_said_to_be_what_could_be_accelerated():
    class Mine(transformers.BertModel):
        pass

    model = torch.nn.ModuleDict({"mine": Mine(stock_model().config)})
    assert bert_fast.report(model).stock == ()
    with pytest.raises(ValueError, match="found Mine"):
        bert_fast.accelerate(model)


def test_a_head_may_be_made_where_somebody_put_our_class_in_place_of_stock_s(monkeypatch):
    monkeypatch.setattr(transformers.models.bert.modeling_bert, "BertModel", bert_fast.BertModel)
    model = bert_fast.BertForMaskedLM(stock_model().config)
    assert type(model.bert) is bert_fast.BertModel


def test_token_types_are_nothing_to_distilbert(device):
    fast = bert_fast.accelerate(stock_model("DistilBertModel", device))
    with torch.no_grad():
        last = fast(ids_of(device), token_type_ids=ids_of(device) * 0 + 1)[0]
        assert torch.equal(last, fast(ids_of(device))[0])
    assert_ran_fast(fast)


# -- weights --------------------------------------------------------------------------------
def test_whoever_writes_to_a_weight_is_heard_at_the_next_call(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    ids, mask = ids_of(device), masks(device)["right"]
    query = fast.encoder.layer[0].attention.self.query.weight

    def in_place():
        query.data.mul_(1.1)  # unseen by version counters

    def optimizer_step():
        fast(ids, mask)[0][..., :3].square().sum().backward()
        torch.optim.AdamW(fast.parameters(), lr=0.05).step()

    def load():
        fast.load_state_dict({k: v * 1.01 for k, v in fast.state_dict().items()})

    for change in (in_place, optimizer_step, load, lambda: fast.to(torch.float16).float()):
        with torch.no_grad():
            fast(ids, mask)
            change() if change is not optimizer_step else None
        if change is optimizer_step:
            change()
        twin = transformers.BertModel(fast.config).eval().to(device)
        twin.load_state_dict(fast.state_dict())
        with torch.no_grad():
            ours, theirs = fast(ids, mask)[0], twin(ids, mask)[0]
        torch.testing.assert_close(ours[mask != 0], theirs[mask != 0], atol=1e-5, rtol=1e-5)
    assert_ran_fast(fast)


def test_weights_stay_where_they_are(device):
    """Others hold them: state dicts, buffers of optimizers, graphs, tools that save by storage."""
    fast = bert_fast.accelerate(stock_model(device=device))

    def places():
        return [(p.untyped_storage().data_ptr(), p.data_ptr()) for p in fast.parameters()]

    before = places()
    assert len({storage for storage, _ in before}) == len(before)
    with torch.no_grad():
        fast(ids_of(device))
    fast(ids_of(device)).last_hidden_state.sum().backward()
    bert_fast.restore(fast)
    assert places() == before


@torch.no_grad()
def test_a_write_to_memory_that_is_shared_is_heard(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    twin = copy.deepcopy(fast)
    twin.load_state_dict(fast.state_dict(), assign=True)
    held = fast.state_dict()
    fast(ids_of(device)), twin(ids_of(device))
    for name, value in held.items():
        if "attention" in name:
            value.mul_(1.5)
    changed = fast(ids_of(device)).last_hidden_state
    assert torch.equal(changed, twin(ids_of(device)).last_hidden_state)
    assert not torch.allclose(changed, stock_model(device=device)(ids_of(device))[0])


@torch.no_grad()
def test_two_products_may_be_of_one_weight(device):
    stock = stock_model(device=device)
    attention = stock.encoder.layer[0].attention.self
    attention.key.weight = attention.query.weight
    ours = bert_fast.accelerate(copy.deepcopy(stock))(ids_of(device))[0]
    torch.testing.assert_close(ours, stock(ids_of(device))[0], atol=1e-5, rtol=0)


def test_a_model_survives_a_forward_of_fake_tensors():
    fast = bert_fast.accelerate(stock_model())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        last = fast(mode.from_tensor(ids_of())).last_hidden_state
    assert last.shape == (*ids_of().shape, 64)
    with torch.no_grad():
        torch.testing.assert_close(fast(ids_of())[0], stock_model()(ids_of())[0], atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_a_first_forward_in_a_capture_leaves_the_weights_as_they_are():
    model = bert_fast.accelerate(stock_model(device="cuda"), cuda_graphs=False)
    before = [p.clone() for p in model.parameters()]
    ids = ids_of("cuda")
    other = bert_fast.accelerate(stock_model(device="cuda"), cuda_graphs=False)
    expected = other(ids).last_hidden_state  # which compiles, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        last = model(ids).last_hidden_state
    graph.replay()
    assert all(map(torch.equal, model.parameters(), before))
    assert torch.equal(last, expected)


def test_a_weight_written_between_forward_and_backward_is_an_error():
    """As in stock, also where three weights have one product."""
    fast = bert_fast.accelerate(stock_model())
    layer = fast.encoder.layer[1]
    for linear in (layer.attention.self.key, layer.output.dense):
        loss = fast(ids_of()).last_hidden_state.sum()
        with torch.no_grad():
            linear.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"modified .*inplace"):
            loss.backward()


def test_the_stock_forward_is_logged_where_it_is_compiled(caplog):
    fast = bert_fast.accelerate(stock_model(dtype=torch.float64))
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    compiled(ids_of()), compiled(ids_of())
    assert caplog.text.count("the stock forward runs: torch.float64 weights") == 1
    assert fast_calls(fast) == [(0, {})]


@pytest.mark.skipif(torch.cuda.is_available(), reason="only CPU tensors are shared by a file")
def test_weights_shared_with_other_processes_stay_where_they_are():
    fast = bert_fast.accelerate(stock_model()).share_memory()
    places = [p.data_ptr() for p in fast.parameters()]
    with torch.no_grad():
        ours = fast(ids_of())[0]
    assert [p.data_ptr() for p in fast.parameters()] == places
    torch.testing.assert_close(ours, stock_model()(ids_of())[0], atol=1e-5, rtol=0)
    assert_ran_fast(fast)


def test_copies_and_pickles_run_alike_and_share_nothing(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    ids, mask = ids_of(device), masks(device)["right"]
    with torch.no_grad():
        expected = fast(ids, mask)[0]
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert type(twin) is bert_fast.BertModel
            assert fast_calls(twin) == [(0, {})]
            assert torch.equal(twin(ids, mask)[0], expected)
            for p in twin.parameters():
                p.zero_()
            assert torch.equal(fast(ids, mask)[0], expected)


def test_threads_may_share_a_model(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    ids, mask = ids_of(device), masks(device)["right"]
    with torch.no_grad():
        expected = bert_fast.accelerate(stock_model(device=device))(ids, mask)[0]
    results = []

    def work():
        with torch.no_grad():
            results.extend(torch.equal(fast(ids, mask)[0], expected) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [True] * 40
    assert fast_calls(fast) == [(40, {})]


# -- loading and saving ---------------------------------------------------------------------
@pytest.mark.parametrize("name", HEADS)
def test_checkpoints_go_both_ways_between_stock_and_fast(name, tmp_path):
    stock = stock_model(name)
    stock.save_pretrained(tmp_path / "stock")
    fast = getattr(bert_fast, name).from_pretrained(tmp_path / "stock")
    with torch.no_grad():
        fast(**({"input_ids": ids_of()[None]} if "Choice" in name else {"input_ids": ids_of()}))
    fast.save_pretrained(tmp_path / "fast")
    back, info = getattr(transformers, name).from_pretrained(
        tmp_path / "fast", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for key, value in stock.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


def test_sharded_old_and_prefixed_checkpoints_load(tmp_path):
    from safetensors.torch import load_file, save_file

    stock = stock_model("BertForMaskedLM")
    stock.save_pretrained(tmp_path / "plain")
    stock.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    old = {
        k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
        for k, v in load_file(tmp_path / "plain" / "model.safetensors").items()
    }
    assert any("gamma" in k for k in old)
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    stock.config.save_pretrained(tmp_path / "old")
    mask = masks()["right"]
    with torch.no_grad():
        expected = stock.bert(ids_of(), mask)[0]
    for folder in ("plain", "sharded", "old"):
        fast = bert_fast.BertModel.from_pretrained(tmp_path / folder, add_pooling_layer=False)
        with torch.no_grad():
            ours = fast(ids_of(), mask)[0]
        torch.testing.assert_close(ours[mask != 0], expected[mask != 0], atol=1e-5, rtol=0)
        assert_ran_fast(fast)
