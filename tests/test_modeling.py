"""The drop-in classes give the numbers of the transformers classes they stand for.

Truth is the stock model in fp64 on the same weights, or in fp32 within 1e-5. Run with
TRITON_INTERPRET=1 too: then the kernels compute them, in the interpreter.
"""

import copy
import inspect

import pytest
import torch
import transformers
from models import (
    FEW,
    HALVES,
    HEADS,
    B,
    S,
    assert_errs_no_more_than_stock,
    assert_ran_fast,
    assert_same_training,
    assert_same_vectors,
    config_of,
    ids_of,
    masks,
    stock_model,
    tokens,
)

import bert_fast
from bert_fast.checkpoints import outlier_model
from bert_fast.kernels.launch import INTERPRET


@pytest.mark.parametrize("kind", masks())
def test_every_mask_gives_the_stock_vectors_and_zeros_elsewhere(kind, device):
    assert_same_vectors("BertModel", masks(device)[kind], device)


@pytest.mark.parametrize("name", HEADS)
def test_each_class_gives_stock_outputs_losses_and_gradients(name, device):
    assert_same_training(name, device)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_half_precision_errs_no_more_than_stock(name, dtype, device):
    assert_errs_no_more_than_stock(name, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_outliers_as_trained_models_have_them_cost_no_precision(dtype, device):
    """A few hidden dimensions at 20 to 60 times the rest, which row statistics must survive."""
    stock = outlier_model(config_of(hidden_size=128, num_hidden_layers=4)).to(device, dtype)
    exact = copy.deepcopy(stock).double()
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    mask = masks(device)["right"].repeat(1 if INTERPRET else 4, 1)
    ids = ids_of(device, shape=mask.shape)
    with torch.no_grad():
        ours, theirs, truth = (m(ids, mask)[0].double() for m in (fast, stock, exact))
    where = mask != 0
    error, allowed = ((x - truth)[where].square().mean().sqrt() for x in (ours, theirs))
    assert_ran_fast(fast)
    assert error <= 1.2 * allowed


def test_position_ids_token_types_and_inputs_embeds_are_honoured(device):
    stock = stock_model(device=device, **FEW)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    embeds = torch.randn(B, S, 64, generator=torch.manual_seed(2)).to(device)
    mask = masks(device)["holes"]
    positions = ids_of(device, high=40)
    for keywords in (
        {"inputs_embeds": embeds},
        {"input_ids": ids_of(device), "position_ids": positions},
        {"input_ids": ids_of(device), "position_ids": positions[:1]},
        {"input_ids": ids_of(device).int(), "token_type_ids": ids_of(device, high=2)},
        {"input_ids": ids_of(device), "token_type_ids": ids_of(device, high=2)[:1]},
        {"inputs_embeds": embeds, "position_ids": positions, "token_type_ids": positions % 2},
    ):
        with torch.no_grad():
            ours, theirs = (m(attention_mask=mask, **keywords)[0] for m in (fast, stock))
        torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=0)
    assert_ran_fast(fast)


def test_padding_of_nan_changes_no_bit(device):
    fast = bert_fast.accelerate(stock_model(device=device))
    mask = masks(device)["holes"]
    embeds = torch.randn(B, S, 64, generator=torch.manual_seed(2)).to(device)
    poisoned = embeds.masked_fill(~mask[..., None], torch.nan)
    with torch.no_grad():
        clean, ours = (fast(inputs_embeds=x, attention_mask=mask) for x in (embeds, poisoned))
    assert torch.equal(ours.last_hidden_state, clean.last_hidden_state)
    assert torch.equal(ours.pooler_output, clean.pooler_output)


