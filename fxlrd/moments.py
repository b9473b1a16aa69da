"""Second moments of tensors' channels over calibration inputs, kept on the nodes that make them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from fxlrd.channels import flattened
from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph import MOMENTS, Inputs, evaluating, layers, positional, source

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
    def mean(self) -> Tensor:
        """E[x]."""
        return self.total / max(self.count, 1)

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


def as_batches(data: Any) -> Iterable[Any]:
    """Return calibration data as an iterable of batches; a tensor or a dict is one batch."""
    if isinstance(data, (Tensor, Mapping, Inputs)):
        return [data]
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise FxlrdError(
            f"calibration: a {type(data).__name__} is no calibration data; "
            "give a tensor, a list of batches or a DataLoader"
        )
    return data


def sweep(gm: fx.GraphModule, batches: Iterable[Any], outputs: bool = True) -> None:
    """Run the graph on each batch in eval mode and leave the moments of every layer's input (and output) on nodes.

    Where several layers read one tensor, it has its moments once. A tensor that was flattened on its way into
    a linear layer also gets those of the channels that it had before. Memory does not grow with the number of
    batches. Raises FxlrdError for batches that are none, do not fit the model or are not finite.
    """
    wanted = _wanted(gm, outputs)
    kept: dict[fx.Node, dict[Axis, Moments]] = {}
    with evaluating(gm), torch.no_grad():
        for i, inputs in enumerate(_as_inputs(gm, batches)):
            try:
                _Sweep(gm, wanted, kept).run(*positional(gm, inputs))
            except Exception as error:
                said = str(error) if isinstance(error, FxlrdError) else one_line(error)
                raise FxlrdError(f"calibration: the model fails on batch {i} ({inputs.describe()}): {said}") from error
    for node, found in kept.items():
        for each in found.values():
            if not bool(each.products.isfinite().all()):
                raise FxlrdError(
                    f"calibration: {node.target} gives NaN or Inf for these inputs; "
                    f"is their scale right, and does {str(_dtype(gm))[6:]} hold the activations?"
                )
    if not any(each.count for found in kept.values() for each in found.values()):
        raise FxlrdError("calibration: there are no inputs; a generator can be read only once, a list or loader again")
    for node, found in kept.items():
        node.meta[MOMENTS] = found


def _dtype(gm: fx.GraphModule) -> torch.dtype:
    return next((p.dtype for p in gm.parameters()), torch.get_default_dtype())


def _as_inputs(gm: fx.GraphModule, batches: Iterable[Any]) -> Iterator[Inputs]:
    """Yield each batch as inputs of the graph: tensors, dicts, or tuples, whose surplus (labels) is dropped."""
    takes = len([n for n in gm.graph.nodes if n.op == "placeholder" and not n.args])
    for i, batch in enumerate(batches):
        try:
            inputs = Inputs.of(tuple(batch)[: max(takes, 1)] if isinstance(batch, (tuple, list)) else batch)
        except FxlrdError as error:
            raise FxlrdError(f"calibration: batch {i}: {str(error).removeprefix('example inputs: ')}") from error
        for t in tree_flatten((inputs.args, inputs.kwargs))[0]:
            if isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all()):
                raise FxlrdError(f"calibration: batch {i} holds NaN or Inf")
        yield inputs


def _wanted(gm: fx.GraphModule, outputs: bool) -> dict[fx.Node, set[tuple[nn.Module, int]]]:
    """Return the nodes to watch, each with the layers that set the axis of the channels, and block sizes."""
    wanted: dict[fx.Node, set[tuple[nn.Module, int]]] = {}
    found = layers(gm)
    for node in gm.graph.nodes:
        module = found.get(str(node.target)) if node.op == "call_module" else None
        given = source(node) if module is not None else None
        if module is None or given is None:
            continue
        wanted.setdefault(given, set()).add((module, 1))
        if outputs:
            wanted.setdefault(node, set()).add((module, 1))
        if isinstance(module, nn.Linear) and (block := flattened(gm, given)) > 1:
            wanted[given].add((module, block))
    return wanted


class _Sweep(fx.Interpreter):
    def __init__(
        self,
        gm: fx.GraphModule,
        wanted: Mapping[fx.Node, set[tuple[nn.Module, int]]],
        kept: dict[fx.Node, dict[Axis, Moments]],
    ) -> None:
        super().__init__(gm)
        self.wanted, self.kept = wanted, kept

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        for axis, block in {(channel_axis(m, value.dim()), block) for m, block in self.wanted.get(n, ())}:
            channels = value.shape[axis] // block
            if channels > LARGEST:
                continue
            found = self.kept.setdefault(n, {})
            if (axis, block) not in found:
                found[axis, block] = Moments.empty(channels, value.device)
            found[axis, block].add(value.movedim(axis, -1).unflatten(-1, (channels, block)).mT.reshape(-1, channels))
        return value
