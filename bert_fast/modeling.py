"""The drop-in classes: transformers' classes of six architectures, with the encoder on the kernels.

A call that the kernels do not cover (see coverage.py) runs the stock forward of the same modules,
counted in report(model). What they compute is in encoder.py.
"""

import collections
import functools
import inspect
import logging
import threading

import torch
import transformers
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.deprecation import deprecate_kwarg

from .architectures import BERT, CAMEMBERT, DISTILBERT, ELECTRA, ROBERTA, XLM_ROBERTA, at
from .coverage import asked, caches, decodes, reason_of_call, reason_of_model
from .encoder import Memory, Tokens, checkpointed, checkpoints, embed, layer_forward
from .frozen import drop_copies
from .graphs import bucket_of, graphs_of
from .inputs import CACHE, Inputs, check
from .kernels.dropout import new_seeds
from .kernels.launch import directly, is_recorded
from .seen import forget
from .training_graphs import training_graphs_of

__all__ = [
    "BertForMaskedLM", "BertForMultipleChoice", "BertForNextSentencePrediction",
    "BertForPreTraining", "BertForQuestionAnswering", "BertForSequenceClassification",
    "BertForTokenClassification", "BertLMHeadModel", "BertModel",
    "CamembertForCausalLM", "CamembertForMaskedLM", "CamembertForMultipleChoice",
    "CamembertForQuestionAnswering", "CamembertForSequenceClassification",
    "CamembertForTokenClassification", "CamembertModel",
    "DistilBertForMaskedLM", "DistilBertForMultipleChoice", "DistilBertForQuestionAnswering",
    "DistilBertForSequenceClassification", "DistilBertForTokenClassification", "DistilBertModel",
    "ElectraForCausalLM", "ElectraForMaskedLM", "ElectraForMultipleChoice", "ElectraForPreTraining",
    "ElectraForQuestionAnswering", "ElectraForSequenceClassification",
    "ElectraForTokenClassification", "ElectraModel",
    "RobertaForCausalLM", "RobertaForMaskedLM", "RobertaForMultipleChoice",
    "RobertaForQuestionAnswering", "RobertaForSequenceClassification",
    "RobertaForTokenClassification", "RobertaModel",
    "XLMRobertaForCausalLM", "XLMRobertaForMaskedLM", "XLMRobertaForMultipleChoice",
    "XLMRobertaForQuestionAnswering", "XLMRobertaForSequenceClassification",
    "XLMRobertaForTokenClassification", "XLMRobertaModel",
]  # fmt: skip

logger = logging.getLogger("bert_fast")


# -- counting -------------------------------------------------------------------------------
class Calls:
    """How often a module ran on the kernels, how often stock ran instead, and why."""

    def __init__(self):
        self.fast = 0
        self.stock = collections.Counter()
        self._lock = threading.Lock()

    def __reduce__(self):  # a copied or loaded model has not run yet
        return Calls, ()

    def count(self, reason):
        """Count a call; reason is None for a fast one. Returns whether the reason is new."""
        with self._lock:
            if reason is None:
                self.fast += 1
                return False
            self.stock[reason] += 1
            return self.stock[reason] == 1


def calls_of(model):
    """The Calls of an encoder, or of an attention."""
    calls = model.__dict__.get("_bert_fast_calls")
    return calls or model.__dict__.setdefault("_bert_fast_calls", Calls())


@torch.compiler.assume_constant_result  # dynamo need not trace it
def _say(reason):
    logger.warning("bert_fast: the stock forward runs: %s", reason)


