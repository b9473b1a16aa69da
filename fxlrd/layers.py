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

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxlrd.errors import FxlrdError
from fxlrd.factor.svd import svd
from fxlrd.factor.tucker import tucker2
from fxlrd.factor.whiten import Root, root, whitened_svd, whitened_tucker2
from fxlrd.ranks import svd_rank, tucker1_rank, tucker2_rank

Conv = nn.modules.conv._ConvNd
"""The common class of all convs."""
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVS, *TRANSPOSED)
Layer = nn.Linear | Conv
Ranks = tuple[int | None, ...]
"""(R,) of an SVD pair, (r1, r2) of a Tucker-2 form (None: that mode is not cut); per group in grouped convs."""


def ranks_text(ranks: Ranks) -> str:
    """Return ranks as text, such as 204 or 309x309; a mode that is not cut is a dash."""
    return "x".join("-" if r is None else str(r) for r in ranks)


TOO_NARROW = "is too narrow"
_NARROW = 16
"""Below this many channels per group a ratio that leaves no rank is a reason, not an error."""


def layer(module: nn.Module) -> Layer:
    """Return the module, which the caller knows to be a conv or Linear, typed so."""
    assert isinstance(module, LAYERS)
    return module


def _stock(module: nn.Module) -> type[Any]:
    return next(kind for kind in LAYERS if isinstance(module, kind))


def op(module: nn.Module) -> str:
    """Return the layer's stock type name, such as Conv2d or Linear, also for a subclass."""
    return _stock(module).__name__


_MAKING = {
    "__init__", "reset_parameters", "__constants__", "__module__", "__qualname__", "__doc__", "__annotations__",
    "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__",
}  # fmt: skip
"""What a subclass may redefine without computing anything else."""


def is_stock(module: nn.Module) -> bool:
    """Whether the layer computes what its stock type does: of that type, or a subclass that is only made otherwise."""
    stock, classes = _stock(module), type(module).__mro__
    own = {name for kind in classes[: classes.index(stock)] for name in vars(kind)} - _MAKING
    return not any(hasattr(stock, name) for name in own)


def spatial_dims(module: nn.Module) -> int:
    """Return how many dimensions the kernel has: 2 for a Conv2d, 0 for a Linear."""
    return layer(module).weight.dim() - 2


def channel_axis(module: nn.Module, dims: int) -> int:
    """Return the axis of a layer's channels in an input or output with ``dims`` dimensions."""
    return dims - 1 - spatial_dims(module)


def form(module: nn.Module) -> str:
    """Return the kind of low-rank form that suits the layer: svd or tucker2."""
    return "svd" if isinstance(module, nn.Linear) or kernel_area(module) == 1 else "tucker2"


