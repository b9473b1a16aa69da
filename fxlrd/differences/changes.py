"""Edits to changes: which nodes belong to one site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.differences.match import Item, Matching
from fxlrd.differences.model import _LARGEST, KINDS, Change, Edit
from fxlrd.graph.facts import FACTORS


class _Grouping:
    """Makes changes of what is not the same: first of nodes, then of sites, then of those that belong together."""

    def __init__(self, found: Matching, shapes: bool, values: bool, passes: Sequence[Mapping[str, Any]]) -> None:
        self.found, self.shapes, self.values, self.passes = found, shapes, values, passes
        self.same_as: dict[Item, Item] = {}
        """A node of the same group, of all but one node of each; see `_root`."""
        self.takes: dict[str, set[bool]] = {}
        """See `_takes`; of each site once, as it may have thousands of nodes."""
        self.before: dict[Item, list[Item]] = {}
        """Of each node that went or came and has nothing of the other side in its place, the first before it that have.

        In order, so that a chain of thousands is walked once.
        """
        self.places: dict[Item, int] = {}
        """The place of each argument among those that both graphs have: a call may give them in order."""
        for items, pairs in ((found.a, found.to_b), (found.b, found.to_a)):
            ends = [i for i in items if i.op == "placeholder" and i in pairs]
            self.places |= {i: n for n, i in enumerate(ends, 1)}
        self.left_a = [i for i in found.a if i not in found.to_b]
        self.left_b = [i for i in found.b if i not in found.to_a]
        self.edits: dict[Item, Edit] = {}
        self.compared: dict[tuple[int, int], list[tuple[str, str]]] = {}

    def changes(self) -> tuple[tuple[Change, ...], tuple[str, ...]]:
        """Return the changes in the order of the graph, and the names of the nodes that are untouched."""
        found = self.found
        for x, y in found.to_b.items():
            if (edit := self._of_itself(x, y)) is not None:
                self.edits[y] = edit
        for item in self.left_a:
            self.edits[item] = Edit("went", item, None)
        for item in self.left_b:
            self.edits[item] = Edit("came", None, item)
        merged = self._join()
        replaced = {self._root(i) for i in self.left_a} & {self._root(i) for i in self.left_b}
        for item in (*self.left_a, *self.left_b):
            if self._root(item) not in replaced:
                firsts = dict.fromkeys(i for near in item.inputs for i in self.before.get(near, [near]))
                self.before[item] = list(firsts)[:_LARGEST]
        for x, y in found.to_b.items():
            if (edit := self._of_place(x, y)) is not None:
                self.edits[y] = edit
        groups: dict[Item, list[Edit]] = {}
        for edit in self.edits.values():
            groups.setdefault(self._root(edit.after or edit.before), []).append(edit)  # type: ignore[arg-type]
        rank = _positions(found)
        changes = []
        for root, edits in groups.items():
            edits.sort(key=lambda e: min(rank[i] for i in (e.before, e.after) if i is not None))
            changes.append(self._change(root, edits, merged.get(root, [])))
        changes.sort(key=lambda c: min(rank[i] for e in c.edits for i in (e.before, e.after) if i is not None))
        return tuple(changes), tuple(i.name for i in found.b if i not in self.edits)

    # -- nodes

    def _of_itself(self, x: Item, y: Item) -> Edit | None:
        """Return in what a pair of nodes computes something else, if it does."""
        what = []
        kinds = []
        casts = self.shapes and None not in (x.dtype, y.dtype) and x.dtype != y.dtype
        if x.text != y.text or x.call != y.call or casts:
            kinds.append("changed")
            what += [f"{p} → {q}" for p, q in ((x.text, y.text), (x.call, y.call)) if p != q][:1]
            what += [f"{x.dtype} → {y.dtype}".replace("torch.", "")] if casts else []
        if x.target != y.target and x.op == y.op and x.op != "output":
            kinds.append("renamed")
            what.append(f"{x.target} → {y.target}")
        if x.text == y.text:
            for kind, text in self._weights(x.owner, y.owner):
                kinds.append(kind)
                what.append(text)
        if self.shapes and None not in (x.shape, y.shape) and x.shape != y.shape:
            kinds.append("reshaped")
        return Edit(min(kinds, key=KINDS.index), x, y, tuple(what)) if kinds else None

    def _weights(self, a: Any, b: Any) -> list[tuple[str, str]]:
        """Return (kind, words) on the weights of two modules of one configuration, or of two tensors."""
        if a is b or not self.values:
            return []
        key = (id(a), id(b))
        if key not in self.compared:
            self.compared[key] = _weights(a, b)
        return self.compared[key]

    def _of_place(self, x: Item, y: Item) -> Edit | None:
        """Return the pair's edit, with that it stands elsewhere or reads something else, if it does."""
        edit = self.edits.get(y)
        if x.op == "placeholder" and self.places[x] != self.places[y]:
            what = f"argument {self.places[y]} instead of {self.places[x]}"
        elif len(x.inputs) != len(y.inputs) or all(
            self._same_source(p, q) for p, q in zip(x.inputs, y.inputs, strict=True)
        ):
            return edit
        else:
            what = f"reads {', '.join(i.name for i in y.inputs)} instead of {', '.join(i.name for i in x.inputs)}"
        kind = "moved" if edit is None else min(edit.kind, "moved", key=KINDS.index)
        return Edit(kind, x, y, (*(edit.what if edit is not None else ()), what))

    def _same_source(self, p: Item, q: Item) -> bool:
        """Whether an input is the counterpart of another, but for nodes that were put in or taken out between."""
        if self._agree(p, q):
            return True
        here, there = self._sources(p), self._sources(q)
        if len(here) == len(there) == 1 and here == [p] and there == [q]:
            return False
        return any(self._agree(i, j) for i in here for j in there)

    def _agree(self, p: Item, q: Item) -> bool:
        if self.found.to_b.get(p) is q:
            return True
        loose = p not in self.found.to_b or q not in self.found.to_a
        return loose and self._root(p) is self._root(q)

    def _sources(self, item: Item) -> list[Item]:
        """Return the node and, where it went or came alone, the first before it that have a counterpart or a place."""
        return [item, *self.before.get(item, ())]

    # -- sites

    def _root(self, item: Item) -> Item:
        while (above := self.same_as.get(item)) is not None:
            item = above
        return item

    def _unite(self, items: Sequence[Item]) -> None:
        first = self._root(items[0])
        for item in items[1:]:
            root = self._root(item)
            if root is not first:
                self.same_as[root] = first

    def _join(self) -> dict[Item, list[str]]:
        """Make groups of nodes: of one site, put in one place, merged into another. Returns names of merged sites."""
        for x, y in self.found.to_b.items():
            self._unite([y, x])
        for site, here in self.found.sites_a.items():
            there = self.found.sites_b.get(site, [])
            self._unite([*there, *here])
        for site, there in self.found.sites_b.items():
            self._unite([*there, *self.found.sites_a.get(site, [])])
        gone = self._parts(self.left_a)
        come = self._parts(self.left_b)
        places: dict[tuple[Item, Item], list[list[Item]]] = {}
        for part in reversed(come):
            if len(part) <= _LARGEST:
                for place in self._between(part):
                    places.setdefault(place, []).append(part)
        merged: dict[Item, list[str]] = {}
        for part in gone:
            into = self._taken(places, part) if len(part) <= _LARGEST else None
            if into is not None:
                self._unite([part[0], *part, *into])
                continue
            survivor = self._survivor(part)
            if survivor is not None:
                names = list(dict.fromkeys(i.site or i.name for i in part))
                self._unite([survivor, *part])
                merged.setdefault(self._root(survivor), []).extend(names)
        return merged

    def _taken(self, places: dict[tuple[Item, Item], list[list[Item]]], part: Sequence[Item]) -> list[Item] | None:
        """Return the part that came into the place of ``part``, in order if there are several, and take it out."""
        for place in self._between(part):
            while stack := places.get(place):
                other = stack.pop()
                if other[0] not in self.same_as:
                    return other
        return None

    def _parts(self, left: Sequence[Item]) -> list[list[Item]]:
        """Return the nodes that have no counterpart, and are of no site that both have, by what hangs together."""
        alone = {i for i in left if not self.found.both(i)}
        parts, seen = [], set()
        for start in left:
            if start not in alone or start in seen:
                continue
            part, pending = [], [start]
            while pending:
                item = pending.pop()
                if item in seen:
                    continue
                seen.add(item)
                part.append(item)
                pending += [i for i in (*item.inputs, *item.users) if i in alone]
            parts.append(sorted(part, key=lambda i: i.index))
        return parts

    def _between(self, part: Sequence[Item]) -> list[tuple[Item, Item]]:
        """Return what stands before and after a part, as pairs of groups."""
        inside = set(part)
        before = dict.fromkeys(self._root(i) for item in part for i in item.inputs if i not in inside)
        after = dict.fromkeys(self._root(i) for item in part for i in item.users if i not in inside)
        return [(p, q) for p in list(before)[:_LARGEST] for q in list(after)[:_LARGEST]]

    def _survivor(self, part: Sequence[Item]) -> Item | None:
        """Return a node of what a part that is gone was merged into, if it was."""
        inside = set(part)
        weighs = any(i.params for i in part)
        for near in ([i for item in part for i in item.inputs], [i for item in part for i in item.users]):
            for item in near:
                if item not in inside and item.site is not None and self._took(item.site, weighs):
                    return item
        return None

    def _took(self, site: str, weighs: bool) -> bool:
        """Whether a site that is left took in a part: it says so or, where it has no provenance, has other weights."""
        if site not in self.takes:
            self.takes[site] = self._takes(site)
        return weighs in self.takes[site]

    def _takes(self, site: str) -> set[bool]:
        """Return of which parts a site may have taken one in: with parameters (True), without."""
        there = self.found.sites_b.get(site, [])
        if not any(i in self.edits and self.edits[i].kind in ("came", "changed", "values") for i in there):
            return set()
        if any(i.known is not None for i in there):
            return {True, False} if any(i.known is not None and i.known.role == "merged" for i in there) else set()
        return {True} if any(i.params for i in there) else set()

    # -- changes

    def _change(self, root: Item, edits: Sequence[Edit], merged: Sequence[str]) -> Change:
        gone = [e.before for e in edits if e.kind == "went" and e.before is not None]
        came = [e.after for e in edits if e.kind == "came" and e.after is not None]
        rest = [e for e in edits if e.before is not None and e.after is not None]
        named = [i for e in edits for i in (e.before, e.after) if i is not None and (i.site or i.name) not in merged]
        first = next((i for i in named if i.site is not None and self.found.both(i)), named[0])
        name = first.site or first.name
        here, there = self._all(first, edits, 0), self._all(first, edits, 1)
        if merged:
            kind = "merged"
        elif gone and came:
            kind = "rewritten"
        elif gone or came:
            kind = "rewritten" if any(e.kind != "reshaped" for e in rest) else "removed" if gone else "added"
        else:
            kind = min((e.kind for e in rest), key=KINDS.index)
        entries = [(p["text"], p["sites"][name]) for p in self.passes if name in p["sites"]]
        timings: Any = next((t for _, (_, t) in reversed(entries) if "original" in t), {})
        figures = _of_sites(here, there)
        if figures["latency_ms_before"] is None and timings and not any(_factor(i) for i in here):
            figures["latency_ms_before"] = timings["original"].seconds * 1e3
        return Change(
            name,
            kind,
            tuple(edits),
            first.path,
            _form(here, there),
            tuple(merged),
            tuple(text for text, _ in entries),
            tuple(note for _, (note, _) in entries),
            figures,
        )

    def _all(self, first: Item, edits: Sequence[Edit], side: int) -> list[Item]:
        """Return the nodes of one side of a change, those of its site that are the same included."""
        given = [e.before if side == 0 else e.after for e in edits]
        sites = self.found.sites_b if side else self.found.sites_a
        return list(dict.fromkeys([*(i for i in given if i is not None), *sites.get(first.site or "", [])]))


