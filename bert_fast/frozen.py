"""Weights that will no longer be written to, with a copy in oneDNN's own layout.

oneDNN converts a weight to that layout at every product, which takes half the time of a product
with few rows. On a CPU with AVX-512, without gradients, products of 7 to 16 tokens take half to two
thirds of the time, those of 128 tokens 0.95 of it. Without AVX-512 only inputs of up to FEW tokens
(linear.py) run on the copy, at 0.6 to 1.0 of the time. For 16-bit dtypes without CPU instructions
the copy is in fp32, which saves converting the weight at each product of any size.

A change of the weights is noticed where PyTorch counts it (load_state_dict, `.to()`, any in-place
operation on a parameter), and the copy is remade. Writes through `.data` are not counted, nor are
steps of fused optimizers. So a forward with gradients, which precedes such a step, drops copies
too; none are made while weights have a gradient; and a call of the stock forward drops them, as
when adapters are attached. Other writes through `.data` go unnoticed, so this is only on request:
accelerate(model, frozen=True).
"""

import torch
from torch import nn

from .kernels.linear import prepack, takes_prepacked

NAME = "_bert_fast_prepacked"  # attribute of a Linear that holds its Prepacked


class Prepacked:
    """The weight of a Linear, or those of several stacked, in oneDNN's layout."""

    def __init__(self):
        # What the copy was made from, the copy, and the weights: while their memory is kept alive,
        # no other weight can have their addresses.
        self.drop()

    def drop(self):
        self._kept = (None, None, None)

    def __reduce__(self):  # copied and loaded models start without
        return Prepacked, ()

    def of(self, weights):
        state = [(w.data_ptr(), w._version, w.dtype) for w in weights]
        made_of, packed, _ = self._kept
        if made_of != state:
            parts = [w.detach() for w in weights]
            packed = prepack(torch.cat(parts))
            self._kept = (state, packed, parts)
        return packed


def prepacked(linears, x):
    """The weights of Linears in oneDNN's layout, for a product with x [T, K]; None if they are not
    frozen, oneDNN does not compute this product, or gradients may be requested."""
    kept = linears[0].__dict__.get(NAME)
    if kept is None or torch.compiler.is_compiling():
        return None
    weights = [m.weight for m in linears]
    trains = torch.is_grad_enabled() or any(w.grad is not None for w in weights)
    if x.device.type != "cpu" or trains:  # an optimizer step may follow
        kept.drop()
        return None
    if torch.is_autocast_enabled("cpu") or not takes_prepacked(x):
        return None
    if any(w.is_inference() for w in weights):  # writes to these are not counted
        return None
    return kept.of(weights)


def turn(model, on):
    """Freeze or unfreeze the weights of an encoder. Returns whether that changes anything."""
    changed = on != is_frozen(model)
    if changed:
        model.__dict__.pop(NAME, None)
        if on:
            model.__dict__[NAME] = True
        for m in model.modules():
            if type(m) is nn.Linear:
                m.__dict__.pop(NAME, None)
                if on:
                    m.__dict__[NAME] = Prepacked()
    return changed


def is_frozen(model):
    return NAME in model.__dict__


def drop_copies(model):
    """Drop the copies of an encoder's weights; they are remade when needed."""
    if is_frozen(model):
        for m in model.modules():
            if m is not model and NAME in m.__dict__:
                m.__dict__[NAME].drop()
