"""A layer that is trained as one function of autograd, beside the same layer op by op."""

import copy

import pytest
import torch
from models import assert_ran_fast, ids_of, masks, stock_model

import bert_fast
from bert_fast import encoder
from bert_fast.kernels.launch import DTYPES

MODELS = ["BertModel", "RobertaModel", "ElectraModel", "DistilBertModel"]


@pytest.fixture
def calls(monkeypatch):
    """Of trained_layer, by layer."""
    calls = []
    original = encoder.trained_layer
    monkeypatch.setattr(
        encoder, "trained_layer", lambda *args: calls.append(args) or original(*args)
    )
    return calls


def trained(model, device, mask, seed=0, **kwargs):
    """last_hidden_state and all gradients of a step."""
    torch.manual_seed(seed)
    model.zero_grad()
    last = model(ids_of(device), attention_mask=mask, **kwargs)[0]
    last.float().square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return last.detach(), grads


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_and_the_gradients_of_layer_forward(
    name, dtype, dropout, device, monkeypatch, calls
):
    model = bert_fast.accelerate(stock_model(name, device).to(dtype)).train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = dropout
        if hasattr(m, "scaling"):
            m.scaling = 0.3
    assert_as_op_by_op(model, device, dtype, monkeypatch, calls)


def test_a_batch_without_a_token(device, calls):
    model = bert_fast.accelerate(stock_model(device=device))
    _, grads = trained(model, device, masks(device)["all zeros"])
    assert len(calls) == 2 and len(grads) > 20
    assert not any(grad.any() for grad in grads.values())


def test_a_decoders_layer_is_causal_here_too(device, monkeypatch, calls):
    model = bert_fast.accelerate(stock_model(device=device, is_decoder=True))
    assert_as_op_by_op(model, device, torch.float32, monkeypatch, calls, use_cache=False)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
def test_autocast(name, dropout, device, monkeypatch, calls):
    """Gradients of weights are in fp32, of products in bf16."""
    model = bert_fast.accelerate(stock_model(name, device)).train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = dropout
    with torch.autocast(device, torch.bfloat16):
        assert_as_op_by_op(model, device, torch.bfloat16, monkeypatch, calls)


def assert_as_op_by_op(model, device, dtype, monkeypatch, calls, **kwargs):
    """Gradients are sums of the same numbers, rounded less often."""
    mask = masks(device)["right"]
    last, grads = trained(model, device, mask, **kwargs)
    assert len(calls) == 2
    monkeypatch.setattr(encoder, "is_trained", lambda *args: False)
    last_of_ops, grads_of_ops = trained(model, device, mask, **kwargs)
    assert len(calls) == 2
    assert torch.equal(last, last_of_ops)
    assert grads.keys() == grads_of_ops.keys()
    for name, grad in grads_of_ops.items():
        assert grads[name].dtype == grad.dtype and grads[name].shape == grad.shape
        apart = (grads[name] - grad).float().square().mean().sqrt()
        assert apart <= 4 * torch.finfo(dtype).eps * grad.float().square().mean().sqrt(), name


def frozen_weight(model):
    model.encoder.layer[1].output.dense.weight.requires_grad_(False)


def frozen_embeddings(model):
    model.embeddings.requires_grad_(False)


@pytest.mark.parametrize("change, count", [(frozen_weight, 1), (frozen_embeddings, 1)])
def test_what_is_not_trained_as_a_whole_goes_op_by_op(change, count, device, calls):
    """And gets the gradients of stock, no others."""
    stock = stock_model(device=device)
    ours = bert_fast.accelerate(copy.deepcopy(stock))
    found = []
    for model in (ours, stock):
        change(model)
        found.append(trained(model, device, None))
    assert len(calls) == count
    assert_ran_fast(ours)
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-4)
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], grad, atol=2e-5, rtol=1e-4)


def test_inference_goes_op_by_op(device, calls):
    model = bert_fast.accelerate(stock_model(device=device), cuda_graphs=False).train()
    with torch.no_grad():
        model(ids_of(device))
    assert not calls


def test_a_second_derivative_is_an_error(device, calls):
    model = bert_fast.accelerate(stock_model(device=device)).train()
    last = model(ids_of(device))[0]
    assert calls
    weight = model.encoder.layer[0].output.dense.weight
    (grad,) = torch.autograd.grad(last.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative is asked for"):
        grad.sum().backward()


def test_under_autocast_a_second_derivative_by_a_weight_is_an_error(device, calls):
    """What is saved there is a copy of the weight."""
    model = bert_fast.accelerate(stock_model(device=device)).train()
    layer = model.encoder.layer[1]
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in layer.parameters()))
    embeds = torch.randn(2, 3, 64, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        last = model(inputs_embeds=embeds)[0]
    assert calls
    weight = layer.output.dense.weight
    (grad,) = torch.autograd.grad(last.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative is asked for"):
        torch.autograd.grad(grad.sum(), weight, allow_unused=True)


def test_gradients_of_steps_add_up_and_share_no_memory(device):
    """Those of query, key and value come from one product."""
    model = bert_fast.accelerate(stock_model(device=device))
    _, once = trained(model, device, None)
    once = {name: grad.clone() for name, grad in once.items()}
    model(ids_of(device))[0].square().mean().backward()
    part = model.encoder.layer[0].attention.self
    for name, p in model.named_parameters():
        if name in once:
            torch.testing.assert_close(p.grad, 2 * once[name])
    part.query.weight.grad.zero_()
    assert part.key.weight.grad.any() and part.value.weight.grad.any()
