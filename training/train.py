"""Train the small BERT that bert_fast ships, from nothing, on text that every Python carries.

    python training/train.py --out DIR

Stage 1  masked language modelling and next-segment prediction (Devlin et al., BERT, 2018).
         A document is a function's name and signature, then the sentences of its docstring; half
         the examples are a whole document, half are two segments of which the second is, every
         other time, the end of another document.
Stage 2  contrastive: a function's name and signature against its docstring, the other pairs of the
         batch as negatives, in both directions (van den Oord et al., CPC, 2018), on [CLS] and on
         the mean over tokens alike. Half the time the docstring is its first paragraph alone, and
         half the time the function's own name is replaced by [MASK] in it, so that the name is no
         shortcut. A quarter of the pairs are two crops of one text (Izacard et al., Contriever,
         2021): 7,000 functions are few, and crops teach what shared rare words are worth. Both
         sides are masked as in stage 1, of which each step also takes a batch: the heads stay good.

Everything measured is on corpus.held_out, a twelfth of the docstrings that neither the tokenizer
nor the model has seen, and on the files as written, fp16 weights included. CPU only, seeded.
"""

import argparse
import itertools
import json
import math
import platform
import random
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import EvalResult, ModelCardData
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertForPreTraining, BertTokenizer

from bert_fast import corpus
from bert_fast.checkpoints import SHIPPED

SEED = 0
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MASK = SPECIAL.index("[MASK]")
MAX_LENGTH = 512  # tokens, [CLS] and two [SEP] included
IGNORED = -100  # the label that has no loss

STEPS = {"pretraining": 4000, "contrastive": 400}
PEAK_LR = {"pretraining": 1e-3, "contrastive": 2e-3}
TOKENS = 4096  # of a batch of stage 1, padding included
PAIRS, CROPPED = 256, 64  # pairs of a contrastive batch, and how many of them are crops
TEMPERATURE = 0.05
CUT = 128  # tokens of a text in stage 2 and in retrieval; nine docstrings in ten are shorter


# -- text -----------------------------------------------------------------------------------
def query(doc):
    return f"{doc.name}{doc.signature}"


def train_tokenizer(texts):
    """A BERT WordPiece tokenizer of 8192 entries, lower case, the same on each run.

    The trainer numbers letters in hash order and breaks ties by number, so it is handed the letters
    in order, those that start a word and those inside one.
    """
    trainer = BertWordPieceTokenizer(lowercase=True)
    text = trainer.normalize(" ".join(texts))
    words = {word for word, _ in trainer.pre_tokenizer.pre_tokenize_str(text)}
    first = sorted({letter for word in words for letter in word})
    inside = sorted({"##" + letter for word in words for letter in word[1:]})
    trainer.train_from_iterator(
        texts, vocab_size=8192, special_tokens=[*SPECIAL, *first, *inside], show_progress=False
    )
    return BertTokenizer(vocab=trainer.get_vocab(), model_max_length=MAX_LENGTH)


def documents(tokenizer, docs):
    """docs as lists of segments of token ids; a page too long for one input becomes several."""
    room = MAX_LENGTH - 3
    result = []
    for doc in docs:
        segments = [query(doc), *re.split(r"(?<=[.!?:])\s+|\n\s*\n", doc.text)]
        result.append([])
        for ids in tokenizer(segments, add_special_tokens=False, verbose=False).input_ids:
            if sum(map(len, result[-1])) + len(ids) > room:
                result.append([])
            result[-1].append(ids[:room])
    return result


def flat(segments):
    return list(itertools.chain.from_iterable(segments))


# -- stage 1 --------------------------------------------------------------------------------
def example(document, others, rng):
    """(first segment, second or [], label of next-segment prediction) of one document."""
    if len(document) < 2 or rng.random() < 0.5:
        return flat(document), [], IGNORED
    split = rng.randrange(1, len(document))
    first, second, label = document[:split], document[split:], 0
    if rng.random() < 0.5:
        other = rng.choice(others)
        second, label = other[rng.randrange(len(other)) :], 1
    first = flat(first)
    return first, flat(second)[: MAX_LENGTH - 3 - len(first)], label


