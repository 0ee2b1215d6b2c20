"""Checkpoints that need no download: the small trained one that ships, and outlier models.

Trained BERTs have a few hidden dimensions whose values are tens of times those of the rest, in
every layer and for nearly every token, held there by the LayerNorms' weights and biases (Kovaleva
et al., BERT Busters: Outlier Dimensions that Disrupt Transformers, 2021; Dettmers et al.,
LLM.int8(), 2022). They dominate the row statistics and the range of low precision, so a model with
freshly initialised weights tests neither. `outlier_model` has random weights and the
outliers.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

SHIPPED = Path(__file__).with_name("checkpoint")  # written by training/train.py


@torch.no_grad()
def outlier_model(config=None, seed=0, outliers=4):
    """A transformers.BertModel in eval mode, in fp32, finite in fp16 too.

    In the output of each layer, `outliers` of the hidden dimensions have an RMS over tokens of 25
    to 45 times that of the rest, each with one sign and a size that varies from token to token;
    after attention it is a third of that. Heads range from nearly flat to peaked.

    config: any BertConfig with more than `outliers` hidden dimensions; BERT-base by default.
    """
    config = config or BertConfig()
    if not 0 < outliers < config.hidden_size:
        raise ValueError(
            f"outlier_model: outliers must be in 1..{config.hidden_size - 1}, got {outliers}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config).eval()
        dims = torch.randperm(config.hidden_size)[:outliers]
        ratio = torch.empty(outliers).uniform_(25, 45) * (torch.randint(2, (outliers,)) * 2 - 1)
        _draw_weights(model, dims, ratio.sign())
        _fit(model, dims, ratio)
    return model


def _draw_weights(model, dims, sign):
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.normal_(0, 0.55 * module.in_features**-0.5)  # BERT's 0.02 at 768
            module.bias.normal_(0, 0.05)
            if module.in_features == model.config.hidden_size:
                module.weight[:, dims] /= 16  # else what tokens share drowns their differences
        elif isinstance(module, torch.nn.LayerNorm):
            module.weight.normal_(0.85, 0.05)
            module.bias.normal_(0, 0.05)
    words = model.embeddings.word_embeddings.weight  # [V, H]
    words[:, dims] = 8 * words.std() * sign * torch.empty(len(words), len(dims)).normal_(1, 0.25)


def _fit(model, dims, ratio):
    """Set LayerNorms, attention's scale and the outliers' share of the FFN in one forward pass.

    Each hook adjusts its module before the pass goes on, so what follows sees the new values.
    """
    config = model.config
    heads = config.num_attention_heads
    rest = torch.ones(config.hidden_size, dtype=torch.bool)
    rest[dims] = False

    def fit_projection(linear, _, out):
        """Scale query and key so that a head's logits have a spread of 0.8 to 3.2 over keys.

        The outliers are constant over tokens and shift all keys alike; that part is disregarded.
        """
        per_head = out.flatten(0, 1).unflatten(-1, (heads, -1))  # [T, heads, D]
        if linear in keys:
            spread, wanted = (per_head - per_head.mean(0)).square(), torch.ones(heads)
        else:
            spread, wanted = per_head.square(), 0.8 * 4 ** torch.rand(heads)
        gain = (wanted / spread.mean((0, 2)).sqrt()).repeat_interleave(per_head.shape[-1])
        linear.weight *= gain[:, None]
        linear.bias *= gain
        return out * gain

    def fit_ffn(linear, _, out):
        """Let what the FFN adds to the outliers vary by a quarter of what it is added to."""
        mean, std = out[..., dims].mean((0, 1)), out[..., dims].std((0, 1))
        gain = after_attention[linear].abs() / 4 / std
        linear.weight[dims] *= gain[:, None]
        linear.bias[dims] = (linear.bias[dims] - mean) * gain
        out[..., dims] = (out[..., dims] - mean) * gain

    def fit_norm(norm, args):
        x_hat = F.layer_norm(args[0], args[0].shape[-1:], eps=norm.eps).flatten(0, 1)
        plain = (x_hat * norm.weight + norm.bias)[:, rest].square().mean().sqrt()
        wanted = ratio * plain
        if norm in ffn_after:
            wanted = after_attention[ffn_after[norm]] = wanted / 3
        norm.weight[dims] = 0.7 * wanted / x_hat[:, dims].mean(0)
        norm.bias[dims] = 0.3 * wanted

    layers = model.encoder.layer
    keys = {layer.attention.self.key for layer in layers}
    ffn_after = {layer.attention.output.LayerNorm: layer.output.dense for layer in layers}
    after_attention = {}  # {second linear of the FFN: the outliers where its output is added}
    hooks = [
        *(layer.attention.self.query.register_forward_hook(fit_projection) for layer in layers),
        *(key.register_forward_hook(fit_projection) for key in keys),
        *(layer.output.dense.register_forward_hook(fit_ffn) for layer in layers),
        *(
            module.register_forward_pre_hook(fit_norm)
            for module in model.modules()
            if isinstance(module, torch.nn.LayerNorm)
        ),
    ]
    model(torch.randint(config.vocab_size, (8, min(64, config.max_position_embeddings))))
    for hook in hooks:
        hook.remove()
