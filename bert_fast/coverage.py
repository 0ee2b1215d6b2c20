"""Which calls the kernels cover. Any other call runs the stock forward, for the reason given here.

A reason is a short phrase that names the obstacle, as report(model) prints it.
"""

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils.weak import WeakIdKeyDictionary
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .architectures import ARCHITECTURES, at
from .encoder import asks_for_gradients, checkpoints, keeps_no_cache
from .kernels import missing
from .kernels.attention import MAX_D
from .kernels.launch import DTYPES
from .kernels.layer_norm import MAX_N
from .seen import HOOKS, forget, see, seen, state_of_buffer

try:  # later transformers 5; earlier ones replace `forward` on the modules while recording
    from transformers.utils import output_capturing
except ImportError:
    output_capturing = None

EXACT_GELU = type(ACT2FN["gelu"])
MODULES = {  # what an encoder may be made of: exactly these, no subclass, and their forwards
    kind: kind.forward
    for kind in {
        nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout, EXACT_GELU,
    }.union(*(architecture.classes() for architecture in ARCHITECTURES))
}  # fmt: skip
GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)
CHUNKS = {kind: getattr(kind, "feed_forward_chunk", None) for kind in MODULES}
ATTENTIONS = {
    "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "bert_fast", None,
}  # fmt: skip
# Their originals, before anything can replace them.
FUNCTIONS = dict(ALL_ATTENTION_FUNCTIONS)
EAGER = {
    a.model_type: (a.module(), getattr(a.module(), "eager_attention_forward", None))
    for a in ARCHITECTURES
}
# Private to torch, which may change it.
_in_torch_func = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
# transformers' keywords that a call may have without any effect on the encoder.
HARMLESS = {
    "return_dict", "output_attentions", "output_hidden_states", "num_items_in_batch",
    "shift_labels", "labels",
}  # fmt: skip


def reason_of_call(model, inputs, kwargs):
    """Why the kernels do not cover this call of `model`; None where they do."""
    if asked(model, kwargs, "output_attentions"):
        return "output_attentions"
    hidden_states = asked(model, kwargs, "output_hidden_states")
    if hidden_states and (hidden_states is not True or torch.is_grad_enabled()):
        # Gradients would have to reach the hidden states that are returned.
        return "output_hidden_states with gradients or a selection of layers"
    if reason := _reason_of_cache(model, inputs):
        return reason
    if decodes(model) and (reason := reason_of_parts(model)):
        return reason  # cross attention is looked for in the layers
    states = inputs.encoder_hidden_states
    if states is not None and not decodes(model):
        return "encoder_hidden_states in an encoder"
    if decodes(model) and (states is not None) != crosses(model):
        if states is None:
            return "cross-attention layers without encoder_hidden_states"
        return "encoder_hidden_states without config.add_cross_attention"
    for name in ("attention_mask", "encoder_attention_mask"):
        mask = getattr(inputs, name)
        if mask is None:
            continue
        if not isinstance(mask, torch.Tensor):
            return f"{name} of type {type(mask).__name__}"
        if mask.ndim > 2:
            return f"{mask.ndim}-D {name}"
    for name, value in kwargs.items():
        if name not in HARMLESS and value is not None:
            if name != "token_type_ids" or model.architecture.embeddings.token_type:
                return f"keyword {name}"  # DistilBERT ignores it, as stock does
    return None


def decodes(model):
    """Whether a model is a decoder: causal, possibly with cross attention and a cache."""
    return model.architecture.cross_attention is not None and bool(setting(model, "is_decoder"))


def setting(model, name):
    """The config's value of name, or None. Avoids transformers' own lookup, which takes 3 us; a
    call makes a dozen."""
    config = model.config
    if torch.compiler.is_compiling():
        return getattr(config, name, None)
    try:
        return object.__getattribute__(config, type(config).attribute_map.get(name, name))
    except AttributeError:
        return None


def crosses(model):
    """Whether the layers have cross attention."""
    return any(len(model.architecture.attentions(layer)) == 2 for layer in layers_of(model))