def pretraining_batches(docs, tokens, rng):
    """Batches (input_ids, token_type_ids, attention_mask, labels) without end.

    Of neighbours in length, so that little is padding: fill is about 0.97.
    """
    while True:
        examples = [example(document, docs, rng) for document in docs]
        examples.sort(key=lambda e: (len(e[0]) + len(e[1])) * rng.uniform(0.9, 1.1))
        batches, longest = [[]], 0
        for e in examples:
            longest = max(longest, len(e[0]) + len(e[1]) + 3)
            if longest * (len(batches[-1]) + 1) > tokens:
                batches.append([])
                longest = len(e[0]) + len(e[1]) + 3
            batches[-1].append(e)
        rng.shuffle(batches)
        yield from map(collate, batches)


def collate(examples):
    cls, sep = [SPECIAL.index("[CLS]")], [SPECIAL.index("[SEP]")]
    firsts = [cls + first + sep for first, _, _ in examples]
    seconds = [second + sep if second else [] for _, second, _ in examples]
    S = max(len(a) + len(b) for a, b in zip(firsts, seconds, strict=True))
    rows = [
        [a + b, [0] * len(a) + [1] * len(b), [1] * len(a + b)]
        for a, b in zip(firsts, seconds, strict=True)
    ]
    padded = torch.tensor([[r + [0] * (S - len(r)) for r in row] for row in rows])  # [B, 3, S]
    return *padded.unbind(1), torch.tensor([label for _, _, label in examples])


def masked(ids, vocabulary):
    """BERT's 15 %: (ids with [MASK] for 80 % of them, any token for 10 %; labels)."""
    chosen = (torch.rand(ids.shape) < 0.15) & (ids >= len(SPECIAL))
    labels = ids.where(chosen, torch.tensor(IGNORED))
    fate = torch.rand(ids.shape)
    anything = torch.randint(len(SPECIAL), vocabulary, ids.shape)
    ids = ids.masked_fill(chosen & (fate < 0.8), MASK)
    return ids.where(~chosen | (fate < 0.9), anything), labels


def heads(model, batch):
    """(MLM logits at the masked positions, their labels, NSP logits), masked anew."""
    ids, types, mask, _ = batch
    ids, labels = masked(ids, model.config.vocab_size)
    out = model.bert(ids, attention_mask=mask, token_type_ids=types)
    at = labels != IGNORED
    logits = model.cls.predictions(out.last_hidden_state[at])
    return logits.float(), labels[at], model.cls.seq_relationship(out.pooler_output).float()


def pretraining_loss(model, batch):
    logits, labels, next_logits = heads(model, batch)
    next_loss = F.cross_entropy(next_logits, batch[-1], reduction="sum") / len(batch[-1])
    return F.cross_entropy(logits, labels) + next_loss


# -- stage 2 --------------------------------------------------------------------------------
def embed(model, tokenizer, texts):
    """{"[CLS]", "mean"}, each [len(texts), H] of unit length; masked as in stage 1 in training.

    In order of length, 64 at a time, so that little is padding.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    cls, mean = [], []
    for start in range(0, len(order), 64):
        inputs = tokenizer(
            [texts[i] for i in order[start : start + 64]],
            padding=True,
            truncation=True,
            max_length=CUT,
            return_tensors="pt",
        )
        if model.training:
            inputs["input_ids"], _ = masked(inputs.input_ids, model.config.vocab_size)
        x = model.bert(**inputs).last_hidden_state.float()  # [64, S, H]
        valid = inputs.attention_mask[..., None]
        cls.append(x[:, 0])
        mean.append((x * valid).sum(1) / valid.sum(1))
    back = torch.tensor(order).argsort()
    return {
        "[CLS]": F.normalize(torch.cat(cls)[back], dim=-1),
        "mean": F.normalize(torch.cat(mean)[back], dim=-1),
    }


def nameless(doc, stand_in):
    """The docstring with the function's own name replaced wherever it occurs as a word."""
    name = re.escape(doc.name.rpartition(".")[2])
    return re.sub(rf"(?<!\w){name}(?!\w)", stand_in, doc.text)