@pytest.mark.skipif(
    not INTERPRET and not torch.cuda.is_available(),
    reason="the promise is the Triton kernels': torch's own products choose by shape",
)
@pytest.mark.usefixtures("sums_without_place")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_bits_of_a_sequence_do_not_depend_on_its_batch(device, dtype):
    """In batches of any size and length, in any order; on a GPU 1,000,000 times."""
    model = bert_fast.accelerate(stock_model(device=device, dtype=dtype, **FEW))
    N, rounds = (6, 3) if INTERPRET else (1000, 500)
    generator = torch.manual_seed(0)
    lengths = torch.randint(1, 41, (N,), generator=generator)
    mask = (torch.arange(40) < lengths[:, None]).to(device)
    ids = ids_of(device, (N, 40))
    once = torch.cat([model(ids[i : i + 1, : lengths[i]])[0][0] for i in range(N)])
    alone = torch.zeros(N, 40, 64, dtype=dtype, device=device)
    alone[mask] = once
    for _ in range(rounds):
        order = torch.randperm(N, generator=generator)
        size = int(torch.randint(1, N + 1, (), generator=generator))
        for batch in order.split(size):
            width = int(torch.randint(lengths[batch].max(), 41, (), generator=generator))
            ours = model(ids[batch, :width], mask[batch, :width])[0]
            assert torch.equal(ours, alone[batch, :width])


def test_the_default_device_is_not_the_model_s(device):
    fast = bert_fast.accelerate(stock_model(device=device, **FEW)).train()
    ids, mask = ids_of(device), masks(device)["holes"]
    outputs = []
    for default in (device, "meta"):
        torch.manual_seed(0)
        with torch.device(default):
            outputs.append(fast(ids, mask).last_hidden_state)
    assert torch.equal(*outputs)
    outputs[1].sum().backward()


def test_gradients_reach_inputs_embeds(device):
    stock = stock_model(device=device, **FEW).requires_grad_(False)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    mask = masks(device)["left"]
    grads = []
    for model in (fast, stock):
        embeds = torch.randn(B, S, 64, generator=torch.manual_seed(2)).to(device).requires_grad_()
        out = model(inputs_embeds=embeds, attention_mask=mask)[0]
        (out[..., :9] * (mask != 0)[..., None]).square().sum().backward()
        grads.append(embeds.grad)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_a_second_derivative_is_an_error(device):
    fast = bert_fast.accelerate(stock_model(device=device, **FEW))
    weight = fast.encoder.layer[0].output.dense.weight
    loss = fast(ids_of(device))[0][..., :9].square().sum()
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative is asked for"):
        grad.square().sum().backward()


def penalty(model, embeds):
    """Of a critic that is linear in the output, so that no gradient that comes in requires one."""
    embeds.requires_grad_()
    (grad,) = torch.autograd.grad(model(inputs_embeds=embeds)[0].sum(), embeds, create_graph=True)
    grad.square().sum().backward()


def hessian(model, embeds):
    return torch.autograd.functional.hessian(lambda x: model(inputs_embeds=x)[0][0, 0, 0], embeds)


def tangents(model, embeds):
    run = lambda x: model(inputs_embeds=x)[0]  # noqa: E731
    return torch.autograd.functional.jvp(run, embeds, torch.ones_like(embeds))


@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
@pytest.mark.parametrize("second", [penalty, hessian, tangents])
def test_no_second_derivative_is_zeros(second, name, device):
    fast = bert_fast.accelerate(stock_model(name, device=device, **FEW))
    with pytest.raises(RuntimeError, match="a second derivative is asked for"):
        second(fast, torch.randn(1, 3, 64, device=device))


def test_a_graph_of_the_backward_that_nobody_differentiates_has_the_gradients(device):
    fast = bert_fast.accelerate(stock_model(device=device, **FEW))
    weights = list(fast.encoder.parameters())
    loss = fast(ids_of(device))[0].square().sum()
    once = torch.autograd.grad(loss, weights, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(loss, weights, create_graph=True), once))


def test_a_batch_of_gradients_is_an_error_that_says_what_to_do(device):
    fast = bert_fast.accelerate(stock_model(device=device, **FEW))
    output, weight = fast(ids_of(device)).pooler_output, fast.encoder.layer[0].output.dense.weight
    several = torch.ones(4, *output.shape, device=device)
    with pytest.raises(RuntimeError, match=r"no batch of gradients.*bert_fast\.restore"):
        torch.autograd.grad(output, weight, grad_outputs=several, is_grads_batched=True)


