"""Second moments of tensors' channels over calibration inputs, kept on the nodes that make them."""

from __future__ import annotations

import functools
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
from fxlrd.layers import Fit, channels, kernel_area, layer

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


def channel_axis(module: nn.Module, dims: int) -> int:
    """Return the axis of a layer's channels in an input or output with ``dims`` dimensions."""
    return dims - 1 if isinstance(module, nn.Linear) else dims - 3


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
        width = layer(module).weight.shape[1] * getattr(module, "groups", 1)
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
            node.meta[SEEN].matters = effect.gamma(node)


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
            if kernel_area(module) > 1 and channels(module)[2] == 1 and layer(module).weight[0].numel() <= patches:
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
        assert isinstance(conv, nn.Conv2d)
        found = self.patches.setdefault(node, Moments.empty(conv.weight[0].numel(), value.device))
        budget = PATCHES * len(found.total)
        for x in (value if value.dim() == 4 else value[None]).split(8):
            seen = patches(conv, x)
            step = max(1, len(seen) * len(value) // max(1, len(x) * budget)) if value.dim() == 4 else 1
            found.add(seen[:: step | 1])  # an odd step: no column of an even image is always missed

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


def patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return what the kernel sees of ``x`` (N×C×H×W) at each position, as rows (…, C·kh·kw), in float64."""
    height, width = conv.kernel_size
    around: list[int] = []
    for size, pad, dilation in reversed(list(zip(conv.kernel_size, _padding(conv), conv.dilation, strict=True))):
        total = dilation * (size - 1) if pad is None else 2 * pad
        around += [total // 2, total - total // 2]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x.detach(), around, mode=mode).double()
    columns = F.unfold(x, (height, width), conv.dilation, stride=conv.stride)
    return columns.mT.reshape(-1, columns.shape[1])


def _padding(conv: nn.Conv2d) -> tuple[int | None, int | None]:
    """Return the padding on either side of height and width; None where it is to keep the size."""
    if isinstance(conv.padding, str):
        return (None, None) if conv.padding == "same" else (0, 0)
    return conv.padding[0], conv.padding[1]
