"""BERT and its family on Triton kernels: transformers' classes, without the padding.

    model = bert_fast.BertModel.from_pretrained("bert-base-uncased")
    model = bert_fast.AutoModel.from_pretrained("roberta-base")
    model = bert_fast.accelerate(any_model_with_a_bert_inside)
    print(bert_fast.report(model))
    bert_fast.restore(model)
    bert_fast.answer(question, context, model, tokenizer)
"""

from importlib.metadata import version
from pathlib import Path

if not Path(__file__).with_name("kernels").exists():  # in a checkout it is beside this folder
    __path__.append(str(Path(__file__).resolve().parents[1]))

from . import attention_interface, auto, modeling
from .answer import answer
from .auto import *  # noqa: F403
from .modeling import *  # noqa: F403
from .swap import accelerate, report, restore

__version__ = version("bert_fast")
__all__ = ["accelerate", "answer", "attention_interface", "report", "restore"]
__all__ += auto.__all__
__all__ += modeling.__all__
