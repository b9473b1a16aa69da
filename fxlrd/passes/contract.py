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
    """A layer that a pass rewrote: its name in the captured model, whether that was exact in eval mode, and
    what was done, in words.

    ``ranks`` are those of its low-rank form now, ``ranks_before`` those that it had before this pass; None where it has
    no such form. ``timings`` holds what was measured on the way, by ranks ("original", "32x32").
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
    """The rewritten graph module, and what was rewritten and skipped. The pass's input is not changed.

    ``note`` is what there is to say of the whole, in words; ``warnings`` are what a user should act on. ``timings``
    holds what was measured on the way, by layer and ranks ("original", "32x32"), also of layers that stay as they are.
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


def names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return names or globs as a tuple; one string is one name."""
    found = (given,) if isinstance(given, str) else tuple(given)
    for name in found:
        if not isinstance(name, str):
            raise FxlrdError(f"skip: {name!r} is not a name or glob of layers")
    return found


class Pass(Protocol):
    """What a pipeline runs: a dataclass whose fields are the pass's options."""

    def __call__(self, gm: fx.GraphModule, progress: Progress = ...) -> PassResult:
        """Return the rewritten copy of ``gm``."""
        ...
