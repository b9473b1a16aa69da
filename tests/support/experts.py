"""A mixture of experts whose weights are tensors of three dimensions, as in transformers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class ExpertWeights(nn.Module):
    """Four experts of 8 features and 12 units each."""

    def __init__(self, gathered):
        super().__init__()
        self.gathered = gathered
        generator = torch.Generator().manual_seed(0)
        self.gate_up = nn.Parameter(torch.randn(4, 24, 8, generator=generator))
        self.down = nn.Parameter(torch.randn(4, 8, 12, generator=generator))

    def forward(self, x, chosen):
        if self.gathered:  # the matrices of each row's expert
            gate, up = torch.bmm(self.gate_up[chosen], x[..., None]).squeeze(-1).chunk(2, dim=-1)
            return torch.bmm(self.down[chosen], (F.silu(gate) * up)[..., None]).squeeze(-1)
        output = torch.zeros_like(x)
        for expert in chosen.unique():
            rows = torch.where(chosen == expert)[0]
            gate, up = F.linear(x[rows], self.gate_up[expert]).chunk(2, dim=-1)
            output.index_add_(0, rows, F.linear(F.silu(gate) * up, self.down[expert]))
        return output


class Experts(nn.Module):
    """Rows of 8 features: a linear layer, then for each row the best of four experts."""

    def __init__(self, gathered=False):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.fc = nn.Linear(8, 8)
        self.router = nn.Parameter(torch.randn(4, 8, generator=generator))
        self.experts = ExpertWeights(gathered)
        self.eval()

    def forward(self, x):
        x = self.fc(x)
        scores = F.linear(x, self.router).softmax(-1)
        weight, chosen = scores.max(-1)
        return x + weight[:, None] * self.experts(x, chosen)
