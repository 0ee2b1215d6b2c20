"""BERT on the kernels: transformers' classes, with an encoder that computes no padding.

    input_ids, attention_mask [B, S]
      pack          row_index, cu_seqlens: where the T tokens are
      embedding     word + position + token type, LayerNorm            x [T, H]
      each layer    q, k, v in one product -> attention -> product     [T, 3H] -> [T, H]
                    LayerNorm(... + x)                                 x [T, H]
                    product -> GELU -> product                         [T, 4H] -> [T, H]
                    LayerNorm(... + x)                                 x [T, H]
      unpack        zeros where there is no token                      [B, S, H]

The model knows of no backend: the ops of bert_fast.kernels find theirs by device. What they do not
cover (see coverage.py) runs the stock forward of the same modules, counted in report(model).
"""

import collections
import logging
import threading

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from . import kernels as ops
from .coverage import asked, reason_of_call, reason_of_model

logger = logging.getLogger("bert_fast")


# -- the encoder ----------------------------------------------------------------------------
class Tokens:
    """Where the tokens of a batch [B, S] are; `cu_seqlens` as attention takes it.

    row_index, packed_row   as of `pack`; None for a batch without padding, which is packed already
    num_tokens              T on the device, for tensors of B * S rows; None for tensors of T rows
    """

    def __init__(self, attention_mask, B, S, device):
        self.shape = (B, S)
        self.row_index = self.packed_row = self.num_tokens = None
        if attention_mask is None:
            self.cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=device) * S
            return
        row_index, packed_row, self.cu_seqlens = ops.pack(attention_mask)
        if _shapes_are_static(device):
            self.row_index, self.packed_row = row_index, packed_row
            self.num_tokens = self.cu_seqlens[-1:]
            return
        # Products still go through torch, which must know T: one wait for the GPU in a forward.
        T = int(self.cu_seqlens[-1])
        if T < B * S:
            self.row_index, self.packed_row = row_index[:T], packed_row

    def unpack(self, x):
        """x [T, H] at its positions: [B, S, H]."""
        if self.packed_row is None:
            return x.view(*self.shape, x.shape[1])
        return ops.unpack(x, self.packed_row)


