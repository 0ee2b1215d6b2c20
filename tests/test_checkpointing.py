"""Gradient checkpointing: layers run twice and keep little, and no bit changes."""

import copy

import pytest
import torch
import transformers
from models import (
    CLASSES,
    HEADS,
    B,
    assert_ran_fast,
    assert_ran_stock,
    config_of,
    ids_of,
    loss_of,
    masks,
    stock_model,
)
from torch.autograd.graph import saved_tensors_hooks

import bert_fast
from bert_fast import encoder
from bert_fast.inputs import CACHE
from bert_fast.kernels.launch import INTERPRET

MODELS = ["BertModel"]
if not INTERPRET:  # slow, and the kernels are the same in all
    MODELS += ["RobertaModel", "ElectraModel", "DistilBertModel"]


def turn_on(model, reentrant=False):
    kwargs = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):  # the older name warns where it is there
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(kwargs)


def trained(model, device, **keywords):
    """The outputs and gradients of one step, the same draws each time."""
    torch.manual_seed(5)
    mask = masks(device)["right"]
    model.zero_grad()
    last = model(ids_of(device), mask, **keywords).last_hidden_state
    last.square().sum().backward()
    return [last, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def layers_run(monkeypatch):
    """The layers that have run on the kernels, in order."""
    ran, original = [], encoder.layer_forward

    def layer_forward(architecture, layer, *args, **kwargs):
        ran.append(layer)
        return original(architecture, layer, *args, **kwargs)

    monkeypatch.setattr(encoder, "layer_forward", layer_forward)
    return ran


@pytest.mark.usefixtures("poisoned")  # CUDA adds up an embedding's gradients in any order else
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_bits_are_those_without_dropout_included(name, reentrant, device, layers_run):
    model = bert_fast.accelerate(stock_model(name, device)).train()
    expected = trained(model, device)
    assert layers_run == []  # counted where they are checkpointed
    turn_on(model, reentrant)
    found = trained(model, device)
    first, second = model.architecture.layers(model)
    assert layers_run == [first, second, second, first]
    assert len(found) == len(expected) > 30
    assert all(map(torch.equal, found, expected))
    assert_ran_fast(model)


@pytest.mark.parametrize("name", HEADS if INTERPRET else CLASSES)
def test_in_every_class_the_parameters_of_stock_get_gradients(name, device):
    reached = []
    for module in (transformers, bert_fast):
        model = getattr(module, name)(config_of(name)).to(device).train()
        model.config.use_cache = False
        turn_on(model)
        loss_of(name, model, ids_of(device), masks(device)["right"])[1].backward()
        reached.append([key for key, p in model.named_parameters() if p.grad is not None])
    assert reached[0] == reached[1]
    assert_ran_fast(model)


def test_gradients_are_those_of_stock(device):
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    stock = stock_model(device=device, attn_implementation="eager", **without).train()
    model = bert_fast.accelerate(copy.deepcopy(stock))
    for m in (model, stock):
        turn_on(m)
    where = masks(device)["right"] != 0
    for m in (model, stock):
        m(ids_of(device), masks(device)["right"])[0][where].square().mean().backward()
    for (key, p), (_, q) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        if q.grad is not None:
            scale = q.grad.abs().max().item()
            atol = 1e-5 + 1e-4 * scale
            torch.testing.assert_close(p.grad, q.grad, atol=atol, rtol=0, msg=key)
    assert_ran_fast(model)


def test_a_layer_keeps_its_input_alone(device):
    model = bert_fast.accelerate(stock_model(device=device, num_hidden_layers=4)).train()

    def kept():
        """Bytes that the graph keeps for its backward, each storage once."""
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            last = model(ids_of(device), masks(device)["right"]).last_hidden_state
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        del last
        return sum(s.nbytes() for at, s in storages.items() if at not in weights)

    before = kept()
    turn_on(model)
    assert kept() < before / 4


@pytest.mark.usefixtures("poisoned")  # CUDA adds up an embedding's gradients in any order else
def test_layers_may_be_checkpointed_in_part(device, layers_run):
    model = bert_fast.accelerate(stock_model(device=device)).train()
    expected = trained(model, device)
    turn_on(model)
    first, second = model.architecture.layers(model)
    first.gradient_checkpointing = False
    found = trained(model, device)
    assert layers_run == [second, second]
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("poisoned")  # CUDA adds up an embedding's gradients in any order else
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_cross_attention_reads_has_its_gradient(reentrant, device, layers_run):
    stock = stock_model(
        device=device, is_decoder=True, add_cross_attention=True, use_cache=False,
    )  # fmt: skip
    model = bert_fast.accelerate(stock).train()
    states = torch.randn(B, 7, 64, device=device, requires_grad=True)
    found = []
    for on in (False, True):
        if on:
            turn_on(model, reentrant)
        states.grad = None
        found.append([*trained(model, device, encoder_hidden_states=states), states.grad])
    assert len(layers_run) == 4
    of_states = [gradients.pop() for gradients in found]  # a sum over layers, in another order
    torch.testing.assert_close(*of_states, atol=1e-4, rtol=1e-5)
    assert all(map(torch.equal, *found))
    assert_ran_fast(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_frozen_embeddings_do_not_stop_the_gradients(reentrant, device):
    """Where the first layer has no input with a gradient, reentrant checkpointing has no backward;
    transformers puts a hook on the word embeddings for that."""
    model = bert_fast.accelerate(stock_model(device=device)).train()
    model.embeddings.requires_grad_(False)
    expected = trained(model, device)
    turn_on(model, reentrant)
    found = trained(model, device)
    assert len(found) == len(expected) == 1 + 2 * 16
    assert all(map(torch.equal, found, expected))
    assert_ran_fast(model)


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_runs_twice_where_there_is_no_backward_or_no_training(grad, device, layers_run):
    model = bert_fast.accelerate(stock_model(device=device))
    turn_on(model)
    with torch.set_grad_enabled(grad):
        model.train(not grad)(ids_of(device), masks(device)["right"])
    assert layers_run == []
    assert_ran_fast(model)


@pytest.mark.parametrize("grad", [False, True])
def test_a_cache_with_checkpointing_is_left_to_stock(grad, device):
    stock = stock_model(device=device, is_decoder=True).train()
    model = bert_fast.accelerate(copy.deepcopy(stock))
    turn_on(stock), turn_on(model)
    with torch.set_grad_enabled(grad):
        ours, theirs = (m(ids_of(device), use_cache=True) for m in (model, stock))
    keeps = CACHE == "cache" and not grad  # transformers 5.24 and newer
    assert (CACHE in ours) == (CACHE in theirs) == keeps
    assert_ran_stock(model, "use_cache with gradient checkpointing")


@pytest.mark.skipif(INTERPRET, reason="dynamo cannot trace the interpreter's launches")
def test_torch_compile_leaves_it_to_stock(device, caplog):
    model = bert_fast.accelerate(stock_model(device=device)).train()
    turn_on(model)
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    where = masks(device)["right"] != 0
    expected = model(ids_of(device), masks(device)["right"]).last_hidden_state[where]
    compiled = torch.compile(model, backend="aot_eager")
    try:
        found = compiled(ids_of(device), masks(device)["right"]).last_hidden_state[where]
    finally:
        torch.compiler.reset()  # else dynamo passes over what it could not compile, in others too
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert "gradient checkpointing under torch.compile" in caplog.text


def test_the_trainer_turns_it_on(tmp_path):
    """As people do it: an argument of transformers' Trainer."""
    transformers.set_seed(0)
    model = bert_fast.BertForSequenceClassification(stock_model().config)
    rows = [{"input_ids": list(ids_of()[n]), "labels": n % 2} for n in range(B)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=B, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, report_to=[], use_cpu=True,
    )  # fmt: skip
    result = transformers.Trainer(model, arguments, train_dataset=rows).train()
    assert result.training_loss > 0
    assert_ran_fast(model)
