"""torch.autocast over weights in fp32: products and attention in 16 bits, the rest in fp32."""

import copy

import pytest
import torch
from models import (
    CLASSES,
    HALVES,
    assert_errs_no_more_than_stock,
    assert_ran_fast,
    assert_ran_stock,
    ids_of,
    masks,
    stock_model,
    tokens,
)

import bert_fast
from bert_fast.kernels import SPECS

# Not ELECTRA, whose embeddings are projected here.
ENCODERS = [n for n in CLASSES if n.endswith("Model") and not n.startswith(("Electra", "BertLM"))]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", [*ENCODERS, "BertForSequenceClassification"])
def test_outputs_err_no_more_than_those_of_stock(name, dtype, device):
    assert_errs_no_more_than_stock(name, dtype, device, autocast=True)


def gradients(model, device, dtype=None):
    """All in one vector, in fp64."""
    mask = masks(device)["right"]
    with torch.autocast(device, dtype, enabled=dtype is not None):
        last = model(ids_of(device), attention_mask=mask).last_hidden_state
    last[tokens(mask, device)].square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert {g.dtype for g in grads} == {p.dtype for p in model.parameters()}
    return torch.cat([g.flatten().double() for g in grads])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_err_no_more_than_those_of_stock(dtype, device):
    stock = stock_model(device=device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    truth = gradients(copy.deepcopy(stock).double(), device)
    ours, theirs = (gradients(m, device, dtype) - truth for m in (fast, stock))
    assert 0 < ours.norm() <= 1.2 * theirs.norm()
    assert_ran_fast(fast)


def test_an_encoder_and_a_decoder_train_under_it(device):
    """Cross attention, too, and dropout."""
    encoder = bert_fast.accelerate(stock_model(device=device)).train()
    decoder = stock_model(device=device, is_decoder=True, add_cross_attention=True)
    decoder = bert_fast.accelerate(decoder).train()
    with torch.autocast(device, torch.bfloat16):
        states = encoder(ids_of(device)).last_hidden_state
        last = decoder(ids_of(device), encoder_hidden_states=states).last_hidden_state
    last.square().mean().backward()
    for model in (encoder, decoder):
        assert_ran_fast(model)
        assert model.encoder.layer[0].attention.self.query.weight.grad.isfinite().all()
    assert encoder.embeddings.word_embeddings.weight.grad.any()


def test_torch_compile_gives_one_graph_with_equal_results(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    with torch.autocast(device, torch.bfloat16):
        one, other = (m(ids_of(device)).last_hidden_state for m in (compiled, fast))
    assert torch.equal(one, other)


def test_what_is_left_to_stock_is_named(device):
    half = bert_fast.accelerate(stock_model(device=device, dtype=torch.bfloat16))
    projected = bert_fast.accelerate(stock_model("ElectraModel", device))
    with torch.autocast(device, torch.bfloat16):
        half(ids_of(device)), projected(ids_of(device))
    assert_ran_stock(half, "torch.autocast from torch.bfloat16 to torch.bfloat16")
    assert_ran_stock(projected, "torch.autocast with embeddings_project")


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_an_op_computes_in_the_dtype_that_it_is_given(spec, device):
    """Its backward too, inside autocast."""
    torch.manual_seed(0)
    inputs = spec.inputs(torch.float32, device, **spec.cases[0])

    def results():
        leaves = {
            name: t.detach().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t
            for name, t in inputs.items()
        }
        out = spec.fn(**leaves)
        if isinstance(out, tuple) or not out.requires_grad:
            return out if isinstance(out, tuple) else (out,)
        out.sum().backward()
        grads = (t.grad for t in leaves.values() if torch.is_tensor(t) and t.grad is not None)
        return out.detach(), *grads

    expected = results()
    with torch.autocast(device, torch.bfloat16):
        given = results()
    assert all(map(torch.equal, given, expected))
