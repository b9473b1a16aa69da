"""The weight of a layer: as blocks by group, and in a new layer that is configured like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.layers.kinds import (
    TRANSPOSED,
    Conv,
    ConvOrLinear,
    as_layer,
    channels_per_group,
    kernel_options,
    make,
    stock_type,
)


def resized(module: nn.Module, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> nn.Module:
    """Return a layer configured as ``module`` with other weights, whose shape sets its channel counts.

    The weights are cast to the module's dtype and memory format. ``groups`` defaults to the module's.
    """
    like = as_layer(module)
    new: ConvOrLinear
    if isinstance(like, nn.Linear):
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        factor = as_blocks(weight, groups or like.groups, like.transposed)
        new = empty_conv(stock_type(like), factor, bias is not None, kernel_options(like))
    fill(new, weight, like)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(like.weight.dtype), like.weight.requires_grad)
    return new.train(like.training)


def weight_blocks(module: nn.Module) -> Tensor:
    """Return the weight as (G, S/G, C/G, k…), also that of a transposed conv."""
    return as_blocks(as_layer(module).weight.detach(), channels_per_group(module)[2], isinstance(module, TRANSPOSED))


def from_blocks(module: nn.Module, factor: Tensor) -> Tensor:
    """Return blocks (G, out, in, k…) as a weight of such a layer: the inverse of `weight_blocks`."""
    return (factor.transpose(1, 2) if isinstance(module, TRANSPOSED) else factor).flatten(0, 1)


def as_blocks(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Return a weight (S, C/G, k…), or (C, S/G, k…) of a transposed conv, as (G, S/G, C/G, k…)."""
    parts = weight.unflatten(0, (groups, -1))
    return parts.transpose(1, 2) if transposed else parts  # (C, S/G, k…) is how a transposed conv keeps it


def empty_conv(kind: type[nn.Module], factor: Tensor, bias: bool, options: Mapping[str, Any]) -> Conv:
    """Return a conv for a factor (G, out, in[, k…]), its tensors on the meta device."""
    groups, c_out, c_in = factor.shape[:3]
    channels = {"in_channels": c_in * groups, "out_channels": c_out * groups, "groups": groups, "bias": bias}
    new = make(kind, {**channels, **options})
    assert isinstance(new, Conv)
    return new


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def fill(part: ConvOrLinear, weight: Tensor, like: ConvOrLinear) -> None:
    """Give a module its weight, in the dtype and memory format of the weight of ``like``."""
    memory_format = torch.contiguous_format
    if not like.weight.is_contiguous():
        memory_format = _CHANNELS_LAST.get(like.weight.dim(), memory_format)
    weight = weight.reshape(part.weight.shape).to(like.weight.dtype)
    # A copy, since contiguous() leaves the strides of a 1×1 kernel, by which torch would pick channels_last.
    part.weight = nn.Parameter(weight.clone(memory_format=memory_format), like.weight.requires_grad)
