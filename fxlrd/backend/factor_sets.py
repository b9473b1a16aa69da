"""Factors of the weights that one compiled graph is called with, retained for the last few models.

Factors are still those of their weights if two things hold. The fingerprint is the same: which tensors they are, their
version counters, which in-place operations of torch increment (load_state_dict, copy_, an optimizer's step unless it is
fused), and the addresses of their data (``p.data = …``). And so is a sample of what they hold, for writes that torch
does not count (fxlrd/backend/contents.py). A write of the second kind that misses every sampled entry cannot be
detected: of single entries or rows of a large weight. After such a write, call
``torch.autograd.graph.increment_version(model.parameters())``.

Weak references report when a storage is freed. So the factors keep no weight alive, and no new tensor at an old address
is taken for the old one. There are none to the tensors: ``torch.utils.swap_tensors`` refuses tensors that have some.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor

from fxlrd.backend.contents import Contents

LIMIT = 4
"""Number of factor sets that one compiled graph retains, for models that take turns."""

Fingerprint = tuple[tuple[Any, ...], ...]

_version = attrgetter("_version")
address = Tensor.data_ptr


def fingerprint(weights: Sequence[Tensor]) -> Fingerprint:
    """Return the identities, the version counters and the data addresses of ``weights``."""
    return tuple(map(id, weights)), tuple(map(_version, weights)), tuple(map(address, weights))


@dataclass(eq=False)
class FactorSet:
    """The factors of weights with this fingerprint and these contents, and the compiled graph that takes them."""

    fingerprint: Fingerprint | None
    contents: Contents
    factors: tuple[Tensor, ...]
    run: Callable[..., Any]
    references: list[Any] = field(default_factory=list)


_EMPTY = FactorSet(None, Contents(()), (), lambda *_: None)


class FactorSets:
    """At most ``LIMIT`` factor sets, the newest first in ``retained``; ``latest`` is the one of the last call."""

    def __init__(self) -> None:
        self.retained: list[FactorSet] = []
        self.latest = _EMPTY

    def find(self, fingerprint: Fingerprint, weights: Sequence[Tensor]) -> FactorSet | None:
        """Return the set of these weights, which have this fingerprint, if there is one, and make it the latest."""
        for candidate in self.retained:
            if candidate.fingerprint == fingerprint and candidate.contents.same(weights):
                self.latest = candidate
                return candidate
        return None

    def add(self, new: FactorSet, weights: Sequence[Tensor]) -> FactorSet:
        """Retain ``new`` until the storage of one of its ``weights`` is freed.

        It takes the place of a set for earlier values of the same tensors.
        """
        owner = weakref.ref(self)

        def freed(_: Any) -> None:
            if (self := owner()) is not None:
                self._remove(new)

        new.references = [weakref.ref(w.untyped_storage(), freed) for w in weights]
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
