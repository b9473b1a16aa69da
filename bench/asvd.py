"""Activation-scaled SVD (ASVD, Yuan et al. 2023, arXiv:2312.05821) of linear layers: a reference to compare with.

With s_i = (mean |x_i|)^α of a layer's inputs, W·diag(s) is cut by its SVD, and diag(s)⁻¹ goes into the first factor:

    W ≈ (U√Σ)·(√Σ Vᵀ diag(s)⁻¹)

so that input channels of large activations lose least. All layers have the same ratio here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd.graph.facts import provenance

ALPHA = 0.5
"""The paper's choice."""


@torch.no_grad()
def mean_magnitudes(layers: Mapping[str, nn.Linear], run: Callable[[], object]) -> dict[str, Tensor]:
    """Return the mean |x_i| of each layer's inputs while ``run`` runs, by name; of those that it reaches."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2).abs().double()
        sums[name] = sums.get(name, 0) + x.sum(0)
        rows[name] = rows.get(name, 0) + len(x)

    handles = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / rows[name] for name, total in sums.items()}


def scaled_svd(weight: Tensor, magnitudes: Tensor, rank: int, alpha: float = ALPHA) -> tuple[Tensor, Tensor]:
    """Return the factors (rank×in) and (out×rank) of a weight (out×in), cut with its inputs' magnitudes (in)."""
    scale = magnitudes.double().pow(alpha)
    scale = scale.clamp_min(1e-6 * scale.max().clamp_min(1e-30))  # a channel that is always 0 can be anything
    u, sigma, v = torch.linalg.svd(weight.double() * scale, full_matrices=False)
    root = sigma[:rank].sqrt()
    return (root[:, None] * v[:rank] / scale).to(weight.dtype), (u[:, :rank] * root).to(weight.dtype)


@torch.no_grad()
def refactor(gm: fx.GraphModule, magnitudes: Mapping[str, Tensor], alpha: float = ALPHA) -> None:
    """Put activation-scaled factors in place of those of a graph module that `decompose` made, at their ranks.

    Raises KeyError for a layer without magnitudes.
    """
    factors: dict[str, dict[str, nn.Linear]] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        origin = provenance(node)
        if origin is not None and origin.role in ("first", "last") and isinstance(origin.original, nn.Linear):
            factors.setdefault(origin.name, {"original": origin.original})[origin.role] = gm.get_submodule(node.target)
    for name, own in factors.items():
        rank = own["first"].out_features
        first, last = scaled_svd(own["original"].weight, magnitudes[name], rank, alpha)
        own["first"].weight.copy_(first)
        own["last"].weight.copy_(last)
