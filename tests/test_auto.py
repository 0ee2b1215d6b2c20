"""bert_fast's Auto classes find its class of each architecture and head."""

import copy

import pytest
import torch
import transformers
from models import CLASSES, assert_ran_fast, config_of, ids_of, stock_model

import bert_fast
from bert_fast import auto


def auto_of(name):
    """The Auto class that finds a class of transformers, or None: some are nobody's choice."""
    config = getattr(transformers, name).config_class
    for auto_name in auto.__all__:
        mapping = getattr(transformers, auto_name)._model_mapping
        found = mapping.get(config, ())
        if getattr(transformers, name) in (found if isinstance(found, tuple) else (found,)):
            return auto_name
    return None


CHOSEN = {name: auto_of(name) for name in CLASSES}


def test_every_class_is_found_by_an_auto_class():
    assert [name for name, auto_name in CHOSEN.items() if auto_name is None] == []


@pytest.mark.parametrize("name", CHOSEN)
def test_an_auto_class_makes_and_loads_the_class_of_its_name(name, tmp_path):
    Auto = getattr(bert_fast, CHOSEN[name])
    assert type(Auto.from_config(config_of(name))) is getattr(bert_fast, name)
    stock = stock_model(name)
    stock.save_pretrained(tmp_path)
    model = Auto.from_pretrained(tmp_path)
    assert type(model) is getattr(bert_fast, name)
    ids = ids_of()
    with torch.no_grad():
        ours, theirs = (
            m(ids[None] if name.endswith("MultipleChoice") else ids)[0] for m in (model, stock)
        )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert_ran_fast(model)
    bert_fast.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def test_loading_info_comes_along(tmp_path):
    stock_model("RobertaForMaskedLM").save_pretrained(tmp_path)
    model, info = bert_fast.AutoModelForMaskedLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(model) is bert_fast.RobertaForMaskedLM
    assert not info["missing_keys"]


def test_a_model_without_kernels_comes_as_transformers_has_it_and_says_so(caplog):
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=9, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2
    )
    model = bert_fast.AutoModelForCausalLM.from_config(config)
    assert type(model) is transformers.GPT2LMHeadModel
    assert "bert_fast: no kernels for GPT2LMHeadModel, it is transformers'" in caplog.text
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        bert_fast.AutoModelForMaskedLM.from_config(config)


def test_both_halves_of_a_translator_are_found(tmp_path):
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        config_of("RobertaModel"), config_of(is_decoder=True, add_cross_attention=True)
    )
    transformers.EncoderDecoderModel(config).save_pretrained(tmp_path)
    model = bert_fast.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(model.encoder) is bert_fast.RobertaModel
    assert type(model.decoder) is bert_fast.BertLMHeadModel
    assert [s.path for s in bert_fast.report(model).swapped] == ["encoder", "decoder.bert"]


def test_a_loaded_model_records_attentions_where_stock_does():
    stock = stock_model("ElectraForMaskedLM", attn_implementation="eager")
    model = bert_fast.AutoModelForMaskedLM.from_config(copy.deepcopy(stock.config)).eval()
    model.load_state_dict(stock.state_dict())
    model.set_attn_implementation("eager")
    ours, theirs = (m(ids_of(), output_attentions=True).attentions for m in (model, stock))
    assert len(ours) == 2
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