def caches(model, inputs):
    """Whether this call is to return a key-value cache."""
    if not decodes(model):
        return False
    return bool(setting(model, "use_cache") if inputs.use_cache is None else inputs.use_cache)


def _reason_of_cache(model, inputs):
    """The kernels fill a new cache; attending to a filled one is left to stock."""
    if caches(model, inputs) and torch.compiler.is_compiling():
        return "use_cache in a decoder under torch.compile"
    if caches(model, inputs) and any(map(keeps_no_cache, layers_of(model))):
        return "use_cache with gradient checkpointing"
    cache = inputs.cache
    if cache is None:
        return None
    parts = [cache]
    if type(cache) is transformers.EncoderDecoderCache:
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    elif inputs.encoder_hidden_states is not None:
        return f"a cache of type {type(cache).__name__} beside encoder_hidden_states"
    if not caches(model, inputs) or any(type(p) is not transformers.DynamicCache for p in parts):
        return f"a cache of type {type(parts[0]).__name__}"
    if any(p.get_seq_length() for p in parts):
        return "a step that reads a cache"
    return None


def reason_of_model(model):
    """Why the kernels do not cover `model` as it is now; None where they do."""
    if reason := reason_of_parts(model):
        return reason
    weight = at(model, model.architecture.embeddings.word).weight
    device, dtype = weight.device, weight.dtype
    if reason := missing(device):
        return reason
    if dtype not in DTYPES:
        return f"{dtype} weights"
    if setting(model, "is_causal") is not None:
        return "config.is_causal"
    implementation = setting(model, "_attn_implementation")
    if implementation not in ATTENTIONS:
        return f"attn_implementation {implementation}"
    if torch.is_autocast_enabled(device.type):
        into = torch.get_autocast_dtype(device.type)
        if dtype is not torch.float32 or into not in (torch.float16, torch.bfloat16):
            return f"torch.autocast from {dtype} to {into}"
        project = model.architecture.project
        if project and project in model._modules:
            return f"torch.autocast with {project}"
    if torch.jit.is_tracing():
        return "torch.jit tracing"
    if is_transformed():
        return "torch.func or forward-mode AD"
    if torch.compiler.is_compiling() and any(map(checkpoints, layers_of(model))):
        return "gradient checkpointing under torch.compile"
    if torch.compiler.is_dynamo_compiling():
        return _first_reason(model, dtype, device) or _reason_of_lengths(model)
    stock, forward = model.stock
    if stock.forward is not forward:
        return f"forward replaced on transformers.{stock.__name__}"
    if any(getattr(nn_module, name, None) for name in GLOBAL_HOOKS):
        return "global module hooks"
    if reason := _reason_of_stock(model, stock, implementation):
        return reason
    if output_capturing is not None and output_capturing._active_collector.get():
        return "an outer model records outputs of these modules"
    return _first_reason(model, dtype, device)


def _reason_of_stock(model, stock, implementation):
    """As reason_of_model, for what stock's forward looks up by name, where it may have been
    replaced."""
    name = "_create_attention_masks"
    if name in model.__dict__ or getattr(type(model), name, None) is not getattr(stock, name, None):
        return f"{name} replaced"
    module, eager = EAGER[model.architecture.model_type]
    if implementation == "eager" and getattr(module, "eager_attention_forward", None) is not eager:
        return "eager_attention_forward replaced"
    known = FUNCTIONS.get(implementation)
    if known is not None and ALL_ATTENTION_FUNCTIONS.get(implementation) is not known:
        return f"another function registered as attn_implementation {implementation}"
    return None


def _reason_of_lengths(model):
    """As _reason_of_buffers, where no values can be read."""
    table = at(model, model.architecture.embeddings.position).weight
    t = model._modules["embeddings"]._buffers.get("position_ids")
    if model.architecture.position_ids is None and t is not None and t.shape[-1] != len(table):
        return "embeddings.position_ids with other numbers than usual"
    return None


_counting = WeakIdKeyDictionary()  # buffer: its state when checked, and whether it was as assumed


