"""The public ops, and SPECS: the one list that tests, benchmarks and the compile check read.

As an attribute, `layer_norm` here is the op and hides its file; `from .layer_norm import ...`
still reaches the file.
"""

if __name__ == "kernels":
    # The repository's root is on sys.path, and transformers looks for the distribution of this
    # name. This is not it: any version below the ones it wants says so.
    __version__ = "0"
else:
    from .attention import SPEC as ATTENTION
    from .attention import attention
    from .attention_backward import SPEC as ATTENTION_BACKWARD
    from .attention_backward import attention_backward
    from .dropout import SPEC as DROPOUT
    from .dropout import dropout
    from .embedding import SPEC as EMBEDDING
    from .embedding import embedding
    from .gelu import SPEC as GELU
    from .gelu import gelu
    from .gelu_gradient import SPEC as GELU_GRADIENT
    from .gelu_gradient import gelu_gradient
    from .launch import backend, missing
    from .layer_norm import SPEC as LAYER_NORM
    from .layer_norm import layer_norm
    from .layer_norm_backward import SPEC as LAYER_NORM_BACKWARD
    from .layer_norm_backward import layer_norm_backward
    from .linear import SPEC as LINEAR
    from .linear import linear
    from .packing import PACK, UNPACK, Packing, pack, unpack
    from .qkv import SPEC as QKV
    from .qkv import qkv
    from .weight_gradient import SPEC as WEIGHT_GRADIENT
    from .weight_gradient import weight_gradient

    SPECS = (
        ATTENTION, ATTENTION_BACKWARD, LAYER_NORM, LAYER_NORM_BACKWARD, GELU, DROPOUT, LINEAR,
        WEIGHT_GRADIENT, GELU_GRADIENT, QKV, EMBEDDING, PACK, UNPACK,
    )  # fmt: skip

__all__ = [
    "SPECS", "Packing", "attention", "attention_backward", "backend", "dropout", "embedding",
    "gelu", "gelu_gradient", "layer_norm", "layer_norm_backward", "linear", "missing", "pack",
    "qkv", "unpack", "weight_gradient",
]
