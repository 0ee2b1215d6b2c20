"""Extractive question answering: which part of a context answers a question, and how certainly.

    [best] = bert_fast.answer("Who wrote it?", "It was written by Ada.", model, tokenizer)
    best.text, best.score, best.start, best.end
"""

import math
import numbers
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from .encode import batches, positions


class Answer(NamedTuple):
    """A part of a context: context[start:end] == text. "No answer" is the text "", from 0 to 0."""

    text: str
    score: float  # probability, 0 to 1
    start: int  # in characters
    end: int


class _Pair(NamedTuple):
    """A question and a context of T tokens, as the tokenizer joins them, before windows are cut."""

    inputs: dict  # name of a model input: one number per token
    first: int  # index of the context's first token
    offsets: list  # [T] of (start, end) in characters; start == end for invisible tokens
    may_start: torch.Tensor  # bool[T]
    may_end: torch.Tensor  # bool[T]


class _Window(NamedTuple):
    pair: int
    begin: int  # in tokens of the context
    end: int


def answer(
    question, context, model, tokenizer, *, top_k=1, max_answer_length=30, window=None,
    stride=None, null_threshold=None, whole_words=True, batch_tokens=8192,
):  # fmt: skip
    """The parts of a context that answer a question best: a list of Answer, best first.

    question, context  a str each; or lists, answered pair by pair; or one str and a list, the str
                       paired with each of the list. With a list, a list of lists is returned
    model              in eval mode, with start_logits and end_logits: any ...ForQuestionAnswering
    tokenizer          a fast one, of the same checkpoint
    top_k              the most answers to return; fewer if fewer parts are valid
    max_answer_length  in tokens
    window             tokens that the model sees at once, with the question and special tokens; by
                       default 384, or as many as the model has positions
    stride             tokens of context that a window shares with the next (not the step between
                       them); by default 128, or half of what a window holds of context
    null_threshold     None: there is an answer. A number: there may be none, see below; 0 for a
                       model trained on SQuAD 2, larger to leave fewer questions unanswered
    whole_words        an answer starts where a word starts, and ends where one ends. False for
                       tokenizers that treat text without spaces as one word
    batch_tokens       tokens per batch, with its padding; it bounds memory

    A span (i, j) of the tokens of a context is valid if i <= j < i + max_answer_length, its words
    are whole, and a window holds it. Its logit is

        z(i, j) = max over windows w that hold i and j of start_logits[w, i] + end_logits[w, j]

    and its score exp(z(i, j)) over the sum of exp(z) of all valid spans of the context. So scores
    sum to 1, unlike the probability of a start times that of an end, which gives weight to ends
    before their start and covers a single window. The maximum over windows is taken because a span
    in two windows is one answer.

    With a null_threshold, no answer is one more candidate,

        z(none) = min over windows w of start_logits[w, 0] + end_logits[w, 0] - null_threshold

    position 0 being [CLS]. It comes first where its logits exceed those of the best span by more
    than the threshold: SQuAD 2's rule.

    Raises ValueError for a slow tokenizer, a model without these logits or in training mode, a
    blank question or context, a question that leaves no room for context in the window, and numbers
    of another type or out of range.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"answer: tokenizer must be a fast one, which knows where in the text its tokens are,"
            f" got {type(tokenizer).__name__}; load it with AutoTokenizer"
        )
    if getattr(model, "training", False):
        raise ValueError(
            "answer: model must be in eval mode, got one in training mode, where dropout changes"
            " the answers; call model.eval()"
        )
    for name, value in (("top_k", top_k), ("max_answer_length", max_answer_length)):
        if not _is_integer(value) or value < 1:
            raise ValueError(f"answer: {name} must be an integer of 1 or more, got {value!r}")
    limit = positions(model, tokenizer)
    window = min(384, limit) if window is None else window
    if not _is_integer(window) or not 1 <= window <= limit:
        raise ValueError(
            f"answer: window must be an integer, 1 to the model's {limit} tokens, got {window!r}"
        )
    if stride is not None and not _is_integer(stride):
        raise ValueError(f"answer: stride must be an integer or None, got {stride!r}")
    if null_threshold is not None and not _is_finite(null_threshold):
        raise ValueError(
            f"answer: null_threshold must be a finite number or None, got {null_threshold!r}"
        )
    questions, contexts, one = _pairs(question, context)

    pairs = _tokenize(questions, contexts, tokenizer, whole_words)
    windows = [w for n, pair in enumerate(pairs) for w in _windows(n, pair, window, stride)]
    spans = [
        torch.full((n, min(max_answer_length, n)), -torch.inf, dtype=torch.float64, device="cpu")
        for n in (len(p.offsets) for p in pairs)
    ]  # z, [i, j - i]
    null = [math.inf] * len(pairs)
    for w, start, end in _logits(windows, pairs, model, batch_tokens):
        null[w.pair] = min(null[w.pair], (start[0] + end[0]).item())
        _add(spans[w.pair], w, pairs[w.pair], start, end)
    answers = [
        _best(z, None if null_threshold is None else n - null_threshold, pair, text, top_k)
        for z, n, pair, text in zip(spans, null, pairs, contexts)
    ]
    return answers[0] if one else answers


def _is_integer(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value):
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _pairs(question, context):
    """Questions, contexts, and whether it is a single pair, not in a list."""
    given = {"question": question, "context": context}
    for name, texts in given.items():
        if not isinstance(texts, (str, list, tuple)):
            kind = type(texts).__name__
            raise ValueError(f"answer: {name} must be a str or a list, got {kind}")
        for n, text in enumerate([texts] if isinstance(texts, str) else texts):
            which = name if isinstance(texts, str) else f"{name} {n}"
            if not isinstance(text, str):
                raise ValueError(f"answer: {which} must be a str, got {type(text).__name__}")
            if not text.strip():
                raise ValueError(f"answer: {which} is blank ({text[:20]!r}); leave it out")
    counts = [len(t) for t in given.values() if not isinstance(t, str)]
    if len(set(counts)) == 2:
        raise ValueError(
            f"answer: got {counts[0]} questions and {counts[1]} contexts; give a context for each"
            " question, or one of them as a str for all"
        )
    count = counts[0] if counts else 1
    return *([t] * count if isinstance(t, str) else list(t) for t in given.values()), not counts


# -- before the model -----------------------------------------------------------------------
def _tokenize(questions, contexts, tokenizer, whole_words):
    if not questions:
        return []
    encoding = tokenizer(
        questions, contexts, return_offsets_mapping=True, return_attention_mask=False,
        padding=False, truncation=False, verbose=False,
    )  # fmt: skip
    all_offsets = encoding.pop("offset_mapping")
    pairs = []
    for n, context in enumerate(contexts):
        sequence = encoding.sequence_ids(n)
        if 1 not in sequence:
            raise ValueError(f"answer: context {n} has no tokens ({context[:20]!r}); leave it out")
        first = sequence.index(1)
        where = slice(first, first + sequence.count(1))
        offsets = [_trim(context, start, end) for start, end in all_offsets[n][where]]
        words = encoding.word_ids(n)[where] if whole_words else list(range(len(offsets)))
        pairs.append(
            _Pair(
                {name: rows[n] for name, rows in encoding.items()},
                first,
                offsets,
                torch.tensor(_firsts(words, offsets), device="cpu"),
                torch.tensor(_firsts(words[::-1], offsets[::-1])[::-1], device="cpu"),
            )
        )
    return pairs


def _trim(text, start, end):
    """Offsets without the space that some tokenizers count as part of the next word."""
    end = start + len(text[start:end].rstrip())
    return end - len(text[start:end].lstrip()), end


def _firsts(words, offsets):
    """Which tokens are the first visible one of their word."""
    found, last = [], -1
    for word, (start, end) in zip(words, offsets):
        found.append(start < end and word != last)
        if start < end:
            last = word
    return found


def _windows(n, pair, window, stride):
    """Pair n in windows, as tokenizers cut them: all full except the last."""
    count = len(pair.offsets)
    around = len(pair.inputs["input_ids"]) - count
    room = window - around
    if room < 1:
        raise ValueError(
            f"answer: question {n} and the special tokens are {around} tokens, which leave no room"
            f" for context in a window of {window}; shorten the question"
        )
    shared = min(128, room // 2) if stride is None else stride
    if not 0 <= shared < room:
        raise ValueError(
            f"answer: stride must be 0 to {room - 1}, less than the {room} tokens of context that"
            f" fit beside question {n}, got {stride}"
        )
    begins = range(0, max(count - shared, 1), room - shared)
    return [_Window(n, begin, min(begin + room, count)) for begin in begins]


# -- the model ------------------------------------------------------------------------------
@torch.inference_mode()
def _logits(windows, pairs, model, batch_tokens):
    """(window, its start_logits, its end_logits), float64 on the CPU, padding too."""
    rows = [_cut(pairs[w.pair], w) for w in windows]
    lengths = [len(row["input_ids"]) for row in rows]
    found = []
    for batch in batches(lengths, batch_tokens):
        inputs = {name: _pad(rows[i][name] for i in batch) for name in rows[batch[0]]}
        inputs["attention_mask"] = _pad([1] * lengths[i] for i in batch)
        out = model(**{name: x.to(model.device) for name, x in inputs.items()})
        try:
            start, end = (x.double().cpu() for x in (out.start_logits, out.end_logits))
        except AttributeError as error:
            raise ValueError(
                f"answer: {type(model).__name__} has no start_logits and end_logits; give a model"
                " for question answering, such as bert_fast.BertForQuestionAnswering"
            ) from error
        found += [(windows[i], start[b], end[b]) for b, i in enumerate(batch)]
    return found


def _cut(pair, window):
    """The inputs of a window: its context, and what the tokenizer puts around the context."""
    first, last = pair.first, pair.first + len(pair.offsets)
    return {
        name: row[:first] + row[first + window.begin : first + window.end] + row[last:]
        for name, row in pair.inputs.items()
    }


def _pad(rows):
    return pad_sequence([torch.tensor(row, device="cpu") for row in rows], batch_first=True)


# -- after the model ------------------------------------------------------------------------
def _add(spans, window, pair, start, end):
    """Raise `spans` to the logits of the window's spans; it is -inf where a span is invalid.

    The model's numbers for the question, special tokens and padding are discarded.
    """
    part = slice(window.begin, window.end)
    there = slice(pair.first, pair.first + window.end - window.begin)
    start = start[there].masked_fill(~pair.may_start[part], -torch.inf)
    end = end[there].masked_fill(~pair.may_end[part], -torch.inf)
    longest = spans.shape[1]
    ends = F.pad(end, (0, longest - 1), value=-torch.inf).unfold(0, longest, 1)  # [i, j - i]
    spans[part] = torch.maximum(spans[part], start[:, None] + ends)


def _best(spans, null, pair, context, top_k):
    """The answers, from the logits of spans and of no answer; ties go to the first in the text."""
    z = spans.flatten()
    if null is not None:
        z = torch.cat([z, z.new_tensor([null])])
    order = z.argsort(descending=True, stable=True)[:top_k]
    scores = z.softmax(0)
    answers = []
    for n in order[z[order] > -torch.inf].tolist():
        i, length = divmod(n, spans.shape[1])
        start, end = (0, 0) if n == spans.numel() else (
            pair.offsets[i][0], pair.offsets[i + length][1]
        )  # fmt: skip
        answers.append(Answer(context[start:end], scores[n].item(), start, end))
    return answers
