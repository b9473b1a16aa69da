"""A layer and its low-rank forms as stock ``torch.nn`` modules.

    Linear, 1×1 conv   svd      first (R) → last
    k×k conv           tucker2  first (1×1, r1) → core (k×k, r2) → last (1×1)

and so for convs of one and three dimensions. Exact, whatever the ranks, about everything but the weight: padding of
any mode stays where it commutes with the 1×1 convs around it (``first`` has no bias, so zeros stay zeros), a 1×1
conv's stride goes to ``first``, where it saves the most, and the bias goes to the last factor. A grouped conv has one
such form per group, run as grouped convs. Of a transposed conv the core is transposed or, where its kernel is 1×1,
``last``: all before it runs at the low resolution.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.factor.svd import svd
from fxlrd.factor.tucker import tucker2
from fxlrd.factor.whiten import whitened_svd, whitened_tucker2
from fxlrd.layers.fit import Fit, roots
from fxlrd.layers.forms import Ranks, form, full_ranks
from fxlrd.layers.kinds import (
    CONVS,
    TRANSPOSED,
    Conv,
    ConvOrLinear,
    as_layer,
    channels_per_group,
    kernel_options,
    kernel_share,
    spatial_dims,
    stock_type,
)


def decomposed(module: nn.Module, ranks: Ranks, sweeps: int = 1, fit: Fit | None = None) -> tuple[nn.Sequential, float]:
    """Return the layer's form at ``ranks`` and its relative error, of the weight.

    With ``fit`` the factors are those of the least error of the layer's output for these moments (fxlrd/factor/
    whiten.py), a bias makes up for what they change of its mean, and the error is that of the output, weighted by
    how much it matters, about the mean. At full rank that is the weight's form.
    """
    if fit is not None and ranks != full_ranks(module):
        return _fitted(as_layer(module), ranks, fit)
    weight = weight_blocks(module)
    if form(module) == "svd":
        (rank,) = ranks
        assert rank is not None
        pair = svd(weight.flatten(2), rank)
        return _assemble(as_layer(module), ranks, [pair.first, pair.last]), pair.error
    r1, r2 = ranks
    triple = tucker2(weight, r1, r2, sweeps)
    factors = [f for f in (triple.first, triple.core, triple.last) if f is not None]
    return _assemble(as_layer(module), ranks, factors), triple.error


def _fitted(module: ConvOrLinear, ranks: Ranks, fit: Fit) -> tuple[nn.Sequential, float]:
    weight = weight_blocks(module)
    reads, matters = roots(module, fit)
    if form(module) == "svd":
        (rank,) = ranks
        assert rank is not None
        pair = whitened_svd(weight.flatten(2), rank, reads, matters)
        factors, error = [pair.first, pair.last], pair.error
        product = torch.einsum("gsr,grc->gsc", pair.last, pair.first).unflatten(2, weight.shape[2:])
    else:
        r1, r2 = ranks
        triple = whitened_tucker2(weight, r1, r2, reads, matters, fit.patches, fit.patch_ridge)
        factors, error = [f for f in triple[:3] if f is not None], triple.error
        product = triple.core
        if triple.first is not None:
            product = torch.einsum("gor...,grc->goc...", product, triple.first)
        if triple.last is not None:
            product = torch.einsum("gso,goc...->gsc...", triple.last, product)
    # What is lost of the mean output: each output channel's own constant.
    lost = weight.double() - product
    if fit.patch_mean is not None:
        bias = lost.flatten(2) @ fit.patch_mean
    else:
        taps = lost.reshape(*lost.shape[:3], -1).sum(3) * kernel_share(module)
        bias = (taps @ fit.mean.unflatten(0, (len(weight), -1))[..., None])[..., 0]
    bias = bias.flatten() if module.bias is None else bias.flatten() + module.bias.detach().double()
    return _assemble(module, ranks, factors, bias), error


def skeleton(module: nn.Module, ranks: Ranks) -> nn.Sequential:
    """Return the layer's form at ``ranks`` with arbitrary weights: the same shapes, for timing."""
    c_in, c_out, groups = channels_per_group(module)
    weight = as_layer(module).weight
    if form(module) == "svd":
        (r,) = ranks
        shapes: list[tuple[Any, ...]] = [(groups, r, c_in), (groups, c_out, r)]
    else:
        r1, r2 = ranks
        shapes = [(groups, r1, c_in)] if r1 else []
        shapes.append((groups, r2 or c_out, r1 or c_in, *weight.shape[2:]))
        shapes += [(groups, c_out, r2)] if r2 else []
    factors = [torch.full(s, 1e-2, device=weight.device, dtype=weight.dtype) for s in shapes]
    return _assemble(as_layer(module), ranks, factors)


