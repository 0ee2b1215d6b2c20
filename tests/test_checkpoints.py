"""The corpus, the shipped checkpoint made from it, and models with outliers.

The figures of the model card are measured again on the same held-out docstrings. Another Python
has other docstrings, so they are allowed to differ by what an eighth of the texts can change.
"""

import math
import platform
import sys

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
)

from bert_fast.checkpoints import SHIPPED, outlier_model
from bert_fast.corpus import docstrings, held_out, topics

SMALL = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def docs():
    return docstrings()


@pytest.fixture(scope="module")
def held(docs):
    return [doc for doc in docs if held_out(doc)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def card():
    """{(what, metric): value} of the model card."""
    results = ModelCard.load(SHIPPED / "README.md").data.eval_results
    python = results[0].dataset_name.split()[-1]
    if python.split(".")[:2] != platform.python_version().split(".")[:2]:
        pytest.skip(f"its figures are of the docstrings of Python {python}, this one has others")
    return {(r.task_type, r.metric_name): r.metric_value for r in results}


# -- corpus ---------------------------------------------------------------------------------
def test_the_corpus_is_the_same_each_time():
    modules = ("asyncio", "json", "builtins", "email")
    assert docstrings(modules) == docstrings(modules)


def test_a_few_modules_give_a_few_hundred_texts_of_those_modules_alone():
    docs = docstrings(("json", "asyncio"))
    assert 200 < len(docs) < 1000
    assert {doc.name.partition(".")[0] for doc in docs} == {"json", "asyncio"}


def test_a_docstring_comes_with_its_name_and_signature():
    docs = {doc.name: doc for doc in docstrings(("textwrap", "builtins"))}
    assert docs["textwrap.indent"].signature == "(text, prefix, predicate=None)"
    assert docs["textwrap.indent"].text.startswith("Adds 'prefix' to the beginning of")
    assert docs["textwrap.TextWrapper.fill"].signature == "(text)"
    assert docs["str.join"].signature == "(iterable, /)"


def test_the_whole_corpus_is_thousands_of_different_texts_of_the_standard_library(docs):
    assert len(docs) > 5000
    assert len({doc.text for doc in docs}) == len(docs)
    builtins = {doc.name for doc in docstrings(("builtins",))}
    modules = {doc.name.partition(".")[0] for doc in docs if doc.name not in builtins}
    assert modules <= sys.stdlib_module_names


def test_a_module_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="no_such_module"):
        docstrings(("json", "no_such_module"))


def test_a_name_alone_is_not_taken_for_a_list_of_letters():
    with pytest.raises(ValueError, match=r"a list or tuple of names, got 'json'; give \('json',\)"):
        docstrings("json")


def test_topics_are_the_long_pages_of_pydoc():
    pages = {doc.name: doc.text for doc in topics()}
    assert len(pages) > 70
    assert "assert" in pages["assert"]


def test_texts_that_share_a_summary_are_on_one_side_of_the_split(docs, held):
    assert 0.05 < len(held) / len(docs) < 0.12
    doc = held[0]
    assert held_out(doc._replace(name="other", text=doc.text.upper() + "\n\nMore."))


# -- the shipped checkpoint -----------------------------------------------------------------
@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForPreTraining])
def test_the_shipped_checkpoint_has_every_weight_and_loads_as_float32(kind):
    model, info = kind.from_pretrained(SHIPPED, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.float32


def test_the_shipped_checkpoint_takes_at_most_6_megabytes():
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 6e6


def test_the_tokenizer_gives_back_what_it_was_given(tokenizer):
    text = "return the absolute value of the argument [MASK]"
    inputs = tokenizer(text)
    assert tokenizer.decode(inputs.input_ids) == f"[CLS] {text} [SEP]"
    assert [tokenizer.pad_token_id, tokenizer.model_max_length, len(tokenizer)] == [0, 512, 8192]


@torch.no_grad()
def test_the_card_tells_how_well_functions_find_their_docstrings(held, tokenizer, card):
    model = BertModel.from_pretrained(SHIPPED).eval()

    def embed(texts):
        inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        return F.normalize(model(**inputs).last_hidden_state[:, 0], dim=-1)

    functions = [i for i, doc in enumerate(held) if doc.signature]
    queries = embed([held[i].name + held[i].signature for i in functions])
    scores = queries @ embed([doc.text for doc in held]).T
    rank = (scores > scores[range(len(functions)), functions][:, None]).sum(1)
    for k in (1, 10):
        measured = (rank < k).float().mean().item()
        assert measured == pytest.approx(card["text-retrieval", f"[CLS] top-{k}"], abs=0.06)


@torch.no_grad()
def test_the_card_tells_how_well_masked_words_are_found(held, tokenizer, card):
    model = BertForMaskedLM.from_pretrained(SHIPPED).eval()
    texts = [f"{doc.name}{doc.signature} {doc.text}" for doc in held[::3]]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    chosen = torch.rand(inputs.input_ids.shape, generator=torch.manual_seed(0)) < 0.15
    chosen &= inputs.input_ids >= 5  # not the special tokens
    labels = inputs.input_ids[chosen]
    inputs.input_ids[chosen] = tokenizer.mask_token_id
    loss = F.cross_entropy(model(**inputs).logits[chosen], labels).item()
    assert loss == pytest.approx(card["fill-mask", "loss"], abs=0.3)


# -- outliers -------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 1])
def test_outliers_run_at_20_to_60_times_the_rest_in_every_layer(seed):
    model = outlier_model(BertConfig(**SMALL), seed)
    ids = torch.randint(500, (4, 50), generator=torch.manual_seed(seed))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    for state in states:
        size = state.square().mean((0, 1)).sort().values.sqrt()
        ratio = size[-4:] / size[:-4].square().mean().sqrt()
        assert 20 < ratio.min() and ratio.max() < 60


def test_attention_of_an_outlier_model_is_neither_uniform_nor_one_hot():
    model = outlier_model(BertConfig(**SMALL, attn_implementation="eager"))
    ids = torch.randint(500, (4, 50), generator=torch.manual_seed(0))
    with torch.no_grad():
        p = torch.stack(model(ids, output_attentions=True).attentions)  # [L, B, H, S, S]
    entropy = -torch.special.xlogy(p, p).sum(-1).mean((1, 3)) / math.log(50)
    assert 0.2 < entropy.min() and entropy.max() < 0.98


def test_an_outlier_checkpoint_is_read_back_as_written_and_is_finite_in_fp16(tmp_path):
    same = outlier_model(BertConfig(**SMALL), seed=3)
    same.save_pretrained(tmp_path)
    model = BertModel.from_pretrained(tmp_path).eval()
    ids = torch.arange(100).view(2, 50)
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, same(ids).last_hidden_state)
        assert model.half()(ids).last_hidden_state.isfinite().all()


def test_making_an_outlier_model_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    outlier_model(BertConfig(**SMALL))
    assert torch.equal(before, torch.get_rng_state())


def test_more_outliers_than_dimensions_are_an_error():
    with pytest.raises(ValueError, match=r"outliers must be in 1\.\.63, got 64"):
        outlier_model(BertConfig(**SMALL), outliers=64)
