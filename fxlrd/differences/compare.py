"""What differs between two graphs: diff(before, after).

Nodes are paired (fxlrd/differences/match.py), and what is not the same is told by *site*, the original module's name.
A change is

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
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxlrd.differences.changes import _Grouping
from fxlrd.differences.match import Item, Matching, graph_items, match, tree_items
from fxlrd.differences.model import Diff
from fxlrd.errors import FxlrdError
from fxlrd.graph import cost
from fxlrd.graph.captured import captured

if TYPE_CHECKING:
    from fxlrd.passes.contract import Pass


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
        "skipped": {get(s, "name"): str(get(s, "reason")) for s in get(record, "skipped")},
    }


def _skipped(before: nn.Module, passes: Sequence[Mapping[str, Any]], touched: set[str]) -> tuple[dict[str, str], ...]:
    """Return the layers that no pass changed, each with the last reason that there is."""
    reasons = {name: reason for p in passes for name, reason in p["skipped"].items()}
    known = captured(before) if isinstance(before, fx.GraphModule) else None
    if known is not None and passes:
        reasons |= {name: str(u.reason) for name, u in known.unreached.items()}
    return tuple({"name": name, "reason": reason} for name, reason in reasons.items() if name not in touched)
