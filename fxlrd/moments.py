"""Second moments of tensors' channels over calibration inputs, kept on the nodes that make them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph import Inputs, evaluating, layers, positional, source

MOMENTS = "fxlrd.moments"
LARGEST = 8192
"""Tensors with more channels than this are passed over: their moments would take half a gigabyte each."""


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
    def ridge(self) -> float:
        """Return how much a fit to these moments should be regularised, relative to their mean variance.

        Nothing from four positions a channel on; below, a fit would follow the sample.
        """
        return 1e-2 * max(0.0, len(self.total) / max(self.count, 1) - 0.25)

    @property
    def mean(self) -> Tensor:
        """E[x]."""
        return self.total / max(self.count, 1)


def moments(node: fx.Node, axis: int) -> Moments | None:
    """Return the moments of the channels along ``axis`` that a sweep has left on the node, if any."""
    found = node.meta.get(MOMENTS, {})
    return found.get(axis) if isinstance(found, dict) else None


def channel_axis(module: nn.Module, dims: int) -> int:
    """Return the axis of a layer's channels in an input or output with ``dims`` dimensions."""
    return dims - 1 if isinstance(module, nn.Linear) else 1


def sweep(gm: fx.GraphModule, batches: Iterable[Any], outputs: bool = True) -> None:
    """Run the graph on each batch in eval mode and leave the moments of every layer's input (and output) on nodes.

    Where several layers read one tensor, it has its moments once. A tensor that is flattened on its way into
    a linear layer gets those of its channels. Memory does not grow with the number of batches. Raises
    FxlrdError for batches that are none, do not fit the model or hold NaN.
    """
    wanted = _wanted(gm, outputs)
    kept: dict[fx.Node, dict[int, Moments]] = {}
    seen = 0
    with evaluating(gm), torch.no_grad():
        for i, inputs in enumerate(as_inputs(gm, batches)):
            try:
                _Sweep(gm, wanted, kept).run(*positional(gm, inputs))
            except FxlrdError:
                raise
            except Exception as error:
                raise FxlrdError(
                    f"calibration: the model fails on batch {i} ({inputs.describe()}): {one_line(error)}"
                ) from error
            seen += 1
    if seen == 0:
        raise FxlrdError("calibration: there are no inputs; a generator can be read only once, a list or loader again")
    for node, found in kept.items():
        node.meta[MOMENTS] = found


def as_inputs(gm: fx.GraphModule, batches: Any) -> Iterator[Inputs]:
    """Yield each batch as inputs of the graph: tensors, dicts, or tuples, whose surplus (labels) is dropped."""
    if isinstance(batches, (Tensor, Mapping)):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise FxlrdError(
            f"calibration: a {type(batches).__name__} is no calibration data; "
            "give a tensor, a list of batches or a DataLoader"
        )
    takes = len([n for n in gm.graph.nodes if n.op == "placeholder" and not n.args])
    for i, batch in enumerate(batches):
        inputs = Inputs.of(tuple(batch)[: max(takes, 1)] if isinstance(batch, (tuple, list)) else batch)
        for t in tree_flatten((inputs.args, inputs.kwargs))[0]:
            if isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all()):
                raise FxlrdError(f"calibration: batch {i} holds NaN or Inf")
        yield inputs


def _wanted(gm: fx.GraphModule, outputs: bool) -> dict[fx.Node, set[nn.Module | None]]:
    """Return the nodes to watch, with the layers that give the axis; None stands for axis 1 (before a flatten)."""
    wanted: dict[fx.Node, set[nn.Module | None]] = {}
    found = layers(gm)
    for node in gm.graph.nodes:
        module = found.get(str(node.target)) if node.op == "call_module" else None
        given = source(node) if module is not None else None
        if module is None or given is None:
            continue
        wanted.setdefault(given, set()).add(module)
        if outputs:
            wanted.setdefault(node, set()).add(module)
        if isinstance(module, nn.Linear) and is_flatten(gm, given):
            wanted.setdefault(given.all_input_nodes[0], set()).add(None)
    return wanted


def is_flatten(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node flattens everything but the batch, so that each channel becomes a run of features."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    if node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten"):
        return (*node.args[1:], *node.kwargs.values()) in ((1,), (1, -1))
    return False


class _Sweep(fx.Interpreter):
    def __init__(
        self,
        gm: fx.GraphModule,
        wanted: Mapping[fx.Node, set[nn.Module | None]],
        kept: dict[fx.Node, dict[int, Moments]],
    ) -> None:
        super().__init__(gm)
        self.wanted, self.kept = wanted, kept

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        readers = self.wanted.get(n, set())
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        for axis in {1 if m is None else channel_axis(m, value.dim()) for m in readers}:
            channels = value.shape[axis]
            if channels > LARGEST:
                continue
            found = self.kept.setdefault(n, {})
            if axis not in found:
                found[axis] = Moments.empty(channels, value.device)
            found[axis].add(value.movedim(axis, -1).reshape(-1, channels))
        return value
