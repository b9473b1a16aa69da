"""What is known of a node or of a graph: every meta key, each behind a typed accessor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

KEY = "fxlrd"
MOMENTS = "fxlrd.moments"
"""The key of a node's second moments, see fxlrd/calibration/moments.py."""
SEEN = "fxlrd.seen"
"""The key of what calibration saw of a layer, on its call and its factors' calls; see fxlrd/calibration/moments.py."""
KEPT = "fxlrd.kept"
"""The key of the output channels of the original layer that a merged one still makes (a tensor of indices)."""
TIMES = "fxlrd.times"
"""The key of how many calls in one run of the model a node stands for, where those are several; see `times`."""
FACTORS = ("first", "core", "branch", "last")
"""The roles of the parts of a layer that stands decomposed."""


@dataclass(frozen=True)
class Provenance:
    """Where a node comes from.

    ``name`` is the module's name in the captured model, ``role`` one of original, first, core, last, merged,
    branch; ``ranks`` are those of the layer's low-rank form and ``error`` its relative error: of the weight, or of
    the layer's output on calibration inputs if it is ``fitted`` to those. The
    ``original`` module is held by reference, never copied. ``latency`` is the measured time of the layer as
    it now stands, in seconds, where a pass has measured it.
    """

    name: str
    role: str = "original"
    ranks: tuple[int | None, ...] = ()
    error: float | None = None
    latency: float | None = None
    fitted: bool = False
    original: nn.Module | None = field(default=None, compare=False, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Provenance:
        return self


def provenance(node: fx.Node) -> Provenance | None:
    """Return the node's provenance, if it has any."""
    found = node.meta.get(KEY)
    return found if isinstance(found, Provenance) else None


def times(node: fx.Node) -> int:
    """Return how many calls of the same shapes the node stands for: several where a region was called so often."""
    return int(node.meta.get(TIMES, 1))
