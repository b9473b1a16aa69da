"""What is not the same about each node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxlrd.differences.groups import LARGEST, DisjointSets
from fxlrd.differences.items import Item
from fxlrd.differences.match import Matching
from fxlrd.differences.model import KINDS, Edit
from fxlrd.differences.weights import compare_weights


def node_edits(matching: Matching, *, shapes: bool, values: bool) -> dict[Item, Edit]:
    """Return the edits of nodes that were removed, were added, or compute something else than their counterpart.

    Keys are the nodes after and, for removed nodes, those before. ``shapes`` compares the shapes and dtypes of outputs,
    ``values`` the weights and which of them train. What a pair reads is not compared, see `moved_edits`.
    """
    compared: dict[tuple[int, int], list[tuple[str, str]]] = {}

    def weights(x: Any, y: Any) -> list[tuple[str, str]]:
        if x is y or not values:
            return []
        key = (id(x), id(y))  # a module of many calls is compared once
        if key not in compared:
            compared[key] = compare_weights(x, y)
        return compared[key]

    edits: dict[Item, Edit] = {}
    for x, y in matching.to_after.items():
        differences = _differences(x, y, shapes)
        if x.text == y.text:
            differences += weights(x.owner, y.owner)
        if shapes and None not in (x.shape, y.shape) and x.shape != y.shape:
            differences.append(("reshaped", ""))
        if differences:
            kind = min((kind for kind, _ in differences), key=KINDS.index)
            edits[y] = Edit(kind, x, y, tuple(text for _, text in differences if text))
    edits |= {item: Edit("went", item, None) for item in matching.removed}
    edits |= {item: Edit("came", None, item) for item in matching.added}
    return edits


def _differences(x: Item, y: Item, shapes: bool) -> list[tuple[str, str]]:
    """Return a kind of change and words for each difference of a pair itself, apart from weights and shapes."""
    differences = []
    if x.text != y.text:
        differences.append(("changed", f"{x.text} → {y.text}"))
    elif x.call != y.call:
        differences.append(("changed", f"{x.call} → {y.call}"))
    if shapes and None not in (x.dtype, y.dtype) and x.dtype != y.dtype:
        differences.append(("changed", f"{x.dtype} → {y.dtype}".replace("torch.", "")))
    if x.target != y.target and x.op == y.op and x.op != "output":
        differences.append(("renamed", f"{x.target} → {y.target}"))
    return differences


def moved_edits(matching: Matching, groups: DisjointSets[Item], edits: Mapping[Item, Edit]) -> dict[Item, Edit]:
    """Return the edits of pairs whose inputs, or whose positions among the arguments, do not correspond.

    They include what ``edits`` says of the same pairs. A node that was added or removed in front of a pair does not
    move it: the pair reads the same through that node.
    """
    positions = _argument_positions(matching)
    previous_matched = _previous_matched(matching, groups)

    def correspond(p: Item, q: Item) -> bool:
        if matching.to_after.get(p) is q:
            return True
        unpaired = p not in matching.to_after or q not in matching.to_before
        return unpaired and groups.find(p) is groups.find(q)

    def reads_same(p: Item, q: Item) -> bool:
        sources, others = [p, *previous_matched.get(p, ())], [q, *previous_matched.get(q, ())]
        return any(correspond(i, j) for i in sources for j in others)

    moved: dict[Item, Edit] = {}
    for x, y in matching.to_after.items():
        if x.op == "placeholder" and positions[x] != positions[y]:
            what = f"argument {positions[y]} instead of {positions[x]}"
        elif len(x.inputs) == len(y.inputs) and not all(map(reads_same, x.inputs, y.inputs)):
            what = f"reads {', '.join(i.name for i in y.inputs)} instead of {', '.join(i.name for i in x.inputs)}"
        else:
            continue
        edit = edits.get(y, Edit("moved", x, y))
        moved[y] = Edit(min(edit.kind, "moved", key=KINDS.index), x, y, (*edit.what, what))
    return moved


def _argument_positions(matching: Matching) -> dict[Item, int]:
    """Return the position of each argument among those that both graphs have: a call may pass them in order."""
    positions: dict[Item, int] = {}
    for items, pairs in ((matching.before, matching.to_after), (matching.after, matching.to_before)):
        arguments = [i for i in items if i.op == "placeholder" and i in pairs]
        positions |= {item: position for position, item in enumerate(arguments, 1)}
    return positions


def _previous_matched(matching: Matching, groups: DisjointSets[Item]) -> dict[Item, list[Item]]:
    """Return the nearest predecessors, of each node that was only removed or only added, that were neither.

    These are paired, or were rewritten: their group has removed and added nodes. The dict is filled in the order of
    the graph, so that a chain of thousands of nodes is walked once.
    """
    rewritten = {groups.find(i) for i in matching.removed} & {groups.find(i) for i in matching.added}
    previous: dict[Item, list[Item]] = {}
    for item in (*matching.removed, *matching.added):
        if groups.find(item) not in rewritten:
            nearest = dict.fromkeys(i for source in item.inputs for i in previous.get(source, [source]))
            previous[item] = list(nearest)[:LARGEST]
    return previous