def _shapes_are_static(device):
    """Whether no shape may depend on data: torch.compile, torch.export, CUDA graph capture."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def embed(embeddings, input_ids, inputs_embeds, token_type_ids, position_ids, tokens):
    """BertEmbeddings of the tokens: [T, H]."""
    norm = embeddings.LayerNorm
    return ops.embedding(
        input_ids,
        embeddings.word_embeddings.weight,
        embeddings.position_embeddings.weight,
        embeddings.token_type_embeddings.weight,
        norm.weight,
        norm.bias,
        inputs_embeds=inputs_embeds,
        token_type_ids=token_type_ids,
        position_ids=position_ids,
        row_index=tokens.row_index,
        eps=norm.eps,
        padding_idx=embeddings.word_embeddings.padding_idx,
        num_tokens=tokens.num_tokens,
    )


def layer_forward(layer, x, qkv_weight, qkv_bias, tokens, causal):
    """One BertLayer: x [T, H] -> [T, H]."""
    o = _attend(layer.attention.self, x, qkv_weight, qkv_bias, tokens, causal)
    x = _add_norm(layer.attention.output, o, x, tokens)
    inner = layer.intermediate.dense
    h = ops.linear(x, inner.weight, inner.bias, "gelu", tokens.num_tokens)
    return _add_norm(layer.output, h, x, tokens)


def _attend(attention, x, qkv_weight, qkv_bias, tokens, causal):
    """BertSelfAttention: x [T, H] -> [T, H]."""
    heads, D = attention.num_attention_heads, attention.attention_head_size
    q, k, v = ops.linear(x, qkv_weight, qkv_bias).view(len(x), 3, heads, D).unbind(1)
    o = ops.attention(
        q, k, v, tokens.cu_seqlens, tokens.shape[1],
        causal=causal, scale=attention.scaling, num_tokens=tokens.num_tokens,
    )  # fmt: skip
    return o.view(len(x), heads * D)


def _add_norm(output, h, residual, tokens):
    """LayerNorm(dense(h) + residual): the end of both halves of a layer."""
    dense, norm = output.dense, output.LayerNorm
    return ops.layer_norm(
        ops.linear(h, dense.weight, dense.bias),
        norm.weight,
        norm.bias,
        residual=residual,
        eps=norm.eps,
        num_tokens=tokens.num_tokens,
    )


# -- q, k, v as one product -----------------------------------------------------------------
_moving = threading.Lock()


class _AsOne(torch.autograd.Function):
    """`stacked`, which parts are the rows of: gradients go to the parts."""

    @staticmethod
    def forward(ctx, stacked, *parts):
        ctx.sizes = [len(p) for p in parts]
        return stacked.view_as(stacked)

    @staticmethod
    def backward(ctx, grad):
        return None, *grad.split(ctx.sizes)


def as_one(*parts):
    """The parameters parts [N, ...] as one tensor [len(parts) * N, ...], with no copy if possible.

    The first call moves the parameters into one storage, in which they stay rows of one tensor: the
    same parameters under the same names, no memory more, and never out of date whoever writes to
    them. Where they cannot be moved (shared with other processes, views of someone's buffer,
    torch.compile), they are concatenated at every call.
    """
    if torch.compiler.is_compiling():
        return torch.cat(parts)
    if not _adjacent(parts):
        with _moving:  # another thread may have moved them meanwhile
            if not _adjacent(parts):
                if not all(map(_movable, parts)):
                    return torch.cat(parts)
                with torch.inference_mode(False), torch.no_grad():
                    rows = torch.cat(parts).split([len(p) for p in parts])
                for p, row in zip(parts, rows):
                    p.data = row
    first = parts[0].detach()
    stacked = first.as_strided((len(parts) * len(first), *first.shape[1:]), first.stride())
    if torch.is_grad_enabled() and any(p.requires_grad for p in parts):
        return _AsOne.apply(stacked, *parts)
    return stacked


def _adjacent(parts):
    """Whether parts are equal in shape and follow each other in one storage."""
    first = parts[0]
    start, size = first.data_ptr(), first.nbytes
    return all(
        p.data_ptr() == start + i * size and p.shape == first.shape and p.is_contiguous()
        for i, p in enumerate(parts)
    ) and first.untyped_storage().nbytes() >= size * len(parts)


def _movable(p):
    return (
        isinstance(p, torch.nn.Parameter)
        and not p.is_inference()
        and p.untyped_storage().nbytes() == p.nbytes
        and not (p.device.type == "cpu" and p.is_shared())
    )


def split_storage(model):
    """Undo as_one: give each q, k, v parameter a storage of its own, bits unchanged."""
    for layer in model.encoder.layer:
        attention = layer.attention.self
        for linear in (attention.query, attention.key, attention.value):
            for p in linear.parameters():
                if p.untyped_storage().nbytes() > p.nbytes and isinstance(p, torch.nn.Parameter):
                    p.data = p.data.clone()


# -- counting -------------------------------------------------------------------------------
class Calls:
    """How often a model ran on the kernels, and how often on the stock forward, and why."""

    def __init__(self):
        self.fast = 0
        self.stock = collections.Counter()
        self._lock = threading.Lock()

    def __reduce__(self):  # a copy of a model, or one from a file, has not run yet
        return Calls, ()

    def count(self, reason):
        """Add a call; log its reason (None for a fast one) the first time it occurs."""
        with self._lock:
            if reason is None:
                self.fast += 1
                return
            self.stock[reason] += 1
            first = self.stock[reason] == 1
        if first:
            logger.warning("bert_fast: the stock forward runs: %s", reason)


def calls_of(model):
    """The Calls of a bert_fast.BertModel."""
    calls = model.__dict__.get("_bert_fast_calls")
    return calls or model.__dict__.setdefault("_bert_fast_calls", Calls())


# -- the drop-in classes --------------------------------------------------------------------
class BertModel(transformers.BertModel):
    """transformers.BertModel on the kernels: same constructor, weights, names and outputs.

    Two things differ. Positions that the attention mask excludes are zeros in `last_hidden_state`
    and `hidden_states`, where the stock model has numbers without a meaning; a sequence that has no
    token at all is zeros too. And a call fails with a ValueError that says why where the stock
    model would fail later, or not at all.
    """

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: transformers.Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | BaseModelOutputWithPoolingAndCrossAttentions:
        """As transformers.BertModel.forward. Raises ValueError, beyond what that raises, for an
        attention_mask that does not fit the input, ids outside their tables (on the CPU), more
        positions than the model has, and tensors that are not on the model's device."""
        reason = reason_of_call(
            self, attention_mask, encoder_hidden_states, past_key_values, use_cache, kwargs
        ) or reason_of_model(self)
        if reason is None:
            reason = _check(
                self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
            )
        if not torch.compiler.is_compiling():
            calls_of(self).count(reason)
        if reason is not None:
            return super().forward(
                input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )

        B, S = (inputs_embeds if input_ids is None else input_ids).shape[:2]
        device = self.embeddings.word_embeddings.weight.device
        if attention_mask is not None:
            attention_mask = attention_mask.to(device)  # stock moves it too
        tokens = Tokens(attention_mask, B, S, device)
        x = embed(self.embeddings, input_ids, inputs_embeds, token_type_ids, position_ids, tokens)
        wanted = asked(self, kwargs, "output_hidden_states")
        states = []
        for layer in self.encoder.layer:
            attention = layer.attention.self
            qkv = (attention.query, attention.key, attention.value)
            weight, bias = as_one(*(m.weight for m in qkv)), as_one(*(m.bias for m in qkv))
            if wanted:
                states.append(x)
            x = layer_forward(layer, x, weight, bias, tokens, causal=self.config.is_decoder)
        last_hidden_state = tokens.unpack(x)
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last_hidden_state,
            pooler_output=None if self.pooler is None else self.pooler(last_hidden_state),
        )
        if wanted:
            output["hidden_states"] = (*map(tokens.unpack, states), last_hidden_state)
        return_dict = asked(self, kwargs, "return_dict")
        return output if return_dict is not False else output.to_tuple()


