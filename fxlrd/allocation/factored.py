"""The forms of a layer at several ranks, from one factorisation.

For an SVD, the singular vectors of the shorter side of the whitened weight do, with the root of that side's metric:

    M = Kᵀ·W·R,   M·Mᵀ = Kᵀ·(W·G·Wᵀ)·K,   Mᵀ·M = Rᵀ·(Wᵀ·Γ·W)·R
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxlrd.factor.whiten import Root
from fxlrd.graph.layer import Layer
from fxlrd.layers.build import decomposed, with_mean_output
from fxlrd.layers.fit import Fit, input_root, metrics, output_root
from fxlrd.layers.forms import Ranks, form
from fxlrd.layers.weights import weight_blocks


def whitened_gram(module: nn.Module, fit: Fit | None) -> Tensor:
    """Return M·Mᵀ or Mᵀ·M (G, n, n), that of the shorter side; without a fit, M is the weight."""
    weight = weight_blocks(module).double().flatten(2)
    inputs, outputs = (None, None) if fit is None else metrics(module, fit)
    if _makes_fewer(weight):
        small = (weight if inputs is None else weight @ inputs) @ weight.mT
    else:
        small = weight.mT @ (weight if outputs is None else outputs @ weight)
    root = _root_of_the_shorter_side(module, weight, fit)
    if root is not None:
        small = root.root.mT @ small @ root.root
    return (small + small.mT) / 2


def _makes_fewer(weight: Tensor) -> bool:
    return weight.shape[1] <= weight.shape[2]


def _root_of_the_shorter_side(module: nn.Module, weight: Tensor, fit: Fit | None) -> Root | None:
    """Return the root of this side's metric; None stands for the identity."""
    if _makes_fewer(weight):
        return None if fit is None or fit.importance is None else output_root(module, fit.importance)
    return None if fit is None else input_root(module, fit)


def fit_of(layer: Layer) -> Fit | None:
    """Return what calibration says that the layer's factors are fitted to."""
    return None if layer.statistics is None else layer.statistics.fit(layer.module)


_MOST = 2**26
"""Entries of all grams that are kept: 256 MB in float32."""


class Factored:
    """Makes forms of layers, and remembers the factorisation of the latest one: trials of one layer follow each other.

    They are what `fxlrd.layers.build.decomposed` makes but for their balance.

    Attributes:
        grams: what `whitened_gram` gives of layers, in any unit, by name, where that is known; each is used up.
    """

    def __init__(self) -> None:
        self.grams: dict[str, Tensor] = {}
        self._latest: tuple[Layer, Fit, Tensor, Root | None] | None = None

    def know(self, layer: Layer, gram: Tensor) -> None:
        """Keep a layer's gram until its forms are made, unless that is too much (`_MOST`)."""
        if gram.numel() + sum(each.numel() for each in self.grams.values()) <= _MOST:
            self.grams[layer.name] = gram

    def at(self, layer: Layer, ranks: Ranks) -> nn.Module:
        """Return the layer's form at ``ranks``."""
        if form(layer.module) != "svd" or layer.statistics is None:
            return decomposed(layer.module, ranks, 1, fit_of(layer))[0]
        if self._latest is None or self._latest[0] is not layer:
            fit = fit_of(layer)
            if fit is None:
                return decomposed(layer.module, ranks)[0]
            weight, audible = weight_blocks(layer.module).flatten(2), _audible(fit)
            small = self.grams.pop(layer.name, None)
            small = whitened_gram(layer.module, audible) if small is None else small.double()
            root = _root_of_the_shorter_side(layer.module, weight, audible)
            self._latest = layer, fit, torch.linalg.eigh(small)[1].flip(-1), root
        _, fit, basis, root = self._latest
        (rank,) = ranks
        return _svd_form(layer.module, fit, basis[..., :rank], root)


def _audible(fit: Fit) -> Fit:
    """Return the fit, without Γ where that is zero: then no change of the layer reaches the output."""
    silent = fit.importance is not None and not bool(fit.importance.any())
    return fit._replace(importance=None) if silent else fit


def _svd_form(module: nn.Module, fit: Fit, basis: Tensor, root: Root | None) -> nn.Sequential:
    weight = weight_blocks(module).double().flatten(2)
    if _makes_fewer(weight):  # W' = K⁻ᵀ·Q·Qᵀ·Kᵀ·W
        first, last = basis.mT, basis
        if root is not None:
            first, last = first @ root.root.mT, root.inverse.mT @ last
        return with_mean_output(module, first @ weight, last, fit)
    assert root is not None  # there is a fit
    return with_mean_output(  # W' = W·R·Q·Qᵀ·R⁻¹
        module, basis.mT @ root.inverse, weight @ (root.root @ basis), fit
    )