def test_hidden_states_and_tuples_are_those_of_stock(device):
    stock = stock_model(device=device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    mask = masks(device)["right"]
    with torch.no_grad():
        ours, theirs = (
            m(ids_of(device), mask, output_hidden_states=True, return_dict=False)
            for m in (fast, stock)
        )
    assert_ran_fast(fast)
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(a[mask != 0], b[mask != 0], atol=1e-5, rtol=0)


def test_a_flag_of_none_is_not_taken_from_the_config(device):
    stock = stock_model(device=device, output_hidden_states=True, output_attentions=True, **FEW)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    flags = {"output_hidden_states": None, "output_attentions": None}
    with torch.no_grad():
        ours, theirs = (m(ids_of(device), **flags) for m in (fast, stock))
    assert_ran_fast(fast)
    assert ours.keys() == theirs.keys()


def test_a_decoder_without_cache_attends_causally(device):
    stock = stock_model("BertLMHeadModel", device, is_decoder=True, **FEW)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    for kind in ("none", "right", "left", "holes"):
        mask = masks(device)[kind]
        with torch.no_grad():
            ours, theirs = (m(ids_of(device), mask, use_cache=False).logits for m in (fast, stock))
        where = tokens(mask, device)
        torch.testing.assert_close(ours[where], theirs[where], atol=1e-4, rtol=0)
    assert_ran_fast(fast)


@pytest.mark.parametrize("heads, hidden", [(8, 64), (1, 80), (1, 256), (3, 3)])
def test_any_head_dimension_runs(heads, hidden, device):
    stock = stock_model(device=device, num_attention_heads=heads, hidden_size=hidden)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    mask = masks(device)["right"]
    with torch.no_grad():
        ours, theirs = (m(ids_of(device), mask)[0] for m in (fast, stock))
        exact = stock.double()(ids_of(device), mask)[0]
    assert_ran_fast(fast)
    apart, limit = ((t - exact)[mask != 0].abs().max() for t in (ours, theirs))
    assert apart <= 1e-5 + 2 * limit  # with one head of 256, scores are large


@pytest.mark.filterwarnings("error:Dynamo detected")  # something that it had better not see
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_torch_compile_gives_one_graph_with_equal_results(gradients, device):
    fast = bert_fast.accelerate(stock_model(device=device, **FEW))
    compiled = torch.compile(copy.deepcopy(fast), backend="aot_eager", fullgraph=True)
    for kind in ("right", "holes"):
        mask = masks(device)[kind].long()
        with torch.set_grad_enabled(gradients):
            ours, eager = (m(ids_of(device), mask)[0] for m in (compiled, fast))
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=0)
        if gradients:
            for out in (ours, eager):
                out[..., :9].square().sum().backward()
            pairs = zip(compiled.parameters(), fast.parameters(), strict=True)
            for p, q in pairs:
                if q.grad is not None:
                    torch.testing.assert_close(p.grad, q.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "DistilBertForMaskedLM"])
@torch.no_grad()
def test_torch_compile_takes_return_dict_of_a_head_in_one_graph(name, device):
    fast = bert_fast.accelerate(stock_model(name, device, **FEW))
    compiled = torch.compile(copy.deepcopy(fast), backend="aot_eager", fullgraph=True)
    ours, eager = (m(ids_of(device), return_dict=False)[0] for m in (compiled, fast))
    torch.testing.assert_close(ours, eager, atol=1e-5, rtol=0)


def test_inference_mode_then_training_works_on_one_model(device):
    fast = bert_fast.accelerate(stock_model(device=device, **FEW))
    with torch.inference_mode():
        first = fast(ids_of(device))[0]
    out = fast(ids_of(device))[0]
    assert torch.equal(first, out)
    out.square().mean().backward()
    assert fast.encoder.layer[0].attention.self.key.weight.grad.any()


@pytest.mark.parametrize("name", HEADS)
def test_forward_has_the_signature_of_stock(name):
    ours, theirs = (inspect.signature(getattr(m, name).forward) for m in (bert_fast, transformers))
    theirs = {k: v for k, v in theirs.parameters.items() if k != "cache_position"}  # 5.0 has it
    assert [k for k in ours.parameters if k != "cache_position"] == list(theirs)
    for key, parameter in theirs.items():
        assert ours.parameters[key].default == parameter.default
        assert ours.parameters[key].kind == parameter.kind