def _check(model, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds):
    """Raise ValueError for inputs that do not fit, or return the reason to leave them to stock."""
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"BertModel: give input_ids or inputs_embeds, one of them; got {given}")
    if inputs_embeds is None:
        name, x, want, ndim = "input_ids", input_ids, "[batch, length]", 2
    else:
        name, x, want, ndim = "inputs_embeds", inputs_embeds, "[batch, length, hidden]", 3
    if x.ndim != ndim:
        raise ValueError(f"BertModel: {name} must be {want}, got {list(x.shape)}")
    B, S = x.shape[:2]
    weight = model.embeddings.word_embeddings.weight
    for other_name, t in (
        (name, x), ("token_type_ids", token_type_ids), ("position_ids", position_ids)
    ):  # fmt: skip
        if t is not None and t.device != weight.device:
            raise ValueError(
                f"BertModel: {other_name} is on {t.device} and the model on {weight.device};"
                f" move it with .to({str(weight.device)!r})"
            )
    if inputs_embeds is not None and inputs_embeds.dtype != weight.dtype:
        return f"inputs_embeds in {inputs_embeds.dtype}, weights in {weight.dtype}"
    limit = len(model.embeddings.position_embeddings.weight)
    if position_ids is None and limit < S:
        raise ValueError(
            f"BertModel: the model has {limit} positions (max_position_embeddings), {name} has {S};"
            " truncate with tokenizer(..., truncation=True) or split the text"
        )
    if S == 0 and model.pooler is not None:
        raise ValueError(f"BertModel: {name} has length 0; the pooler needs a first position")
    if attention_mask is not None:
        shape = list(attention_mask.shape)
        if attention_mask.ndim != 2 or shape[0] != B:
            want = f"[{B}, {S}] like {name}"
            raise ValueError(f"BertModel: attention_mask must be {want}, got {shape}")
        if shape[1] != S:
            return "attention_mask of another length than the input"
    for other_name, t in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if t is not None and t.shape not in ((B, S), (1, S)):
            raise ValueError(
                f"BertModel: {other_name} must be [{B}, {S}] like {name}, got {list(t.shape)}"
            )
    return None


class _Head:
    """A transformers BERT with a head, whose encoder is bert_fast's."""

    def __init__(self, config):
        super().__init__(config)
        self.bert.__class__ = BertModel


class BertForPreTraining(_Head, transformers.BertForPreTraining):
    """transformers.BertForPreTraining on the kernels."""


class BertLMHeadModel(_Head, transformers.BertLMHeadModel):
    """transformers.BertLMHeadModel on the kernels; a call with a key-value cache runs stock."""


class BertForMaskedLM(_Head, transformers.BertForMaskedLM):
    """transformers.BertForMaskedLM on the kernels."""


class BertForNextSentencePrediction(_Head, transformers.BertForNextSentencePrediction):
    """transformers.BertForNextSentencePrediction on the kernels."""


class BertForSequenceClassification(_Head, transformers.BertForSequenceClassification):
    """transformers.BertForSequenceClassification on the kernels."""


class BertForMultipleChoice(_Head, transformers.BertForMultipleChoice):
    """transformers.BertForMultipleChoice on the kernels."""


class BertForTokenClassification(_Head, transformers.BertForTokenClassification):
    """transformers.BertForTokenClassification on the kernels."""


class BertForQuestionAnswering(_Head, transformers.BertForQuestionAnswering):
    """transformers.BertForQuestionAnswering on the kernels."""


CLASSES = (
    BertModel, BertForPreTraining, BertLMHeadModel, BertForMaskedLM, BertForNextSentencePrediction,
    BertForSequenceClassification, BertForMultipleChoice, BertForTokenClassification,
    BertForQuestionAnswering,
)  # fmt: skip