def _reason_of_buffers(model):
    """(the reason or None, whether all could be checked). If a call gives no positions or token
    types, stock reads them from buffers, which may have been replaced; the kernels count positions
    and use type 0. The buffers' values are checked once."""
    looked, names = True, {"token_type_ids": 0}  # and the step from each number to the next
    if model.architecture.position_ids is None:
        names["position_ids"] = 1
    for name, step in names.items():
        t = model._modules["embeddings"]._buffers.get(name)
        if type(t) is not torch.Tensor or t.is_meta:
            continue
        state = state_of_buffer(t)
        if _counting.get(t, (None,))[0] != state:
            if t.is_cuda and torch.cuda.is_current_stream_capturing():
                looked = False
                continue
            same = (t.cpu() == step * torch.arange(t.shape[-1], device="cpu")).all()
            if type(same) is not torch.Tensor or same.is_meta:  # under fake tensors
                looked = False
                continue
            _counting[t] = state, bool(same)
        if not _counting[t][1]:
            return f"embeddings.{name} with other numbers than usual", looked
    return None, looked


def is_transformed():
    """Whether this runs inside a torch.func transform (grad, jvp, vmap, ...) or a dual level of
    forward-mode AD."""
    return _in_torch_func() or forward_ad._current_level >= 0


def layers_of(model):
    """The layers of an encoder; none if something else has replaced them."""
    layers = getattr(model._modules.get(model.architecture.encoder), "layer", None)
    return layers if type(layers) is nn.ModuleList else ()


def reason_of_parts(model):
    """Why embeddings or layers are not where the kernels expect them; None if they are."""
    for path, place, name, kind in PLACES[model.architecture.model_type]:
        outer = model._modules.get(place)
        if type(outer) not in MODULES:
            return f"{place}: {_name(outer)}"
        inner = outer._modules.get(name)
        if type(inner) is not kind:
            return f"{path}: {_name(inner)}"
    return None


def _places_of(architecture):
    """(path, its two parts, class of the module there) of the embeddings' parts and the layers."""
    paths = architecture.embeddings
    kinds = {
        paths.word: nn.Embedding,
        paths.position: nn.Embedding,
        paths.token_type: nn.Embedding,
        paths.norm: nn.LayerNorm,
        paths.dropout: nn.Dropout,
        f"{architecture.encoder}.layer": nn.ModuleList,
    }
    return [(path, *path.split("."), kind) for path, kind in kinds.items() if path is not None]


PLACES = {a.model_type: _places_of(a) for a in ARCHITECTURES}


def asked(model, kwargs, name):
    """An output_... flag of this call, or the config's if the call does not have it. As in stock, a
    flag of None has been given."""
    return kwargs[name] if name in kwargs else setting(model, name)


def _first_reason(model, dtype, device):
    """As reason_of_model, for modules and buffers, which are checked one by one if any changed."""
    if torch.compiler.is_compiling():
        return _reason_of_modules(model, dtype, device)[0]
    beside = dtype, device, setting(model, "num_attention_heads"), decodes(model)
    known = seen(model)
    if known is not None:
        if known.holds(beside):
            return None
        forget(model)  # it keeps the old modules alive
    reason, modules = _reason_of_modules(model, dtype, device)
    if reason is None:
        reason, looked = _reason_of_buffers(model)
        if reason is None and looked:
            see(model, modules, beside)
    return reason


def parts_of(model):
    """A list of the modules that contain all that the kernels compute."""
    names = "embeddings", model.architecture.project, model.architecture.encoder
    return [model._modules[name] for name in names if name in model._modules]


