"""Second moments, and the weights that factors stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from fxlrd.factor.svd import Pair
from fxlrd.factor.tucker import Triple


def second_moments(x: Tensor) -> Tensor:
    """Return E[x·xᵀ] (C, C) of samples (N, C)."""
    return x.mT @ x / len(x)


def mixed(samples: int, sources: int, channels: int) -> Tensor:
    """Return samples of channels that are linear functions of ``sources`` of them."""
    return torch.randn(samples, sources).double() @ torch.randn(sources, channels).double()


def decaying(samples: int, channels: int) -> Tensor:
    """Return samples of correlated channels, each direction of less variance than the one before."""
    scale = 1 / torch.arange(1, channels + 1).double()
    return torch.randn(samples, channels).double() * scale @ torch.randn(channels, channels).double()


def svd_product(pair: Pair) -> Tensor:
    """Return last · first, in float64."""
    return pair.last.double() @ pair.first.double()


def tucker_product(triple: Triple) -> Tensor:
    """Return the weight (G, S, C, k…) of a Tucker-2 form, in float64."""
    weight = triple.core.double()
    if triple.first is not None:
        weight = torch.einsum("gor...,grc->goc...", weight, triple.first.double())
    if triple.last is not None:
        weight = torch.einsum("goc...,gso->gsc...", weight, triple.last.double())
    return weight
