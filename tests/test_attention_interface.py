"""attn_implementation="bert_fast": transformers' models with their own forward and our attention.

Truth is the same model with transformers' sdpa, whose values at padded positions ours must have
too, except in causal attention.
"""

import copy

import pytest
import torch
import transformers
from models import HALVES, B, S, assert_ran_fast, ids_of, masks, stock_model, tokens
from transformers import masking_utils

import bert_fast
from bert_fast import attention_interface
from bert_fast.inputs import CACHE

FAMILY = [
    "BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel", "ElectraModel",
    "DistilBertModel", "AlbertModel",
]  # fmt: skip
SMALL = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 100, "max_position_embeddings": 40, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def pair(stock, name="bert_fast"):
    """A model, and a copy of it with our attention."""
    ours = copy.deepcopy(stock)
    ours.set_attn_implementation(name)
    if ours.config._attn_implementation != name and transformers.__version__ < "5.1":
        pytest.skip("not through the AttentionInterface in this version")
    assert ours.config._attn_implementation == name
    return ours, stock


def made(model, config, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, config)(**SMALL, **changes)
    return getattr(transformers, model)(config).eval()


def counted(model):
    attention = bert_fast.report(model).attention
    return attention.fast_calls, attention.stock_calls


@pytest.mark.parametrize("name", FAMILY)
def test_padding_is_honoured_and_every_position_has_the_numbers_of_sdpa(name, device):
    ours, stock = pair(stock_model(name, device))
    for kind, mask in masks(device).items():
        with torch.no_grad():
            a, b = (m(ids_of(device), attention_mask=mask)[0] for m in (ours, stock))
        where = slice(None) if mask is None else (mask != 0).any(1)  # rows that have tokens
        torch.testing.assert_close(a[where], b[where], atol=1e-5, rtol=0, msg=kind)
        assert a.isfinite().all()
    assert counted(ours) == (2 * len(masks()), {})


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel"])
def test_half_precision_errs_no_more_than_sdpa(name, dtype, device):
    ours, stock = pair(stock_model(name, device, dtype))
    exact = copy.deepcopy(stock).double()
    mask = masks(device)["right"].repeat(4, 1)
    ids = ids_of(device, mask.shape)
    with torch.no_grad():
        a, b, truth = (m(ids, attention_mask=mask)[0].double() for m in (ours, stock, exact))
    error, allowed = ((x - truth)[mask != 0].square().mean().sqrt() for x in (a, b))
    assert error <= 1.2 * allowed


@pytest.mark.parametrize("name", ["BertLMHeadModel", "RobertaForCausalLM"])
def test_a_decoder_attends_causally_and_to_its_encoder(name, device):
    ours, stock = pair(stock_model(name, device, is_decoder=True, add_cross_attention=True))
    states = torch.randn(B, S, 64, generator=torch.manual_seed(3)).to(device)
    for kind in ("none", "right", "left", "holes"):
        mask = masks(device)[kind]
        keywords = {
            "attention_mask": mask,
            "encoder_hidden_states": states,  # as long as the decoder, with another mask
            "encoder_attention_mask": masks(device)["right"].flip(0),
            "use_cache": False,
        }
        with torch.no_grad():
            a, b = (m(ids_of(device), **keywords).logits for m in (ours, stock))
        where = tokens(mask, device)
        assert (a - b)[where].abs().max() < 1e-4, kind
    assert counted(ours) == (16, {})


def test_gradients_are_those_of_sdpa(device):
    """Against fp64, as that of a key's bias is zero: there is no number to be near, but noise."""
    ours, stock = pair(stock_model("RobertaModel", device))
    exact = copy.deepcopy(stock).double()
    mask = masks(device)["holes"]
    for model in (ours, stock, exact):
        model(ids_of(device), mask)[0][..., :9].square().sum().backward()
    for (key, a), b, truth in zip(
        ours.named_parameters(), stock.parameters(), exact.parameters(), strict=True
    ):
        if truth.grad is None:
            assert a.grad is None, key
            continue
        error, allowed = ((x.grad - truth.grad).abs().max().item() for x in (a, b))
        assert error <= 1e-5 + 1e-4 * truth.grad.abs().max().item() + 4 * allowed, key


