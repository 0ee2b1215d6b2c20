"""Decoders: causal and cross attention on the kernels, caches filled by them, and generation.

A call that attends to what a cache holds already runs stock; it is counted and named.
"""

import copy
import inspect

import pytest
import torch
import transformers
from models import (
    HALVES,
    B,
    S,
    assert_ran_fast,
    assert_ran_stock,
    config_of,
    fast_calls,
    ids_of,
    masks,
    stock_model,
    tokens,
)

import bert_fast
from bert_fast.inputs import CACHE

DECODERS = ["BertLMHeadModel", "RobertaForCausalLM", "ElectraForCausalLM"]
SK = 31  # length of what the decoder reads
STEP = "a step that reads a cache"


def crossing(name, device, dtype=torch.float32, **changes):
    """A stock decoder with cross attention, and a copy of it on the kernels."""
    stock = stock_model(name, device, dtype, is_decoder=True, add_cross_attention=True, **changes)
    return stock, bert_fast.accelerate(copy.deepcopy(stock))


def states_of(device, length=SK, dtype=torch.float32):
    states = torch.randn(B, length, 64, generator=torch.manual_seed(3))
    return states.to(device, dtype)


def encoder_masks(device, length=SK):
    lengths = torch.tensor([length, 1, 9, length - 1, 20])[:, None]
    right = torch.arange(length) < lengths
    return {
        "none": None,
        "right": right.to(device).long(),
        "left": right.flip(1).to(device),
        "holes": (torch.arange(length) * 5 + torch.arange(B)[:, None]).remainder(3).to(device),
    }


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", DECODERS)
def test_cross_attention_reads_the_tokens_of_the_encoder(name, kind, device):
    stock, fast = crossing(name, device)
    for encoder_kind, encoder_mask in encoder_masks(device).items():
        mask = masks(device)[kind]
        with torch.no_grad():
            ours, theirs = (
                m(
                    ids_of(device),
                    attention_mask=mask,
                    encoder_hidden_states=states_of(device),
                    encoder_attention_mask=encoder_mask,
                    use_cache=False,
                ).logits
                for m in (fast, stock)
            )
        where = tokens(mask, device)
        apart = (ours - theirs)[where].abs().max()
        assert apart < 1e-4, encoder_kind
    assert_ran_fast(fast)


def test_an_encoder_as_long_as_the_decoder_masks_no_query(device):
    """Lengths agree, masks do not: each is of its own side."""
    stock, fast = crossing("BertLMHeadModel", device)
    mask = masks(device)["right"]
    keywords = {
        "encoder_hidden_states": states_of(device, S),
        "encoder_attention_mask": mask.flip(0),
        "use_cache": False,
    }
    with torch.no_grad():
        ours, theirs = (m(ids_of(device), **keywords).logits for m in (fast, stock))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert_ran_fast(fast)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cross_attention_in_half_precision_errs_no_more_than_stock(dtype, device):
    stock, fast = crossing("BertLMHeadModel", device, dtype)
    exact = copy.deepcopy(stock).double()
    mask, encoder_mask = masks(device)["right"], encoder_masks(device)["right"]
    results = []
    for m in (fast, stock, exact):
        with torch.no_grad():
            out = m.bert(
                ids_of(device),
                mask,
                encoder_hidden_states=states_of(device, dtype=m.dtype),
                encoder_attention_mask=encoder_mask,
                use_cache=False,
            )
        results.append(out[0].double()[mask != 0])
    error, allowed = ((x - results[2]).square().mean().sqrt() for x in results[:2])
    assert_ran_fast(fast)
    assert error <= 1.2 * allowed


def test_encoder_states_that_reach_no_token_give_no_context(device):
    """Every key masked: the context is zeros, whatever is in the states."""
    _, fast = crossing("BertModel", device)
    nothing = torch.zeros(B, SK, device=device)
    with torch.no_grad():
        one, other = (
            fast(
                ids_of(device),
                encoder_hidden_states=states,
                encoder_attention_mask=nothing,
                use_cache=False,
            )[0]
            for states in (states_of(device), states_of(device) * torch.nan)
        )
    assert one.isfinite().all()
    assert torch.equal(one, other)


# -- translation ----------------------------------------------------------------------------
def translator(device, **changes):
    """An EncoderDecoderModel of two BERTs, and a copy with both on the kernels."""
    decoder = config_of(is_decoder=True, add_cross_attention=True, **changes)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config_of(), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    torch.manual_seed(0)
    stock = transformers.EncoderDecoderModel(config).eval().to(device)
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(0.05 * torch.randn_like(p))
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    assert [s.path for s in bert_fast.report(fast).swapped] == ["encoder", "decoder.bert"]
    return stock, fast


