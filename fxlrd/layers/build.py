"""A layer and its low-rank forms as stock ``torch.nn`` modules.

    Linear, 1×1 conv   svd      first (R) → last
    k×k conv           tucker2  first (1×1, r1) → core (k×k, r2) → last (1×1)

and in the same way for convs of one and three dimensions. Whatever the ranks, everything but the weight is carried over
exactly. Padding of any mode stays with the kernel: it commutes with the 1×1 convs before and after (``first`` has no
bias, so zeros stay zeros). The stride of a 1×1 conv goes to ``first``, where it saves the most, and the bias goes to
the last factor. A grouped conv has one form per group, run as grouped convs. Of a transposed conv, the core is
transposed, or ``last`` if the kernel is 1×1: what comes before runs at the low resolution.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.factor.failures import check_finite
from fxlrd.factor.svd import svd
from fxlrd.factor.tucker import Triple, tucker2
from fxlrd.factor.whiten import whitened_svd, whitened_tucker2
from fxlrd.layers.fit import Fit, roots
from fxlrd.layers.forms import Ranks, form, full_ranks
from fxlrd.layers.kinds import (
    CONVS,
    ConvOrLinear,
    as_layer,
    channels_per_group,
    kernel_options,
    kernel_share,
    spatial_dims,
    stock_type,
)
from fxlrd.layers.weights import empty_conv, fill, from_blocks, weight_blocks


def decomposed(module: nn.Module, ranks: Ranks, sweeps: int = 1, fit: Fit | None = None) -> tuple[nn.Sequential, float]:
    """Return the layer's form at ``ranks`` and its relative error: of the weight, or with ``fit`` of the output.

    With ``fit`` the factors minimise the error of the layer's output for these moments (fxlrd/factor/whiten.py) and the
    bias of the last one restores the mean output. The error is about the mean, and weighted by importance. At full rank
    the form is that of the weight, whatever the fit. ``sweeps`` are those of `tucker2`, without ``fit``. Raises
    NotFiniteError for factors that are not finite, as those of a weight near the end of its dtype's range may be.
    """
    factors, error = _decomposed(module, ranks, sweeps, fit)
    check_finite(*(p.detach() for p in factors.parameters()))
    return factors, error


def _decomposed(module: nn.Module, ranks: Ranks, sweeps: int, fit: Fit | None) -> tuple[nn.Sequential, float]:
    if fit is not None and ranks != full_ranks(module):
        return _fitted(as_layer(module), ranks, fit)
    weight = weight_blocks(module)
    if form(module) == "svd":
        first, last, error = svd(weight.flatten(2), _svd_rank(ranks))
        factors = [first, last]
        del first, last
        return _assemble(as_layer(module), ranks, factors), error
    r1, r2 = ranks
    triple = tucker2(weight, r1, r2, sweeps)
    return _assemble(as_layer(module), ranks, _factors(triple)), triple.error


def _fitted(module: ConvOrLinear, ranks: Ranks, fit: Fit) -> tuple[nn.Sequential, float]:
    weight = weight_blocks(module)
    input_root, output_root = roots(module, fit)
    if form(module) == "svd":
        pair = whitened_svd(weight.flatten(2), _svd_rank(ranks), input_root, output_root)
        return with_mean_output(module, pair.first, pair.last, fit), pair.error
    r1, r2 = ranks
    triple = whitened_tucker2(weight, r1, r2, input_root, output_root, fit.regularised_patches)
    product = triple.core
    if triple.first is not None:
        product = torch.einsum("gor...,grc->goc...", product, triple.first)
    if triple.last is not None:
        product = torch.einsum("gso,goc...->gsc...", triple.last, product)
    return _assemble(module, ranks, _factors(triple), _bias(module, product, fit)), triple.error


def with_mean_output(module: nn.Module, first: Tensor, last: Tensor, fit: Fit) -> nn.Sequential:
    """Return the SVD form of factors (G, R, C) and (G, S, R), with the bias that restores the mean output."""
    weight = weight_blocks(module)
    product = torch.einsum("gsr,grc->gsc", last, first).unflatten(2, weight.shape[2:])
    return _assemble(as_layer(module), (first.shape[1],), [first, last], _bias(as_layer(module), product, fit))


def _bias(module: ConvOrLinear, product: Tensor, fit: Fit) -> Tensor:
    """Return the bias with which factors of this product restore the mean output."""
    bias = _mean_output(module, weight_blocks(module).double() - product, fit)
    return bias if module.bias is None else bias + module.bias.detach().double()


def _mean_output(module: ConvOrLinear, weight: Tensor, fit: Fit) -> Tensor:
    """Return the mean output (S) of a layer like ``module`` with this weight (G, S/G, C/G, k…) and no bias."""
    if fit.patch_mean is not None:
        return (weight.flatten(2) @ fit.patch_mean).flatten()
    taps = weight.reshape(*weight.shape[:3], -1).sum(3) * kernel_share(module)
    return (taps @ fit.mean.unflatten(0, (len(weight), -1))[..., None]).flatten()


def _svd_rank(ranks: Ranks) -> int:
    (rank,) = ranks
    assert rank is not None
    return rank


def _factors(triple: Triple) -> list[Tensor]:
    return [factor for factor in (triple.first, triple.core, triple.last) if factor is not None]


def skeleton(module: nn.Module, ranks: Ranks) -> nn.Sequential:
    """Return the layer's form at ``ranks`` with arbitrary weights, for timing."""
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


def _assemble(module: ConvOrLinear, ranks: Ranks, factors: list[Tensor], bias: Tensor | None = None) -> nn.Sequential:
    """Wrap factors, each (G, out, in[, k…]), into modules that do what the layer does.

    ``bias`` takes the place of the layer's own. The list is emptied, so that no factor stays in memory beside its copy.
    """
    if bias is None and module.bias is not None:
        bias = module.bias.detach().clone()
    roles = _roles(module, ranks)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    assert len(roles) == len(factors)
    for role in roles:
        part = _empty(module, role, factors[0], bias is not None and role == roles[-1])
        fill(part, from_blocks(part, factors.pop(0)), like=module)
        parts[role] = part
    if bias is not None:
        like = module.weight if module.bias is None else module.bias
        part.bias = nn.Parameter(bias.to(like.dtype), like.requires_grad)
    return nn.Sequential(parts).train(module.training)


def _roles(module: nn.Module, ranks: Ranks) -> list[str]:
    if form(module) == "svd":
        return ["first", "last"]
    return [*(["first"] if ranks[0] else []), "core", *(["last"] if ranks[1] else [])]


def _empty(module: ConvOrLinear, role: str, factor: Tensor, bias: bool) -> ConvOrLinear:
    """Return the module of one factor, its tensors on the meta device."""
    if isinstance(module, nn.Linear):
        return nn.Linear(factor.shape[2], factor.shape[1], bias=bias, device="meta")
    spatial = "core" if form(module) == "tucker2" else "last" if module.transposed else "first"
    if role == spatial:
        return empty_conv(stock_type(module), factor, bias, kernel_options(module))
    dims = spatial_dims(module)
    return empty_conv(CONVS[dims - 1], factor, bias, {"kernel_size": (1,) * dims})