def test_bart_encodes_decodes_and_generates(device):
    config = transformers.BartConfig(
        vocab_size=99, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=100, decoder_ffn_dim=100, init_std=0.3,
        max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(0)
    ours, stock = pair(transformers.BartForConditionalGeneration(config).eval().to(device))
    mask = masks(device)["left"]
    keywords = {"input_ids": ids_of(device), "attention_mask": mask}
    with torch.no_grad():
        a, b = (
            m(decoder_input_ids=ids_of(device, (B, 9)), **keywords).logits for m in (ours, stock)
        )
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        assert counted(ours) == (6, {})
        a, b = (m.generate(**keywords, num_beams=2, max_new_tokens=6) for m in (ours, stock))
    assert torch.equal(a, b)


def test_a_sliding_window_is_left_to_sdpa_and_named(device):
    """ModernBERT: layers in turn see all keys, or those nearby."""
    ours, stock = pair(
        made(
            "ModernBertModel", "ModernBertConfig", local_attention=8, global_attn_every_n_layers=2,
            cls_token_id=1, sep_token_id=2,
        ).to(device)
    )  # fmt: skip
    mask = masks(device)["right"]
    with torch.no_grad():
        a, b = (m(ids_of(device), mask)[0] for m in (ours, stock))
    torch.testing.assert_close(a[mask != 0], b[mask != 0], atol=1e-5, rtol=0)
    assert counted(ours) == (1, {"4-D attention_mask": 1})


def test_grouped_heads_and_position_biases_are_left_to_sdpa_and_named(device):
    t5 = transformers.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=100, num_layers=2, num_heads=4
    )
    for model, reason in (
        (made("LlamaModel", "LlamaConfig", num_key_value_heads=2), "fewer heads of keys"),
        (transformers.T5EncoderModel(t5).eval(), "keyword position_bias"),
    ):
        ours, stock = pair(model.to(device))
        mask = masks(device)["left"]
        with torch.no_grad():
            a, b = (m(input_ids=ids_of(device), attention_mask=mask)[0] for m in (ours, stock))
        assert torch.equal(a[mask != 0], b[mask != 0])
        fast, stock_calls = counted(ours)
        assert fast == 0
        assert [reason in key for key in stock_calls] == [True]


CALLS = {
    "4-D attention_mask": {"attention_mask": torch.ones(B, 1, S, S, dtype=torch.bool).tril()},
    "torch.float64 queries": {},
}


@pytest.mark.parametrize("reason", CALLS)
def test_a_call_that_is_not_covered_runs_sdpa_and_is_named(reason, device):
    ours, stock = pair(stock_model(device=device))
    if "float64" in reason:
        ours, stock = ours.double(), stock.double()
    keywords = {k: v.to(device) for k, v in CALLS[reason].items()}
    with torch.no_grad():
        a, b = (m(ids_of(device), **keywords)[0] for m in (ours, stock))
    assert torch.equal(a, b)
    assert counted(ours) == (0, {reason: 2})
    assert f"2 calls on transformers' own: {reason}" in str(bert_fast.report(ours))


@pytest.mark.parametrize("is_decoder", [False, True])
def test_asked_for_attentions_it_gives_them(is_decoder, device):
    stock = stock_model(device=device, is_decoder=is_decoder, attn_implementation="eager")
    ours, stock = pair(stock)
    for kind in ("none", "right", "holes"):
        mask = masks(device)[kind]
        with torch.no_grad():
            a, b = (
                m(ids_of(device), mask, output_attentions=True, use_cache=False)
                for m in (ours, stock)
            )
        assert len(a.attentions) == 2
        where = tokens(mask, device)
        for p, q in zip((*a.attentions, a[0]), (*b.attentions, b[0]), strict=True):
            p, q = (t.transpose(1, 2) if t.ndim == 4 else t for t in (p, q))
            torch.testing.assert_close(p[where], q[where], atol=1e-5, rtol=0)
    assert counted(ours) == (0, {"output_attentions": 6})


def test_torch_compile_gives_one_graph_with_equal_results(device):
    ours, _ = pair(stock_model("RobertaModel", device))
    compiled = torch.compile(copy.deepcopy(ours), backend="aot_eager", fullgraph=True)
    mask = masks(device)["holes"].long()
    with torch.no_grad():
        a, b = (m(ids_of(device), mask)[0] for m in (compiled, ours))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_model_with_an_attention_of_its_own_is_an_error_that_says_so(device, monkeypatch):
    """Or, in versions in which its masks are its own too, nothing reaches us."""
    config = transformers.MPNetConfig(**SMALL)
    model = transformers.MPNetModel._from_config(config, attn_implementation="bert_fast").eval()
    mask, seen = masks(device)["right"], []
    monkeypatch.setitem(
        masking_utils.AttentionMaskInterface._global_mapping, "bert_fast",
        lambda **keywords: seen.append(1) or attention_interface.mask(**keywords),
    )  # fmt: skip
    try:
        ours = model.to(device)(ids_of(device), mask)[0]
    except ValueError as error:
        caught = error
    else:
        model.config._attn_implementation = "eager"
        assert not seen
        assert torch.equal(ours, model(ids_of(device), mask)[0])
        return
    assert "MPNetModel computes its attention itself" in str(caught)
    assert 'load it with attn_implementation="eager"' in str(caught)


def test_the_drop_in_classes_take_the_name_too(device):
    stock = stock_model(device=device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    fast.set_attn_implementation("bert_fast")
    mask = masks(device)["right"]
    with torch.no_grad():
        fast(ids_of(device), mask)
        assert_ran_fast(fast)
        mask4 = torch.ones(B, 1, S, S, dtype=torch.bool, device=device).tril()
        a, b = (m(ids_of(device), mask4)[0] for m in (fast, stock))
    assert torch.equal(a, b)


def test_it_comes_from_pretrained_by_name_and_counts_are_not_saved(tmp_path, device):
    stock_model("RobertaModel").save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="bert_fast")
    model.to(device)(ids_of(device))
    assert counted(model) == (2, {})
    assert bert_fast.report(copy.deepcopy(model)).attention.fast_calls == 0


