"""Edits to changes: one change for each group of nodes, with its kind, form and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fxlrd.differences.groups import DisjointSets
from fxlrd.differences.items import Item
from fxlrd.differences.match import Matching
from fxlrd.differences.model import KINDS, Change, Edit
from fxlrd.differences.records import PassRecord
from fxlrd.graph.facts import FACTORS
from fxlrd.timing.layers import ORIGINAL


def to_changes(
    matching: Matching,
    edits: Mapping[Item, Edit],
    groups: DisjointSets[Item],
    merged: Mapping[Item, Sequence[str]],
    passes: Sequence[PassRecord] = (),
) -> tuple[Change, ...]:
    """Return a change for each group with edits, in the order of the graph.

    ``groups`` and ``merged`` are those of `group_edits`; ``passes`` say which pass changed a site, and add timings.
    """
    edits_of: dict[Item, list[Edit]] = {}
    for edit in edits.values():
        edits_of.setdefault(groups.find(edit.items[0]), []).append(edit)
    merged_into: dict[Item, list[str]] = {}
    for survivor, names in merged.items():
        merged_into.setdefault(groups.find(survivor), []).extend(names)
    position = _positions(matching)

    def first_position(edits: Sequence[Edit]) -> tuple[float, int, int]:
        return min(position[item] for edit in edits for item in edit.items)

    for group in edits_of.values():
        group.sort(key=lambda edit: first_position([edit]))
    changes = [_change(matching, group, merged_into.get(root, []), passes) for root, group in edits_of.items()]
    return tuple(sorted(changes, key=lambda change: first_position(change.edits)))


def _positions(matching: Matching) -> dict[Item, tuple[float, int, int]]:
    """Return a key that sorts the nodes of both graphs into one order.

    It is the order of the graph after; a removed node follows the counterpart of the paired node before it, and is
    before the nodes that were added in its place.
    """
    positions: dict[Item, tuple[float, int, int]] = {y: (y.index, 1, y.index) for y in matching.after}
    last = -1.0
    for x in matching.before:
        if x in matching.to_after:
            index = matching.to_after[x].index
            last = max(last, index)
            positions[x] = (index, 0, x.index)
        else:
            positions[x] = (last + 0.5, 0, x.index)
    return positions


def _change(matching: Matching, edits: Sequence[Edit], merged: Sequence[str], passes: Sequence[PassRecord]) -> Change:
    named = [i for edit in edits for i in edit.items if (i.site or i.name) not in merged]
    first = next((i for i in named if matching.shares_site(i)), named[0])
    name = first.site or first.name
    before = _nodes([e.before for e in edits], matching.sites_before.get(first.site or "", []))
    after = _nodes([e.after for e in edits], matching.sites_after.get(first.site or "", []))
    applied = [record for record in passes if name in record.notes]
    figures = _figures(before, "_before") | _figures(after, "")
    if figures["latency_ms_before"] is None and not any(i.is_factor for i in before):
        original = next((r.timings[name][ORIGINAL] for r in reversed(applied) if ORIGINAL in r.timings[name]), None)
        figures["latency_ms_before"] = None if original is None else original.seconds * 1e3
    figures["error_of"] = _error_of(after)
    return Change(
        name,
        "merged" if merged else _kind(edits),
        tuple(edits),
        first.path,
        _form(before, after),
        tuple(merged),
        tuple(record.text for record in applied),
        tuple(record.notes[name] for record in applied),
        figures,
    )


def _nodes(edited: Sequence[Item | None], site: Sequence[Item]) -> list[Item]:
    """Return the nodes of one graph in a change: those with edits, and the others of its site."""
    return list(dict.fromkeys([*(i for i in edited if i is not None), *site]))


def _kind(edits: Sequence[Edit]) -> str:
    kinds = {edit.kind for edit in edits}
    of_pairs = kinds - {"went", "came"}
    if len(kinds) == len(of_pairs):
        return min(of_pairs, key=KINDS.index)
    if {"went", "came"} <= kinds or of_pairs - {"reshaped"}:
        return "rewritten"
    return "removed" if "went" in kinds else "added"


def _figures(items: Sequence[Item], suffix: str) -> dict[str, Any]:
    """Return ranks, params, flops, latency_ms and error of the nodes of a site in one graph."""
    origins = [i.provenance for i in items if i.provenance is not None]
    ranks = next((origin.ranks for origin in origins if any(origin.ranks)), None)
    errors = [origin.error for origin in origins if origin.error is not None]
    latencies = [origin.latency for origin in origins if origin.latency is not None]
    params = {id(i.owner): i.params for i in items if i.owner is not None}
    flops = [i.flops for i in items if i.flops is not None]
    return {
        f"ranks{suffix}": None if ranks is None else list(ranks),
        f"params{suffix}": sum(params.values()),
        f"flops{suffix}": sum(flops) if flops else None,
        f"latency_ms{suffix}": latencies[0] * 1e3 if latencies else None,
        f"error{suffix}": max(errors) if errors else None,
    }


def _error_of(after: Sequence[Item]) -> str | None:
    """Return what the error of a decomposed layer is the error of."""
    factor = next((i.provenance for i in after if i.provenance is not None and i.is_factor), None)
    if factor is None:
        return None
    return "output" if factor.fitted else "weight"


def _form(before: Sequence[Item], after: Sequence[Item]) -> str | None:
    """Return the form of a site after, if its provenance says so."""
    roles = {i.provenance.role for i in after if i.provenance is not None}
    if "branch" in roles:
        return "branched"
    if "core" in roles:
        return "tucker2"
    if roles & set(FACTORS):
        return "svd"
    if "merged" in roles:
        return "merged"
    return "original" if "original" in roles and any(i.is_factor for i in before) else None