def function_pair(doc, rng):
    name, signature = doc.name, doc.signature
    if rng.random() < 0.2:
        parts = name.split(".")
        name = ".".join(parts[rng.randrange(len(parts)) :])
        signature = rng.choice([signature, ""])
    text = nameless(doc, "[MASK]") if rng.random() < 0.5 else doc.text
    return name + signature, text.partition("\n\n")[0] if rng.random() < 0.5 else text


def cropped_pair(doc, rng):
    """Two stretches of 4 to 60 words, drawn independently from 120 words of one text."""
    words = f"{query(doc)} {doc.text}".split()
    start = rng.randrange(max(1, len(words) - 120))
    words = words[start : start + 120]

    def crop():
        length = rng.randint(min(4, len(words)), max(4, len(words) // 2))
        at = rng.randrange(max(1, len(words) - length + 1))
        return " ".join(words[at : at + length])

    return crop(), crop()


def contrastive_loss(model, tokenizer, pairs):
    lefts, rights = (embed(model, tokenizer, side) for side in zip(*pairs, strict=True))
    target = torch.arange(len(pairs))
    loss = 0
    for pooling in lefts:
        logits = lefts[pooling] @ rights[pooling].T / TEMPERATURE
        loss += (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 4
    return loss


# -- optimisation ---------------------------------------------------------------------------
def optimise(model, stage, loss_of_step):
    """AdamW, linear warm-up over a twentieth of the steps, cosine to zero; bf16 autocast.

    Returns what it cost: steps, tokens (padding excluded), minutes, cpu_minutes.
    """
    steps = STEPS[stage]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR[stage], betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min(20 * (t + 1) / steps, (1 + math.cos(math.pi * t / steps)) / 2),
    )
    tokens, recent, wall, cpu = 0, 0.0, time.monotonic(), time.process_time()

    def count(_, __, inputs):
        nonlocal tokens
        tokens += inputs["attention_mask"].sum().item()

    counting = model.bert.register_forward_pre_hook(count, with_kwargs=True)
    model.train()
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of_step()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent += (loss.item() - recent) / min(step, 50)
        if step % 50 == 0:
            print(f"{stage} {step}/{steps}: loss {recent:.3f}", flush=True)
    model.eval()
    counting.remove()
    return {
        "steps": steps,
        "tokens": tokens,
        "minutes": (time.monotonic() - wall) / 60,
        "cpu_minutes": (time.process_time() - cpu) / 60,
    }


def pretrain(model, pages):
    batches = pretraining_batches(pages, TOKENS, random.Random(SEED))
    return optimise(model, "pretraining", lambda: pretraining_loss(model, next(batches)))


def contrast(model, tokenizer, docs, pages):
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    functions = [doc for doc in docs if doc.signature]
    batches = pretraining_batches(pages, TOKENS, rng)

    def loss():
        pairs = [function_pair(doc, rng) for doc in rng.sample(functions, PAIRS - CROPPED)]
        pairs += [cropped_pair(doc, rng) for doc in rng.sample(docs, CROPPED)]
        return contrastive_loss(model, tokenizer, pairs) + pretraining_loss(model, next(batches))

    return optimise(model, "contrastive", loss)


# -- measurement ----------------------------------------------------------------------------
class TfIdf:
    """Cosine of sublinear term frequency times smoothed idf; identifiers split into words."""

    def __init__(self, texts):
        counts = Counter(word for text in texts for word in set(self.words(text)))
        self.index = {word: i for i, word in enumerate(counts)}
        self.idf = np.log((1 + len(texts)) / (1 + np.array(list(counts.values())))) + 1

    @staticmethod
    def words(text):
        """In lower case, split at _ and . and where camelCase turns: "getFileName_2" is four."""
        return [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)]

    def __call__(self, texts):
        matrix = np.zeros((len(texts), len(self.idf)), np.float32)
        for row, text in zip(matrix, texts, strict=True):
            for word, count in Counter(self.words(text)).items():
                if word in self.index:
                    row[self.index[word]] = 1 + math.log(count)
        matrix *= self.idf
        return matrix / np.linalg.norm(matrix, axis=1, keepdims=True).clip(1e-9)


def top(scores, target):
    """Share of queries whose target is the best, and among the ten best, of their candidates.

    scores [queries, candidates]; target[i] is what query i is after.
    """
    rank = (scores > scores[np.arange(len(target)), target][:, None]).sum(1)
    return {"top-1": float((rank < 1).mean()), "top-10": float((rank < 10).mean())}


@torch.no_grad()
def retrieval(model, tokenizer, tfidf, held):
    """{"TF-IDF", "[CLS]", "mean": [top() as written, top() with the names removed]}."""
    target = [i for i, doc in enumerate(held) if doc.signature]
    queries = [query(held[i]) for i in target]
    scores = {"TF-IDF": [], "[CLS]": [], "mean": []}
    for texts in ([doc.text for doc in held], [nameless(doc, "") for doc in held]):
        scores["TF-IDF"].append(top(tfidf(queries) @ tfidf(texts).T, target))
        q, t = embed(model, tokenizer, queries), embed(model, tokenizer, texts)
        for pooling in q:
            scores[pooling].append(top((q[pooling] @ t[pooling].T).numpy(), target))
    return scores


@torch.no_grad()
def language_modelling(model, held):
    """Of both heads on documents of held, each as one example; the masks are seeded."""
    torch.manual_seed(SEED)
    batches = pretraining_batches(held, TOKENS, random.Random(SEED))
    loss = right = masks = next_right = nexts = 0
    for batch in itertools.islice(batches, 50):
        logits, labels, next_logits = heads(model, batch)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
        masks += len(labels)
        next_right += (next_logits.argmax(-1) == batch[-1]).sum().item()
        nexts += (batch[-1] != IGNORED).sum().item()
    return {
        "loss": loss / masks,
        "perplexity": math.exp(loss / masks),
        "accuracy": right / masks,
        "next_accuracy": next_right / nexts,
    }


# -- files ----------------------------------------------------------------------------------
def write(model, tokenizer, out):
    """The hub's format, weights in fp16; the configuration says float32, so they load as that."""
    model.half().save_pretrained(out)
    tokenizer.backend_tokenizer.no_padding()  # both are of the last call, and would be saved
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


CARD = """\
---
{metadata}---

# A small BERT for Python's own words

4 layers, hidden size 128, 2 heads, {vocabulary:,} WordPieces, {parameters:.2f} M parameters, fp16
on disk. Trained from nothing by `training/train.py` in {total:.0f} CPU minutes, so that `bert-fast
embed`, demonstrations and tests have a real checkpoint where there is no network. Both pre-training
heads are there (`BertForPreTraining`). As an embedding take [CLS] or the mean over tokens; compare
by cosine.

## Data

The documentation that Python {python} carries, as `bert_fast.corpus` reads it: {texts:,} docstrings
of the standard library, without its tests, and {topics} pages of `pydoc_data.topics`. That text is
under the PSF license. One text in twelve is held out, by a hash of its first paragraph: neither the
tokenizer nor the model has seen it. {held} of those are docstrings.

## Training

| stage | steps | tokens seen | minutes | CPU minutes |
| --- | --- | --- | --- | --- |
{stages}

Seed {seed}, bf16 autocast over fp32 weights, AdamW, no dropout; torch {torch}, transformers
{transformers}. The machine was shared, so CPU minutes say more than minutes.

## On the held-out docstrings, from these files

Masked tokens (15 %): loss {loss:.3f}, perplexity {perplexity:.1f}, the token itself {accuracy:.1%}.
Next segment: {next_accuracy:.1%} right, where chance is 50 %.

Retrieval: the name and signature of each of {queries} functions is a query, and all {held} held-out
docstrings are the candidates, cut at {cut} tokens for the model, whole for TF-IDF. That baseline
splits identifiers at `_`, `.` and camelCase and takes its word counts from all texts, held-out ones
too. Many docstrings repeat the function's name; on the right it is removed from them.

| embedding | top-1 | top-10 | top-1, name removed | top-10, name removed |
| --- | --- | --- | --- | --- |
{table}

## Limits

It knows English about Python's standard library, and little of that; it is no general embedding
model, and its fill-mask is a small model's. The library repeats itself: {near:.0%} of the held-out
docstrings have a TF-IDF cosine of 0.8 or more with a text that was trained on, which flatters the
figures.

## Training it again

    python training/train.py --out DIR

On another Python, which has other docstrings, or another torch, the figures move by a few points.
"""


def card(language, scores, **facts):
    """The model card in the hub's format; every number in it is measured or counted."""
    measured = [("fill-mask", k, k, v) for k, v in language.items()]
    for model, (as_written, _) in scores.items():
        measured += [("text-retrieval", k, f"{model} {k}", v) for k, v in as_written.items()]
    metadata = ModelCardData(
        license="apache-2.0",
        language="en",
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["bert", "fill-mask", "python", "docstrings"],
        model_name="bert_fast checkpoint",
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type="docstrings",
                dataset_name=f"Held-out docstrings of Python {facts['python']}",
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 4),
            )
            for task, kind, name, value in measured
        ],
    )
    table = "\n".join(
        f"| {model} | {' | '.join(f'{v:.1%}' for form in forms for v in form.values())} |"
        for model, forms in scores.items()
    )
    return CARD.format(metadata=f"{metadata}\n", table=table, **language, **facts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the checkpoint")
    out = parser.parse_args().out

    docs, topics = corpus.docstrings(), corpus.topics()
    held = [doc for doc in docs if corpus.held_out(doc)]
    seen = [doc for doc in docs + topics if not corpus.held_out(doc)]
    tokenizer = train_tokenizer([f"{query(doc)} {doc.text}" for doc in seen])

    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.06,  # with BERT's 0.02, meant for 768, attention stays uniform for long
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",  # a step costs a third less than with sdpa's CPU backward
    )
    model = BertForPreTraining(config)
    pages = documents(tokenizer, seen)
    costs = {
        "masked words, next segment": pretrain(model, pages),
        "contrastive, and the above": contrast(model, tokenizer, seen, pages),
    }
    write(model, tokenizer, out)

    model = BertForPreTraining.from_pretrained(out).eval()
    tfidf = TfIdf([f"{query(doc)} {doc.text}" for doc in docs])
    near = tfidf([doc.text for doc in held]) @ tfidf([doc.text for doc in seen]).T
    text = card(
        language_modelling(model, documents(tokenizer, held)),
        retrieval(model, tokenizer, tfidf, held),
        vocabulary=len(tokenizer),
        parameters=model.num_parameters() / 1e6,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        seed=SEED,
        texts=len(docs),
        topics=len(topics),
        held=len(held),
        queries=sum(bool(doc.signature) for doc in held),
        cut=CUT,
        near=(near.max(1) >= 0.8).mean(),
        total=sum(cost["cpu_minutes"] for cost in costs.values()),
        stages="\n".join(
            f"| {name} | " + " | ".join(f"{value:,.0f}" for value in cost.values()) + " |"
            for name, cost in costs.items()
        ),
    )
    (out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
