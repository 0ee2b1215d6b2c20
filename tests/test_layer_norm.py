"""LayerNorm of rows of which rounding would leave nothing but an error."""

import pytest
import torch
from test_linear import DEVICE

from bert_fast.kernels import embedding, layer_norm, layer_norm_backward

ROWS = [(c, N) for c in (0.1, 3.3, 100.3) for N in (3, 100, 768, 1024)]


@pytest.mark.parametrize("c, N", ROWS)
def test_rows_of_equal_numbers_become_the_bias(c, N):
    """The error of their mean, over its own size, would be as large as any other row."""
    bias = torch.randn(N, device=DEVICE)
    weight = torch.ones_like(bias)
    x = torch.full((2, N), c, device=DEVICE)
    torch.testing.assert_close(layer_norm(x, weight, bias), bias.expand(2, N), rtol=0, atol=1e-6)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    y = embedding(ids, x, torch.zeros_like(x), torch.zeros_like(x), weight, bias)
    torch.testing.assert_close(y.view(2, N), bias.expand(2, N), rtol=0, atol=1e-6)


@pytest.mark.parametrize("c, N", ROWS)
def test_gradients_of_rows_of_equal_numbers(c, N):
    x = torch.full((2, N), c, device=DEVICE)
    dy, weight = torch.randn_like(x), torch.randn(N, device=DEVICE)
    ours = layer_norm_backward(dy, x, weight)
    g = dy.double() * weight.double()
    dx = (g - g.mean(-1, keepdim=True)) * 1e6  # 1 / sqrt(eps)
    torch.testing.assert_close(ours.dx.double(), dx, rtol=1e-5, atol=1.0)
    torch.testing.assert_close(ours.dweight, torch.zeros(N, device=DEVICE), rtol=0, atol=1e-5)
