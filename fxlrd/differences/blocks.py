"""Blocks of a model that changed alike.

A block is a module whose name ends in a number. Siblings that follow each other (``layer.0``, ``layer.1``, ...) changed
alike if the changes in them are equal except for the block's own name and for measurements (errors and latencies).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence

from fxlrd.differences.items import Item
from fxlrd.differences.model import Block, Change
from fxlrd.differences.tree import Module, module_tree

_MEASURED = ("error", "latency")


def blocks_alike(changes: Sequence[Change]) -> tuple[Block, ...]:
    """Return the runs of blocks that changed alike, each before those inside its first block.

    Nothing inside the other blocks of a run is returned: it is as in the first.
    """
    root = module_tree(changes, lambda change: change.path)
    signatures: dict[str, Hashable] = {}
    _sign(root, signatures)
    return tuple(_blocks(root, signatures))


def _blocks(module: Module[Change], signatures: Mapping[str, Hashable]) -> Iterator[Block]:
    for first, same in _runs(module, signatures):
        if same:
            yield Block(first.path, tuple(same))
        yield from _blocks(first, signatures)


def _runs(module: Module[Change], signatures: Mapping[str, Hashable]) -> list[tuple[Module[Change], list[str]]]:
    """Return the parts of a module in runs: one part, and the paths of those after it that changed alike."""
    runs: list[tuple[Module[Change], list[str]]] = []
    previous_stem = None
    for name, part in module.parts.items():
        stem = re.sub(r"\d+$", "", name) if name[-1:].isdigit() else None
        continues = runs and stem is not None and stem == previous_stem
        if continues and signatures[runs[-1][0].path] == signatures[part.path]:
            runs[-1][1].append(part.path)
        else:
            runs.append((part, []))
        previous_stem = stem
    return runs


def _sign(module: Module[Change], signatures: dict[str, Hashable]) -> None:
    """Compute a value for a module, and each inside it, that modules which changed alike have in common."""
    for part in module.parts.values():
        _sign(part, signatures)
    inside = tuple((_part_name(name, part), signatures[part.path]) for name, part in module.parts.items())
    signatures[module.path] = (inside, tuple(_change_signature(change) for change in module.entries))


def _part_name(name: str, part: Module[Change]) -> str:
    """Return a part's name; that of a function without the number that fx appends to it."""
    is_function = any(item.site is None for change in part.entries for edit in change.edits for item in edit.items)
    return re.sub(r"_\d+$", "", name) if is_function else name


def _change_signature(change: Change) -> Hashable:
    """Return a change without names and measurements."""
    figures = {key: str(value) for key, value in change.figures.items() if not key.startswith(_MEASURED)}
    edits = tuple(
        (
            edit.kind,
            *(
                () if item is None else (item.text, item.call, item.shape, _relative_target(item, change))
                for item in (edit.before, edit.after)
            ),
        )
        for edit in change.edits
    )
    return change.kind, change.form, len(change.merged), tuple(figures.items()), edits


def _relative_target(item: Item, change: Change) -> str:
    """Return a module's name relative to the change's path, with ``^`` for each step up; empty for a function."""
    if item.site is None:
        return ""
    origin, target = change.path.split("."), item.target.split(".")
    common = 0
    while common < min(len(origin), len(target)) and origin[common] == target[common]:
        common += 1
    return ".".join(["^"] * (len(origin) - common) + target[common:])
