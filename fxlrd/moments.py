"""Second moments of tensors' channels over calibration inputs, kept on the nodes that make them."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxlrd.calibration import NOTHING, failed
from fxlrd.channels import flattened
from fxlrd.effect import Effect
from fxlrd.errors import FxlrdError
from fxlrd.graph import MOMENTS, SEEN, Inputs, evaluating, layers, positional, source, tensors
from fxlrd.layers import CONVS, Conv, Fit, channel_axis, channels, kernel_area, spatial_dims

LARGEST = 8192
"""Tensors with more channels than this are passed over: their moments would take half a gigabyte each."""

PATCHES = 8
"""About so many patches for each number in one are taken from a batch, evenly spread; more would tell little."""


@dataclass
class Moments:
    """Running moments of one tensor's C channels over every position of every input.

    ``second`` (C×C) and ``mean`` (C) are float64 expectations; ``count`` is the number of positions seen.
    """

    total: Tensor
    products: Tensor
    count: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> Moments:
        """Return moments that have seen nothing."""
        zeros = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        return cls(zeros[0].clone(), zeros)

    def add(self, x: Tensor) -> None:
        """Add the rows of ``x`` (N×C), in float64.

        Products rounded to float32 would leave noise of 1e-7 in directions that carry nothing, and a least
        squares fit would divide by it.
        """
        x = x.detach().double()
        self.products += x.mT @ x
        self.total += x.sum(0)
        self.count += len(x)

    @property
    def second(self) -> Tensor:
        """E[x·xᵀ]."""
        return self.products / max(self.count, 1)

    @property
    def mean(self) -> Tensor:
        """E[x]."""
        return self.total / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """E[(x − mean)·(x − mean)ᵀ], positive semidefinite in spite of rounding where channels hardly vary."""
        rounding = 1e-12 * self.second.diagonal()
        return self.second - torch.outer(self.mean, self.mean) + rounding.diag()

    @property
    def ridge(self) -> float:
        """How much a fit to these moments should be regularised, relative to their mean variance.

        Nothing from four positions a channel on; below, a fit would follow the sample.
        """
        return 1e-2 * max(0.0, len(self.total) / max(self.count, 1) - 0.25)


Axis = tuple[int, int]
"""The axis of a tensor's channels, and how many consecutive entries along it belong to one (after a flatten)."""


def moments(node: fx.Node, axis: int, block: int = 1) -> Moments | None:
    """Return the moments that a sweep has left on the node: of the channels along ``axis``, ``block`` entries each."""
    found: Moments | None = node.meta.get(MOMENTS, {}).get((axis, block))
    return found


@dataclass
class Seen:
    """What calibration saw of a layer: moments of what it reads, of the patches that its kernel sees (channel-major,
    only where asked for), and Γ, how much its output matters (`fxlrd.effect`).
    """

    reads: Moments | None = None
    patches: Moments | None = None
    matters: Tensor | None = None

    def __add__(self, other: Seen) -> Seen:
        both = (self.matters, other.matters)
        return Seen(
            _sum(self.reads, other.reads),
            _sum(self.patches, other.patches),
            None if any(m is None for m in both) else both[0] + both[1],  # type: ignore[operator]
        )

    def fit(self, module: nn.Module) -> Fit | None:
        """Return what the layer's factors are to be fitted to, or None where its input's moments are not known."""
        c_in, _, groups = channels(module)
        width = c_in * groups
        if self.reads is None or len(self.reads.total) != width or not self.reads.count:
            return None
        patches = self.patches
        if patches is not None and (not patches.count or len(patches.total) != width * kernel_area(module)):
            patches = None
        return Fit(
            self.reads.covariance,
            self.reads.mean,
            self.reads.ridge,
            None if patches is None else patches.covariance,
            None if patches is None else patches.mean,
            0.0 if patches is None else patches.ridge,
            self.matters,
        )


def _sum(a: Moments | None, b: Moments | None) -> Moments | None:
    if a is None or b is None or a is b:
        return a if a is b else None
    return Moments(a.total + b.total, a.products + b.products, a.count + b.count)


def seen(nodes: Iterable[fx.Node]) -> Seen | None:
    """Return what calibration saw of a layer over all its calls; ``nodes`` are those, or those of its factors."""
    found = list({id(n.meta[SEEN]): n.meta[SEEN] for n in nodes if SEEN in n.meta}.values())
    return functools.reduce(operator.add, found) if found else None


def sweep(
    gm: fx.GraphModule, batches: Iterable[Inputs], outputs: bool = True, patches: int = 0, effects: int = 0
) -> None:
    """Run the graph on each batch in eval mode and leave the moments of every layer's input (and output) on nodes.

    Where several layers read one tensor, it has its moments once. A tensor that was flattened on its way into
    a linear layer also gets those of the channels that it had before. ``patches``: convs whose kernel sees at most
    so many numbers also get the moments of those. ``effects``: on so many inputs, how much each layer's
    output matters is measured. Memory does not grow with the number of batches. Raises FxlrdError for batches
    that are none, do not fit the model or are not finite.
    """
    watch = _Sweep(gm, outputs, patches)
    effect, left = Effect(gm), effects
    for i, inputs in enumerate(batches):
        try:
            with evaluating(gm), torch.no_grad():
                watch.run(*positional(gm, inputs))
            if left > 0:
                left = left - _rows(inputs) if effect.add(inputs) else 0
        except Exception as error:
            raise failed(i, inputs, error) from error
    watch.finish()
    for node in gm.graph.nodes:
        if SEEN in node.meta:
            node.meta[SEEN].matters = effect.estimate(node)


