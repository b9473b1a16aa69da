"""What differs between two graphs: diff(before, after).

Nodes are paired (fxlrd/match.py), and what is not the same is told by *site*, the original module's name. A change is

    rewritten   other nodes under the same name, or in the same place: 1 → N, N → 1, N → M
    merged      as rewritten or changed, and nodes around it went into it: N → 1
    changed     the same node, configured or called in another way: channels, groups, arguments
    moved       the same node, reading something else, or an argument in another place
    renamed     the same node under another name
    values      the same node with other weights (refitted, BatchNorm re-estimated, trained)
    trainable   the same node, of which other parameters train
    reshaped    the same node, whose output has another shape, as what is before it changed
    added, removed

A node that is none of these is untouched. A node is in one change at most. Shapes are compared only where both graphs
were captured with inputs of the same shapes.

Any two graph modules will do. Where one of the two is no graph (a model of the user's own class with layers replaced
inside), modules are compared by name, those with parts by their class, and nothing can be said of what was moved,
merged or reshaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxlrd import cost
from fxlrd.errors import FxlrdError
from fxlrd.graph import FACTORS, captured
from fxlrd.match import Item, Matching, graph_items, match, tree_items

if TYPE_CHECKING:
    from fxlrd.pipeline import Pass

KINDS = (
    "rewritten", "merged", "changed", "moved", "renamed", "values", "trainable", "reshaped", "added", "removed",
)  # fmt: skip
_LARGEST = 16
"""Unrelated nodes in one place are told as one rewrite up to so many; more are two models with nothing in common."""


@dataclass(frozen=True)
class Edit:
    """One node that went (``after`` is None), came (``before`` is None) or stayed and is not the same.

    ``kind`` is went, came, or one of those of a change; ``what`` says in words what is not the same.
    """

    kind: str
    before: Item | None
    after: Item | None
    what: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, see `Diff.to_dict`."""
        return {
            "kind": self.kind,
            "before": None if self.before is None else _node(self.before),
            "after": None if self.after is None else _node(self.after),
            "what": list(self.what),
        }


def _node(item: Item) -> dict[str, Any]:
    return {
        "index": item.index,
        "name": item.name,
        "op": item.op,
        "target": item.target,
        "text": item.text,
        "role": None if item.known is None else item.known.role,
        "shape": None if item.shape is None else list(item.shape),
        "params": item.params,
        "flops": item.flops,
        "inputs": [i.name for i in item.inputs],
    }