def resized(module: nn.Module, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> nn.Module:
    """Return a layer configured as ``module`` with other weights, whose shape sets its channel counts.

    The weights are cast to the module's dtype and memory format. ``groups`` defaults to the module's.
    """
    like = as_layer(module)
    new: ConvOrLinear
    if isinstance(like, nn.Linear):
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        factor = _as_blocks(weight, groups or like.groups, like.transposed)
        new = _conv(stock_type(like), factor, bias is not None, kernel_options(like))
    _fill(new, weight, like)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(like.weight.dtype), like.weight.requires_grad)
    return new.train(like.training)


def weight_blocks(module: nn.Module) -> Tensor:
    """Return the weight as (groups, S/G, C/G, k…), also that of a transposed conv."""
    return _as_blocks(as_layer(module).weight.detach(), channels_per_group(module)[2], isinstance(module, TRANSPOSED))


def from_blocks(module: nn.Module, factor: Tensor) -> Tensor:
    """Return blocks (groups, out, in, k…) as a weight of such a layer: the inverse of `weight_blocks`."""
    return (factor.transpose(1, 2) if isinstance(module, TRANSPOSED) else factor).flatten(0, 1)


def _as_blocks(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    parts = weight.unflatten(0, (groups, -1))
    return parts.transpose(1, 2) if transposed else parts  # (C, S/G, k…) is how a transposed conv keeps it


def _assemble(module: ConvOrLinear, ranks: Ranks, factors: list[Tensor], bias: Tensor | None = None) -> nn.Sequential:
    """Wrap factors, each (groups, out, in[, k…]), into modules that do what the layer did.

    ``bias`` takes the place of the layer's own.
    """
    like = module.weight if module.bias is None else module.bias
    given = module.bias.detach().clone() if bias is None and module.bias is not None else bias
    if isinstance(module, nn.Linear):
        roles = ["first", "last"]
        parts: list[ConvOrLinear] = [
            nn.Linear(f.shape[2], f.shape[1], bias=i == 1 and given is not None, device="meta")
            for i, f in enumerate(factors)
        ]
    else:
        if form(module) == "svd":
            roles, spatial = ["first", "last"], "last" if module.transposed else "first"
        else:
            roles = [*(["first"] if ranks[0] else []), "core", *(["last"] if ranks[1] else [])]
            spatial = "core"
        parts = []
        for role, f in zip(roles, factors, strict=True):
            kind, options = (stock_type(module), kernel_options(module)) if role == spatial else _pointwise(module)
            parts.append(_conv(kind, f, role == roles[-1] and given is not None, options))
    for part, f in zip(parts, factors, strict=True):
        _fill(part, from_blocks(part, f), like=module)
    if given is not None:
        parts[-1].bias = nn.Parameter(given.to(like.dtype), like.requires_grad)
    named: OrderedDict[str, nn.Module] = OrderedDict(zip(roles, parts, strict=True))
    return nn.Sequential(named).train(module.training)


def _pointwise(module: Conv) -> tuple[type[Any], dict[str, Any]]:
    return CONVS[spatial_dims(module) - 1], {"kernel_size": (1,) * spatial_dims(module)}


def _conv(kind: type[Any], factor: Tensor, bias: bool, options: dict[str, Any]) -> Conv:
    groups, c_out, c_in = factor.shape[:3]
    # On the meta device: no memory, and the global random state stays as it was.
    new = kind(c_in * groups, c_out * groups, groups=groups, bias=bias, device="meta", **options)
    assert isinstance(new, Conv)
    return new


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _fill(part: ConvOrLinear, weight: Tensor, like: ConvOrLinear) -> None:
    weight = weight.reshape(part.weight.shape).to(like.weight.dtype)
    given = like.weight
    layout = torch.contiguous_format if given.is_contiguous() else _CHANNELS_LAST.get(given.dim())
    # A copy, since contiguous() leaves the strides of a 1×1 kernel, by which torch would pick channels_last.
    weight = weight.clone(memory_format=layout or torch.contiguous_format)
    part.weight = nn.Parameter(weight, like.weight.requires_grad)
