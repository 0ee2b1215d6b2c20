"""RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA and DistilBERT give the numbers of transformers.

What does not depend on the architecture (weights, threads, hooks, ...) is tested on BERT, in
test_modeling.py and test_swap.py.
"""

import copy
import inspect

import pytest
import torch
import transformers
from models import (
    CLASSES,
    HALVES,
    B,
    S,
    assert_errs_no_more_than_stock,
    assert_ran_fast,
    assert_ran_stock,
    assert_same_training,
    assert_same_vectors,
    ids_of,
    masks,
    stock_model,
)

import bert_fast

CLASSES = [name for name in CLASSES if not name.startswith("Bert")]
ENCODERS = [name for name in CLASSES if name.endswith("Model")]


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("name", ENCODERS)
def test_every_mask_gives_the_stock_vectors_and_zeros_elsewhere(name, kind, device):
    assert_same_vectors(name, masks(device)[kind], device)


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_gives_stock_outputs_losses_and_gradients(name, device):
    assert_same_training(name, device)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_half_precision_errs_no_more_than_stock(name, dtype, device):
    assert_errs_no_more_than_stock(name, dtype, device)


@pytest.mark.parametrize("name", ENCODERS)
def test_position_ids_inputs_embeds_and_hidden_states_are_those_of_stock(name, device):
    stock = stock_model(name, device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    width = stock.get_input_embeddings().weight.shape[1]
    embeds = torch.randn(B, S, width, generator=torch.manual_seed(2)).to(device)
    mask = masks(device)["holes"]
    positions = ids_of(device, high=40)
    for keywords in (
        {"inputs_embeds": embeds},
        {"input_ids": ids_of(device), "position_ids": positions},
        {"input_ids": ids_of(device).int(), "position_ids": positions[:1]},
        {"input_ids": ids_of(device), "output_hidden_states": True},
    ):
        with torch.no_grad():
            ours, theirs = (m(attention_mask=mask, **keywords) for m in (fast, stock))
        pairs = [(ours[0], theirs[0]), *zip(ours.hidden_states or (), theirs.hidden_states or ())]
        assert len(pairs) == (4 if "output_hidden_states" in keywords else 1)
        for a, b in pairs:
            torch.testing.assert_close(a[mask], b[mask], atol=1e-5, rtol=0)
    assert_ran_fast(fast)


@pytest.mark.parametrize("name", ["RobertaModel", "ElectraModel", "DistilBertModel"])
def test_torch_compile_gives_one_graph_with_equal_results(name, device):
    fast = bert_fast.accelerate(stock_model(name, device))
    compiled = torch.compile(copy.deepcopy(fast), backend="aot_eager", fullgraph=True)
    mask = masks(device)["holes"].long()
    ours, eager = (m(ids_of(device), mask)[0] for m in (compiled, fast))
    torch.testing.assert_close(ours, eager, atol=1e-5, rtol=0)
    for out in (ours, eager):
        out[..., :9].square().sum().backward()
    for p, q in zip(compiled.parameters(), fast.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-3, rtol=1e-3)


def test_an_electra_whose_embeddings_are_as_wide_as_its_layers_has_no_projection(device):
    stock = stock_model("ElectraModel", device, embedding_size=64)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    with torch.no_grad():
        ours, theirs = (m(ids_of(device))[0] for m in (fast, stock))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert_ran_fast(fast)


# -- positions ------------------------------------------------------------------------------
def test_padding_ids_take_no_position_in_roberta(device):
    """40 rows, the first two of which are padding's: room for 38 tokens in inputs of any length."""
    stock = stock_model("RobertaModel", device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    ids = ids_of(device, shape=(2, 45)).clamp(min=2)
    ids[:, 3:10] = stock.config.pad_token_id
    with torch.no_grad():
        ours, theirs = (m(ids)[0] for m in (fast, stock))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    ids[:, 3:10] = 5
    with pytest.raises(ValueError) as caught:
        fast(ids)
    assert "RobertaModel: the model has 38 positions (max_position_embeddings less 2" in str(
        caught.value
    )
    assert "input_ids has 45; truncate with" in str(caught.value)
    with pytest.raises(ValueError, match=r"has 38 positions .* inputs_embeds has 39"):
        fast(inputs_embeds=torch.zeros(2, 39, 64, device=device))


# -- accelerate, restore, report, checkpoints -----------------------------------------------
@pytest.mark.parametrize("name", CLASSES)
def test_accelerate_then_restore_leaves_class_weights_and_results_as_they_were(name, device):
    stock = stock_model(name, device)
    model = torch.nn.ModuleDict({"inside": copy.deepcopy(stock)})
    bert_fast.accelerate(model)
    ids = ids_of(device)
    inputs = {"input_ids": ids[None] if name.endswith("MultipleChoice") else ids}
    with torch.no_grad():
        model["inside"](**inputs)
    ((path, *_),) = [(s.path, s) for s in bert_fast.report(model).swapped]
    assert path.startswith("inside")
    assert_ran_fast(model)
    back = bert_fast.restore(model)["inside"]
    assert [type(m) for m in back.modules()] == [type(m) for m in stock.modules()]
    for (key, p), (_, q) in zip(back.state_dict().items(), stock.state_dict().items(), strict=True):
        assert torch.equal(p, q), key
    with torch.no_grad():
        assert torch.equal(back(**inputs)[0], stock(**inputs)[0])


@pytest.mark.parametrize("name", CLASSES)
def test_checkpoints_go_both_ways_between_stock_and_fast(name, tmp_path):
    stock = stock_model(name)
    stock.save_pretrained(tmp_path / "stock")
    fast = getattr(bert_fast, name).from_pretrained(tmp_path / "stock")
    ids = ids_of()
    with torch.no_grad():
        fast(ids[None] if name.endswith("MultipleChoice") else ids)
    assert_ran_fast(fast)
    fast.save_pretrained(tmp_path / "fast")
    back, info = getattr(transformers, name).from_pretrained(
        tmp_path / "fast", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for key, value in stock.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


@pytest.mark.parametrize("name", CLASSES)
def test_forward_has_the_signature_of_stock(name):
    ours, theirs = (inspect.signature(getattr(m, name).forward) for m in (bert_fast, transformers))
    theirs = {k: v for k, v in theirs.parameters.items() if k != "cache_position"}  # 5.0 has it
    assert [k for k in ours.parameters if k != "cache_position"] == list(theirs)
    for key, parameter in theirs.items():
        assert ours.parameters[key].default == parameter.default


@pytest.mark.parametrize("name", ENCODERS)
def test_report_names_the_architecture_and_what_fell_back(name, device):
    stock = stock_model(name, device, attn_implementation="eager")
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    ids = ids_of(device)
    ours, theirs = (m(ids, output_attentions=True) for m in (fast, stock))
    assert_ran_stock(fast, "output_attentions")
    assert ours.keys() == theirs.keys()
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        assert torch.equal(a, b)
    mask = torch.ones(B, 1, S, S, dtype=torch.bool, device=device).tril()
    ours, theirs = (m(ids, mask)[0] for m in (fast, stock))
    assert torch.equal(ours, theirs)
    (swapped,) = bert_fast.report(fast).swapped
    assert swapped.stock_calls == {"output_attentions": 1, "4-D attention_mask": 1}
    assert swapped.architecture == stock.config.model_type
    assert f"2 layers of {swapped.architecture}" in str(bert_fast.report(fast))


# -- models that look like BERT and are not ---------------------------------------------------
def function_for_activation(model):
    inner = model.encoder.layer[0].intermediate
    del inner.intermediate_act_fn
    inner.intermediate_act_fn = torch.nn.functional.relu


def one_head_less(model):
    attention = model.encoder.layer[1].attention
    for name in ("query", "key", "value"):
        linear = getattr(attention.self, name)
        linear.weight = torch.nn.Parameter(linear.weight[:48].clone())
        linear.bias = torch.nn.Parameter(linear.bias[:48].clone())
    dense = attention.output.dense
    dense.weight = torch.nn.Parameter(dense.weight[:, :48].clone())


def made_a_decoder_later(model):
    model.config.is_decoder = True
    model.config.use_cache = False


ODD = {
    "encoder.layer.0: activation relu": function_for_activation,
    "encoder.layer.1: pruned heads: not 4 (config.num_attention_heads)": one_head_less,
    "encoder.layer.0: config.is_decoder is True, and was not": made_a_decoder_later,
}


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel"])
@pytest.mark.parametrize("reason", ODD)
def test_a_model_that_only_looks_like_bert_runs_stock_and_is_named(reason, name, device):
    stock = stock_model(name, device)
    ODD[reason](stock)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    assert reason in bert_fast.report(fast).swapped[0].reason
    mask = masks(device)["right"]
    ours, theirs = (m(ids_of(device), mask)[0] for m in (fast, stock))
    assert_ran_stock(fast, reason)
    assert torch.equal(ours, theirs)
