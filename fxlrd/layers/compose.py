"""Exact algebra on layers: composing affine neighbours, selecting channels, folding a matrix into a layer.

    scaled       y = g·(W·x + b) + h        →   W' = g·W,  b' = g·b + h
    composed     y = W₂·(W₁·x + b₁) + b₂    →   W' = W₂·W₁,  b' = W₂·b₁ + b₂
    fold_inputs  y = W·(T·x + t) + b        →   W' = W·T,  b' = W·t + b

Computed in float64. Every function returns a new module in the dtype of the old one; none is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxlrd.errors import Reason
from fxlrd.factor.products import half
from fxlrd.layers.kinds import BATCH_NORMS, as_layer, kernel_area
from fxlrd.layers.narrow import narrowed
from fxlrd.layers.weights import resized


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return (g, h) of a BatchNorm in eval mode, y = g·x + h for each channel, in float64."""
    assert isinstance(norm, BATCH_NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def unit_norm(norm: nn.Module, shift: Tensor) -> nn.Module:
    """Return a BatchNorm2d of unit statistics for x + shift, otherwise like ``norm``."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    new = nn.BatchNorm2d(len(shift), norm.eps, norm.momentum, device=shift.device, dtype=shift.dtype)
    assert new.running_var is not None
    with torch.no_grad():
        new.running_var.fill_(1 - norm.eps)
        new.bias.copy_(shift)
    return new.to(norm.running_mean.dtype).train(norm.training)


def scaled(module: nn.Module, scale: Tensor, shift: Tensor) -> nn.Module:
    """Return the layer followed by y = scale·x + shift on each output channel."""
    weight, bias = _double(module)
    weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    return resized(module, weight, bias * scale + shift)


def why_not_composable(first: nn.Module, second: nn.Module, shift: bool) -> Reason | None:
    """Return why ``second(first(x))`` is not one layer of fewer operations, or None.

    ``shift`` says whether the first layer adds a constant.
    """
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return None
    if not (isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)):
        return Reason("conv-linear", "a conv and a linear layer do not compose")
    if first.groups > 1 or second.groups > 1:
        return Reason("grouped", "grouped convs do not compose into one of fewer operations")
    if kernel_area(second) == 1:
        if first.padding == "same" and second.stride != (1, 1):
            return Reason("same-padding", "a conv with padding='same' takes no stride")
        return Reason("own-padding", "the second, a 1×1 conv, pads between the two") if _pads(second) else None
    if kernel_area(first) > 1:
        return Reason("larger-kernel", "two k×k convs compose into one of a larger kernel")
    if first.stride != (1, 1) or _pads(first):
        return Reason("own-stride", "the 1×1 conv has a stride or padding of its own")
    if shift and _pads(second) and second.padding_mode == "zeros":
        return Reason("border", "a bias before a zero-padded conv is not exact at the border")
    return None


def _pads(conv: nn.Conv2d) -> bool:
    if isinstance(conv.padding, str):
        return conv.padding == "same" and kernel_area(conv) > 1
    return any(conv.padding)


def composed(first: nn.Module, second: nn.Module) -> nn.Module:
    """Return the one layer that computes ``second(first(x))``, for layers that `why_not_composable` allows."""
    (w1, b1), (w2, b2) = _double(first), _double(second)
    constant = w2.flatten(2).sum(2) @ b1 if w2.dim() == 4 else w2 @ b1
    bias = constant + b2 if _has_bias(first) or _has_bias(second) else None
    if isinstance(second, nn.Linear):
        return resized(second, w2 @ w1, bias)
    if kernel_area(second) > 1:
        return resized(second, torch.einsum("osij,sc->ocij", w2, w1.flatten(1)), bias)
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    merged = resized(first, torch.einsum("os,scij->ocij", w2.flatten(1), w1), bias)
    assert isinstance(merged, nn.Conv2d)
    merged.stride = (first.stride[0] * second.stride[0], first.stride[1] * second.stride[1])
    return merged


def keep_outputs(module: nn.Module, indices: Tensor) -> nn.Module:
    """Return the layer with only the output channels ``indices``."""
    like = as_layer(module)
    bias = None if like.bias is None else like.bias.detach()[indices]
    return resized(module, like.weight.detach()[indices], bias)


def keep_inputs(module: nn.Module, indices: Tensor, block: int = 1) -> nn.Module:
    """Return the layer with only the input channels ``indices``, of ``block`` features each."""
    like = as_layer(module)
    weight = like.weight.detach().unflatten(1, (-1, block))[:, indices].flatten(1, 2)
    return resized(module, weight, None if like.bias is None else like.bias.detach())


def keep_channels(module: nn.Module, indices: Tensor, count: int) -> nn.Module:
    """Return a module that treats each of ``count`` channels alone (BatchNorm, depthwise conv) for ``indices`` only."""
    if isinstance(module, nn.Conv2d):
        bias = None if module.bias is None else module.bias.detach()[indices]
        return resized(module, module.weight.detach()[indices], bias, groups=len(indices))
    if all(t.numel() == 1 for t in (*module.parameters(), *module.buffers())):
        return module
    new = narrowed(module, indices, count)
    assert new is not None, "its tensors are not by channel"
    return new


def takes_shift(module: nn.Module) -> bool:
    """Whether a constant added to the layer's input can go into its bias: not at a border of zeros, nor without one."""
    zeros = isinstance(module, nn.Conv2d) and _pads(module) and module.padding_mode == "zeros"
    return _has_bias(module) and not zeros


def fold_inputs(module: nn.Module, matrix: Tensor, block: int = 1, shift: Tensor | None = None) -> nn.Module:
    """Return the layer with T (C×r) and t (C) folded into its input: W'·x + b' = W·(T·x + t) + b.

    ``block`` is the number of consecutive input features that belong to one channel (after a flatten). ``shift`` is t,
    for a layer that `takes_shift` only.
    """
    weight, bias = _double(module)
    by_channel = weight.unflatten(1, (-1, block))
    folded = torch.einsum("oc...,cr->or...", by_channel, matrix.double()).flatten(1, 2)
    if shift is not None:
        bias = bias + by_channel.flatten(2).sum(2) @ shift.double()
    return resized(module, folded, bias if _has_bias(module) else None)


def weight_by_channel(module: nn.Module, block: int = 1, importance: Tensor | None = None) -> Tensor:
    """Return F (m×C, m ≤ C) with FᵀF = WᵀΓW of a layer's weight, summed over kernel positions and block, in float64.

    ``importance`` is Γ (S×S); without it every output counts alike. It may be a view of the weight.
    """
    weight, _ = _double(module)
    by_channel = weight.unflatten(1, (-1, block)).movedim(1, -1)  # S … C
    rows = by_channel.flatten(0, -2)
    if len(rows) > rows.shape[1]:
        weighted = by_channel if importance is None else torch.tensordot(importance.double(), by_channel, 1)
        return half(rows.mT @ weighted.flatten(0, -2))
    return rows if importance is None else torch.tensordot(half(importance), by_channel, 1).flatten(0, -2)


def _double(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias (zeros if there is none) in float64."""
    like = as_layer(module)
    weight = like.weight.detach().double()
    return weight, weight.new_zeros(len(weight)) if like.bias is None else like.bias.detach().double()


def _has_bias(module: nn.Module) -> bool:
    return as_layer(module).bias is not None