def _rows(inputs: Inputs) -> int:
    return max((len(t) for t in tensors((inputs.args, inputs.kwargs)) if t.dim()), default=1)


def _dtype(gm: fx.GraphModule) -> torch.dtype:
    return next((p.dtype for p in gm.parameters()), torch.get_default_dtype())


class _Sweep(fx.Interpreter):
    """Runs a graph and adds up the moments of the tensors that layers read and make."""

    def __init__(self, gm: fx.GraphModule, outputs: bool, patches: int) -> None:
        super().__init__(gm)
        self.gm = gm
        self.layers: dict[fx.Node, nn.Module] = {}
        self.kept: dict[fx.Node, dict[Axis, Moments]] = {}
        self.patches: dict[fx.Node, Moments] = {}
        self.wanted: dict[fx.Node, set[tuple[nn.Module, int]]] = {}
        self.readers: dict[fx.Node, list[fx.Node]] = {}
        found = layers(gm)
        for node in gm.graph.nodes:
            module = found.get(str(node.target)) if node.op == "call_module" else None
            given = source(node) if module is not None else None
            if module is None or given is None:
                continue
            self.layers[node] = module
            self.wanted.setdefault(given, set()).add((module, 1))
            if outputs:
                self.wanted.setdefault(node, set()).add((module, 1))
            if isinstance(module, nn.Linear) and (block := flattened(gm, given)) > 1:
                self.wanted[given].add((module, block))
            c_in, _, groups = channels(module)
            if isinstance(module, CONVS) and groups == 1 and 1 < kernel_area(module) <= patches // c_in:
                self.readers.setdefault(given, []).append(node)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        for axis, block in {(channel_axis(m, value.dim()), block) for m, block in self.wanted.get(n, ())}:
            count = value.shape[axis] // block
            if count > LARGEST:
                continue
            found = self.kept.setdefault(n, {})
            if (axis, block) not in found:
                found[axis, block] = Moments.empty(count, value.device)
            found[axis, block].add(value.movedim(axis, -1).unflatten(-1, (count, block)).mT.reshape(-1, count))
        for reader in self.readers.get(n, ()):
            self._add_patches(reader, value)
        return value

    def _add_patches(self, node: fx.Node, value: Tensor) -> None:
        conv = self.layers[node]
        assert isinstance(conv, Conv)
        found = self.patches.setdefault(node, Moments.empty(conv.weight[0].numel(), value.device))
        found.add(patches(conv, value, PATCHES * len(found.total)))

    def finish(self) -> None:
        """Check what was found and leave it on the nodes."""
        found = [(n, each) for n, by_axis in self.kept.items() for each in by_axis.values()]
        for node, each in [*found, *self.patches.items()]:
            if not bool(each.products.isfinite().all()):
                raise FxlrdError(
                    f"calibration: {node.target} gives NaN or Inf for these inputs; "
                    f"is their scale right, and does {str(_dtype(self.gm))[6:]} hold the activations?"
                )
        if self.layers and not any(each.count for _, each in found):
            raise FxlrdError(NOTHING)
        for node, by_axis in self.kept.items():
            node.meta[MOMENTS] = by_axis
        for node, module in self.layers.items():
            given = source(node)
            assert given is not None
            dims = len(given.meta["tensor_meta"].shape) if "tensor_meta" in given.meta else None
            by_axis = self.kept.get(given, {})
            axes = [a for a, block in by_axis if block == 1 and (dims is None or a == channel_axis(module, dims))]
            reads = by_axis[axes[0], 1] if len(axes) == 1 else None
            node.meta[SEEN] = Seen(reads, self.patches.get(node))


def spread(count: int, most: int) -> int:
    """Return the step at which about ``most`` of ``count`` positions are taken."""
    return max(1, count // most) | 1  # odd: no column of an even image is always missed


def patches(conv: Conv, x: Tensor, most: int | None = None) -> Tensor:
    """Return what the kernel sees of ``x`` at each position, as rows (…, C·K), channel-major, in float64.

    ``conv`` is none that is transposed. Of positions beyond ``most``, about so many are taken, evenly spread.
    """
    dims = spatial_dims(conv)
    around: list[int] = []
    spans = [dilation * (size - 1) for size, dilation in zip(conv.kernel_size, conv.dilation, strict=True)]
    for span, pad in reversed(list(zip(spans, _padding(conv), strict=True))):
        total = span if pad is None else 2 * pad
        around += [total // 2, total - total // 2]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad((x if x.dim() == dims + 2 else x[None]).detach(), around, mode=mode)
    for i, (span, stride, dilation) in enumerate(zip(spans, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + i, span + 1, stride)[..., ::dilation]
    windows = x.movedim(1, 1 + dims)  # N, positions…, C, k…: a view yet
    count = math.prod(windows.shape[: 1 + dims])
    at = torch.arange(0, count, 1 if most is None else spread(count, most), device=x.device)
    return windows[torch.unravel_index(at, windows.shape[: 1 + dims])].flatten(1).double()


def _padding(conv: Conv) -> tuple[int | None, ...]:
    """Return the padding on either side of each dimension; None where it is to keep the size."""
    if isinstance(conv.padding, str):
        return ((None if conv.padding == "same" else 0),) * spatial_dims(conv)
    return conv.padding
