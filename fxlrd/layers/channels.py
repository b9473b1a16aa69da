"""The error of a layer's form by output channel: what one norm over all channels hides."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fxlrd.factor.basis import working
from fxlrd.layers.fit import Fit
from fxlrd.layers.kinds import channels_per_group
from fxlrd.layers.weights import weight_blocks

_ENTRIES = 2**22
"""Entries of a product that are in memory at once."""


def channel_error(module: nn.Module, factors: nn.Sequential, fit: Fit | None = None) -> float:
    """Return the largest relative error of an output channel: of its weights, or with ``fit`` of its values.

    The latter are about their mean. Where ``fit`` has no moments of patches, kernel positions count as uncorrelated. A
    channel that is always zero has no relative error.
    """
    weight, (inner, last) = _kernels(module), _product(factors)
    rows = max(1, _ENTRIES // max(1, math.prod(weight.shape[2:])))
    largest = 0.0
    for start in range(0, weight.shape[1], rows):
        block = weight[:, start : start + rows]
        product = inner[:, start : start + rows]
        if last is not None:
            product = torch.einsum("gsr,grck->gsck", last[:, start : start + rows], inner)
        norms = _norms(block, module, fit)
        shares = _norms(block - product, module, fit) / norms
        largest = max(largest, float(torch.where(norms > 0, shares, torch.zeros_like(shares)).max()))
    return largest


def _kernels(module: nn.Module) -> Tensor:
    """Return the weight as (G, S/G, C/G, K)."""
    weight = working(weight_blocks(module))
    return weight.reshape(*weight.shape[:3], math.prod(weight.shape[3:]))


def _product(factors: nn.Sequential) -> tuple[Tensor, Tensor | None]:
    """Return the product (G, R, C/G, K) of all factors up to the last one, and that (G, S/G, R); None for a core."""
    first, *others = [_kernels(part) for part in factors.children()]
    product = first
    for each in others:
        if each is others[-1] and each.shape[3] == 1:
            return product, each[..., 0]
        if product.shape[3] == 1:
            product = torch.einsum("gsrk,grc->gsck", each, product[..., 0])
    return product, None


def _norms(weight: Tensor, module: nn.Module, fit: Fit | None) -> Tensor:
    """Return the size (G, S/G) of what each row of a weight (G, S/G, C/G, K) makes."""
    weight = weight.double()  # squares stay within range
    if fit is None:
        return torch.linalg.vector_norm(weight, dim=(2, 3))
    if fit.patch_covariance is not None:
        rows = weight.flatten(2)
        return ((rows @ fit.patch_covariance) * rows).sum(2).clamp_min(0).sqrt()
    groups = channels_per_group(module)[2]
    blocks = fit.covariance.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).diagonal(dim1=0, dim2=2)
    moved = torch.einsum("gsck,cdg->gsdk", weight, blocks)
    return (moved * weight).sum((2, 3)).clamp_min(0).sqrt()