@pytest.mark.parametrize("use_cache", [None, False])
def test_a_translator_trains_on_the_kernels(use_cache, device):
    stock, fast = translator(device)
    mask, encoder_mask = masks(device)["right"], encoder_masks(device)["right"]
    losses = []
    for m in (fast, stock):
        out = m(
            input_ids=ids_of(device, (B, SK)),
            attention_mask=encoder_mask,
            decoder_input_ids=ids_of(device),
            decoder_attention_mask=mask,
            use_cache=use_cache,
        )
        assert (CACHE in out) == (use_cache is not False)
        loss = torch.nn.functional.cross_entropy(
            out.logits.transpose(1, 2), ids_of(device).masked_fill(mask == 0, -100)
        )
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    assert_ran_fast(fast)
    for (key, p), (_, q) in zip(fast.named_parameters(), stock.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if q.grad is not None:
            close = 1e-5 + 1e-4 * q.grad.abs().max().item()
            torch.testing.assert_close(
                p.grad, q.grad, atol=close, rtol=0, msg=lambda m, k=key: f"{k} {m}"
            )


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_gives_the_tokens_of_stock(use_cache, beams, device):
    stock, fast = translator(device)
    inputs = {
        "input_ids": ids_of(device, (B, SK)),
        "attention_mask": encoder_masks(device)["right"],
        "num_beams": beams,
        "max_new_tokens": 8,
        "use_cache": use_cache,
    }
    with torch.no_grad():
        ours, theirs = (m.generate(**inputs) for m in (fast, stock))
    assert torch.equal(ours, theirs)
    assert len(ours.unique()) > 5  # sentences, not one token over and over
    assert not torch.equal(ours[0], ours[1])
    encoder, decoder = fast_calls(fast)
    assert encoder == (1, {})
    if "cache_position" in inspect.signature(stock.decoder.forward).parameters:
        return  # transformers 5.0: a keyword that could say anything
    if use_cache:  # the first step fills the cache, the others read it
        assert decoder == (1, {STEP: ours.shape[1] - 2})
    else:
        assert decoder == (ours.shape[1] - 1, {})


# -- caches ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["none", "left", "holes"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_filled_by_the_kernels_serves_the_next_step(name, kind, device):
    stock = stock_model(name, device, is_decoder=True)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    mask = masks(device)[kind]
    where = tokens(mask, device)
    with torch.no_grad():
        ours, theirs = (m(ids_of(device), attention_mask=mask) for m in (fast, stock))
        for a, b in zip(ours[CACHE], theirs[CACHE], strict=True):
            for x, y in zip(a[:2], b[:2]):
                at_tokens = where[:, None, :, None].expand_as(x)
                torch.testing.assert_close(x[at_tokens], y[at_tokens], atol=1e-5, rtol=0)
                assert not x[~at_tokens].any()
        assert_ran_fast(fast)
        longer = None if mask is None else torch.cat((mask != 0, mask.new_ones(B, 1)), 1)
        ours, theirs = (
            m(ids_of(device)[:, :1], attention_mask=longer, **{CACHE: out[CACHE]})
            for m, out in ((fast, ours), (stock, theirs))
        )
    has_tokens = where.any(1)
    torch.testing.assert_close(
        ours.logits[has_tokens], theirs.logits[has_tokens], atol=1e-4, rtol=0
    )
    assert fast_calls(fast) == [(1, {STEP: 1})]


@pytest.mark.parametrize("name", ["BertModel", "ElectraModel"])
def test_tuples_have_the_cache_and_the_states_where_stock_has_them(name, device):
    stock = stock_model(name, device, is_decoder=True)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    with torch.no_grad():
        ours, theirs = (
            m(ids_of(device), output_hidden_states=True, return_dict=False) for m in (fast, stock)
        )
    assert_ran_fast(fast)
    assert [type(a) for a in ours] == [type(b) for b in theirs]
    assert any(isinstance(a, transformers.DynamicCache) for a in ours)


def test_an_empty_cache_that_is_passed_is_filled_and_returned(device):
    _, fast = crossing("BertModel", device)
    cache = transformers.EncoderDecoderCache(
        transformers.DynamicCache(config=fast.config), transformers.DynamicCache(config=fast.config)
    )
    with torch.no_grad():
        out = fast(
            ids_of(device),
            encoder_hidden_states=states_of(device),
            use_cache=True,
            **{CACHE: cache},
        )
    assert out[CACHE] is cache
    assert cache.get_seq_length() == S
    assert cache.cross_attention_cache.get_seq_length() == SK
    assert_ran_fast(fast)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_cache_is_taken_by_its_place_and_by_the_names_that_stock_takes(device):
    fast = bert_fast.accelerate(stock_model(device=device, is_decoder=True))
    place = list(inspect.signature(fast.forward).parameters).index(CACHE)
    for names in ((CACHE,), ("past_key_values",), ()):
        cache = transformers.DynamicCache(config=fast.config)
        places = [] if names else [*[None] * (place - 1), cache]
        with torch.no_grad():
            out = fast(ids_of(device), *places, use_cache=True, **dict.fromkeys(names, cache))
        assert out[CACHE] is cache
        assert cache.get_seq_length() == S
    assert_ran_fast(fast)


@pytest.mark.parametrize("layers", [(0, 2), (2, 1, 0)], ids=["dropped", "turned round"])
def test_a_cache_knows_layers_by_the_number_that_stock_gives_them(layers, device):
    stock = stock_model("BertLMHeadModel", device, is_decoder=True, num_hidden_layers=3)
    stock.bert.encoder.layer = torch.nn.ModuleList([stock.bert.encoder.layer[i] for i in layers])
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    ids, mask = ids_of(device), masks(device)["left"]
    longer = torch.cat((mask, mask.new_ones(B, 1)), 1)
    ours, theirs = [], []
    with torch.no_grad():
        for m, logits in ((fast, ours), (stock, theirs)):
            first = m(ids, attention_mask=mask, use_cache=True)
            step = {CACHE: first[CACHE], "attention_mask": longer}
            logits.append(m(ids[:, :1], **step, use_cache=True).logits)
    assert fast_calls(fast) == [(1, {STEP: 1})]
    there = mask.any(1)
    torch.testing.assert_close(ours[0][there], theirs[0][there], atol=1e-4, rtol=0)


def test_another_cache_runs_stock(device):
    fast = bert_fast.accelerate(stock_model(device=device, is_decoder=True))
    cache = transformers.StaticCache(config=fast.config, max_cache_len=40)
    with torch.no_grad():
        fast(ids_of(device), use_cache=True, **{CACHE: cache})
    assert_ran_stock(fast, "a cache of type StaticCache")


# -- what is not covered, and bad input -------------------------------------------------------
def test_cross_attention_layers_without_encoder_states_run_stock(device):
    stock, fast = crossing("BertModel", device)
    with torch.no_grad():
        ours, theirs = (m(ids_of(device), use_cache=False)[0] for m in (fast, stock))
    assert torch.equal(ours, theirs)
    assert_ran_stock(fast, "cross-attention layers without encoder_hidden_states")


def test_encoder_states_without_layers_that_read_them_are_stocks_error(device):
    fast = bert_fast.accelerate(stock_model(device=device, is_decoder=True))
    with pytest.raises(ValueError, match=r"config\.add_cross_attention=True"):
        fast(ids_of(device), encoder_hidden_states=states_of(device), use_cache=False)
    assert_ran_stock(fast, "encoder_hidden_states without config.add_cross_attention")


def test_an_encoder_ignores_encoder_states_as_stock_does(device):
    stock = stock_model(device=device)
    fast = bert_fast.accelerate(copy.deepcopy(stock))
    with torch.no_grad():
        ours, theirs = (
            m(ids_of(device), encoder_hidden_states=states_of(device))[0] for m in (fast, stock)
        )
    assert torch.equal(ours, theirs)
    assert_ran_stock(fast, "encoder_hidden_states in an encoder")


def test_encoder_masks_of_three_dimensions_and_other_lengths_run_stock(device):
    stock, fast = crossing("BertModel", device)
    for shape in ((B, SK + 2), (B, 1, S, SK)):
        keywords = {
            "encoder_hidden_states": states_of(device),
            "encoder_attention_mask": torch.ones(shape, device=device),
            "use_cache": False,
        }
        try:
            theirs = stock(ids_of(device), **keywords)[0]
        except RuntimeError:
            with pytest.raises(RuntimeError):
                fast(ids_of(device), **keywords)
        else:
            assert torch.equal(fast(ids_of(device), **keywords)[0], theirs)
    ((count, reasons),) = fast_calls(fast)
    assert count == 0
    assert list(reasons) == [
        "encoder_attention_mask of another length than encoder_hidden_states",
        "4-D encoder_attention_mask",
    ]


def test_bad_encoder_states_and_masks_are_errors_that_say_why(device):
    _, fast = crossing("BertModel", device)
    states = states_of(device)
    with pytest.raises(ValueError) as caught:
        fast(ids_of(device), encoder_hidden_states=states[0], use_cache=False)
    want = "BertModel: encoder_hidden_states must be [5, length, hidden] like input_ids"
    assert f"{want}, got [31, 64]" in str(caught.value)
    with pytest.raises(ValueError) as caught:
        fast(
            ids_of(device),
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(2, SK, device=device),
            use_cache=False,
        )
    want = "encoder_attention_mask must be [5, 31] like encoder_hidden_states, got [2, 31]"
    assert want in str(caught.value)


def test_torch_compile_takes_cross_attention_in_one_graph(device):
    _, fast = crossing("BertModel", device)
    compiled = torch.compile(copy.deepcopy(fast), backend="aot_eager", fullgraph=True)
    mask = masks(device)["right"]
    with torch.no_grad():
        ours, eager = (
            m(
                ids_of(device),
                mask,
                encoder_hidden_states=states_of(device),
                encoder_attention_mask=encoder_masks(device)["left"],
                use_cache=False,
            )[0]
            for m in (compiled, fast)
        )
    torch.testing.assert_close(ours, eager, atol=1e-5, rtol=0)
