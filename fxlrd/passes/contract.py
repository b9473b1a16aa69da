"""What a pass is, and what it hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import fx

from fxlrd.errors import FxlrdError, Reason
from fxlrd.layers.forms import Ranks
from fxlrd.progress import Progress
from fxlrd.timing.clock import Timing

UNNAMED = Reason("unnamed", "ranks= does not name it")
"""The reason of a layer that ``ranks`` by name does not mention."""


@dataclass(frozen=True)
class Site:
    """A layer that a pass rewrote.

    Attributes:
        name: its name in the captured model.
        exact: whether the rewrite is exact in eval mode.
        note: what was done, in words.
        timings: what was measured on the way, by ranks ("original", "32x32").
        ranks: those of its low-rank form now; None where it has none.
        ranks_before: those of its low-rank form before this pass; None where it had none.
    """

    name: str
    exact: bool
    note: str
    timings: dict[str, Timing] = field(default_factory=dict, compare=False)
    ranks: Ranks | None = None
    ranks_before: Ranks | None = None


@dataclass(frozen=True)
class Skip:
    """A layer that a pass left alone, and why."""

    name: str
    reason: Reason


@dataclass(frozen=True)
class PassResult:
    """What a pass returns. Its input is not changed.

    Attributes:
        graph_module: the rewritten copy.
        sites: the layers that were rewritten.
        skipped: the layers that were left alone.
        note: what the pass did to the model, in words.
        timings: what was measured on the way, by layer and ranks ("original", "32x32"), also of layers left alone.
        warnings: what a user should act on.
    """

    graph_module: fx.GraphModule
    sites: tuple[Site, ...] = ()
    skipped: tuple[Skip, ...] = ()
    note: str = ""
    timings: Mapping[str, Mapping[str, Timing]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether any site was rewritten."""
        return bool(self.sites)

    @property
    def exact(self) -> bool:
        """Whether every site is exact in eval mode."""
        return all(site.exact for site in self.sites)


def names(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return names or globs as a tuple; one string is one name. Raises FxlrdError for what is no string."""
    if not isinstance(patterns, (str, Sequence)):
        raise FxlrdError(f"skip: {patterns!r} is not a name or glob of layers")
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise FxlrdError(f"skip: {pattern!r} is not a name or glob of layers")
    return patterns


class Pass(Protocol):
    """What a pipeline runs: a dataclass whose fields are the pass's options."""

    def __call__(self, gm: fx.GraphModule, progress: Progress = ...) -> PassResult:
        """Return the rewritten copy of ``gm``."""
        ...
