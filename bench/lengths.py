"""Lengths of the sequences that models are timed on: seeded samples of published quantiles."""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import transformers

from bert_fast import corpus
from bert_fast.checkpoints import SHIPPED


@dataclass(frozen=True)
class Lengths:
    draw: Callable  # (batches, sequences in each) -> integers [batches, sequences]
    padded_to: int | None = None  # None: to the longest of the batch
    batches: int = 4  # that one timed call goes through
    sequences: int = 32
    fitting: bool = False  # as many sequences as fit into memory, `sequences` or more


@functools.cache
def _docstring_lengths():
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    texts = [doc.text for doc in corpus.docstrings()]
    ids = tokenizer(texts, truncation=True, max_length=256).input_ids
    return np.array([len(row) for row in ids])


def _docstrings(batches, sequences):
    lengths = np.random.default_rng(0).permutation(_docstring_lengths())
    return lengths[: batches * sequences].reshape(batches, sequences)


def _sorted_docstrings(batches, sequences):
    """The whole corpus sorted and cut into batches, of which some at even distances."""
    lengths = np.sort(_docstring_lengths())
    cut = lengths[: len(lengths) // sequences * sequences].reshape(-1, sequences)
    return cut[((np.arange(batches) + 0.5) * len(cut) / batches).astype(int)]


def _log_normal(median, below, above, longest, batches, sequences):
    """Half log-normals on either side of the median, of log-spreads `below` and `above`."""
    z = np.random.default_rng(0).standard_normal((batches, sequences))
    lengths = median * np.exp(np.where(z < 0, below, above) * z)
    return np.clip(lengths, 1, longest).astype(int)


def _full(length, batches, sequences):
    return np.full((batches, sequences), length)


def _dense(S, **options):
    return Lengths(functools.partial(_full, S), batches=1, **options)


P90 = 1.2816  # of the standard normal
# SQuAD: p10, 50 and 90 of 107, 159 and 260.
_squad = functools.partial(
    _log_normal, 159, math.log(159 / 107) / P90, math.log(260 / 159) / P90, 384
)
# Wikipedia and books: the one log-normal of which 512 positions pad 48 % and 128 pad 17 %.
_wikipedia = functools.partial(_log_normal, 224, 1.34, 1.34, 512)
# CoLA: 128 positions pad 89 %. The spread is reasoned, not published: sentences of 5 to 30 tokens.
_cola = functools.partial(_log_normal, 13.7, 0.38, 0.38, 128)

LENGTHS = {
    "docstrings": Lengths(_docstrings),
    "docstrings-sorted": Lengths(_sorted_docstrings),
    "squad-384": Lengths(_squad, padded_to=384),
    "wikipedia-512": Lengths(_wikipedia, padded_to=512),
    "cola-128": Lengths(_cola, padded_to=128),
    "full-128": _dense(128),
    "full-256": _dense(256),
    "full-384": _dense(384),
    "full-512": _dense(512),
    "full-512-fitting": _dense(512, fitting=True),
    "batch-1": _dense(128, sequences=1),
    "batch-1-short": _dense(16, sequences=1),
}


def lengths_of(name):
    """The Lengths called `name`, or `name` of other sequences: full-128x8 is 8 instead of 32.

    Raises ValueError, with the known names, for any other.
    """
    base, sequences = re.fullmatch(r"(.*?)(?:x(\d+))?", name).groups()
    if base not in LENGTHS or sequences == "0":
        known = ", ".join(LENGTHS)
        raise ValueError(f"no lengths {name}; there are {known}, and each with x1, x2, ... behind")
    return replace(LENGTHS[base], sequences=int(sequences)) if sequences else LENGTHS[base]