def _positions(found: Matching) -> dict[Item, tuple[float, int, int]]:
    """Return where in the order of both graphs a node stands: by what follows in after, went before came."""
    rank: dict[Item, tuple[float, int, int]] = {}
    for y in found.b:
        rank[y] = (y.index, 1, y.index)
    last = -1.0
    for x in found.a:
        if x in found.to_b:
            index = found.to_b[x].index
            last = max(last, index)
            rank[x] = (index, 0, x.index)
        else:
            rank[x] = (last + 0.5, 0, x.index)
    return rank


def _of_sites(here: Sequence[Item], there: Sequence[Item]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for suffix, items in (("_before", here), ("", there)):
        ranks = next((i.known.ranks for i in items if i.known is not None and any(i.known.ranks)), None)
        errors = [i.known.error for i in items if i.known is not None and i.known.error is not None]
        times = [i.known.latency for i in items if i.known is not None and i.known.latency is not None]
        owned = {(id(i.owner)): i.params for i in items if i.owner is not None}
        flops = [i.flops for i in items if i.flops is not None]
        figures[f"ranks{suffix}"] = None if ranks is None else list(ranks)
        figures[f"params{suffix}"] = sum(owned.values())
        figures[f"flops{suffix}"] = sum(flops) if flops else None
        figures[f"latency_ms{suffix}"] = times[0] * 1e3 if times else None
        figures[f"error{suffix}"] = max(errors) if errors else None
    factors = [i.known for i in there if i.known is not None and i.known.role in FACTORS]
    figures["error_of"] = ("output" if factors[0].fitted else "weight") if factors else None
    return figures


def _factor(item: Item) -> bool:
    return item.known is not None and item.known.role in FACTORS


def _form(here: Sequence[Item], there: Sequence[Item]) -> str | None:
    """Return the form that a site has now, if its provenance tells."""
    roles = {i.known.role for i in there if i.known is not None}
    if "branch" in roles:
        return "branched"
    if "core" in roles:
        return "tucker2"
    if roles & set(FACTORS):
        return "svd"
    if "merged" in roles:
        return "merged"
    return "original" if "original" in roles and any(_factor(i) for i in here) else None


def _weights(a: Any, b: Any) -> list[tuple[str, str]]:
    sides = [_tensors(a), _tensors(b)]
    if sides[0].keys() != sides[1].keys():
        names = sorted(sides[0].keys() ^ sides[1].keys())
        return [("changed", f"only one side has {', '.join(names)}")]
    found, trains = [], []
    for name, x in sides[0].items():
        y = sides[1][name]
        if (text := _moved(x, y)) is not None:
            found.append(("values", f"{name} {text}".strip()))
        if x.requires_grad != y.requires_grad:
            trains.append(f"{name} {'trains' if y.requires_grad else 'is frozen'}".strip())
    return [*found, *(("trainable", text) for text in trains)]


def _tensors(owner: Any) -> dict[str, Tensor]:
    if isinstance(owner, Tensor):
        return {"": owner}
    if not isinstance(owner, nn.Module):
        return {}
    return {**dict(owner.named_parameters()), **dict(owner.named_buffers())}


def _moved(x: Tensor, y: Tensor) -> str | None:
    """Return in words how two tensors differ, None where they do not."""
    if x is y:
        return None
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{str(x.dtype)[6:]}{list(x.shape)} → {str(y.dtype)[6:]}{list(y.shape)}"
    if x.is_meta or y.is_meta:
        return None
    x, y = x.detach(), y.detach().to(x.device)
    if x.layout != y.layout:
        return f"{str(x.layout)[6:]} → {str(y.layout)[6:]}"
    if x.layout != torch.strided:
        x, y = x.to_dense(), y.to_dense()
    if torch.equal(x, y):
        return None
    if not (x.is_floating_point() or x.is_complex()):
        return "is another"
    wide = torch.complex128 if x.is_complex() else torch.float64
    x, y = x.to(wide), y.to(wide)
    same = (x == y) | (x.isnan() & y.isnan())
    if bool(same.all()):
        return None
    if not x.count_nonzero():
        return "was zero"
    gap = torch.where(same, torch.zeros_like(x), y - x).norm().item() / x.norm().item()
    return f"moved by {gap:.2g}"
