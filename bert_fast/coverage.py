"""Which calls the kernels cover. Any other call runs the stock forward, with the reason given here.

A reason is a short phrase that names what stands in the way, as report(model) prints it.
"""

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from transformers.activations import ACT2FN
from transformers.models.bert import modeling_bert as stock

from .kernels import missing
from .kernels.launch import DTYPES

try:  # in later transformers 5; before, recording replaces `forward` on the modules meanwhile
    from transformers.utils import output_capturing
except ImportError:
    output_capturing = None

EXACT_GELU = type(ACT2FN["gelu"])
MODULES = {  # what the encoder may be made of: exactly these, no subclass
    stock.BertEmbeddings, stock.BertEncoder, stock.BertLayer, stock.BertAttention,
    stock.BertSelfAttention, stock.BertSelfOutput, stock.BertIntermediate, stock.BertOutput,
    stock.BertCrossAttention, nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout,
    EXACT_GELU,
}  # fmt: skip
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ATTENTIONS = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", None}
# Keywords of transformers that a forward may carry without any effect on the encoder.
HARMLESS = {
    "return_dict", "output_attentions", "output_hidden_states", "num_items_in_batch",
    "shift_labels", "labels",
}  # fmt: skip


def reason_of_call(model, mask, encoder_hidden_states, past_key_values, use_cache, kwargs):
    """Why the kernels do not cover this call of `model`; None where they do."""
    config = model.config
    if asked(model, kwargs, "output_attentions"):
        return "output_attentions"
    hidden_states = asked(model, kwargs, "output_hidden_states")
    if hidden_states and (hidden_states is not True or torch.is_grad_enabled()):
        # With gradients, they must reach the hidden states that are handed out.
        return "output_hidden_states with gradients or a selection of layers"
    if past_key_values is not None:
        return "past_key_values"
    if config.is_decoder and (config.use_cache if use_cache is None else use_cache):
        return "use_cache in a decoder"
    if encoder_hidden_states is not None:
        return "encoder_hidden_states"
    if mask is not None:
        if not isinstance(mask, torch.Tensor):
            return f"attention_mask of type {type(mask).__name__}"
        if mask.ndim > 2:
            return f"{mask.ndim}-D attention_mask"
    for name, value in kwargs.items():
        if name not in HARMLESS and value is not None:
            return f"keyword {name}"
    return None


def reason_of_model(model):
    """Why the kernels do not cover `model` as it is now; None where they do."""
    weight = model.embeddings._modules["word_embeddings"].weight
    device, dtype = weight.device, weight.dtype
    if reason := missing(device):
        return reason
    if dtype not in DTYPES:
        return f"{dtype} weights"
    config = model.config
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return f"position_embedding_type {config.position_embedding_type}"
    if getattr(config, "is_causal", None) is not None:
        return "config.is_causal"
    if config._attn_implementation not in ATTENTIONS:
        return f"attn_implementation {config._attn_implementation}"
    if torch.is_autocast_enabled(device.type):
        return "torch.autocast"
    if torch.jit.is_tracing():
        return "torch.jit tracing"
    if model.gradient_checkpointing and model.training:
        return "gradient checkpointing"
    if torch.compiler.is_compiling():  # dynamo runs hooks itself, or breaks the graph for them
        return _first_reason(model, dtype, device, hooks=False)
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "global module hooks"
    if output_capturing is not None and output_capturing._active_collector.get():
        return "an outer model records outputs of these modules"
    return _first_reason(model, dtype, device, hooks=True)


def asked(model, kwargs, name):
    """An output_... flag of this call, which the config may answer."""
    value = kwargs.get(name)
    return getattr(model.config, name, False) if value is None else value


def _first_reason(model, dtype, device, hooks):
    index = device.index if device.type == "cuda" else -1  # as Tensor.get_device has it
    todo = [model._modules["embeddings"], model._modules["encoder"]]
    for module in todo:
        if reason := _reason_of_module(module, dtype, index, hooks):
            path = next(path for path, m in model.named_modules() if m is module)
            return f"{path}: {reason}"
        todo += module._modules.values()
    return None


def _reason_of_module(module, dtype, device_index, hooks):
    """As reason_of_model, of one module of the encoder. Called for each at each call: 1 us."""
    kind = type(module)
    if kind not in MODULES:
        return f"{kind.__module__}.{kind.__qualname__}"
    state = module.__dict__
    if "forward" in state and state["forward"] != kind.forward.__get__(module):
        return "forward replaced on the module"
    if hooks and (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        recorders = [h for h in state["_forward_hooks"].values() if _is_recorder(h)]
        if len(recorders) != sum(len(state[name]) for name in HOOKS):
            return "hooks, which the kernels would not run"
    for p in state["_parameters"].values():
        if p is None:
            return "no bias or weight"
        if type(p) is not nn.Parameter and type(p) is not torch.Tensor:
            return f"weights of type {type(p).__name__}"
        if p.dtype is not dtype or p.get_device() != device_index:
            return f"{p.dtype} on {p.device} beside {dtype} on the model's device"
    if kind is nn.Dropout:
        if module.training and module.p > 0:
            return f"training with dropout {module.p:g}"
    elif kind is nn.Embedding:
        if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            return "max_norm, sparse or scale_grad_by_freq"
    elif kind is stock.BertSelfAttention:
        if module.query.weight.shape[0] != module.num_attention_heads * module.attention_head_size:
            return "pruned heads"
        if module.attention_head_size > 256:
            return f"heads of {module.attention_head_size}, the kernels take 256 at most"
    return None


def _is_recorder(hook):
    """Whether a forward hook is transformers' own output recorder, which sleeps until outputs are
    asked for."""
    return output_capturing is not None and hook.__module__ == output_capturing.__name__