# -- the encoders ---------------------------------------------------------------------------
class _Encoder:
    """A transformers model whose encoder is bert_fast's; `architecture` says where its parts are.

    Two things differ. Positions that the attention mask excludes are zeros in `last_hidden_state`
    and `hidden_states`, where the stock model has meaningless numbers; a sequence without any token
    is zeros too. And a call raises a ValueError with the reason where the stock model would fail
    later, or not at all: for an attention_mask with another batch size, ids outside their tables
    (on the CPU), more positions than the model has, and tensors on another device than the model.
    """

    def _run(self, stock_forward, kwargs, **inputs):
        """Their common forward: on the kernels, or stock_forward with the reason counted."""
        given = Inputs(**inputs)
        graphs = graphs_of(self)
        bucket = bucket_of(self, given, kwargs) if graphs else None
        played = graphs.replay(bucket, given) if bucket else None
        reason = reason_of_call(self, given, kwargs)
        if reason is None:
            reason = reason_of_model(self)
            if reason is not None and played is not None:
                graphs.is_refused = True
        if reason is None:
            reason = check(self, given)
        if torch.compiler.is_compiling():
            if reason is not None:
                _say(reason)  # while tracing: compiled code does not count calls
        elif calls_of(self).count(reason):
            _say(reason)
        if reason is not None:
            if not torch.compiler.is_compiling():
                drop_copies(self)
            if "cache" in inputs:
                inputs[CACHE] = inputs.pop("cache")
            return stock_forward(**inputs, **kwargs)
        of_training = training_graphs_of(self) if is_recorded() else None
        if bucket:
            last = graphs.result(self, bucket, given, played)
        else:
            last = of_training.forward(self, given, kwargs) if of_training else None
        if last is not None:
            return self._output(last, kwargs)
        try:
            return self._run_on_kernels(given, kwargs)
        except torch.OutOfMemoryError as error:
            why = f"out of memory, {error}"
            dropped = [held.drop(why) for held in (graphs, of_training) if held]
            if not any(dropped):
                raise
        return self._run_on_kernels(given, kwargs)

    def _run_on_kernels(self, inputs, kwargs):
        wanted = asked(self, kwargs, "output_hidden_states")
        last, states, cache = self._encode_directly(inputs, wanted)
        return self._output(last, kwargs, cache, (*states, last) if wanted else None)

    def _encode_directly(self, inputs, wanted):
        """As _encode, bypassing torch's dispatcher where it is not needed."""
        layers = self.architecture.layers(self)
        if torch.compiler.is_compiling() or any(map(checkpoints, layers)):
            return self._encode(inputs, wanted)  # checkpointing may use a dispatch mode
        weight = at(self, self.architecture.embeddings.word).weight
        with directly(weight.device, [t for t in inputs if isinstance(t, torch.Tensor)]):
            return self._encode(inputs, wanted)

    def _encode(self, inputs, wanted=False, static=None):
        """(last_hidden_state, earlier hidden states if wanted, the cache) of a covered call;
        static as in Tokens."""
        architecture = self.architecture
        B, S = inputs.shape()
        device = at(self, architecture.embeddings.word).weight.device
        tokens = _tokens(inputs.attention_mask, B, S, device, static)
        memory = inputs.encoder_hidden_states
        if memory is not None:
            there = _tokens(inputs.encoder_attention_mask, B, memory.shape[1], device, static)
            memory = Memory(there.pack(memory), there)
        cache = inputs.cache
        if cache is None and caches(self, inputs):
            cache = _new_cache(self.config, memory is not None)
        layers = architecture.layers(self)
        seeds = new_seeds(1 + 5 * len(layers), device)  # two attentions have four dropouts
        x = embed(self, inputs, tokens, seeds)
        states, causal = [], decodes(self)
        for layer in layers:
            if wanted:
                states.append(tokens.unpack(x))
            if checkpoints(layer):  # then there is no cache, see coverage.py
                x = checkpointed(architecture, layer, x, tokens, seeds, causal, memory)
                continue
            x = layer_forward(architecture, layer, x, tokens, seeds, causal, memory, cache)
        return tokens.unpack(x), states, cache

    def _output(self, last, kwargs, cache=None, states=None):
        """What forward returns, in stock's form."""
        given = {"last_hidden_state": last}
        if getattr(self, "pooler", None) is not None:
            given["pooler_output"] = self.pooler(last)
        if cache is not None:
            given[CACHE] = cache
        output = self.architecture.output(**given)
        if states is not None:
            output["hidden_states"] = states  # the last, as in stock
        return output if asked(self, kwargs, "return_dict") is not False else output.to_tuple()

    def _apply(self, fn, recurse=True):  # for .to() and the like, which may move weights
        super()._apply(fn, recurse)
        forget(self)
        for held in filter(None, (graphs_of(self), training_graphs_of(self))):
            held.check(self)
        return self