def channels(module: nn.Module) -> tuple[int, int, int]:
    """Return (input channels per group, output channels per group, groups)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, 1
    assert isinstance(module, Conv)
    return module.in_channels // module.groups, module.out_channels // module.groups, module.groups


def ranks_for_ratio(module: nn.Module, ratio: float, beta: float = 1.0, strict: bool = True) -> Ranks | str:
    """Return the ranks at which the layer's factors have 1/ratio of its parameters, or why there are none.

    Raises FxlrdError where the layer is wide enough to be cut but ``ratio`` leaves it less than rank 1, unless it
    is not to be ``strict``.
    """
    c_in, c_out, groups = channels(module)
    if groups > 1 and min(c_in, c_out) == 1:
        return f"groups={groups}: one channel a group (depthwise) leaves no rank to cut"
    where = f"{groups} groups of {c_in}→{c_out}" if groups > 1 else f"{c_in}→{c_out}"
    ranks: Ranks
    if form(module) == "svd":
        ranks = (svd_rank(c_in, c_out, ratio),)
    else:
        kernel = layer(module).weight.shape[2:]
        r1 = tucker2_rank(c_in, c_out, kernel, ratio, beta)
        ranks = (r1, math.floor(beta * r1))
        if ranks[0] >= c_in and ranks[1] < c_out:
            ranks = (None, tucker1_rank(c_in, c_out, kernel, ratio))
        elif ranks[1] >= c_out and ranks[0] < c_in:
            ranks = (tucker1_rank(c_out, c_in, kernel, ratio), None)
    if min(r for r in ranks if r is not None) < 1:
        if min(c_in, c_out) < _NARROW or not strict:
            return f"{where} {TOO_NARROW}: ratio={ratio:g} leaves no rank"
        raise FxlrdError(
            f"ratio={ratio:g} leaves less than rank 1 for {where}, kernel {kernel_text(module)}: use a ratio of at "
            f"most {_largest_ratio(module, beta):.3g}, or skip the layer"
        )
    if parameters(module, ranks) >= layer(module).weight.numel():
        return f"{where}: no rank at ratio={ratio:g} saves parameters"
    return ranks


def _largest_ratio(module: nn.Module, beta: float) -> float:
    c_in, c_out, groups = channels(module)
    if form(module) == "svd":
        least: float = c_in + c_out
    else:
        r1 = max(1, math.ceil(1 / beta))
        least = r1 * (beta * kernel_area(module) * r1 + c_in + beta * c_out)
    largest = layer(module).weight.numel() / groups / least
    digits = 10.0 ** (2 - math.floor(math.log10(largest)))
    return math.floor(largest * digits) / digits  # rounded down, so that it is within reach as printed


def explicit_ranks(module: nn.Module, ranks: int | Ranks) -> Ranks:
    """Return the ranks a user asked for as this layer's form takes them, clipped to full rank.

    An int serves both modes of a Tucker-2 form. Raises FxlrdError for a rank under 1 or a wrong number of them.
    """
    full = full_ranks(module)
    given = tuple(ranks) if isinstance(ranks, (tuple, list)) else (ranks,) * len(full)
    if len(given) != len(full):
        raise FxlrdError(f"ranks={ranks}: a {form(module)} form takes {len(full)}, got {len(given)}")
    whole = [r for r in given if r is not None]
    if not whole or any(not isinstance(r, int) or isinstance(r, bool) or r < 1 for r in whole):
        raise FxlrdError(f"ranks={ranks}: a rank is a whole number of at least 1")
    return tuple(None if r is None or top is None else min(r, top) for r, top in zip(given, full, strict=True))


def parameters(module: nn.Module, ranks: Ranks) -> int:
    """Return the number of weight parameters of the layer's form at ``ranks``, bias not counted."""
    c_in, c_out, groups = channels(module)
    if form(module) == "svd":
        (r,) = ranks
        assert r is not None
        return groups * r * (c_in + c_out)
    r1, r2 = ranks
    core = (r1 or c_in) * (r2 or c_out) * kernel_area(module)
    return groups * (core + (c_in * r1 if r1 else 0) + (c_out * r2 if r2 else 0))


class Fit(NamedTuple):
    """What a layer's factors are fitted to (float64), for C input and S output channels.

    ``second`` (C×C) are the centred second moments of the input and ``mean`` (C) its mean; ``ridge`` says how much
    more variance, relative to the mean one, few samples call for. The same of the patches that the kernel sees
    (C·K, channel-major), where known. ``matters`` (S×S) is Γ (`fxlrd.effect`), where known.
    """

    second: Tensor
    mean: Tensor
    ridge: float = 0.0
    patches: Tensor | None = None
    patch_mean: Tensor | None = None
    patch_ridge: float = 0.0
    matters: Tensor | None = None


MATTERS_RIDGE = 1e-2
"""Share of the mean that is added to every direction of Γ: it is an estimate, and no direction matters nothing."""


def roots(module: nn.Module, fit: Fit) -> tuple[Root, Root | None]:
    """Return the roots of the input's moments (G, C/G, C/G) and of Γ (G, S/G, S/G), group by group."""
    groups = channels(module)[2]
    reads = root(_diagonal_blocks(fit.second, groups), fit.ridge)
    return reads, None if fit.matters is None else root(_diagonal_blocks(fit.matters, groups), MATTERS_RIDGE)


def _diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    blocks = matrix.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def decomposed(module: nn.Module, ranks: Ranks, sweeps: int = 1, fit: Fit | None = None) -> tuple[nn.Sequential, float]:
    """Return the layer's form at ``ranks`` and its relative error, of the weight.

    With ``fit`` the factors are those of the least error of the layer's output for these moments (fxlrd/factor/
    whiten.py), a bias makes up for what they change of its mean, and the error is that of the output, weighted by
    how much it matters, about the mean. At full rank that is the weight's form.
    """
    if fit is not None and ranks != full_ranks(module):
        return _fitted(layer(module), ranks, fit)
    weight = weight_blocks(module)
    if form(module) == "svd":
        (rank,) = ranks
        assert rank is not None
        pair = svd(weight.flatten(2), rank)
        return _assemble(layer(module), ranks, [pair.first, pair.last]), pair.error
    r1, r2 = ranks
    triple = tucker2(weight, r1, r2, sweeps)
    factors = [f for f in (triple.first, triple.core, triple.last) if f is not None]
    return _assemble(layer(module), ranks, factors), triple.error


