"""Which nodes belong to one change: those of one site, of one place in the graph, or merged into one site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from fxlrd.differences.items import Item
from fxlrd.differences.match import Matching
from fxlrd.differences.model import Edit

LARGEST = 16
"""The most unpaired nodes in one place that are one rewrite; more are two models with nothing in common."""
T = TypeVar("T")
Place = tuple[Item, Item]


class DisjointSets(Generic[T]):
    """A partition in which each element is alone at first: union-find with path compression."""

    def __init__(self) -> None:
        self._parents: dict[T, T] = {}

    def find(self, element: T) -> T:
        """Return the representative of the element's set."""
        root = element
        while root in self._parents:
            root = self._parents[root]
        while element is not root:
            self._parents[element], element = root, self._parents[element]
        return root

    def unite(self, elements: Iterable[T]) -> None:
        """Unite the sets of all elements, under the representative of the first one's."""
        first, *others = map(self.find, elements)
        self._parents |= {root: first for root in others if root is not first}


def group_edits(matching: Matching, edits: Mapping[Item, Edit]) -> tuple[DisjointSets[Item], dict[Item, list[str]]]:
    """Return the nodes in groups, one for each change, and the names of merged sites by a node that they went into.

    ``edits`` are those of `node_edits`. Three rules make groups: nodes of one site; removed and added nodes in the
    same place; removed nodes and the site beside them that they were merged into.
    """
    groups: DisjointSets[Item] = DisjointSets()
    _join_sites(groups, matching)
    places: dict[Place, list[list[Item]]] = {}
    for component in reversed(_components(matching, matching.added)):
        for place in _places(groups, component):
            places.setdefault(place, []).append(component)
    absorbing = {
        (site, weighted)
        for site, items in matching.sites_after.items()
        for weighted in (True, False)
        if _absorbs(items, edits, weighted)
    }
    merged: dict[Item, list[str]] = {}
    for component in _components(matching, matching.removed):
        if _join_place(groups, component, places):
            continue
        if (survivor := _join_survivor(groups, component, absorbing)) is not None:
            merged.setdefault(survivor, []).extend(dict.fromkeys(i.site or i.name for i in component))
    return groups, merged


def _join_sites(groups: DisjointSets[Item], matching: Matching) -> None:
    """Unite the nodes of each pair, and those of each site in both graphs."""
    for x, y in matching.to_after.items():
        groups.unite([y, x])
    for site in matching.sites_before | matching.sites_after:
        groups.unite([*matching.sites_after.get(site, []), *matching.sites_before.get(site, [])])


def _join_place(groups: DisjointSets[Item], removed: Sequence[Item], places: Mapping[Place, list[list[Item]]]) -> bool:
    """Unite removed nodes with added ones between the same neighbours, if there are any; each are used up once."""
    for place in _places(groups, removed):
        while stack := places.get(place):
            added = stack.pop()
            if groups.find(added[0]) is added[0]:  # otherwise they are in another place's group already
                groups.unite([removed[0], *removed, *added])
                return True
    return False


def _join_survivor(
    groups: DisjointSets[Item], removed: Sequence[Item], absorbing: set[tuple[str, bool]]
) -> Item | None:
    """Unite removed nodes with the site, before or else after them, that they were merged into; return a node of it."""
    inside = set(removed)
    weighted = any(i.params for i in removed)
    neighbours = [*(i for item in removed for i in item.inputs), *(i for item in removed for i in item.users)]
    for survivor in neighbours:
        if survivor not in inside and survivor.site is not None and (survivor.site, weighted) in absorbing:
            groups.unite([survivor, *removed])
            return survivor
    return None


def _absorbs(items: Sequence[Item], edits: Mapping[Item, Edit], weighted: bool) -> bool:
    """Whether a site, by its nodes after, may have absorbed removed nodes, with or without weights.

    Its provenance says so or, where it has none, other weights absorbed those of the removed nodes.
    """
    if not any(i in edits and edits[i].kind in ("came", "changed", "values") for i in items):
        return False
    origins = [i.provenance for i in items if i.provenance is not None]
    if origins:
        return any(origin.role == "merged" for origin in origins)
    return weighted and any(i.params for i in items)


def _components(matching: Matching, unpaired: Sequence[Item]) -> list[list[Item]]:
    """Return the connected components of the unpaired nodes whose site only one graph has, each in graph order."""
    alone = {i for i in unpaired if not matching.shares_site(i)}
    components, visited = [], set()
    for start in unpaired:
        if start not in alone or start in visited:
            continue
        component, pending = [], [start]
        while pending:
            item = pending.pop()
            if item in visited:
                continue
            visited.add(item)
            component.append(item)
            pending += [i for i in (*item.inputs, *item.users) if i in alone]
        components.append(sorted(component, key=lambda i: i.index))
    return components


def _places(groups: DisjointSets[Item], component: Sequence[Item]) -> list[Place]:
    """Return the pairs of groups that a component stands between: what it reads, and what reads it."""
    if len(component) > LARGEST:
        return []
    inside = set(component)
    read = dict.fromkeys(groups.find(i) for item in component for i in item.inputs if i not in inside)
    readers = dict.fromkeys(groups.find(i) for item in component for i in item.users if i not in inside)
    return [(p, q) for p in list(read)[:LARGEST] for q in list(readers)[:LARGEST]]