def _tokens(mask, B, S, device, static):
    mask = mask if mask is None else mask.to(device)  # stock moves it too
    return Tokens(mask, B, S, device, static)


def _new_cache(config, crosses):
    """A new cache, as stock makes it."""
    if crosses or config.is_encoder_decoder:
        return transformers.EncoderDecoderCache(
            transformers.DynamicCache(config=config), transformers.DynamicCache(config=config)
        )
    return transformers.DynamicCache(config=config)


def _named_as_in_stock(forward):
    """forward, with the cache under the name that it has in transformers: past_key_values before
    5.24; since then `cache`, the earlier name with a FutureWarning."""
    if CACHE == "cache":
        return deprecate_kwarg("past_key_values", "5.40.0", new_name=CACHE)(forward)

    @functools.wraps(forward)
    def named(*args, **kwargs):
        if CACHE in kwargs:
            kwargs["cache"] = kwargs.pop(CACHE)
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    given = signature.parameters.values()
    given = [p.replace(name=CACHE) if p.name == "cache" else p for p in given]
    named.__signature__ = signature.replace(parameters=given)
    return named


class _BertLike(_Encoder):
    """The forward of all architectures but DistilBERT."""

    @_named_as_in_stock
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cache: transformers.Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | BaseModelOutputWithPoolingAndCrossAttentions:
        """As the forward of the transformers class; see _Encoder for what else it raises."""
        return self._run(
            super().forward,
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            cache=cache,
            use_cache=use_cache,
        )


class BertModel(_BertLike, transformers.BertModel):
    """transformers.BertModel on the kernels: same constructor, weights, names and outputs."""

    architecture = BERT


class RobertaModel(_BertLike, transformers.RobertaModel):
    """transformers.RobertaModel on the kernels, as BertModel is."""

    architecture = ROBERTA


class XLMRobertaModel(_BertLike, transformers.XLMRobertaModel):
    """transformers.XLMRobertaModel on the kernels, as BertModel is."""

    architecture = XLM_ROBERTA


class CamembertModel(_BertLike, transformers.CamembertModel):
    """transformers.CamembertModel on the kernels, as BertModel is."""

    architecture = CAMEMBERT


class ElectraModel(_BertLike, transformers.ElectraModel):
    """transformers.ElectraModel on the kernels, as BertModel is."""

    architecture = ELECTRA


class DistilBertModel(_Encoder, transformers.DistilBertModel):
    """transformers.DistilBertModel on the kernels, as BertModel is."""

    architecture = DISTILBERT

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput | tuple[torch.Tensor, ...]:
        """As the forward of the transformers class; see _Encoder for what else it raises."""
        return self._run(
            super().forward,
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
        )


# -- models with a head ---------------------------------------------------------------------
class _Head:
    """A transformers model with a head, whose encoder is bert_fast's."""

    def __init__(self, config):
        super().__init__(config)
        if type(self.base_model) not in STOCK:  # unless transformers' class was replaced by ours
            put_on(self.base_model)

    def __init_subclass__(cls):
        super().__init_subclass__()
        cls.__doc__ = cls.__doc__ or f"transformers.{cls.__name__} on the kernels."


class BertForPreTraining(_Head, transformers.BertForPreTraining): ...
class BertLMHeadModel(_Head, transformers.BertLMHeadModel): ...
class BertForMaskedLM(_Head, transformers.BertForMaskedLM): ...
class BertForNextSentencePrediction(_Head, transformers.BertForNextSentencePrediction): ...
class BertForSequenceClassification(_Head, transformers.BertForSequenceClassification): ...
class BertForMultipleChoice(_Head, transformers.BertForMultipleChoice): ...
class BertForTokenClassification(_Head, transformers.BertForTokenClassification): ...
class BertForQuestionAnswering(_Head, transformers.BertForQuestionAnswering): ...


