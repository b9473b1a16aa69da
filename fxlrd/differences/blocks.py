"""Blocks of a model that changed alike."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxlrd.differences.match import Item
    from fxlrd.differences.model import Change


@dataclass
class _Block:
    """A module with the changes at it and inside of it."""

    path: str
    changes: list[Change] = field(default_factory=list)
    parts: dict[str, _Block] = field(default_factory=dict)
    alike: Hashable = None

    def every(self) -> Iterator[Change]:
        yield from self.changes
        for part in self.parts.values():
            yield from part.every()


def runs(changes: Sequence[Change]) -> list[tuple[str, list[str]]]:
    """Return the runs of sibling blocks that changed alike: the first one's path and the others'."""
    found: list[tuple[str, list[str]]] = []

    def walk(block: _Block) -> None:
        for first, same in _siblings(block):
            if same:
                found.append((first.path, [s.path for s in same]))
            walk(first)

    walk(_tree(changes))
    return found


def _tree(changes: Sequence[Change]) -> _Block:
    root = _Block("")
    for change in changes:
        block = root
        for part in change.path.split("."):
            path = f"{block.path}.{part}" if block.path else part
            block = block.parts.setdefault(part, _Block(path))
        block.changes.append(change)
    _mark(root)
    return root


def _mark(block: _Block) -> None:
    """Leave on each block what it has in common with blocks that changed alike."""
    for part in block.parts.values():
        _mark(part)
    inside = tuple((_label(name, part), part.alike) for name, part in block.parts.items())
    block.alike = (inside, tuple(_alike(c) for c in block.changes))


def _label(name: str, block: _Block) -> str:
    function = any(
        i is not None and i.site is None for c in block.changes for e in c.edits for i in (e.before, e.after)
    )
    return re.sub(r"_\d+$", "", name) if function else name


def _alike(change: Change) -> Hashable:
    """Return a change without names and without what was measured."""
    figures = {k: str(v) for k, v in change.figures.items() if not k.startswith(("error", "latency"))}
    edits = tuple(
        (
            e.kind,
            *((i.text, i.call, i.shape, _label_of(change, i)) if i is not None else () for i in (e.before, e.after)),
        )
        for e in change.edits
    )
    return change.kind, change.form, len(change.merged), tuple(figures.items()), edits


def _label_of(change: Change, item: Item) -> str:
    """Return a module's name as seen from the change."""
    if item.site is None:
        return ""
    here, there = change.path.split("."), item.target.split(".")
    same = next((i for i, (p, q) in enumerate(zip(here, there, strict=False)) if p != q), min(len(here), len(there)))
    return ".".join(["^"] * (len(here) - same) + there[same:])


def _siblings(block: _Block) -> list[tuple[_Block, list[_Block]]]:
    """Return the parts of a block, of those in a run that changed alike the first, with the others."""
    found: list[tuple[_Block, list[_Block]]] = []
    stem = None
    for name, part in block.parts.items():
        here = re.sub(r"\d+$", "", name) if re.search(r"\d+$", name) else None
        if found and here is not None and here == stem and found[-1][0].alike == part.alike:
            found[-1][1].append(part)
        else:
            found.append((part, []))
        stem = here
    return found
