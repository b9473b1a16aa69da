"""What the rewrites of `merge` share: which layers they merge, to how many channels, and how they replace modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx, nn

from fxlrd.errors import FxlrdError, Reason
from fxlrd.graph.captured import captured
from fxlrd.graph.facts import FACTORS, Provenance, provenance
from fxlrd.graph.guards import check_names, matches, skip_reason
from fxlrd.graph.layer import origin
from fxlrd.graph.surgery import calls
from fxlrd.layers.kinds import as_layer
from fxlrd.passes.contract import UNNAMED, Skip

UNMERGED = Reason("layer-type", "only Conv2d and Linear layers are merged")


@dataclass(frozen=True)
class Targets:
    """The options of `Merge` that say which layers are merged, and to how many channels."""

    ratio: float
    ranks: int | Mapping[str, int] | None
    skip: tuple[str, ...]

    def check_named(self, gm: fx.GraphModule) -> None:
        """Raise FxlrdError for a layer named in ``ranks`` that the graph does not have."""
        if not isinstance(self.ranks, Mapping):
            return
        check_names(gm, list(self.ranks))
        capture = captured(gm)
        for name in self.ranks:
            if capture is not None and name in capture.unreached:
                raise FxlrdError(f"merge: {name} cannot be merged: {capture.unreached[name].reason}")

    def left_alone(self, name: str) -> Reason | None:
        """Return why the options leave a layer alone, if they do."""
        if (pattern := matches(name, self.skip)) is not None:
            return skip_reason(pattern)
        if isinstance(self.ranks, Mapping) and matches(name, list(self.ranks)) is None:
            return UNNAMED
        return None

    def explicit_rank(self, name: str) -> int | None:
        """Return the rank that ``ranks`` asks for in a layer that the options do not leave alone."""
        if not isinstance(self.ranks, Mapping):
            return self.ranks
        if name in self.ranks:
            return self.ranks[name]
        pattern = matches(name, list(self.ranks))
        assert pattern is not None
        return self.ranks[pattern]

    def refusal(self, node: fx.Node, reason: Reason) -> Skip:
        """Return the skip of a layer. Raises FxlrdError for one that ``ranks`` names, rather than as part of a glob."""
        name = str(node.target)
        if isinstance(self.ranks, Mapping) and name in self.ranks:
            raise FxlrdError(f"merge: {name} cannot be merged: {reason}")
        return Skip(origin(node), reason)


def original_shape(gm: fx.GraphModule, node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a layer's weight before any merging, also by an earlier compress: α refers to that."""
    capture, recorded = captured(gm), provenance(node)
    if capture is not None and (shape := capture.weight_shapes.get(origin(node))) is not None:
        return shape
    original = recorded.original if recorded is not None else None
    return tuple(as_layer(original or gm.get_submodule(str(node.target))).weight.shape)


def is_shared(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether other nodes call the node's module too, and it has parameters or buffers."""
    target = str(node.target)
    return len(calls(gm, target)) > 1 and bool(gm.get_submodule(target).state_dict())


def put_merged(
    gm: fx.GraphModule,
    node: fx.Node,
    module: nn.Module,
    ranks: tuple[int | None, int | None] = (None, None),
    error: float | None = None,
    *,
    entangled: bool = False,
) -> None:
    """Replace the node's module by a merged one and record that in the provenance.

    ``ranks`` are the channels that it reads and makes, where they are fewer now; ``error`` is the relative error.
    ``entangled`` is that of `Provenance`.
    """
    target = str(node.target)
    gm.set_submodule(target, module)
    recorded = provenance(node) or Provenance(target)
    earlier = recorded.ranks if recorded.role == "merged" and len(recorded.ranks) == 2 else (None, None)
    merged = tuple(new if new is not None else old for new, old in zip(ranks, earlier, strict=True))
    if recorded.role in FACTORS:
        merged = recorded.ranks
    largest = max((e for e in (error, recorded.error) if e is not None), default=None)
    entangled = entangled or recorded.entangled
    changed = replace(recorded, role="merged", ranks=merged, error=largest, channel_error=None, entangled=entangled)
    for call in calls(gm, target):
        provenance.record(call, changed)