class RobertaForCausalLM(_Head, transformers.RobertaForCausalLM): ...
class RobertaForMaskedLM(_Head, transformers.RobertaForMaskedLM): ...
class RobertaForSequenceClassification(_Head, transformers.RobertaForSequenceClassification): ...
class RobertaForMultipleChoice(_Head, transformers.RobertaForMultipleChoice): ...
class RobertaForTokenClassification(_Head, transformers.RobertaForTokenClassification): ...
class RobertaForQuestionAnswering(_Head, transformers.RobertaForQuestionAnswering): ...


class XLMRobertaForCausalLM(_Head, transformers.XLMRobertaForCausalLM): ...
class XLMRobertaForMaskedLM(_Head, transformers.XLMRobertaForMaskedLM): ...
class XLMRobertaForSequenceClassification(
    _Head, transformers.XLMRobertaForSequenceClassification
): ...
class XLMRobertaForMultipleChoice(_Head, transformers.XLMRobertaForMultipleChoice): ...
class XLMRobertaForTokenClassification(_Head, transformers.XLMRobertaForTokenClassification): ...
class XLMRobertaForQuestionAnswering(_Head, transformers.XLMRobertaForQuestionAnswering): ...


class CamembertForCausalLM(_Head, transformers.CamembertForCausalLM): ...
class CamembertForMaskedLM(_Head, transformers.CamembertForMaskedLM): ...
class CamembertForSequenceClassification(
    _Head, transformers.CamembertForSequenceClassification
): ...
class CamembertForMultipleChoice(_Head, transformers.CamembertForMultipleChoice): ...
class CamembertForTokenClassification(_Head, transformers.CamembertForTokenClassification): ...
class CamembertForQuestionAnswering(_Head, transformers.CamembertForQuestionAnswering): ...


class ElectraForPreTraining(_Head, transformers.ElectraForPreTraining): ...
class ElectraForCausalLM(_Head, transformers.ElectraForCausalLM): ...
class ElectraForMaskedLM(_Head, transformers.ElectraForMaskedLM): ...
class ElectraForSequenceClassification(_Head, transformers.ElectraForSequenceClassification): ...
class ElectraForMultipleChoice(_Head, transformers.ElectraForMultipleChoice): ...
class ElectraForTokenClassification(_Head, transformers.ElectraForTokenClassification): ...
class ElectraForQuestionAnswering(_Head, transformers.ElectraForQuestionAnswering): ...


class DistilBertForMaskedLM(_Head, transformers.DistilBertForMaskedLM): ...
class DistilBertForSequenceClassification(
    _Head, transformers.DistilBertForSequenceClassification
): ...
class DistilBertForMultipleChoice(_Head, transformers.DistilBertForMultipleChoice): ...
class DistilBertForTokenClassification(_Head, transformers.DistilBertForTokenClassification): ...
class DistilBertForQuestionAnswering(_Head, transformers.DistilBertForQuestionAnswering): ...


# -- which class stands for which -----------------------------------------------------------
CLASSES = tuple(globals()[name] for name in __all__)
STOCK = {fast: getattr(transformers, fast.__name__) for fast in CLASSES}
FAST = {stock: fast for fast, stock in STOCK.items()}
for _fast, _stock in STOCK.items():
    _fast.stock = _stock, _stock.forward  # its original forward, before any patch


def put_on(module):
    """Turn a module of a transformers class into one of the corresponding bert_fast class."""
    fast = FAST[type(module)]
    _register_outputs(fast)
    module.__class__ = fast


@functools.cache
def _register_outputs(fast):
    """transformers registers in a model's constructor which outputs its class can record. A class
    assigned to an existing model must therefore have been constructed once, or its stock forward
    would record no attentions. The constructor that all models share creates no modules."""
    transformers.PreTrainedModel.__init__(fast.__new__(fast), fast.config_class())
