"""Second moments of tensors' channels over calibration inputs, kept on the nodes that make them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd.calibration.batches import NOTHING, failed
from fxlrd.calibration.importance import Effect
from fxlrd.calibration.patches import patches
from fxlrd.errors import FxlrdError
from fxlrd.graph.captured import feed
from fxlrd.graph.channels import flattened
from fxlrd.graph.facts import output_moments, shape, statistics
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.run import evaluating
from fxlrd.graph.surgery import layers, source
from fxlrd.layers.fit import Moments, Statistics
from fxlrd.layers.kinds import CONVS, Conv, channel_axis, channels_per_group, kernel_area

LARGEST = 8192
"""Tensors with more channels than this are passed over: their moments would take half a gigabyte each."""
PATCHES = 8
"""About so many patches for each number in one are taken from a batch, evenly spread; more would tell little."""
Axis = tuple[int, int]
"""The axis of a tensor's channels, and how many consecutive entries along it belong to one (after a flatten)."""


def moments(node: fx.Node, axis: int, block: int = 1) -> Moments | None:
    """Return the moments that a sweep has left on the node: of the channels along ``axis``, ``block`` entries each."""
    return (output_moments(node) or {}).get((axis, block))


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
                watch.run(*feed(gm, inputs))
            if left > 0:
                left = left - _rows(inputs) if effect.add(inputs) else 0
        except Exception as error:
            raise failed(i, inputs, error) from error
    watch.finish()
    for node in gm.graph.nodes:
        if (measured := statistics(node)) is not None:
            measured.matters = effect.estimate(node)


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
            c_in, _, groups = channels_per_group(module)
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
            output_moments.record(node, by_axis)
        for node, module in self.layers.items():
            given = source(node)
            assert given is not None
            sizes = shape(given)
            dims = None if sizes is None else len(sizes)
            by_axis = self.kept.get(given, {})
            axes = [a for a, block in by_axis if block == 1 and (dims is None or a == channel_axis(module, dims))]
            reads = by_axis[axes[0], 1] if len(axes) == 1 else None
            statistics.record(node, Statistics(reads, self.patches.get(node)))