def test_masks_of_other_shapes_are_made_as_for_sdpa(device):
    """A window, a cache, a mask that must be there for another to be added: four dimensions."""
    config = transformers.BertConfig(**SMALL)
    config._attn_implementation = "bert_fast"
    embeds, padding = torch.zeros(B, S, 64, device=device), masks(device)["right"]
    make, causal = masking_utils.create_bidirectional_mask, masking_utils.create_causal_mask
    if transformers.__version__ < "5.1":
        pytest.skip("create_causal_mask has other arguments")
    assert make(config, embeds, padding).shape == (B, S)
    assert make(config, embeds, None) is None
    def overlay(batch, head, q, k):
        return (q - k).abs() < 3

    assert make(config, embeds, padding, and_mask_function=overlay).shape == (B, 1, S, S)
    assert causal(config, embeds, padding, **{CACHE: None}).shape == (B, 1, S)
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(B, 4, 2, 16), torch.zeros(B, 4, 2, 16), 0)
    longer = torch.cat((padding, padding[:, :2]), 1)
    assert causal(config, embeds, longer, **{CACHE: cache}).shape == (B, 1, S, S + 2)


def test_causal_queries_before_more_keys_are_left_to_sdpa(device):
    """A first step with a StaticCache: the keys that follow are empty, and come last, not first."""
    module = torch.nn.Module()
    module.is_causal = True
    q = torch.randn(B, 4, 7, 16, device=device)
    k, v = torch.randn(2, B, 4, 20, 16, device=device)
    ours, _ = attention_interface.attend(module, q, k, v, None)
    theirs, _ = transformers.AttentionInterface()["sdpa"](module, q, k, v, None)
    assert torch.equal(ours, theirs)
    assert counted(module) == (0, {"causal attention to keys of another length": 1})


def of_t5():
    config = transformers.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=100, num_layers=2, num_heads=4,
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


def of_gemma():
    config = transformers.Gemma2Config(
        **SMALL, head_dim=16, num_key_value_heads=2, attn_logit_softcapping=0.5
    )
    return transformers.Gemma2Model(config)


def of_gpt_oss():
    config = transformers.GptOssConfig(
        **SMALL, head_dim=16, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1
    )
    return transformers.GptOssModel(config)


@pytest.mark.parametrize("attentions", [False, True])
@pytest.mark.parametrize("make", [of_t5, of_gemma, of_gpt_oss])
def test_what_a_model_alone_knows_is_left_to_its_own_attention(make, attentions, device):
    """A bias of positions, a cap of the scores, sinks: nothing of it is dropped."""
    torch.manual_seed(0)
    stock = make().to(device).eval()
    stock.set_attn_implementation("eager")
    ours, _ = pair(stock)
    mask = masks(device)["right"]
    with torch.no_grad():
        a, b = (m(ids_of(device), mask, output_attentions=attentions) for m in (ours, stock))
    torch.testing.assert_close(a[0][mask != 0], b[0][mask != 0], atol=1e-5, rtol=0)
    if attentions:
        torch.testing.assert_close(a.attentions, b.attentions, atol=1e-5, rtol=0)
    fast, stock_calls = counted(ours)
    assert fast == 0 and sum(stock_calls.values()) == 2


def test_an_attention_that_has_no_eager_form_in_its_file_says_what_to_do():
    with pytest.raises(ValueError, match=r'Linear was called with s_aux, .*="eager"'):
        attention_interface._eager_of(torch.nn.Linear, "keyword s_aux")


def test_under_transforms_of_torch_func_sdpa_runs_and_is_named(device):
    ours, theirs = pair(stock_model(device=device))
    embeds = torch.randn(2, 7, 64, device=device)

    def gradient(model):
        return torch.func.grad(lambda x: model(inputs_embeds=x)[0].square().sum())(embeds)

    torch.testing.assert_close(gradient(ours), gradient(theirs), rtol=1e-4, atol=1e-4)
    count, reasons = counted(ours)
    assert count == 0 and list(reasons) == ["torch.func or forward-mode AD"]


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_trace_runs_sdpa_for_any_size_and_warns_as_with_sdpa(is_decoder):
    def traced(model):
        given = ids_of(), masks()["right"]
        with pytest.warns() as warned:
            program = torch.jit.trace(model, given, check_trace=False)
        return program, {(w.filename, w.lineno, w.category) for w in warned}

    ours, theirs = pair(stock_model(is_decoder=is_decoder, use_cache=False, return_dict=False))
    program, warned = traced(ours)
    assert warned <= traced(theirs)[1]
    assert counted(ours) == (0, {"torch.jit tracing": 2})
    ids, mask = ids_of(shape=(2, 11)), masks()["right"][2:4, :11]
    torch.testing.assert_close(program(ids, mask)[0], theirs(ids, mask)[0], atol=1e-5, rtol=0)
