"""Which node of one graph corresponds to which node of another.

There are two steps. *Exact* pairs rest on identity: arguments and outputs, the same module object under any name, and
modules of one site that each graph calls once under one name. For graphs that carry provenance, these are all
the layers. *Heuristic* pairs serve functions, and graphs without provenance: nodes that do the same to paired
inputs, nodes that are read by paired nodes in the same way, then nodes of equal name that do the same.

Each step is linear in the number of nodes: a node is compared with at most `_CANDIDATES` others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from torch import nn

from fxlrd.differences.items import Item

_CANDIDATES = 16
"""The most candidates for one node that are compared: of hundreds of equal readers of a node, the first will do."""
_ROUNDS = 3
_ENDS = ("placeholder", "output")
Key = Callable[[Item], Hashable]


@dataclass
class Matching:
    """Pairs of nodes of two graphs, in both directions, and the nodes of each graph by site."""

    before: list[Item]
    after: list[Item]
    to_after: dict[Item, Item] = field(default_factory=dict)
    to_before: dict[Item, Item] = field(default_factory=dict)
    sites_before: dict[str, list[Item]] = field(default_factory=dict)
    sites_after: dict[str, list[Item]] = field(default_factory=dict)

    @property
    def removed(self) -> list[Item]:
        """The nodes of the graph before that have no counterpart."""
        return [i for i in self.before if i not in self.to_after]

    @property
    def added(self) -> list[Item]:
        """The nodes of the graph after that have no counterpart."""
        return [i for i in self.after if i not in self.to_before]

    def pair(self, x: Item, y: Item) -> None:
        """Record ``y`` of the graph after as the counterpart of ``x`` of the graph before."""
        self.to_after[x], self.to_before[y] = y, x

    def index_sites(self) -> None:
        """Group the nodes of each graph by site; sites must not change afterwards."""
        for items, sites in ((self.before, self.sites_before), (self.after, self.sites_after)):
            for item in items:
                if item.site is not None:
                    sites.setdefault(item.site, []).append(item)

    def shares_site(self, item: Item) -> bool:
        """Whether both graphs have nodes of the item's site."""
        return item.site is not None and item.site in self.sites_before and item.site in self.sites_after

    def agree(self, x: Item, y: Item) -> bool:
        """Whether the two are a pair or, where one of them has no counterpart, of the same site."""
        counterpart = self.to_after.get(x)
        if counterpart is not None and y in self.to_before:
            return counterpart is y
        return x.site is not None and x.site == y.site


def match(before: list[Item], after: list[Item]) -> Matching:
    """Pair the nodes of two graphs, as the module docstring says."""
    matching = Matching(before, after)
    _match_exactly(matching)
    _match_heuristically(matching)
    return matching


def _by_site(item: Item) -> Hashable:
    return None if item.site is None else (item.site, item.target)


def _match_exactly(matching: Matching) -> None:
    _match_ends(matching)
    _match_unique(matching, lambda i: id(i.owner) if isinstance(i.owner, nn.Module) else None)
    _adopt_outer_sites(matching)
    matching.index_sites()
    _match_unique(matching, _by_site)


def _match_ends(matching: Matching) -> None:
    """Pair arguments by name, the others in order if their numbers are equal, and the outputs."""
    arguments = [[i for i in items if i.op == "placeholder"] for items in (matching.before, matching.after)]
    by_name = {i.target: i for i in arguments[0]}
    for y in arguments[1]:
        if y.target in by_name:
            matching.pair(by_name[y.target], y)
    removed = [i for i in arguments[0] if i not in matching.to_after]
    added = [i for i in arguments[1] if i not in matching.to_before]
    if len(removed) == len(added):
        for x, y in zip(removed, added, strict=True):
            matching.pair(x, y)
    outputs = [[i for i in items if i.op == "output"] for items in (matching.before, matching.after)]
    for x, y in zip(*outputs, strict=False):
        matching.pair(x, y)


def _adopt_outer_sites(matching: Matching) -> None:
    """Give a site that one graph lacks the name of an enclosing module that only the other graph calls.

    So ``conv.first`` and ``conv.last`` of one graph are of the site ``conv`` of the other.
    """
    names_before, names_after = ({item.site for item in items} for items in (matching.before, matching.after))
    for items, own_names, other_names in (
        (matching.before, names_before, names_after),
        (matching.after, names_after, names_before),
    ):
        for item in items:
            is_paired = item in matching.to_after or item in matching.to_before
            if item.site is None or item.site in other_names or is_paired:
                continue
            outer = item.site
            while outer := outer.rpartition(".")[0]:
                if outer in other_names and outer not in own_names:
                    item.site = item.path = outer
                    break


def _unmatched(matching: Matching, key: Key) -> tuple[dict[Hashable, list[Item]], dict[Hashable, list[Item]]]:
    """Return the nodes without counterpart of both graphs by their key, without those whose key is None."""
    removed: dict[Hashable, list[Item]] = {}
    added: dict[Hashable, list[Item]] = {}
    for items, groups in ((matching.removed, removed), (matching.added, added)):
        for item in items:
            if item.op not in _ENDS and (k := key(item)) is not None:
                groups.setdefault(k, []).append(item)
    return removed, added


