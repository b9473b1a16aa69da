"""The least squares fit of one layer to outputs that it should give, for `refit`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from fxlrd.calibration.padding import at_tokens
from fxlrd.calibration.patches import patches, stride_for
from fxlrd.errors import Reason
from fxlrd.factor.failures import check_finite
from fxlrd.factor.ridge import with_ridge
from fxlrd.graph.facts import retained_channels, shape
from fxlrd.graph.guards import hooked
from fxlrd.graph.surgery import calls
from fxlrd.layers.fit import Moments
from fxlrd.layers.kinds import BATCH_NORMS, CONVS, as_layer, channel_axis
from fxlrd.layers.weights import resized

NOT_FINITE = Reason("not-finite", "the calibration inputs give NaN or Inf there")
CALLED_AGAIN = Reason("called-again", "it is called more than once")

ROWS, FEW = 32, 16384
"""Rows used per batch: all if at most `FEW`; otherwise about `ROWS` × fan-in, evenly strided."""


class LeastSquares:
    """Sums over pairs of z, which a layer reads, and y, what it should make of that.

    Args:
        gm: the graph that has the layer.
        call: the layer's one call in it. Where the layer makes some of an original layer's channels only, y has all.
        ridge: ρ, relative to the mean variance of z.
    """

    def __init__(self, gm: fx.GraphModule, call: fx.Node, ridge: float) -> None:
        self.gm, self.target, self.ridge = gm, str(call.target), ridge
        self.module = gm.get_submodule(self.target)
        self.retained = retained_channels(call)
        self.norm = _norm_after(gm, call)
        self.weight = as_layer(self.module).weight.detach().double().flatten(1)
        count, width = self.weight.shape
        self.read = Moments.empty(width, self.weight.device)
        self.cross, self.total = self.weight.new_zeros(count, width), self.weight.new_zeros(count)

    def add(self, z: Tensor, y: Tensor, tokens: Tensor | None) -> None:
        """Add the positions of one batch that hold ``tokens``, see `ROWS`."""
        count, width = self.weight.shape
        if not isinstance(self.module, CONVS):
            z, y = at_tokens(z, tokens), at_tokens(y, tokens)
        made = y.movedim(channel_axis(self.module, y.dim()), -1)
        made = (made if self.retained is None else made[..., self.retained]).reshape(-1, count)
        most = max(ROWS * width, FEW)
        rows, made = _rows(self.module, z, most), made[:: stride_for(len(made), most)].double()
        self.read.add(rows)
        self.cross.addmm_(made.mT, rows)
        self.total += made.sum(0)

    def modules(self) -> dict[str, nn.Module] | None:
        """Return what is to be put into the graph, by name; None where values are not finite.

        That is the fitted layer or, if it has no bias and a BatchNorm reads it, that too, which takes the constant.
        """
        has_bias = as_layer(self.module).bias is not None
        solved = self._solved(has_bias or self.norm is not None)
        if solved is None:
            return None
        weight, bias = solved
        made = {self.target: resized(self.module, weight, bias if has_bias else None).eval()}
        if self.norm is not None and not has_bias:
            made[self.norm] = _shifted(self.gm.get_submodule(self.norm), bias)
        return made

    def _solved(self, constant: bool) -> tuple[Tensor, Tensor] | None:
        """Return weight and bias, or None where values are not finite.

        Without a ``constant`` the bias is zero: budgets count parameters, so that a layer gets no bias that had none.
        """
        read, weight = self.read, self.weight
        mean = self.total / max(read.count, 1)
        inner, cross = read.second, self.cross / max(read.count, 1)
        if constant:
            inner, cross = read.covariance, cross - torch.outer(mean, read.mean)
        if not bool(inner.isfinite().all() and cross.isfinite().all()):
            return None
        scale = inner.diagonal().mean() * self.ridge
        if not scale > 0:
            return None
        wanted = (cross - weight @ inner).mT
        regularised = with_ridge(inner, read.ridge)
        regularised.diagonal().add_(scale)
        change = torch.cholesky_solve(wanted, torch.linalg.cholesky(regularised)).mT
        weight = weight + change
        bias = (mean - weight @ read.mean) * constant
        check_finite(weight, bias)
        return weight.view_as(as_layer(self.module).weight), bias


def _norm_after(gm: fx.GraphModule, call: fx.Node) -> str | None:
    """Return the name of the BatchNorm that alone reads a layer's output, if its statistics may be changed."""
    user = next(iter(call.users))
    sizes, layer = shape(call), gm.get_submodule(str(call.target))
    if sizes is None or channel_axis(layer, len(sizes)) % len(sizes) != 1:  # a BatchNorm counts along that one
        return None
    if len(call.users) != 1 or user.op != "call_module" or len(calls(gm, str(user.target))) != 1:
        return None
    module = gm.get_submodule(str(user.target))
    statistics = type(module) in BATCH_NORMS and module.running_mean is not None and not hooked(module)
    return str(user.target) if statistics else None


def _shifted(norm: nn.Module, constant: Tensor) -> nn.Module:
    """Return a copy of a BatchNorm that computes norm(x + constant) in eval mode."""
    new = copy.deepcopy(norm)
    new.running_mean = norm.running_mean - constant.to(norm.running_mean)  # type: ignore[operator, arg-type]
    return new


def _rows(module: nn.Module, x: Tensor, most: int) -> Tensor:
    """Return what the layer's outputs are computed from, one row a position; about ``most`` of more rows."""
    if isinstance(module, CONVS):
        return patches(module, x, most)
    rows = x.reshape(-1, x.shape[-1])
    return rows[:: stride_for(len(rows), most)].double()
