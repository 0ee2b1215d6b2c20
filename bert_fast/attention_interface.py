"""attn_implementation="bert_fast": packed attention in any otherwise unchanged transformers model.

    model = AutoModel.from_pretrained("xlm-roberta-base", attn_implementation="bert_fast")

transformers calls two functions, which importing bert_fast registers. `mask` computes, once per
forward, what every layer's `attend` then receives as attention_mask:

    None        every key is visible, or with module.is_causal those up to the query: as for sdpa
    [B, Sk]     which keys are tokens; every query sees all of them
    [B, 1, S]   which queries and keys are tokens; a query sees those up to itself
    4-D         anything else, as sdpa takes it: transformers' own sdpa runs then, or the model's
                eager attention for a keyword that sdpa lacks or if probabilities are requested

Keys and values are packed to the tokens, and queries too where attention is causal, as it then
relates a sequence to itself. Otherwise a mask says nothing about queries: it may belong to an
encoder that a decoder reads. So a padded query has stock's values there, and zeros if causal.
"""

import functools
import sys

import torch
import transformers
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import kernels as ops
from .coverage import is_transformed
from .encoder import Tokens
from .kernels.attention import MAX_D
from .kernels.dropout import new_seeds
from .kernels.launch import DTYPES
from .modeling import calls_of, logger

NAME = "bert_fast"


# -- masks ----------------------------------------------------------------------------------
def mask(mask_function=masking_utils.causal_mask_function, **kwargs):
    """The mask for `attend`, from transformers' description of a batch: keywords as in sdpa_mask.

    Raises ValueError for a model that would pass the mask to its own attention.
    """
    _check_model(type(kwargs.get("config")))
    if torch.jit.is_tracing():  # the program is of sdpa, for any size
        return masking_utils.sdpa_mask(mask_function=mask_function, **kwargs)
    padding = kwargs.get("attention_mask")
    Sk = kwargs["kv_length"]
    # transformers 5.0 passes the positions of the queries, later ones their number and the first.
    positions = kwargs.get("cache_position")
    S = kwargs["q_length"] if positions is None else len(positions)
    fits = padding is None or padding.shape == (kwargs["batch_size"], Sk)
    if mask_function is masking_utils.bidirectional_mask_function:
        if fits and kwargs.get("allow_is_bidirectional_skip"):
            return padding
    elif mask_function is masking_utils.causal_mask_function:
        if fits and S == Sk and kwargs.get("allow_is_causal_skip"):
            return padding if padding is None else padding[:, None]
    return masking_utils.sdpa_mask(mask_function=mask_function, **kwargs)


@torch.compiler.assume_constant_result
def _check_model(config_class):
    """Raise if `mask` would reach an attention that does not use the interface."""
    if name := _own_attention(config_class):
        raise ValueError(
            f'attn_implementation="{NAME}": {name} computes its attention itself, without'
            ' transformers\' AttentionInterface; load it with attn_implementation="eager"'
        )


@functools.cache
def _own_attention(config_class):
    """The model of a config, if it has its own attention; None if that is not known."""
    if config_class not in transformers.MODEL_MAPPING:
        return None
    model = transformers.MODEL_MAPPING[config_class]
    through = getattr(model, "_supports_sdpa", True) or model._supports_attention_backend
    return None if through else model.__name__


def _as_sdpa_takes_it(mask, S):
    """A mask from `mask` as bool [B, 1, S or 1, Sk]; unchanged if it has four dimensions."""
    if mask is None or mask.ndim == 4:
        return mask
    seen = mask.to(torch.bool)
    if mask.ndim == 2:
        return seen[:, None, None].expand(-1, 1, S, -1)
    return seen[:, None] & torch.ones(S, S, dtype=torch.bool, device=mask.device).tril()


