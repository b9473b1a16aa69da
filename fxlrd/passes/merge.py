"""merge: as many layers as before or fewer, with fewer parameters, in one of three modes.

interpolative (approximate, the default; fxlrd/passes/_interpolate.py)
    Layers retain some of their channels, and those that read them interpolate the others. Needs `calibrate`.

        producer ─ BN ─ ReLU ─ consumer   →   producer[S] ─ BN[S] ─ ReLU ─ consumer·T

exact (fxlrd/passes/_compose.py)
    Neighbours with only affine operations between become one layer, where that costs less.

        1×1 ─ BN ─ k×k   →   k×k

relocate (approximate, needs fine-tuning; fxlrd/passes/_relocate.py)
    The paper's Fig. 3: a k×k conv between two 1×1 convs moves into rank space, with BN and activation.

        1×1 ─ BN ─ act ─ k×k ─ BN ─ act ─ 1×1   →   U·1×1 ─ BN' ─ act ─ core ─ BN' ─ act ─ 1×1·V
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

from torch import fx

from fxlrd.errors import FxlrdError, unknown
from fxlrd.graph.captured import refresh_shapes
from fxlrd.passes._compose import Compose
from fxlrd.passes._interpolate import Interpolate
from fxlrd.passes._relocate import Relocate
from fxlrd.passes.contract import PassResult, names
from fxlrd.passes.driver import start
from fxlrd.progress import Progress, quiet
from fxlrd.ranks import check_ratio
from fxlrd.timing.clock import Timer, compare
from fxlrd.timing.inductor import Compile

Rewrite = Interpolate | Compose | Relocate
MODES: dict[str, type[Rewrite]] = {"interpolative": Interpolate, "exact": Compose, "relocate": Relocate}
"""The rewrite of each mode; its fields are the options that the mode reads."""


@dataclass(frozen=True)
class Merge:
    """Fold factors into neighbouring layers; see the module docstring for ``mode``.

    Options of a mode that does not read them must stay at their defaults:

    - interpolative and relocate: ``ratio`` is the compression ratio α, from which the number r of channels or ranks
      follows. ``ranks`` overrides that: one int, or a mapping from the names or globs of producers to r, in which case
      only those are merged. A residual stream is cut where one of the layers that are added up is named, as a whole.
    - all: ``skip`` takes names and globs of layers to leave alone, with every group of layers that has one of them.
    - exact: ``norms`` folds conv–BN pairs too.
    - interpolative: ``snap`` moves r down to a hardware multiple (not below ``floor``·r) where timing the group's
      layers says that it pays, as `Snap` does; ``compile`` times under Inductor, ``seconds`` bounds the timing of one
      group.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    mode: str = "interpolative"
    ratio: float = 2.75
    ranks: int | Mapping[str, int] | None = None
    skip: tuple[str, ...] = ()
    norms: bool = False
    snap: bool = False
    floor: float = 0.75
    compile: Compile = False
    seconds: float = 1.5
    timer: Timer = field(default=compare, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode of merge", self.mode, MODES)
        check_ratio(self.ratio)
        object.__setattr__(self, "skip", names(self.skip))
        if not 0 < self.floor <= 1:
            raise FxlrdError(f"merge: floor={self.floor} is not a fraction of the channels in (0, 1]")
        if not self.seconds > 0:
            raise FxlrdError(f"merge: seconds={self.seconds} leaves no time to measure")
        for rank in self.ranks.values() if isinstance(self.ranks, Mapping) else [self.ranks]:
            if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
                raise FxlrdError(f"merge: ranks={rank}: a rank is a whole number of at least 1")
        for option in fields(self):
            if option.name not in self.reads and getattr(self, option.name) != option.default:
                read = ", ".join(f.name for f in fields(self)[1:] if f.name in self.reads and f.repr)
                raise FxlrdError(f"merge: mode {self.mode} does not read {option.name}; it reads {read}")

    @property
    def reads(self) -> tuple[str, ...]:
        """The options that the mode reads."""
        return ("mode", *(f.name for f in fields(MODES[self.mode])))

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a merged copy of ``gm``.

        Raises FxlrdError for a name that fits no layer, and for a producer named in ``ranks`` that cannot be cut.
        """
        run = start(self, gm, progress, named=self.skip)
        rewrite = MODES[self.mode](**{name: getattr(self, name) for name in self.reads[1:]})
        rewrite.rewrite(run)
        result = run.result()
        if result.modified:
            refresh_shapes(result.graph_module)
        return result
