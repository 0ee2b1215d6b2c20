"""Texts to embeddings, and everything that can be wrong with the checkpoint that makes them.

    model, tokenizer = load("bert-base-uncased")
    ids, truncated = tokenize(texts, tokenizer, positions(model, tokenizer))
    embeddings = encode(ids, model, pooling="mean")
"""

import os
import pickle

import torch
import transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence

from .modeling import BertModel

POOLINGS = ("cls", "mean")
# What transformers raises, by its version, for files that it cannot make sense of.
UNREADABLE = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip


def load(name, dtype=torch.float32, device="cpu", cls=BertModel):
    """The model and the tokenizer of a BERT checkpoint.

    name  a directory in transformers' format, or an id on the model hub
    cls   a class of bert_fast, whose head the checkpoint must have; BertModel, which comes without
          a pooler, takes a checkpoint with any head or none

    Returns (cls, tokenizer). Raises OSError where there is no checkpoint and ValueError where it is
    not a BERT's or not whole: transformers itself would fill what is missing with random weights or
    an empty vocabulary.
    """
    _check_config(name)
    keywords = {"add_pooling_layer": False} if cls is BertModel else {}
    try:
        model, info = cls.from_pretrained(
            name, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **keywords
        )
    except UNREADABLE as error:
        raise ValueError(
            f"{name}: cannot read the weights ({_why(error)}); save or download them again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing and cls is not BertModel and not any(key.startswith("bert.") for key in missing):
        raise ValueError(
            f"{name}: has no head of {cls.__name__} ({', '.join(missing)} are not in it); give a"
            f" checkpoint that was saved as one"
        )
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of the encoder's {len(model.state_dict())} weights are not in"
            f" it ({missing[0]}, ...); they would be random, so save or download it again"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        key, found, expected = mismatched[0]
        raise ValueError(
            f"{name}: {len(mismatched)} weights do not fit its config.json ({key} must be"
            f" {list(expected)}, got {list(found)}); take both from one checkpoint"
        )
    return model.to(device), _tokenizer(name, model.config.vocab_size)


def _check_config(name):
    local = os.path.isdir(name)
    if not local and os.path.exists(name):
        raise NotADirectoryError(f"{name}: is a file; give the directory of the checkpoint")
    try:
        config, _ = transformers.BertConfig.get_config_dict(name)
    except OSError as error:
        if local:
            raise ValueError(f"{name}: cannot read config.json ({_why(error)})") from error
        raise FileNotFoundError(
            f"{name}: no such directory, nor a model that the hub or its cache gave"
            f" ({_why(error)}); check the name, or give a directory"
        ) from error
    if not config:
        raise FileNotFoundError(
            f"{name}: has no config.json; give a directory that save_pretrained wrote"
        )
    kind = config.get("model_type", "bert")  # checkpoints of 2019 do not say
    if kind != "bert":
        raise ValueError(f"{name}: is a {kind} model, not BERT; give one of model_type bert")


def _tokenizer(name, vocab_size):
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except UNREADABLE as error:
        raise ValueError(
            f"{name}: cannot read the tokenizer ({_why(error)}); save or download it again"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(
            f"{name}: has no vocabulary (tokenizer.json or vocab.txt);"
            " save the tokenizer beside the model"
        )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens and the model {vocab_size};"
            " take both from one checkpoint"
        )
    return tokenizer


def _why(error):
    """An error of another library in one short line."""
    text = str(error).strip() or "no reason given"
    return f"{type(error).__name__}: {text.splitlines()[0].rstrip('.')}"


def positions(model, tokenizer):
    """The most tokens that a text may have."""
    return min(model.config.max_position_embeddings, tokenizer.model_max_length)


def tokenize(texts, tokenizer, limit):
    """The token ids of each text, cut to `limit` of them, and how many texts were cut."""
    ids = tokenizer(texts, verbose=False)["input_ids"]
    long = [i for i, row in enumerate(ids) if len(row) > limit]
    for i in long:
        ids[i] = tokenizer(texts[i], truncation=True, max_length=limit)["input_ids"]
    return ids, len(long)


def batches(lengths, batch_tokens):
    """Indices of `lengths` in lists, longest first, each of batch_tokens with its padding at most.

    A text longer than that is a batch of its own.
    """
    found = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not found or (len(found[-1]) + 1) * lengths[found[-1][0]] > batch_tokens:
            found.append([])
        found[-1].append(i)
    return found


@torch.inference_mode()
def encode(ids, model, pooling="cls", batch_tokens=8192, track=iter):
    """Embeddings of texts that `tokenize` made ids of: float32[n, hidden] on the CPU, in order.

    pooling       "cls", the last hidden state of the first token, or "mean", over all tokens
    batch_tokens  of a batch with its padding; it bounds memory
    track         wraps the list of batches as they are run, for a progress bar
    """
    if pooling not in POOLINGS:
        raise ValueError(f"encode: pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    out = torch.empty(len(ids), model.config.hidden_size)
    for batch in track(batches([len(row) for row in ids], batch_tokens)):
        rows = [torch.tensor(ids[i]) for i in batch]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        mask = mask.to(model.device)
        input_ids = pad_sequence(rows, batch_first=True).to(model.device)
        hidden = model(input_ids, attention_mask=mask).last_hidden_state.float()
        if pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        out[batch] = pooled.cpu()
    return out