def _reason_of_modules(model, dtype, device):
    """(the reason or None, the modules)"""
    architecture = model.architecture
    index = device.index if device.type == "cuda" else -1  # as Tensor.get_device has it
    place = index, at(model, architecture.embeddings.word).weight.is_meta
    todo = parts_of(model)
    for module in todo:
        if reason := _reason_of_module(module, dtype, place):
            return f"{_path(model, module)}: {reason}", todo
        todo += [m for m in module._modules.values() if m is not None]
    hidden = at(model, architecture.embeddings.norm).weight.shape[-1]
    layers = architecture.layers(model)
    if layers:
        hidden = max(hidden, at(layers[0], architecture.feed_forward.norm).weight.shape[-1])
    if hidden > MAX_N:
        return f"hidden size {hidden}, the kernels take {MAX_N} at most", todo
    heads, is_decoder = setting(model, "num_attention_heads"), decodes(model)
    for layer in layers:
        if reason := _reason_of_layer(architecture, layer, heads, is_decoder):
            return f"{_path(model, layer)}: {reason}", todo
    return None, todo


def _path(model, module):
    return next(path for path, m in model.named_modules() if m is module)


def _reason_of_layer(architecture, layer, heads, is_decoder):
    """As reason_of_model, for how the modules of a layer, all of known types, fit together."""
    activation = at(layer, architecture.feed_forward.activation)
    if type(activation) is not EXACT_GELU:
        return f"activation {getattr(activation, '__qualname__', type(activation).__qualname__)}"
    if getattr(layer, "is_decoder", False) != is_decoder:
        return f"config.is_decoder is {is_decoder}, and was not when the model was made"
    kind = type(layer)
    # Not kind.__dict__: dynamo reads none once a dict has changed, as keywords do in a head.
    if getattr(kind, "feed_forward_chunk", None) is not CHUNKS[kind] or (
        "feed_forward_chunk" in layer.__dict__
    ):
        return "feed_forward_chunk replaced"
    for paths, causal in zip(architecture.attentions(layer), (is_decoder, False)):
        if getattr(at(layer, paths.core), "is_causal", causal) != causal:
            return f"{paths.core}.is_causal is {not causal}"
        D = at(layer, paths.core).attention_head_size
        if at(layer, paths.query).weight.ndim != 2:
            return "flat weights, as FullyShardedDataParallel keeps them between calls"
        if at(layer, paths.query).weight.shape[0] != heads * D:
            return f"pruned heads: not {heads} (config.num_attention_heads)"
        if D > MAX_D:
            return f"heads of {D}, the kernels take {MAX_D} at most"
    return None


def _reason_of_module(module, dtype, place):
    """As reason_of_model, for one module of the encoder. Takes 1 us per module."""
    kind = type(module)
    if kind not in MODULES:
        return _name(module)
    state = module.__dict__
    if "forward" in state and state["forward"] != kind.forward.__get__(module):
        return "forward replaced on the module"
    if kind.forward is not MODULES[kind]:
        return f"forward replaced on {kind.__qualname__}"
    if (  # unrolled: a loop over HOOKS takes three times as long
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        if not all(_is_harmless(h) for name in HOOKS for h in state[name].values()):
            return "hooks, which the kernels would not run"
    for p in state["_parameters"].values():
        if p is None:
            return "no bias or weight"
        if type(p) is not nn.Parameter and type(p) is not torch.Tensor and not (
            type(p) is FakeTensor and torch.compiler.is_compiling()  # torch.export's, for a weight
        ):
            return f"weights of type {type(p).__name__}"
        if p.layout is not torch.strided:
            return f"{p.layout} weights"
        if p.dtype is not dtype or (p.get_device(), p.is_meta) != place:
            return f"{p.dtype} on {p.device} beside {dtype} on the model's device"
    if kind in (nn.Linear, nn.LayerNorm) and "bias" not in state["_parameters"]:
        if getattr(module, "bias", None) is None:  # DataParallel replicas have a tensor there
            return "no bias or weight"
    if kind is nn.Embedding:
        if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            return "max_norm, sparse or scale_grad_by_freq"
    return None


def _name(module):
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_harmless(hook):
    """Whether a hook is transformers' own output recorder, which is inactive until outputs are
    requested, or its hook on word embeddings for gradient checkpointing, which `embed` handles."""
    if output_capturing is not None and hook.__module__ == output_capturing.__name__:
        return True
    return asks_for_gradients(hook)