def _fitted(module: Layer, ranks: Ranks, fit: Fit) -> tuple[nn.Sequential, float]:
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


def full_ranks(module: nn.Module) -> Ranks:
    """Return the ranks at which the layer's form loses nothing."""
    c_in, c_out, _ = channels(module)
    return (min(c_in, c_out),) if form(module) == "svd" else (c_in, c_out)


def skeleton(module: nn.Module, ranks: Ranks) -> nn.Sequential:
    """Return the layer's form at ``ranks`` with arbitrary weights: the same shapes, for timing."""
    c_in, c_out, groups = channels(module)
    weight = layer(module).weight
    if form(module) == "svd":
        (r,) = ranks
        shapes: list[tuple[Any, ...]] = [(groups, r, c_in), (groups, c_out, r)]
    else:
        r1, r2 = ranks
        shapes = [(groups, r1, c_in)] if r1 else []
        shapes.append((groups, r2 or c_out, r1 or c_in, *weight.shape[2:]))
        shapes += [(groups, c_out, r2)] if r2 else []
    factors = [torch.full(s, 1e-2, device=weight.device, dtype=weight.dtype) for s in shapes]
    return _assemble(layer(module), ranks, factors)


def resized(module: nn.Module, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> nn.Module:
    """Return a layer configured as ``module`` with other weights, whose shape sets its channel counts.

    The weights are cast to the module's dtype and memory format. ``groups`` defaults to the module's.
    """
    like = layer(module)
    new: Layer
    if isinstance(like, nn.Linear):
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        factor = _as_blocks(weight, groups or like.groups, like.transposed)
        new = _conv(_stock(like), factor, bias is not None, _options(like))
    _fill(new, weight, like)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(like.weight.dtype), like.weight.requires_grad)
    return new.train(like.training)


def kernel_area(module: nn.Module) -> int:
    """Return the number of positions of the kernel: 9 for 3×3, 1 for a Linear."""
    return math.prod(layer(module).weight.shape[2:])


def kernel_share(module: nn.Module) -> float:
    """Return the share of the kernel that an output meets, on average: all, but in a transposed conv with a stride."""
    return 1 / math.prod(module.stride) if isinstance(module, TRANSPOSED) else 1.0


def kernel_text(module: nn.Module) -> str:
    """Return the kernel size as text, such as 3×3; 1×1 for a Linear."""
    return "×".join(str(k) for k in layer(module).weight.shape[2:]) or "1×1"


def weight_blocks(module: nn.Module) -> Tensor:
    """Return the weight as (groups, S/G, C/G, k…), also that of a transposed conv."""
    return _as_blocks(layer(module).weight.detach(), channels(module)[2], isinstance(module, TRANSPOSED))


def from_blocks(module: nn.Module, factor: Tensor) -> Tensor:
    """Return blocks (groups, out, in, k…) as a weight of such a layer: the inverse of `weight_blocks`."""
    return (factor.transpose(1, 2) if isinstance(module, TRANSPOSED) else factor).flatten(0, 1)


def _as_blocks(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    parts = weight.unflatten(0, (groups, -1))
    return parts.transpose(1, 2) if transposed else parts  # (C, S/G, k…) is how a transposed conv keeps it


def _options(module: Conv) -> dict[str, Any]:
    """Return how the kernel is applied, as arguments of such a conv."""
    names = ["kernel_size", "stride", "padding", "dilation", "padding_mode"]
    return {name: getattr(module, name) for name in [*names, *(["output_padding"] if module.transposed else [])]}


def _assemble(module: Layer, ranks: Ranks, factors: list[Tensor], bias: Tensor | None = None) -> nn.Sequential:
    """Wrap factors, each (groups, out, in[, k…]), into modules that do what the layer did.

    ``bias`` takes the place of the layer's own.
    """
    like = module.weight if module.bias is None else module.bias
    given = module.bias.detach().clone() if bias is None and module.bias is not None else bias
    if isinstance(module, nn.Linear):
        roles = ["first", "last"]
        parts: list[Layer] = [
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
            kind, options = (_stock(module), _options(module)) if role == spatial else _pointwise(module)
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


def _fill(part: Layer, weight: Tensor, like: Layer) -> None:
    weight = weight.reshape(part.weight.shape).to(like.weight.dtype)
    given = like.weight
    layout = torch.contiguous_format if given.is_contiguous() else _CHANNELS_LAST.get(given.dim())
    # A copy, since contiguous() leaves the strides of a 1×1 kernel, by which torch would pick channels_last.
    weight = weight.clone(memory_format=layout or torch.contiguous_format)
    part.weight = nn.Parameter(weight, like.weight.requires_grad)