@dataclass(frozen=True)
class Change:
    """What became of one site, see `Diff.to_dict` for the fields."""

    name: str
    kind: str
    edits: tuple[Edit, ...]
    path: str
    form: str | None = None
    merged: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def went(self) -> list[Item]:
        """The nodes of before that have no counterpart."""
        return [e.before for e in self.edits if e.kind == "went" and e.before is not None]

    @property
    def came(self) -> list[Item]:
        """The nodes of after that have no counterpart."""
        return [e.after for e in self.edits if e.kind == "came" and e.after is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, see `Diff.to_dict`."""
        return {
            "name": self.name,
            "kind": self.kind,
            "form": self.form,
            "path": self.path,
            **self.figures,
            "merged": list(self.merged),
            "passes": list(self.passes),
            "notes": list(self.notes),
            "edits": [edit.to_dict() for edit in self.edits],
        }


@dataclass(frozen=True)
class Diff:
    """The difference of two graphs; false where there is none. See `to_dict` for the fields."""

    before: dict[str, Any]
    after: dict[str, Any]
    changes: tuple[Change, ...]
    untouched: tuple[str, ...]
    skipped: tuple[dict[str, str], ...] = ()
    passes: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes)

    def to_text(self, *, color: bool = False, times: bool = True) -> str:
        """Return the difference as text, the empty string where there is nothing to say.

        Each change is a headline and a line for each node that went (-), came (+) or is not the same (~); nothing in
        a line depends on other lines. ``times=False`` leaves out what was measured, which no two runs have in common.
        """
        from fxlrd.difftext import whole

        return whole(self, color, times)

    def to_html(self, path: str | Path) -> None:
        """Write the difference as one HTML page that needs nothing else."""
        from fxlrd.files import write_out
        from fxlrd.report.html import diff_page

        write_out(Path(path), diff_page(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as plain data, fit for JSON.

        ``before``, ``after``: of each side as a whole ``model`` (class name), ``nodes``, ``params``, ``flops``,
        ``depth`` (None where it is not known: no shapes, no graph).

        ``same``: whether there is no change. ``counts``: number of changes by kind (see the module docstring; those
        that occur only), and of nodes ``untouched``.

        ``changes``: in the order of the graph, a dict each of

        - ``name``: the original module's name, or that of the first node; ``kind``; ``path``: where it is in the tree
          of modules, for grouping
        - ``form``: svd, tucker2, branched, merged or original, where after has provenance that says so; else None
        - ``ranks_before``, ``ranks``: lists of int or None (a mode that is not cut), or None
        - ``params_before``, ``params``, ``flops_before``, ``flops``: of the nodes of the site; FLOPs may be None
        - ``latency_ms_before``, ``latency_ms``: where a pass measured them, else None
        - ``error_before``, ``error``: relative error of the site's form, or None
        - ``merged``: names of other sites whose nodes went into this one
        - ``passes``: what changed the site, in the order of application, and ``notes``, what each says of it (both
          need ``report=``)
        - ``edits``: its nodes that are not the same, in the order of the graph, each with ``kind`` (went, came or a
          kind of change), ``before`` and ``after`` (None, or ``index`` in its graph, ``name``, ``op``, ``target``,
          ``text``, ``role``, ``shape`` (or None), ``params``, ``flops``, ``inputs``: names of nodes), and ``what``,
          words on what is not the same (empty for went and came)

        ``untouched``: names of the nodes of after that did not change. ``skipped``: layers that were left alone, each
        ``name`` and ``reason``. ``passes``: those applied, in order, each ``text``, ``sites``, ``skipped`` (numbers).
        ``blocks``: runs of blocks that changed alike, each ``name`` (the first) and ``same`` (the others), as paths:
        all changes under ``same`` are those under ``name`` but for what was measured. ``notes``: what should be known
        of the comparison itself.
        """
        from fxlrd.difftext import runs

        counts = {kind: n for kind in KINDS if (n := sum(c.kind == kind for c in self.changes))}
        return {
            "before": dict(self.before),
            "after": dict(self.after),
            "same": not self,
            "counts": {**counts, "untouched": len(self.untouched)},
            "changes": [change.to_dict() for change in self.changes],
            "untouched": list(self.untouched),
            "skipped": [dict(s) for s in self.skipped],
            "passes": [dict(p) for p in self.passes],
            "blocks": [{"name": name, "same": list(same)} for name, same in runs(self.changes)],
            "notes": list(self.notes),
        }


def diff(before: Any, after: Any, *, report: Any = None, values: bool = True) -> Diff:
    """Return what differs between two graph modules, or two models, or results of `compress` or of a pipeline.

    ``report`` adds which pass did what and why layers were left alone: a `Report`, the result of `compress` or of a
    pipeline, or a ledger; where ``after`` is a result, its own is taken. Without ``values``, weights are not compared,
    nor which of them train. Raises FxlrdError for what is no model.
    """
    report = after if report is None else report
    a, b = _model(before, "before"), _model(after, "after")
    if graphs := isinstance(a, fx.GraphModule) and isinstance(b, fx.GraphModule):
        found = match(graph_items(a), graph_items(b))
    else:
        found = match(tree_items(a, b), tree_items(b, a))
    notes = [] if graphs else ["compared by the names of modules, as one of the two is no graph"]
    shapes = _same_inputs(found)
    if shapes is False:
        notes.append("the two were captured with inputs of different shapes: shapes are not compared")
    passes = [_pass(record) for record in _records(report)]
    changes, untouched = _Grouping(found, bool(shapes), values, passes).changes()
    touched = {c.name for c in changes} | {name for c in changes for name in c.merged}
    return Diff(
        _figures(a, found.a, graphs),
        _figures(b, found.b, graphs),
        changes,
        untouched,
        _skipped(a, passes, touched),
        tuple({"text": p["text"], "sites": len(p["sites"]), "skipped": len(p["skipped"])} for p in passes),
        tuple(notes),
    )


class Steps:
    """The graphs between the passes of a pipeline, to compare any two of: give it as the pipeline's callback.

    ``names`` are those of the steps, ``graphs`` their graph modules: the pipeline's input first, under ``input``.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, before: fx.GraphModule, step: Pass, after: fx.GraphModule) -> None:
        """Take in a step; it is what a pipeline calls."""
        if not self.graphs:
            self.names.append("input")
            self.graphs.append(before)
        self.names.append(type(step).__name__.lower())
        self.graphs.append(after)

    def diff(self, start: int = 0, end: int = -1, *, report: Any = None, values: bool = True) -> Diff:
        """Return what differs between two steps by number, 0 being the pipeline's input.

        Of a ``report`` on the pipeline, what is about the passes between the two is taken.
        """
        count = len(self.graphs)
        if not -count <= start < count or not -count <= end < count:
            known = ", ".join(f"{i} {name}" for i, name in enumerate(self.names)) or "none"
            raise FxlrdError(f"steps {start} and {end}: there are {known}")
        first, last = sorted((start % count, end % count))
        return diff(self.graphs[start], self.graphs[end], report=_records(report)[first:last], values=values)


def _model(given: Any, where: str) -> nn.Module:
    model = given
    for name in ("model", "graph_module"):  # the result of compress, of a pipeline or a pass
        if not isinstance(model, nn.Module):
            model = getattr(given, name, model)
    if not isinstance(model, nn.Module):
        raise FxlrdError(f"diff: {where} is a {type(given).__name__}; give a GraphModule, a model or a result")
    lazy = torch.nn.parameter.is_lazy
    if any(lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise FxlrdError(f"diff: {where} has weights that are not initialised yet: run it on an input first")
    return model


def _figures(model: nn.Module, items: Sequence[Item], graphs: bool) -> dict[str, Any]:
    flops = [i.flops for i in items if i.flops is not None]
    return {
        "model": type(model).__name__,
        "nodes": len(items),
        "params": cost.params(model),
        "flops": sum(flops) if flops else None,
        "depth": cost.depth(model) if graphs and isinstance(model, fx.GraphModule) else None,
    }


def _same_inputs(found: Matching) -> bool | None:
    """Return whether the two graphs' inputs have the same shapes, None where those are not known."""
    sides = [[i.shape for i in items if i.op == "placeholder"] for items in (found.a, found.b)]
    if any(not s or None in s for s in sides):
        return None
    return sides[0] == sides[1]


def _records(report: Any) -> list[Any]:
    """Return what a report, a result or a ledger has on each pass."""
    if isinstance(report, nn.Module):
        return []
    for name in ("report", "ledger", "passes"):  # a report that was read from a file has no ledger
        report = getattr(report, name, None) or report
    if isinstance(report, Mapping):
        report = report.get("passes", ())
    if not isinstance(report, Sequence) or isinstance(report, str):
        return []
    return [p for p in report if isinstance(p, Mapping) or hasattr(p, "skipped")]


def _pass(record: Any) -> dict[str, Any]:
    def get(thing: Any, name: str) -> Any:
        return thing.get(name, "") if isinstance(thing, Mapping) else getattr(thing, name, "")

    return {
        "name": get(record, "name"),
        "text": get(record, "text"),
        "sites": {get(s, "name"): (get(s, "note"), get(s, "timings") or {}) for s in get(record, "sites")},
        "skipped": {get(s, "name"): get(s, "reason") for s in get(record, "skipped")},
    }


def _skipped(before: nn.Module, passes: Sequence[Mapping[str, Any]], touched: set[str]) -> tuple[dict[str, str], ...]:
    """Return the layers that no pass changed, each with the last reason that there is."""
    reasons = {name: reason for p in passes for name, reason in p["skipped"].items()}
    known = captured(before) if isinstance(before, fx.GraphModule) else None
    if known is not None and passes:
        reasons |= {name: u.reason for name, u in known.unreached.items()}
    return tuple({"name": name, "reason": reason} for name, reason in reasons.items() if name not in touched)


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
