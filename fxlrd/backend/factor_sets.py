"""Factors of the weights that one compiled graph is called with, retained for the last few models.

A fingerprint of weights tells whether factors are still theirs: which tensors they are, their version counters, which
every in-place operation of torch increments (an optimizer's step, load_state_dict, copy_), and the addresses of their
data (``p.data = …``). Weak references report when a tensor or its storage is freed. So the factors keep neither alive,
and no new tensor at an old address is taken for the old one.

What torch itself does not count cannot be detected: a write through ``p.data`` (``p.data.copy_``, ``p.data.add_``),
through NumPy or from another process. After such a write, call
``torch.autograd.graph.increment_version(model.parameters())``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor

LIMIT = 4
"""Number of factor sets that one compiled graph retains, for models that take turns."""

Fingerprint = tuple[tuple[Any, ...], ...]

_version = attrgetter("_version")
_address = Tensor.data_ptr


def fingerprint(weights: Sequence[Tensor]) -> Fingerprint:
    """Return the identities, the version counters and the data addresses of ``weights``."""
    return tuple(map(id, weights)), tuple(map(_version, weights)), tuple(map(_address, weights))


@dataclass(eq=False)
class FactorSet:
    """The factors of weights with this fingerprint, and the compiled graph that takes them."""

    fingerprint: Fingerprint | None
    factors: tuple[Tensor, ...]
    run: Callable[..., Any]
    references: list[Any] = field(default_factory=list)


_EMPTY = FactorSet(None, (), lambda *_: None)


class FactorSets:
    """At most ``LIMIT`` factor sets, the newest first in ``retained``; ``latest`` is the one of the last call."""

    def __init__(self) -> None:
        self.retained: list[FactorSet] = []
        self.latest = _EMPTY

    def find(self, fingerprint: Fingerprint) -> FactorSet | None:
        """Return the set of weights with this fingerprint, if there is one, and make it the latest."""
        for candidate in self.retained:
            if candidate.fingerprint == fingerprint:
                self.latest = candidate
                return candidate
        return None

    def add(self, new: FactorSet, weights: Sequence[Tensor]) -> FactorSet:
        """Retain ``new`` until one of its ``weights`` or their storages is freed.

        It takes the place of a set for earlier values of the same tensors.
        """
        owner = weakref.ref(self)

        def freed(_: Any) -> None:
            if (self := owner()) is not None:
                self._remove(new)

        new.references = [weakref.ref(thing, freed) for w in weights for thing in (w, w.untyped_storage())]
        others = [s for s in self.retained if not _same_tensors(s, new)]
        self.retained = [new, *others][:LIMIT]
        self.latest = new
        return new

    def _remove(self, old: FactorSet) -> None:
        self.retained = [s for s in self.retained if s is not old]
        if self.latest is old:
            self.latest = _EMPTY


def _same_tensors(a: FactorSet, b: FactorSet) -> bool:
    return a.fingerprint is not None and b.fingerprint is not None and a.fingerprint[0] == b.fingerprint[0]
