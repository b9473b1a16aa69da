"""Models around nn.MultiheadAttention, and inputs and masks for them."""

from __future__ import annotations

import torch
from torch import nn


def attention(**options):
    """Return an attention of 8 channels and 2 heads with random weights and biases."""
    generator = torch.Generator().manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **options).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return module


def values(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A transformer block that can be traced: batch first, with masks."""

    def __init__(self, **options):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8).double(), attention(batch_first=True, **options)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double()

    def forward(self, x, mask=None, padding=None):
        h = self.norm(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask, key_padding_mask=padding)[0]
        return x + self.mlp(x)


class Branching(Block):
    """The same, which cannot be traced as a whole."""

    def forward(self, x, mask=None, padding=None):
        if x.sum() > 1e9:
            x = x * 2
        return super().forward(x, mask, padding)


class Cross(nn.Module):
    """Cross attention, positions first, other widths of keys and values; called twice, with weights."""

    def __init__(self):
        super().__init__()
        self.fc, self.attn = nn.Linear(8, 8).double(), attention(kdim=6, vdim=4)

    def forward(self, query, key, value):
        x, mean = self.attn(self.fc(query), key, value)
        y, each = self.attn(x, key, value=value, average_attn_weights=False)
        return y, mean, each


X = values(2, 5, 8)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
MASKS = {
    "none": (),
    "causal": (CAUSAL,),
    "both": (CAUSAL, PADDING),
    "floats": (values(5, 5, seed=4), PADDING.double()),
    "heads": (CAUSAL.expand(4, 5, 5),),
    "padding": (None, PADDING),
}
CROSS = (values(5, 2, 8), values(7, 2, 6, seed=1), values(7, 2, 4, seed=2))
"""Inputs of a `Cross`."""