# -- attention ------------------------------------------------------------------------------
def attend(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **kwargs
):
    """Attention of a layer, as transformers' AttentionInterface calls it.

    query       [B, heads, S, D]
    key, value  [B, heads, Sk, D]
    attention_mask  from `mask`, or 4-D: bool, True where visible, or added to the scores
    is_causal   None means the module's

    Returns o [B, S, heads, D] in the dtype of query, and None; or the probabilities
    [B, heads, S, Sk] where the model was called with output_attentions.
    """
    S, Sk = query.shape[2], key.shape[2]
    if attention_mask is not None:
        causal = attention_mask.ndim == 3
    else:
        causal = S > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    reason = _reason(query, key, value, attention_mask, causal, kwargs)
    if not torch.compiler.is_compiling() and calls_of(module).count(reason):
        _say(reason)
    if reason in EAGER:
        mask = _as_sdpa_takes_it(attention_mask, S)
        if mask is None and causal:
            mask = torch.ones(S, Sk, dtype=torch.bool, device=query.device).tril()[None, None]
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
        eager = _eager_of(type(module), reason)
        return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    if reason is not None:
        mask = _as_sdpa_takes_it(attention_mask, S)
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal, **kwargs
        )

    B, device = query.shape[0], query.device
    static = torch.compiler.is_compiling() or device.type == "cuda"
    keys = queries = Tokens(
        None if attention_mask is None else attention_mask.reshape(B, Sk), B, Sk, device, static
    )
    if (attention_mask is None and S != Sk) or (attention_mask is not None and not causal):
        queries = Tokens(None, B, S, device)
    q, k, v = (
        tokens.pack(t.transpose(1, 2))
        for t, tokens in ((query, queries), (key, keys), (value, keys))
    )
    across = queries is not keys
    o = ops.attention(
        q, k, v, queries.cu_seqlens, S,
        cu_seqlens_k=keys.cu_seqlens if across else None, max_seqlen_k=Sk if across else None,
        causal=causal, scale=scaling, num_tokens=queries.num_tokens,
        dropout_p=dropout, seed=next(new_seeds(1, device)) if dropout else None,
    )  # fmt: skip
    return queries.unpack(o.flatten(1)).unflatten(2, o.shape[1:]), None


# Keywords that transformers' sdpa does not support: the model's own attention runs.
EAGER = {"output_attentions", "keyword softcap", "keyword s_aux"}


@torch.compiler.assume_constant_result
def _eager_of(kind, reason):
    """The eager attention of the model that the attention class `kind` belongs to. Raises
    ValueError if it has none in the usual place."""
    own = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
    if own is None:
        raise ValueError(
            f'attn_implementation="{NAME}": {kind.__name__} was called with'
            f" {reason.removeprefix('keyword ')}, which these kernels do not have; load the model"
            ' with attn_implementation="eager"'
        )
    return own


@functools.cache  # a model has many attentions
def _say(reason):
    logger.warning("bert_fast: transformers' own attention runs: %s", reason)


def _reason(query, key, value, mask, causal, kwargs):
    """Why the kernels do not cover this call; None where they do."""
    if kwargs.get("output_attentions"):
        return "output_attentions"
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if kwargs.get(name) is not None:
            return f"keyword {name}"
    if torch.jit.is_tracing():
        return "torch.jit tracing"
    if mask is not None and mask.ndim == 4:
        return "4-D attention_mask"
    if is_transformed():
        return "torch.func or forward-mode AD"
    if reason := ops.missing(query.device):
        return reason
    if query.dtype not in DTYPES:
        return f"{query.dtype} queries"
    if query.shape[-1] > MAX_D:
        return f"heads of {query.shape[-1]}, the kernels take {MAX_D} at most"
    if not query.shape[::3] == key.shape[::3] == value.shape[::3]:
        return "keys and values of another batch or head dimension than queries"
    if not query.shape[1] == key.shape[1] == value.shape[1]:
        return "fewer heads of keys and values than of queries"
    if not query.dtype == key.dtype == value.dtype:
        return f"keys in {key.dtype}, queries in {query.dtype}"
    if causal and query.shape[2] != key.shape[2]:
        return "causal attention to keys of another length"
    return None


transformers.AttentionInterface.register(NAME, attend)
transformers.AttentionMaskInterface.register(NAME, mask)
