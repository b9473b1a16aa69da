"""A diff as text, one line a thing, and blocks that changed alike told once.

Nothing in a line depends on other changes (columns line up within one change only), so that a change of the model
changes its own lines of a golden file or a pull request and no others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fxlrd.differences.blocks import _Block, _siblings, _tree
from fxlrd.layers.forms import ranks_text
from fxlrd.report.numbers import change as percent
from fxlrd.report.numbers import error, giga

if TYPE_CHECKING:
    from fxlrd.differences.match import Item
    from fxlrd.differences.model import Change, Diff, Edit

_WIDEST = 100
_STYLES = {"head": "1", "-": "31", "+": "32", "~": "33", "same": "2"}
_WORDS = {"values": "other weights"}
Paint = Callable[[str, str], str]


def whole(diff: Diff, color: bool, times: bool) -> str:
    """Return the figures, the changes, what was left alone and why; nothing where nothing is to be said."""

    def paint(style: str, text: str) -> str:
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if color else text

    parts = []
    if diff.changes:
        parts.append("\n".join(_figures(diff)))
        parts.append("\n".join(_block(_tree(diff.changes), paint, times)))
    if diff.skipped:
        parts.append("\n".join([paint("head", "left alone"), *_reasons(diff.skipped)]))
    if diff.passes and diff.changes:
        parts.append("applied in order: " + ", ".join(str(p["text"]) for p in diff.passes))
    if parts:
        parts += [f"note: {note}" for note in diff.notes]
    return "\n\n".join(parts)


def _figures(diff: Diff) -> Iterator[str]:
    before, after = diff.before, diff.after
    yield f"{'parameters':10}  {_pair(before['params'], after['params'], '{:,}'.format)}"
    if None not in (before["flops"], after["flops"]):
        yield f"{'FLOPs':10}  {_pair(before['flops'], after['flops'], giga)}"
    if None not in (before["depth"], after["depth"]):
        yield f"{'depth':10}  {before['depth']} → {after['depth']}"
    kind = "modules" if after["depth"] is None else "nodes"
    yield f"{kind:10}  {before['nodes']} → {after['nodes']}, {len(diff.untouched)} untouched"
    counts = Counter(c.kind for c in diff.changes)
    yield f"{'changes':10}  {', '.join(f'{n} {kind}' for kind, n in counts.items())}"


def _pair(before: float, after: float, text: Callable[[float], str]) -> str:
    return text(before) if before == after else f"{text(before)} → {text(after)} ({percent(before, after)})"


def _lines(change: Change, paint: Paint, times: bool) -> Iterator[str]:
    said = [*_what(change), *_costs(change, times)]
    rows = [row for edit in change.edits for row in _rows(change, edit)]
    if len(rows) == 1 and rows[0][0] == "~":
        name, *rest = rows[0][1:]
        where = f"{name} " if name != change.name else ""
        words = [where + text for text in rest if text]
        yield paint("head", change.name) + ": " + ", ".join([said[0], *words, *said[1:]])
        return
    yield paint("head", change.name) + ": " + ", ".join(said)
    width = max(len(row[1]) for row in rows)
    for (sign, name, *rest), count in _counted(rows):
        text = "  ".join([f"{name:{width}}", *filter(None, rest)])
        yield "  " + paint(sign, f"{sign} {text.rstrip()}{f'  ({count} calls)' if count > 1 else ''}")


def _counted(rows: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], int]]:
    """Return each row once, in order of first appearance, and how often there is such a one."""
    return list(Counter(rows).items())


def _what(change: Change) -> Iterator[str]:
    went, came = len(change.went), len(change.came)
    word = _WORDS.get(change.kind, change.kind)
    if change.kind in ("added", "removed"):
        yield word if went + came == 1 else f"{word}, {went + came} nodes"
    else:
        yield f"{word} {went} → {came}" if change.kind == "rewritten" else word
    ranks, before = change.figures["ranks"], change.figures["ranks_before"]
    if change.form == "original":
        yield "original back"
    elif change.form == "merged" and change.kind == "changed" and len(ranks or ()) == 2 and ranks != before:
        yield "keeps " + " and ".join(
            f"{r} channels {way}" for r, way in zip(ranks, ("in", "out"), strict=True) if r is not None
        )
    elif ranks != before:
        form = f"{change.form} at " if change.form in ("svd", "tucker2", "branched") and not before else ""
        yield f"{form}rank {f'{ranks_text(tuple(before))} → ' if before else ''}{ranks_text(tuple(ranks or ()))}"


def _costs(change: Change, times: bool) -> Iterator[str]:
    f = change.figures
    if f["params_before"] != f["params"]:
        yield f"parameters {f['params_before']:,} → {f['params']:,}"
    if None not in (f["flops_before"], f["flops"]) and f["flops_before"] != f["flops"]:
        yield f"FLOPs {giga(f['flops_before'])} → {giga(f['flops'])}"
    if times and f["latency_ms"] is not None and f["latency_ms"] != f["latency_ms_before"]:
        before = "" if f["latency_ms_before"] is None else f"{f['latency_ms_before']:.3g} → "
        yield f"{before}{f['latency_ms']:.3g} ms"
    if times and _erred(change):
        before = "" if f["error_before"] is None else f"{error(f['error_before'])} → "
        yield f"error {before}{error(f['error'])}"


def _erred(change: Change) -> bool:
    return change.figures["error"] is not None and change.figures["error"] != change.figures["error_before"]


def _rows(change: Change, edit: Edit) -> Iterator[tuple[str, ...]]:
    """Return (sign, name, text, shape) of the lines of one edit."""
    a, b = edit.before, edit.after
    shows = edit.kind == "changed" and a is not None and b is not None and _text(a) != _text(b)
    if a is None or b is None or shows:
        for sign, item in (("-", a), ("+", b)):
            if item is not None:
                yield sign, _called(item), _text(item), _shape(item)
        return
    shapes = f"{_shape(a)} → {_shape(b)}" if a.shape != b.shape and edit.kind == "reshaped" else ""
    yield "~", _called(b), "; ".join(edit.what), shapes


def _called(item: Item) -> str:
    return item.target if item.owner is not None and item.target else item.name


def _text(item: Item) -> str:
    """Return what a node computes, with the names of its inputs where it is a function's call."""
    text = item.text
    if item.op.startswith("call") and item.owner is None:
        names = iter([i.name for i in item.inputs])
        text = item.target + re.sub("%", lambda found: next(names, found[0]), item.call)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def _shape(item: Item) -> str:
    return "" if item.shape is None else "×".join(map(str, item.shape)) or "scalar"


