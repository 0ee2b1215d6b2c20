"""transformers' Auto classes, returning bert_fast's class for an architecture if there is one."""

import transformers

from .modeling import FAST, logger, put_on

__all__ = [
    "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction", "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering", "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification",
    "AutoModelForTextEncoding", "AutoModelForTokenClassification",
]  # fmt: skip


class _Auto:
    """As the transformers class of its name. A model without a bert_fast class is transformers'
    own, and a log line says so; the parts inside an EncoderDecoderModel become bert_fast's."""

    @classmethod
    def from_config(cls, *args, **kwargs):
        return _put_on_all(super().from_config(*args, **kwargs))

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        found = super().from_pretrained(*args, **kwargs)
        _put_on_all(found[0] if isinstance(found, tuple) else found)
        return found  # a tuple with output_loading_info=True


def _put_on_all(model):
    todo = [m for m in model.modules() if type(m) in FAST]
    for module in todo:
        put_on(module)
    if not todo:
        logger.warning("bert_fast: no kernels for %s, it is transformers'", type(model).__name__)
    return model


class AutoModel(_Auto, transformers.AutoModel): ...
class AutoModelForCausalLM(_Auto, transformers.AutoModelForCausalLM): ...
class AutoModelForMaskedLM(_Auto, transformers.AutoModelForMaskedLM): ...
class AutoModelForMultipleChoice(_Auto, transformers.AutoModelForMultipleChoice): ...
class AutoModelForNextSentencePrediction(
    _Auto, transformers.AutoModelForNextSentencePrediction
): ...
class AutoModelForPreTraining(_Auto, transformers.AutoModelForPreTraining): ...
class AutoModelForQuestionAnswering(_Auto, transformers.AutoModelForQuestionAnswering): ...
class AutoModelForSeq2SeqLM(_Auto, transformers.AutoModelForSeq2SeqLM): ...
class AutoModelForSequenceClassification(
    _Auto, transformers.AutoModelForSequenceClassification
): ...
class AutoModelForTextEncoding(_Auto, transformers.AutoModelForTextEncoding): ...
class AutoModelForTokenClassification(_Auto, transformers.AutoModelForTokenClassification): ...
