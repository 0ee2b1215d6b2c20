"""bert_fast.answer against stock's logits, decoded one span at a time from the tokenizer's windows.

The head is random, on the shipped checkpoint: every span is as good a candidate as any other.
"""

import copy
import math
import pathlib
import random

import pytest
import tokenizers
import torch
import transformers
from models import assert_ran_fast, stock_model

import bert_fast
from bert_fast.answer import Answer
from bert_fast.checkpoints import SHIPPED

ANSWER = bert_fast.answer
QUESTION = "What is returned?"
TEXT = (pathlib.Path(__file__).parent.parent / "LICENSE").read_text()  # the same on any machine
CONTEXT = "An unforgettable antidisestablishmentarian, or None if there is none."


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering.from_pretrained(SHIPPED, dtype=torch.float32)
    torch.nn.init.normal_(model.qa_outputs.weight, std=0.2)
    torch.nn.init.normal_(model.qa_outputs.bias)
    return model.eval()


@pytest.fixture
def fast(stock, device):
    return bert_fast.accelerate(copy.deepcopy(stock)).to(device)


@pytest.fixture(scope="module")
def texts():
    """Questions of 2 to 12 words and contexts of 10 to 250, 40 of each."""
    draw, words = random.Random(0), TEXT.split()

    def some(low, high):
        begin = draw.randrange(len(words) - high)
        return " ".join(words[begin : begin + draw.randint(low, high)])

    return [some(2, 12) for _ in range(40)], [some(10, 250) for _ in range(40)]