def _reasons(skipped: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Return a line for each name and reason; names that differ in numbers only are told as one if they are many."""
    alike: dict[tuple[str, str], list[str]] = {}
    for skip in skipped:
        alike.setdefault((re.sub(r"\d+", "*", skip["name"]), skip["reason"]), []).append(skip["name"])
    for (pattern, reason), names in alike.items():
        for name in names if len(names) < 3 else [f"{pattern} ({len(names)} layers)"]:
            yield f"  {name}: {reason}"


def _names(paths: Sequence[str]) -> str:
    numbers = [int(m[0]) for p in paths if (m := re.search(r"\d+$", p))]
    if len(paths) > 2 and numbers == list(range(numbers[0], numbers[0] + len(paths))):
        return f"{paths[0]} … {paths[-1]}"
    return ", ".join(paths)


def _block(block: _Block, paint: Paint, times: bool) -> Iterator[str]:
    for change in block.changes:
        yield from _lines(change, paint, times)
    for first, same in _siblings(block):
        yield from _block(first, paint, times)
        if same:
            errors = [c.figures["error"] for s in same for c in s.every() if _erred(c)]
            ends = sorted({error(min(errors)), error(max(errors))}, key=float) if errors and times else []
            measured = f", error {' to '.join(ends)}" if ends else ""
            yield paint("same", f"{_names([s.path for s in same])}: the same as {first.path}{measured}")
