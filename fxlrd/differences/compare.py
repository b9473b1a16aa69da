"""What differs between two graphs: diff(before, after).

The steps are modules: items (read a graph), match (pair the nodes), edits (of nodes), groups (nodes of one change),
changes, blocks. A change is about a *site*, named after the original module. Its kind is one of

    rewritten   other nodes under the same name, or in the same place: 1 → N, N → 1, N → M
    merged      as rewritten or changed, and neighbouring nodes were merged into it: N → 1
    changed     the same node, configured or called in another way: channels, groups, arguments
    moved       the same node, reading something else, or an argument in another place
    renamed     the same node under another name
    values      the same node with other weights (refitted, BatchNorm re-estimated, trained)
    trainable   the same node, of which other parameters train
    reshaped    the same node, whose output has another shape, because an earlier node changed
    added, removed

A node that is none of these is untouched. A node is in one change at most. Shapes are compared only if both graphs
were captured with inputs of the same shapes.

Any two graph modules can be compared. If one of the two is no graph (a model of the user's own class with layers
replaced inside), modules are compared by name, those with children by their class; whether something was moved, merged
or reshaped is then unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxlrd.differences.blocks import blocks_alike
from fxlrd.differences.changes import to_changes
from fxlrd.differences.edits import moved_edits, node_edits
from fxlrd.differences.groups import group_edits
from fxlrd.differences.items import Item, graph_items, tree_items
from fxlrd.differences.match import Matching, match
from fxlrd.differences.model import Diff
from fxlrd.differences.records import PassRecord, ledger_of, pass_records
from fxlrd.errors import FxlrdError
from fxlrd.graph import cost
from fxlrd.graph.captured import captured

if TYPE_CHECKING:
    from fxlrd.passes.contract import Pass


def diff(before: Any, after: Any, *, report: Any = None, values: bool = True) -> Diff:
    """Return what differs between two graph modules, or two models, or results of `compress` or of a pipeline.

    >>> import fxlrd, torch
    >>> gm = fxlrd.capture(torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.randn(2, 64))
    >>> print(fxlrd.diff(gm, fxlrd.Pipeline.parse("decompose{ratio=2}")(gm)))
    parameters  4,160 → 2,112 (-49.2 %)
    ...
      - 0        Linear(in_features=64, out_features=64, bias=True)  2×64
      + 0.first  Linear(in_features=64, out_features=16, bias=False)  2×16
      + 0.last   Linear(in_features=16, out_features=64, bias=True)  2×64
    ...

    ``report`` adds which pass did what and why layers were left alone: a `Report`, the result of `compress` or of a
    pipeline, or a ledger; by default that of ``after``, if it is a result. ``values=False`` compares neither the
    weights nor which of them train. Raises FxlrdError for an argument that is no model.
    """
    passes = pass_records(after if report is None else report)
    a, b = _model(before, "before"), _model(after, "after")
    as_graphs = isinstance(a, fx.GraphModule) and isinstance(b, fx.GraphModule)
    notes = [] if as_graphs else ["compared by the names of modules, as one of the two is no graph"]
    matching = match(_items(a, b), _items(b, a))
    shapes = _same_input_shapes(matching)
    if shapes is False:
        notes.append("the two were captured with inputs of different shapes: shapes are not compared")
    edits = node_edits(matching, shapes=bool(shapes), values=values)
    groups, merged = group_edits(matching, edits)
    edits |= moved_edits(matching, groups, edits)
    changes = to_changes(matching, edits, groups, merged, passes)
    touched = {c.name for c in changes} | {name for c in changes for name in c.merged}
    return Diff(
        before=_figures(a, matching.before, as_graphs),
        after=_figures(b, matching.after, as_graphs),
        changes=changes,
        untouched=tuple(i.name for i in matching.after if i not in edits),
        blocks=blocks_alike(changes),
        skipped=_skipped(a, passes, touched),
        passes=tuple(record.to_dict() for record in passes),
        notes=tuple(notes),
    )


class Steps:
    """The graphs between the passes of a pipeline, any two of which can be compared; a callback of the pipeline.

    ``graphs`` are the graph modules and ``names`` those of the passes that made them; the pipeline's input is the
    first, named ``input``.

    >>> import fxlrd, torch
    >>> gm = fxlrd.capture(torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.randn(2, 64))
    >>> steps = Steps()
    >>> run = fxlrd.Pipeline.parse("decompose,freeze")(gm, callback=steps)
    >>> steps.names
    ['input', 'decompose', 'freeze']
    >>> [(change.name, change.kind) for change in steps.diff(1, 2).changes]
    [('0', 'trainable')]
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, before: fx.GraphModule, step: Pass, after: fx.GraphModule) -> None:
        """Add a step; the pipeline calls this after each pass."""
        if not self.graphs:
            self.names.append("input")
            self.graphs.append(before)
        self.names.append(type(step).__name__.lower())
        self.graphs.append(after)

    def diff(self, start: int = 0, end: int = -1, *, report: Any = None, values: bool = True) -> Diff:
        """Return what differs between the graphs ``start`` and ``end``, by number; 0 is the pipeline's input.

        ``report`` is on the pipeline; only its passes between the two are used.
        """
        count = len(self.graphs)
        if not -count <= start < count or not -count <= end < count:
            steps = ", ".join(f"{i} {name}" for i, name in enumerate(self.names)) or "none"
            raise FxlrdError(f"steps {start} and {end}: there are {steps}")
        first, last = sorted((start % count, end % count))
        return diff(self.graphs[start], self.graphs[end], report=ledger_of(report)[first:last], values=values)


def _model(argument: Any, name: str) -> nn.Module:
    model = argument
    for attribute in ("model", "graph_module"):  # the result of compress, of a pipeline or a pass
        if not isinstance(model, nn.Module):
            model = getattr(argument, attribute, model)
    if not isinstance(model, nn.Module):
        raise FxlrdError(f"diff: {name} is a {type(argument).__name__}; give a GraphModule, a model or a result")
    lazy = torch.nn.parameter.is_lazy
    if any(lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise FxlrdError(f"diff: {name} has weights that are not initialised yet: run it on an input first")
    return model


def _items(model: nn.Module, other: nn.Module) -> list[Item]:
    if isinstance(model, fx.GraphModule) and isinstance(other, fx.GraphModule):
        return graph_items(model)
    return tree_items(model, other)


def _figures(model: nn.Module, items: Sequence[Item], as_graph: bool) -> dict[str, Any]:
    flops = [i.flops for i in items if i.flops is not None]
    return {
        "model": type(model).__name__,
        "nodes": len(items),
        "params": cost.params(model),
        "flops": sum(flops) if flops else None,
        "depth": cost.depth(model) if as_graph and isinstance(model, fx.GraphModule) else None,
    }


def _same_input_shapes(matching: Matching) -> bool | None:
    """Return whether the two graphs' inputs have the same shapes, None if those are unknown."""
    before, after = ([i.shape for i in items if i.op == "placeholder"] for items in (matching.before, matching.after))
    if not before or not after or None in (*before, *after):
        return None
    return before == after


def _skipped(before: nn.Module, passes: Sequence[PassRecord], touched: set[str]) -> tuple[dict[str, str], ...]:
    """Return the layers that no pass changed, each with the last reason recorded."""
    reasons = {name: reason for record in passes for name, reason in record.skipped.items()}
    capture = captured(before) if isinstance(before, fx.GraphModule) else None
    if capture is not None and passes:
        reasons |= {name: str(unreached.reason) for name, unreached in capture.unreached.items()}
    return tuple({"name": name, "reason": reason} for name, reason in reasons.items() if name not in touched)