@torch.no_grad()
def decoded(question, context, model, tokenizer, window, stride, longest, threshold, whole_words):
    """{(start, end) in characters: score} by definition, (0, 0) for no answer."""
    windows = tokenizer(
        question, context, truncation="only_second", max_length=window, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    whole = tokenizer(question, context, return_offsets_mapping=True, verbose=False)
    edges = {}
    for place, word, sequence in zip(
        whole["offset_mapping"], whole.word_ids(), whole.sequence_ids()
    ):
        if sequence == 1:
            edges.setdefault(word, []).append(place)
    starts = {places[0][0] for places in edges.values()}
    ends = {places[-1][1] for places in edges.values()}
    spans, null = {}, math.inf
    for w, ids in enumerate(windows["input_ids"]):
        types = torch.tensor([windows["token_type_ids"][w]])
        out = model(torch.tensor([ids]), token_type_ids=types)
        start, end = (x[0].double().tolist() for x in (out.start_logits, out.end_logits))
        null = min(null, start[0] + end[0])
        place = windows["offset_mapping"][w]
        mine = [i for i, sequence in enumerate(windows.sequence_ids(w)) if sequence == 1]
        for i in mine:
            for j in mine:
                key = (place[i][0], place[j][1])
                if i <= j < i + longest and (
                    not whole_words or (key[0] in starts and key[1] in ends)
                ):
                    spans[key] = max(spans.get(key, -math.inf), start[i] + end[j])
    if threshold is not None:
        spans[0, 0] = null - threshold
    top = max(spans.values())
    total = sum(math.exp(z - top) for z in spans.values())
    return {key: math.exp(z - top) / total for key, z in spans.items()}, len(windows["input_ids"])


SETTINGS = {
    "one window each": (512, 100, 30, None, True),
    "overlapping windows": (64, 20, 30, None, True),
    "windows side by side": (48, 0, 8, None, True),
    "parts of words": (64, 20, 5, None, False),
    "maybe no answer": (64, 20, 30, -8.0, True),
    "one token": (64, 20, 1, -5.8, True),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_spans_and_scores_are_those_of_stock_logits(setting, stock, fast, tokenizer, texts):
    window, stride, longest, threshold, whole_words = SETTINGS[setting]
    found = ANSWER(
        *texts, fast, tokenizer, top_k=10**6, window=window, stride=stride, batch_tokens=2000,
        max_answer_length=longest, null_threshold=threshold, whole_words=whole_words,
    )  # fmt: skip
    assert_ran_fast(fast)
    assert len(found) == len(texts[0])
    counts = []
    for question, context, answers in zip(*texts, found):
        scores, count = decoded(question, context, stock, tokenizer, *SETTINGS[setting])
        counts.append(count)
        assert {(a.start, a.end) for a in answers} == scores.keys()
        assert len(answers) == len(scores)
        for a in answers:
            assert a.text == context[a.start : a.end]
            assert a.score == pytest.approx(scores[a.start, a.end], rel=1e-4)
        assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)
        assert (answers[0].start, answers[0].end) == max(scores, key=scores.get)
        assert sum(a.score for a in answers) == pytest.approx(1)
    assert (max(counts) > 3) == (window < 512)
    if threshold is not None:  # the setting is one where both happen
        assert {a[0].text == "" for a in found} == {True, False}


def test_top_k_is_the_head_of_all_answers_and_one_by_default(fast, tokenizer):
    every = ANSWER(QUESTION, CONTEXT, fast, tokenizer, top_k=1000)
    assert len(every) > 20
    assert ANSWER(QUESTION, CONTEXT, fast, tokenizer, top_k=3) == every[:3]
    assert ANSWER(QUESTION, CONTEXT, fast, tokenizer) == every[:1]
    assert isinstance(every[0], Answer)


def test_one_str_goes_with_each_of_a_list(fast, tokenizer):
    other = "None, where there is nothing."
    one, two = (ANSWER(QUESTION, text, fast, tokenizer)[0] for text in (CONTEXT, other))
    for question in (QUESTION, [QUESTION] * 2):
        [a], [b] = ANSWER(question, [CONTEXT, other], fast, tokenizer)
        assert (a.text, b.text) == (one.text, two.text)
        assert (a.score, b.score) == pytest.approx((one.score, two.score), rel=1e-4)
    assert ANSWER([QUESTION, other], CONTEXT, fast, tokenizer)[0][0].text == one.text
    assert ANSWER([], CONTEXT, fast, tokenizer) == []


def test_a_default_device_changes_no_answer(fast, tokenizer):
    expected = ANSWER(QUESTION, CONTEXT, fast, tokenizer, top_k=5, null_threshold=0)
    with torch.device("meta"):
        assert ANSWER(QUESTION, CONTEXT, fast, tokenizer, top_k=5, null_threshold=0) == expected


def test_by_default_windows_are_of_384_tokens_and_share_128(fast, tokenizer, texts):
    long = " ".join(texts[1])
    default = ANSWER(QUESTION, long, fast, tokenizer, top_k=5)
    assert default == ANSWER(QUESTION, long, fast, tokenizer, top_k=5, window=384, stride=128)
    narrow = ANSWER(QUESTION, long, fast, tokenizer, top_k=5, window=107)
    room = 107 - len(tokenizer(QUESTION)["input_ids"]) - 1
    again = ANSWER(QUESTION, long, fast, tokenizer, top_k=5, window=107, stride=room // 2)
    assert narrow == again != default


def test_a_threshold_moves_no_answer_and_not_the_order_of_spans(fast, tokenizer):
    spans = ANSWER(QUESTION, CONTEXT, fast, tokenizer, top_k=1000)
    for threshold, at in ((-100, 0), (100, -1)):
        answers = ANSWER(QUESTION, CONTEXT, fast, tokenizer, top_k=1000, null_threshold=threshold)
        none = answers.pop(at)
        assert none[:1] + none[2:] == ("", 0, 0)
        assert none.score == pytest.approx(float(threshold < 0))
        assert [a[2:] for a in answers] == [a[2:] for a in spans]


def test_words_are_whole_unless_asked_otherwise(fast, tokenizer):
    word = "antidisestablishmentarian"
    count = len(tokenizer(word, add_special_tokens=False)["input_ids"])
    assert count > 2
    begin = CONTEXT.index(word)

    def of_word(**options):
        found = ANSWER(QUESTION, CONTEXT, fast, tokenizer, top_k=10**4, **options)
        return sum(begin <= a.start and a.end <= begin + len(word) for a in found)

    assert of_word(max_answer_length=count) == 1
    assert of_word(max_answer_length=count - 1) == 0
    assert of_word(max_answer_length=2, whole_words=False) == 2 * count - 1
    assert ANSWER(QUESTION, word, fast, tokenizer, max_answer_length=1) == []


@pytest.mark.parametrize("name", ["Roberta", "Electra", "DistilBert"])
def test_others_of_the_family_answer_too(name, tokenizer, texts, device):
    stock = stock_model(f"{name}ForQuestionAnswering", vocab_size=8192, max_position_embeddings=80)
    own = copy.deepcopy(tokenizer)
    own.model_input_names = ["input_ids", "attention_mask"]
    fast = bert_fast.accelerate(copy.deepcopy(stock)).to(device)
    ours, theirs = (ANSWER(*texts, model, own, window=64) for model in (fast, stock))
    assert_ran_fast(fast)
    for [a], [b] in zip(ours, theirs):
        assert a.text == b.text
        assert a.score == pytest.approx(b.score, rel=1e-3)


def test_space_that_a_tokenizer_counts_to_a_word_is_none_of_the_answer(device):
    pieces = ["<s>", "</s>", "?", "\u2581", *"abcd", "\u2581ab"]
    core = tokenizers.Tokenizer(tokenizers.models.Unigram([(p, -1.0) for p in pieces], unk_id=2))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    context = "ab  cd ab"  # cd is a blank token, c, d
    places = own("a", context, return_offsets_mapping=True)["offset_mapping"]
    assert any(context[start:end].startswith(" ") for start, end in places)
    fast = bert_fast.accelerate(stock_model("BertForQuestionAnswering", device, vocab_size=9))
    found = ANSWER("a", context, fast, own, top_k=99)
    texts = ["ab", "ab", "ab  cd", "ab  cd ab", "cd", "cd ab"]
    assert sorted(a.text for a in found) == texts


# -- bad input ------------------------------------------------------------------------------
def given(**changes):
    return {"question": QUESTION, "context": CONTEXT} | changes


BAD = {
    "a blank question": (given(question=" "), "answer: question is blank (' '); leave it out"),
    "an empty context": (given(context=""), "answer: context is blank ('')"),
    "one of several": (given(context=["a", "\n"]), r"answer: context 1 is blank ('\n')"),
    "no tokens": (given(context="\u200b"), r"answer: context 0 has no tokens ('\u200b')"),
    "bytes": (given(question=b"who"), "answer: question must be a str or a list, got bytes"),
    "None": (given(context=[None]), "answer: context 0 must be a str, got NoneType"),
    "lists of two lengths": (
        given(question=["a", "b"], context=["c"] * 3),
        "answer: got 2 questions and 3 contexts; give a context for each question, or",
    ),
    "a long question": (
        given(question="who " * 400),
        "answer: question 0 and the special tokens are 403 tokens, which leave no room for context"
        " in a window of 384; shorten the question",
    ),
    "a window of the question": (given(window=7), "tokens, which leave no room for context"),
    "no window": (
        given(window=0), "answer: window must be an integer, 1 to the model's 512 tokens, got 0"
    ),
    "a wide window": (given(window=513), "1 to the model's 512 tokens, got 513"),
    "half a token": (given(window=20.5), "1 to the model's 512 tokens, got 20.5"),
    "a long stride": (
        given(window=27, stride=20),
        "answer: stride must be 0 to 19, less than the 20 tokens of context that fit beside"
        " question 0, got 20",
    ),
    "a negative stride": (given(stride=-1), "answer: stride must be 0 to "),
    "half a stride": (given(stride=1.5), "answer: stride must be an integer or None, got 1.5"),
    "no answers": (given(top_k=0), "answer: top_k must be an integer of 1 or more, got 0"),
    "a str of answers": (given(top_k="3"), "top_k must be an integer of 1 or more, got '3'"),
    "half an answer": (given(top_k=1.5), "top_k must be an integer of 1 or more, got 1.5"),
    "answers of nothing": (given(max_answer_length=0), "max_answer_length must be an integer of 1"),
    "no number": (
        given(null_threshold=math.nan),
        "answer: null_threshold must be a finite number or None, got nan",
    ),
    "a word": (given(null_threshold="0"), "must be a finite number or None, got '0'"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(bad, fast, tokenizer):
    keywords, message = BAD[bad]
    with pytest.raises(ValueError) as raised:
        ANSWER(model=fast, tokenizer=tokenizer, **keywords)
    assert message in str(raised.value)


def test_a_slow_tokenizer_is_named(fast):
    with pytest.raises(ValueError, match=r"tokenizer must be a fast one, .* got CanineTokenizer"):
        ANSWER(QUESTION, CONTEXT, fast, transformers.CanineTokenizer())


def test_a_model_of_another_kind_is_named(tokenizer):
    model = bert_fast.BertForTokenClassification.from_pretrained(SHIPPED)
    with pytest.raises(ValueError, match="BertForTokenClassification has no start_logits and end"):
        ANSWER(QUESTION, CONTEXT, model, tokenizer)


def test_a_model_in_training_mode_is_named(fast, tokenizer):
    with pytest.raises(ValueError, match=r"model must be in eval mode, .*; call model.eval\(\)"):
        ANSWER(QUESTION, CONTEXT, fast.train(), tokenizer)
