"""What changes on a model between two calls is seen, though its modules are compared as a whole."""

import copy
import importlib
import weakref

import pytest
import torch
from models import ids_of, stock_model
from torch import nn

import bert_fast
from bert_fast import coverage
from bert_fast.seen import seen

seen_file = importlib.import_module("bert_fast.seen")


class Own(nn.Linear):
    pass


class OwnParameter(nn.Parameter):
    pass


def hooked(layer, monkeypatch):
    layer.output.dense.register_forward_hook(lambda *args: None)


def hooked_backward(layer, monkeypatch):
    layer.output.dense.register_full_backward_pre_hook(lambda *args: None)


def covered(layer, monkeypatch):
    layer.output.dense.forward = lambda x: x


def covered_class(layer, monkeypatch):
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: x)


def covered_chunk_of_class(layer, monkeypatch):
    monkeypatch.setattr(type(layer), "feed_forward_chunk", lambda self, x: x)


def covered_chunk(layer, monkeypatch):
    layer.feed_forward_chunk = lambda x: x


def another_child(layer, monkeypatch):
    layer.output.dense = Own(64, 64)


def a_child_more(layer, monkeypatch):
    layer.output.dense.inner = Own(64, 64)


def another_class(layer, monkeypatch):
    layer.output.dense.__class__ = Own


def another_weight(layer, monkeypatch):
    dense = layer.output.dense
    dense.weight = OwnParameter(dense.weight.detach())


def sparse_weight(layer, monkeypatch):
    dense = layer.output.dense
    dense.weight = nn.Parameter(dense.weight.detach().to_sparse())


def another_dtype(layer, monkeypatch):
    layer.output.dense.weight.data = layer.output.dense.weight.double()


def another_dtype_in_place(layer, monkeypatch):
    dense = layer.output.dense
    dense.weight.data = dense.weight.data.view(torch.float16)[:, : dense.in_features]


def a_part(layer, monkeypatch):
    query = layer.attention.self.query
    query.weight.data = query.weight.data[:16]


def another_shape_in_place(layer, monkeypatch):
    query = layer.attention.self.query
    query.weight.data = query.weight.data.view(32, 128)


def without_bias(layer, monkeypatch):
    layer.output.dense.bias = None


def another_activation(layer, monkeypatch):
    layer.intermediate.intermediate_act_fn = nn.ReLU()


def causal(layer, monkeypatch):
    layer.attention.self.is_causal = True


def fewer_heads(layer, monkeypatch):
    layer.attention.self.attention_head_size = 8


REASONS = {
    hooked: "encoder.layer.1.output.dense: hooks",
    hooked_backward: "encoder.layer.1.output.dense: hooks",
    covered: "encoder.layer.1.output.dense: forward replaced on the module",
    covered_class: "embeddings.LayerNorm: forward replaced on LayerNorm",
    covered_chunk_of_class: "feed_forward_chunk replaced",
    covered_chunk: "encoder.layer.1: feed_forward_chunk replaced",
    another_child: "encoder.layer.1.output.dense: test_seen.Own",
    a_child_more: "encoder.layer.1.output.dense.inner: test_seen.Own",
    another_class: "encoder.layer.1.output.dense: test_seen.Own",
    another_weight: "encoder.layer.1.output.dense: weights of type OwnParameter",
    sparse_weight: "encoder.layer.1.output.dense: torch.sparse_coo weights",
    another_dtype: "encoder.layer.1.output.dense: torch.float64",
    another_dtype_in_place: "encoder.layer.1.output.dense: torch.float16",
    a_part: "encoder.layer.1: pruned heads",
    another_shape_in_place: "encoder.layer.1: pruned heads",
    without_bias: "encoder.layer.1.output.dense: no bias or weight",
    another_activation: "torch.nn.modules.activation.ReLU",
    causal: "encoder.layer.1: attention.self.is_causal",
    fewer_heads: "encoder.layer.1: pruned heads",
}


@pytest.fixture
def model(device):
    model = bert_fast.accelerate(stock_model(device=device), cuda_graphs=False)
    with torch.no_grad():
        model(ids_of(device))
    assert seen(model) is not None
    return model


@pytest.mark.parametrize("versions", [True, False], ids=["versions", "contents"])
@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_a_change_after_a_call_is_seen(change, versions, model, monkeypatch):
    if not versions:  # as in a torch that does not tell them
        monkeypatch.setattr(seen_file, "dict_version", None)
    assert coverage.reason_of_model(model) is None
    change(model.encoder.layer[1], monkeypatch)
    reason = coverage.reason_of_model(model)
    assert reason and REASONS[change] in reason, reason
    assert seen(model) is None  # or it would keep what is gone


def test_numbers_given_to_a_buffer_by_its_data_are_seen(model):
    model.embeddings.position_ids.data = model.embeddings.position_ids.flip(1)
    assert "position_ids with other numbers" in coverage.reason_of_model(model)


def test_a_buffer_may_be_anywhere_or_nowhere(model):
    model.encoder.register_buffer("mine", torch.eye(3).to_sparse())
    assert coverage.reason_of_model(model) is None and seen(model) is not None


def test_numbers_written_into_a_buffer_are_seen(model):
    model.embeddings.position_ids[0, 3] = 7
    assert "position_ids with other numbers" in coverage.reason_of_model(model)
    assert seen(model) is None
    model.embeddings.position_ids[0, 3] = 3
    assert coverage.reason_of_model(model) is None and seen(model) is not None


@torch.no_grad()
def test_an_untouched_model_is_looked_at_once(model, device, monkeypatch):
    looked = []
    monkeypatch.setattr(
        coverage, "_reason_of_modules", lambda *args: looked.append(args) or (None, [])
    )
    for _ in range(3):
        model(ids_of(device))
    assert not looked
    hook = model.encoder.layer[0].register_forward_hook(print)
    hook.remove()
    model(ids_of(device))
    assert not looked
    model.config.num_attention_heads = 2
    model(ids_of(device))
    assert looked


@torch.no_grad()
def test_a_tensor_in_a_tensors_place_is_no_error(model):
    norm = model.encoder.layer[1].output.LayerNorm
    norm.weight = nn.Parameter(norm.weight + 1)
    assert not seen(model).holds(seen(model)._beside)
    assert coverage.reason_of_model(model) is None
    assert seen(model).holds(seen(model)._beside)


def test_weights_lent_for_one_call_are_not_kept(model, device):
    lent = {name: p.detach() + 1 for name, p in model.named_parameters()}
    torch.func.functional_call(model, lent, (ids_of(device),))
    kept = [weakref.ref(w) for w in lent.values()]
    del lent
    assert not any(w() is not None for w in kept)


def test_a_restored_model_keeps_nothing(model):
    bert_fast.restore(model)
    assert seen(model) is None


def test_copies_are_looked_at_for_themselves(model):
    twin = copy.deepcopy(model)
    assert seen(twin) is None
    twin.encoder.layer[1].output.dense.register_forward_hook(print)
    assert coverage.reason_of_model(twin) and not coverage.reason_of_model(model)