def _match_unique(matching: Matching, key: Key) -> None:
    """Pair two nodes whose key no other node of either graph has."""
    removed, added = _unmatched(matching, key)
    for k, before in removed.items():
        after = added.get(k, [])
        if len(before) == len(after) == 1:
            matching.pair(before[0], after[0])


def _match_heuristically(matching: Matching) -> None:
    _match_neighbours(matching)
    _match_in_order(matching, _by_site)
    _match_unique(matching, lambda i: (i.name, _kind(matching, i)))
    _match_neighbours(matching)


def _match_in_order(matching: Matching, key: Key) -> None:
    removed, added = _unmatched(matching, key)
    for k, before in removed.items():
        for x, y in zip(before, added.get(k, []), strict=False):
            matching.pair(x, y)


def _kind(matching: Matching, item: Item) -> Hashable:
    """Return what two nodes must have in common to be a pair."""
    if item.site is None:
        return (item.op, item.target)
    return (item.op, item.site, item.target) if matching.shares_site(item) else (item.op, item.text)


def _match_neighbours(matching: Matching) -> None:
    """Pair nodes by their inputs and by their users: first if all of those agree, then if half of them do."""
    for least in (1.0, 0.5):
        for _ in range(_ROUNDS):
            count = len(matching.to_after)
            _match_by_inputs(matching, least)
            _match_by_users(matching, least)
            if len(matching.to_after) == count:
                break


def _match_by_inputs(matching: Matching, least: float) -> None:
    """Pair, in the order of the graph, nodes of which at least the share ``least`` of inputs agrees."""

    def agreement(x: Item, y: Item) -> float:
        same = sum(matching.agree(p, q) for p, q in zip(x.inputs, y.inputs, strict=False))
        return same / max(len(x.inputs), len(y.inputs))

    users = _Neighbours(matching, lambda x: x.users)
    for y in matching.after:
        _match_best(matching, y, users.like(y, y.inputs), agreement, least)


def _match_by_users(matching: Matching, least: float) -> None:
    """Pair, against the order of the graph, nodes of which at least the share ``least`` of users agrees."""

    def agreement(x: Item, y: Item) -> float:
        users, sites = set(y.users), {q.site for q in y.users if q.site is not None}
        same = sum(matching.to_after[p] in users if p in matching.to_after else p.site in sites for p in x.users)
        return same / max(len(x.users), len(y.users))

    inputs = _Neighbours(matching, lambda x: x.inputs[::-1])
    for y in reversed(matching.after):
        _match_best(matching, y, inputs.like(y, y.users), agreement, least)


def _match_best(
    matching: Matching, y: Item, candidates: Iterator[Item], agreement: Callable[[Item, Item], float], least: float
) -> None:
    """Pair ``y`` with the candidate that agrees best; among equals, one that is configured or named alike."""
    if y in matching.to_before or y.op in _ENDS:
        return
    scored = [
        ((agreement(x, y), (x.call, x.text) == (y.call, y.text), x.name == y.name), x)
        for x in dict.fromkeys(candidates)
    ]
    if scored:
        score, best = max(scored, key=lambda pair: pair[0])
        if score[0] >= least:
            matching.pair(best, y)


class _Neighbours:
    """The neighbours of nodes of the graph before that have no counterpart, by their kind."""

    def __init__(self, matching: Matching, neighbours: Callable[[Item], Sequence[Item]]) -> None:
        self._matching, self._neighbours = matching, neighbours
        self._by_kind: dict[Item, dict[Hashable, deque[Item]]] = {}

    def like(self, y: Item, anchors: Sequence[Item]) -> Iterator[Item]:
        """Yield candidates for ``y``: neighbours, of its kind, of the counterparts of ``anchors``."""
        kind = _kind(self._matching, y)
        for anchor in anchors:
            for x in _counterparts(self._matching, anchor):
                queue = self._of(x).get(kind, deque())
                while queue and queue[0] in self._matching.to_after:
                    queue.popleft()
                yield from [x for x in islice(queue, _CANDIDATES) if x not in self._matching.to_after]

    def _of(self, x: Item) -> dict[Hashable, deque[Item]]:
        if x not in self._by_kind:
            groups = self._by_kind[x] = {}
            for item in self._neighbours(x):
                groups.setdefault(_kind(self._matching, item), deque()).append(item)
        return self._by_kind[x]


def _counterparts(matching: Matching, item: Item) -> Sequence[Item]:
    """Return the nodes of the graph before that may stand where ``item`` stands in the graph after.

    Of a site with more nodes than `_CANDIDATES`, these are those at the same relative position.
    """
    if item in matching.to_before:
        return [matching.to_before[item]]
    if item.site is None or item.site not in matching.sites_before:
        return []
    before, after = matching.sites_before[item.site], matching.sites_after[item.site]
    if len(before) <= _CANDIDATES:
        return before
    middle = bisect_left(after, item.index, key=lambda i: i.index) * len(before) // len(after)
    start = min(max(0, middle - _CANDIDATES // 2), len(before) - _CANDIDATES)
    return before[start : start + _CANDIDATES]
