"""Moments of what layers read: one for all that have read the same tensor in every run.

Query, key and value of an attention read one tensor, gate and up of an MLP another. What tells is the tensor object:
layers of a graph share a node anyway. Readers that go together in the first run in which they are seen share their
moments until one of them reads something else, as an expert may; from then on it has its own.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx

from fxlrd.graph.writes import changes_in_place
from fxlrd.layers.fit import HeldOut, Moments

Axis = tuple[int, int]
"""The axis of a tensor's channels, and how many consecutive entries along it belong to one (after a flatten)."""
Reader = tuple[fx.Node, int, Axis]
"""The node that is read, the number of changes in place since its value was made, and along which axis."""


@dataclass
class _Read:
    """A tensor that was added in this run.

    Attributes:
        reader: the first that read it.
        tensor: the tensor itself.
        version: its number of changes in place.
        before: what was held out before it was added.
        first: whether its reader had read nothing in runs before.
        awaited: other readers with the same moments that have not read it yet.
        values: its values, as long as there are such readers.
    """

    reader: Reader
    tensor: weakref.ref[Tensor]
    version: int
    before: HeldOut
    first: bool
    awaited: set[Reader] = field(default_factory=set)
    values: Tensor | None = None


class CommonReads:
    """Moments by reader. ``rows_of`` gives a tensor as rows of channels (N×C), for a reader.

    Attributes:
        moments: those so far; readers may have one in common.
    """

    def __init__(self, rows_of: Callable[[Reader, Tensor], Tensor]) -> None:
        self.rows_of = rows_of
        self.moments: dict[Reader, Moments] = {}
        self._leaders: dict[Reader, Reader] = {}  # the first of those that share a reader's moments, for the others
        self._run: dict[Reader, _Read] = {}

    def finish_run(self) -> None:
        """Let readers have moments of their own that have not read in this run what the others have read."""
        for read in self._run.values():
            for reader in tuple(read.awaited):
                self._leave(reader)
        self._run = {}

    def add(self, reader: Reader, value: Tensor, channels: int) -> None:
        """Add what a reader reads, once in a run."""
        if self._joins(reader, value, channels):
            return
        if reader in self._leaders:
            self._leave(reader)
        first = reader not in self.moments
        if first:
            self.moments[reader] = Moments.empty(channels, value.device)
        moments = self.moments[reader]
        awaited = {other for other, leader in self._leaders.items() if leader == reader}
        values = value.detach() if awaited else None
        read = _Read(reader, weakref.ref(value), changes_in_place(value), moments.held_out, first, awaited, values)
        moments.add(self.rows_of(reader, value))
        self._run[reader] = read

    def _joins(self, reader: Reader, value: Tensor, channels: int) -> bool:
        """Whether the tensor is in the moments that this reader shares, or shares from now on."""
        for read in self._same(reader, value):
            if reader in read.awaited:
                read.awaited.discard(reader)
                read.values = read.values if read.awaited else None
                return True
            shared = self.moments.get(read.reader)
            if reader not in self.moments and read.first and shared is not None and len(shared.total) == channels:
                self._leaders[reader] = read.reader
                self.moments[reader] = shared
                return True
        return False

    def _same(self, reader: Reader, value: Tensor) -> Iterator[_Read]:
        for read in self._run.values():
            if read.reader[2] == reader[2] and read.tensor() is value and read.version == changes_in_place(value):
                yield read

    def _leave(self, reader: Reader) -> None:
        """Give a reader the moments without what the others have read in this run."""
        shared, read = self.moments[reader], self._run.get(self._leaders.pop(reader))
        own = dataclasses.replace(shared, total=shared.total.clone(), products=shared.products.clone())
        if read is not None and reader in read.awaited:
            read.awaited.discard(reader)
            assert read.values is not None
            if changes_in_place(read.values) == read.version:
                own.remove(self.rows_of(reader, read.values), read.before)
            else:  # changed in place since: its own start anew
                own = Moments.empty(len(shared.total), shared.total.device)
        self.moments[reader] = own
