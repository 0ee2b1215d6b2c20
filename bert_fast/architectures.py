"""Where things are in each architecture: what the encoder needs, under transformers' names.

The encoders of BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA and DistilBERT compute the same; they
differ in names, in how a token's position is found, and in what some of them lack. So each is a
declaration, and encoder.py is written once. A new architecture is a declaration here and its
classes in modeling.py.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import modeling_outputs


class Embeddings(NamedTuple):
    """In a model: project(dropout(norm(word + token_type + position)))."""

    word: Any
    position: Any
    token_type: Any  # None where there are no token types
    norm: Any
    dropout: Any


class Attention(NamedTuple):
    """In a layer: norm(dropout(dense(attention(query, key, value))) + x)."""

    core: Any  # has attention_head_size, scaling, and the dropout of probabilities
    query: Any
    key: Any
    value: Any
    dense: Any
    dropout: Any  # None where there is none
    norm: Any


class FeedForward(NamedTuple):
    """In a layer: norm(dropout(down(activation(up(x)))) + x)."""

    up: Any
    activation: Any
    down: Any
    dropout: Any
    norm: Any


def at(module, path):
    """What `module` has at a dotted path. Reads _modules, which is five times as fast as getattr,
    for the hundred paths of a forward."""
    for name in path.split("."):
        child = module._modules.get(name)
        module = getattr(module, name) if child is None else child
    return module


def find(module, paths):
    """`paths`, a NamedTuple of dotted paths, each replaced by what `module` has there."""
    return type(paths)(*(p and at(module, p) for p in paths))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model type of transformers. Paths start at a model, or at one of its layers."""

    model_type: str  # as in config.json
    parts: tuple[str, ...]  # classes of its modules, from the embeddings to the last layer
    embeddings: Embeddings
    encoder: str  # child of the model that has the layers, as `layer`
    attention: Attention
    feed_forward: FeedForward
    output: type  # what forward returns
    project: str | None = None  # child of the model after the embeddings, absent in some models
    cross_attention: Attention | None = None  # in layers of decoders; None where none decodes
    # (model, input_ids, inputs_embeds) -> position_ids; None: a token's position is its column
    position_ids: Callable | None = None

    def layers(self, model):
        return getattr(model, self.encoder).layer

    def attentions(self, layer):
        """The paths of the one or two attentions in a layer."""
        crosses = self.cross_attention and getattr(layer, "add_cross_attention", False)
        return (self.attention, self.cross_attention) if crosses else (self.attention,)

    def module(self):
        """The module of transformers that defines its classes."""
        name = self.model_type.replace("-", "_")
        return importlib.import_module(f"transformers.models.{name}.modeling_{name}")

    def classes(self):
        """The classes that its encoder may consist of."""
        return {getattr(self.module(), name) for name in self.parts}


def _after_padding(model, input_ids, inputs_embeds):
    """RoBERTa's positions: tokens count from padding_idx + 1, and padding ids, whatever the
    attention mask says, stay at padding_idx."""
    embeddings = model.embeddings
    if input_ids is None:
        return embeddings.create_position_ids_from_inputs_embeds(
            inputs_embeds, embeddings.padding_idx
        )
    return embeddings.create_position_ids_from_input_ids(input_ids, embeddings.padding_idx)


def _bert_parts(prefix):
    return tuple(
        prefix + name
        for name in (
            "Embeddings", "Encoder", "Layer", "Attention", "SelfAttention", "CrossAttention",
            "SelfOutput", "Intermediate", "Output",
        )
    )  # fmt: skip


def _bert_attention(name):
    return Attention(
        core=f"{name}.self",
        query=f"{name}.self.query",
        key=f"{name}.self.key",
        value=f"{name}.self.value",
        dense=f"{name}.output.dense",
        dropout=f"{name}.output.dropout",
        norm=f"{name}.output.LayerNorm",
    )


BERT = Architecture(
    model_type="bert",
    parts=_bert_parts("Bert"),
    embeddings=Embeddings(
        word="embeddings.word_embeddings",
        position="embeddings.position_embeddings",
        token_type="embeddings.token_type_embeddings",
        norm="embeddings.LayerNorm",
        dropout="embeddings.dropout",
    ),
    encoder="encoder",
    attention=_bert_attention("attention"),
    cross_attention=_bert_attention("crossattention"),
    feed_forward=FeedForward(
        up="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        down="output.dense",
        dropout="output.dropout",
        norm="output.LayerNorm",
    ),
    output=modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions,
)
ROBERTA = dataclasses.replace(
    BERT, model_type="roberta", parts=_bert_parts("Roberta"), position_ids=_after_padding
)
XLM_ROBERTA = dataclasses.replace(
    ROBERTA, model_type="xlm-roberta", parts=_bert_parts("XLMRoberta")
)
CAMEMBERT = dataclasses.replace(ROBERTA, model_type="camembert", parts=_bert_parts("Camembert"))
ELECTRA = dataclasses.replace(
    BERT,
    model_type="electra",
    parts=_bert_parts("Electra"),
    project="embeddings_project",
    output=modeling_outputs.BaseModelOutputWithPastAndCrossAttentions,
)
DISTILBERT = Architecture(
    model_type="distilbert",
    parts=("Embeddings", "Transformer", "TransformerBlock", "DistilBertSelfAttention", "FFN"),
    embeddings=BERT.embeddings._replace(token_type=None),
    encoder="transformer",
    attention=Attention(
        core="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        dense="attention.out_lin",
        dropout=None,
        norm="sa_layer_norm",
    ),
    feed_forward=FeedForward(
        up="ffn.lin1",
        activation="ffn.activation",
        down="ffn.lin2",
        dropout="ffn.dropout",
        norm="output_layer_norm",
    ),
    output=modeling_outputs.BaseModelOutput,
)
ARCHITECTURES = (BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, ELECTRA, DISTILBERT)
