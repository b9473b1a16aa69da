"""What is recorded about a node or a graph: provenance, statistics, shapes.

A fact is kept in the ``meta`` of its node or graph module. It is read and written through a `Fact` only, never through
a string key, so that `forget` misses none. Facts on nodes survive every pass and are shared by copies of a graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from fxlrd.layers.fit import Moments, Statistics
from fxlrd.sharing import Job

T = TypeVar("T")
_PREFIX = "fxlrd."
FACTORS = ("first", "core", "branch", "last")
"""The roles of the parts of a decomposed layer."""


class Fact(Generic[T]):
    """One kind of fact: call it to read, `record` it to write.

    >>> calls = Fact("calls", int)
    >>> node = fx.Graph().placeholder("x")
    >>> calls(node) is None
    True
    >>> calls.record(node, 3)
    >>> calls(node)
    3
    """

    def __init__(self, name: str, kind: type[T]) -> None:
        self.key = _PREFIX + name
        self.kind = kind

    def __call__(self, owner: fx.Node | fx.GraphModule) -> T | None:
        """Return the fact, or None where it is not recorded."""
        value = owner.meta.get(self.key)
        return value if isinstance(value, self.kind) else None

    def record(self, owner: fx.Node | fx.GraphModule, value: T) -> None:
        """Write the fact, in the place of an earlier one."""
        owner.meta[self.key] = value

    def drop(self, owner: fx.Node | fx.GraphModule) -> None:
        """Remove the fact, if it is recorded."""
        owner.meta.pop(self.key, None)


@dataclass(frozen=True)
class Provenance:
    """Where a node comes from.

    Attributes:
        name: the module's name in the captured model.
        role: original, first, core, last, branch or merged.
        ranks: the ranks of the layer's low-rank form.
        error: the relative error of that form: of the weight, or of the layer's output on calibration inputs if it is
            ``fitted`` to those.
        channel_error: that of the output channel of which it is the largest, where it was determined.
        latency: the measured time of the layer in its present form, in seconds, in all its calls, where a pass has
            measured it.
        fitted: whether the factors were fitted to calibration inputs.
        original: the original module, by reference; it is never copied.
        entangled: whether it does not do by itself what the original layer did: it took in a neighbour, or is part of
            one, or works in other units. It can neither be restored nor fitted to the original's outputs.
    """

    name: str
    role: str = "original"
    ranks: tuple[int | None, ...] = ()
    error: float | None = None
    latency: float | None = None
    fitted: bool = False
    original: nn.Module | None = field(default=None, compare=False, repr=False)
    channel_error: float | None = None
    entangled: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Provenance:
        return self


provenance = Fact("provenance", Provenance)
"""Where a node comes from."""
statistics = Fact("statistics", Statistics)
"""What calibration measured of a layer: on its call, or on the calls of its factors."""
output_moments: Fact[dict[tuple[int, int], Moments]] = Fact("moments", dict)
"""The moments of the tensor that a node makes, by (channel axis, entries per channel)."""
retained_channels = Fact("retained_channels", Tensor)
"""The indices of the original layer's output channels that a merged layer still makes."""
described_layers: Fact[frozenset[str]] = Fact("described", frozenset)
"""The layers that a trace asked for the dtype, device or shape of their weight: on its graph module."""
job: Fact[Job] = Fact("job", Job)
"""The processes that share the work of a compression: on its graph module."""
_times = Fact("times", int)


def times(node: fx.Node) -> int:
    """Return how many calls of the same shapes the node stands for: several where a region was called repeatedly."""
    return _times(node) or 1


def record_times(node: fx.Node, count: int) -> None:
    """Record how many calls of the same shapes the node stands for."""
    _times.record(node, count)


def entangle(gm: fx.GraphModule, name: str) -> None:
    """Record that a layer does not do by itself any more what the original one of this name did."""
    for node in gm.graph.nodes:
        if (recorded := provenance(node)) is not None and recorded.name == name:
            provenance.record(node, replace(recorded, entangled=True))


def tensor_meta(node: fx.Node) -> TensorMetadata | None:
    """Return the shape, dtype and memory format of the node's value; None before a propagation and for no tensor."""
    metadata = node.meta.get("tensor_meta")
    return metadata if isinstance(metadata, TensorMetadata) else None


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of the node's value; None before a propagation and where it is no tensor."""
    metadata = tensor_meta(node)
    return None if metadata is None else tuple(metadata.shape)


def counted_flops(node: fx.Node) -> int | None:
    """Return the FLOPs of the node (2 × multiply-adds) in the last propagation; None before one."""
    count = node.meta.get("flops")
    return None if count is None else int(count)


def flops(node: fx.Node) -> int:
    """Return the FLOPs of the node (2 × multiply-adds) in the last propagation; 0 before one."""
    return counted_flops(node) or 0


def inherited(node: fx.Node) -> dict[str, Any]:
    """Return the ``meta`` that a factor of the node's layer inherits: all but what describes the node's output."""
    return {k: v for k, v in node.meta.items() if k not in ("tensor_meta", "flops", output_moments.key)}


def forget(gm: fx.GraphModule) -> None:
    """Remove every fact from a graph module and its nodes but provenance, which lets go of the original modules."""
    for owner in (gm, *gm.graph.nodes):
        for key in [k for k in owner.meta if str(k).startswith(_PREFIX) and k != provenance.key]:
            del owner.meta[key]
    for node in gm.graph.nodes:
        if (origin := provenance(node)) is not None:
            provenance.record(node, replace(origin, original=None))
