"""Texts to embeddings, and the errors for everything that can be wrong with a checkpoint.

    model, tokenizer = load("bert-base-uncased")
    ids, truncated = tokenize(texts, tokenizer, positions(model, tokenizer))
    embeddings = encode(ids, model, pooling="mean")
"""

import inspect
import os
import pickle

import torch
import transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence

from . import modeling
from .inputs import room
from .swap import ENCODERS, accelerate

POOLINGS = ("cls", "mean")
# What transformers raises, depending on its version, for files that it cannot read.
UNREADABLE = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip


def load(name, dtype=torch.float32, device="cpu", head=None):
    """The model and the tokenizer of a checkpoint of one of bert_fast's architectures.

    name  a directory in transformers' format, or an id on the model hub
    head  what the checkpoint must have, as in the name of a class: "ForQuestionAnswering"; None
          takes a checkpoint with any head or none, for the encoder without a pooler

    Returns (model of bert_fast, tokenizer); the model's weights are frozen, see `accelerate`, which
    helps most for a text or two. Raises OSError if there is no checkpoint and ValueError if it has
    another architecture, is incomplete, or lacks the head: transformers itself would fill what is
    missing with random weights or an empty vocabulary.
    """
    encoder = _encoder_of(name)
    cls = encoder if head is None else _with_head(encoder, head)
    pools = "add_pooling_layer" in inspect.signature(encoder).parameters
    try:
        model, info = cls.from_pretrained(
            name, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True,
            **({"add_pooling_layer": False} if pools and head is None else {}),
        )  # fmt: skip
    except UNREADABLE as error:
        raise ValueError(
            f"{name}: cannot read the weights ({_why(error)}); save or download them again"
        ) from error
    missing = sorted(info["missing_keys"])
    in_encoder = [key for key in missing if key.startswith(f"{cls.base_model_prefix}.")]
    if missing and head is not None and not in_encoder:
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
    accelerate(model, frozen=True)
    return model.to(device), _tokenizer(name, model.config.vocab_size)


def _encoder_of(name):
    """The encoder class for a checkpoint's config."""
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
    known = {cls.architecture.model_type: cls for cls in ENCODERS}
    kind = config.get("model_type", "bert")  # missing in checkpoints of 2019
    if kind not in known:
        raise ValueError(f"{name}: is a {kind} model; give one of {', '.join(known)}")
    return known[kind]


def _with_head(encoder, head):
    prefix = encoder.__name__.removesuffix("Model")
    heads = {
        cls.__name__.removeprefix(prefix): cls
        for cls in modeling.CLASSES
        if cls.__name__.startswith(prefix) and cls is not encoder
    }
    if head not in heads:
        known = ", ".join(heads)
        raise ValueError(f"load: head must be one of {known}, or None, got {head!r}")
    return heads[head]


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
    """Another library's error in one short line."""
    text = str(error).strip() or "no reason given"
    return f"{type(error).__name__}: {text.splitlines()[0].rstrip('.')}"


def positions(model, tokenizer):
    """The most tokens that a text may have."""
    encoder = model.base_model
    ours = isinstance(encoder, tuple(ENCODERS))
    rows = room(encoder) if ours else model.config.max_position_embeddings
    return min(rows, tokenizer.model_max_length)


def tokenize(texts, tokenizer, limit):
    """The token ids of each text, cut to `limit` of them, and how many texts were cut."""
    ids = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    long = [i for i, row in enumerate(ids) if len(row) > limit]
    for i in long:
        ids[i] = tokenizer(texts[i], truncation=True, max_length=limit)["input_ids"]
    return ids, len(long)


def batches(lengths, batch_tokens):
    """Lists of indices of `lengths`, longest first, each at most batch_tokens with its padding.

    A text longer than that is its own batch.
    """
    found = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not found or (len(found[-1]) + 1) * lengths[found[-1][0]] > batch_tokens:
            found.append([])
        found[-1].append(i)
    return found


@torch.inference_mode()
def encode(ids, model, pooling="cls", batch_tokens=8192, track=iter):
    """Embeddings of texts tokenized by `tokenize`: float32[n, hidden] on the CPU, in order.

    pooling       "cls", the last hidden state of the first token, or "mean", over all tokens
    batch_tokens  tokens per batch, with its padding; it bounds memory
    track         wraps the list of batches as they run, for a progress bar
    """
    if pooling not in POOLINGS:
        raise ValueError(f"encode: pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if empty := [i for i, row in enumerate(ids) if len(row) == 0]:
        raise ValueError(f"encode: each text must have a token id, text {empty[0]} has none")
    out = torch.empty(len(ids), model.config.hidden_size, dtype=torch.float32, device="cpu")
    for batch in track(batches([len(row) for row in ids], batch_tokens)):
        rows = [torch.tensor(ids[i], device="cpu") for i in batch]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        mask = mask.to(model.device)
        input_ids = pad_sequence(rows, batch_first=True).to(model.device)
        hidden = model(input_ids, attention_mask=mask).get("last_hidden_state")
        if hidden is None:
            kind = type(model).__name__
            raise ValueError(f"encode: model must be an encoder, got {kind}; give its base_model")
        hidden = hidden.float()
        if pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        out[batch] = pooled.cpu()
    return out
