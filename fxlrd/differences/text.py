"""A diff as text, from the plain data of `Diff.to_dict`.

Blocks that changed alike are printed once. No line depends on other changes (columns line up within one change only),
so that a change of the model changes its own lines of a golden file or a pull request, and no others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fxlrd.differences.tree import Module, module_tree
from fxlrd.escaping import printable
from fxlrd.layers.forms import ranks_text
from fxlrd.report.numbers import change as percent
from fxlrd.report.numbers import error, giga

_WIDEST = 100
_STYLES = {"head": "1", "-": "31", "+": "32", "~": "33", "same": "2"}
_WORDS = {"values": "other weights"}
Data = Mapping[str, Any]
Paint = Callable[[str, str], str]


class _Repeated(NamedTuple):
    """Blocks that changed as the ``first`` one did, with the changes in them."""

    first: str
    paths: Sequence[str]
    changes: Sequence[Data]


def to_text(diff: Data, *, color: bool = False, times: bool = True) -> str:
    """Return figures, changes, and layers left alone with the reasons; the empty string if there is nothing to say."""

    diff = printable(diff)

    def paint(style: str, text: str) -> str:
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if color else text

    parts = []
    if diff["changes"]:
        parts.append("\n".join(f"{label:10}  {text}" for label, text in _figures(diff)))
        parts.append("\n".join(_changes(diff, paint, times)))
    if diff["skipped"]:
        parts.append("\n".join([paint("head", "left alone"), *_reasons(diff["skipped"])]))
    if diff["passes"] and diff["changes"]:
        parts.append("applied in order: " + ", ".join(str(p["text"]) for p in diff["passes"]))
    if parts:
        parts += [f"note: {note}" for note in diff["notes"]]
    return "\n\n".join(parts)


def _figures(diff: Data) -> Iterator[tuple[str, str]]:
    before, after = diff["before"], diff["after"]
    yield "parameters", _pair(before["params"], after["params"], "{:,}".format)
    if None not in (before["flops"], after["flops"]):
        yield "FLOPs", _pair(before["flops"], after["flops"], giga)
    if None not in (before["depth"], after["depth"]):
        yield "depth", f"{before['depth']} → {after['depth']}"
    kind = "modules" if after["depth"] is None else "nodes"
    yield kind, f"{before['nodes']} → {after['nodes']}, {len(diff['untouched'])} untouched"
    counts = Counter(c["kind"] for c in diff["changes"])
    yield "changes", ", ".join(f"{n} {kind}" for kind, n in counts.items())


def _pair(before: float, after: float, text: Callable[[float], str]) -> str:
    return text(before) if before == after else f"{text(before)} → {text(after)} ({percent(before, after)})"


def _in_blocks(diff: Data) -> Iterator[Data | _Repeated]:
    """Yield the changes by module, and after each block those that changed alike, as one entry."""
    runs = {block["name"]: block["same"] for block in diff["blocks"]}
    repeated = {path for paths in runs.values() for path in paths}

    def walk(module: Module[Data]) -> Iterator[Data | _Repeated]:
        yield from module.entries
        parts = {part.path: part for part in module.parts.values()}
        for path, part in parts.items():
            if path not in repeated:
                yield from walk(part)
            if path in runs:
                yield _Repeated(path, runs[path], [change for other in runs[path] for change in parts[other]])

    yield from walk(module_tree(diff["changes"], lambda change: str(change["path"])))


def _changes(diff: Data, paint: Paint, times: bool) -> Iterator[str]:
    for entry in _in_blocks(diff):
        if not isinstance(entry, _Repeated):
            yield from _lines(entry, paint, times)
            continue
        errors = [change["error"] for change in entry.changes if _has_new_error(change)]
        ends = sorted({error(min(errors)), error(max(errors))}, key=float) if errors and times else []
        measured = f", error {' to '.join(ends)}" if ends else ""
        yield paint("same", f"{_names(entry.paths)}: the same as {entry.first}{measured}")


def _lines(change: Data, paint: Paint, times: bool) -> Iterator[str]:
    summary = [*_what(change), *_costs(change, times)]
    rows = [row for edit in change["edits"] for row in _rows(edit)]
    if len(rows) == 1 and rows[0][0] == "~":
        name, *rest = rows[0][1:]
        where = f"{name} " if name != change["name"] else ""
        words = [where + text for text in rest if text]
        yield paint("head", change["name"]) + ": " + ", ".join([summary[0], *words, *summary[1:]])
        return
    yield paint("head", change["name"]) + ": " + ", ".join(summary)
    width = max(len(row[1]) for row in rows)
    for (sign, name, *rest), count in Counter(rows).items():  # equal rows once, in order of first appearance
        text = "  ".join([f"{name:{width}}", *filter(None, rest)])
        yield "  " + paint(sign, f"{sign} {text.rstrip()}{f'  ({count} calls)' if count > 1 else ''}")


def _what(change: Data) -> Iterator[str]:
    """Yield the kind of a change and, if they changed, the ranks."""
    kinds = Counter(edit["kind"] for edit in change["edits"])
    went, came = kinds["went"], kinds["came"]
    word = _WORDS.get(change["kind"], str(change["kind"]))
    if change["kind"] in ("added", "removed"):
        yield word if went + came == 1 else f"{word}, {went + came} nodes"
    else:
        yield f"{word} {went} → {came}" if change["kind"] == "rewritten" else word
    form, ranks, before = change["form"], change["ranks"], change["ranks_before"]
    if form == "original":
        yield "original back"
    elif form == "merged" and change["kind"] == "changed" and len(ranks or ()) == 2 and ranks != before:
        yield "keeps " + " and ".join(
            f"{r} channels {way}" for r, way in zip(ranks, ("in", "out"), strict=True) if r is not None
        )
    elif ranks != before:
        prefix = f"{form} at " if form in ("svd", "tucker2", "branched") and not before else ""
        yield f"{prefix}rank {f'{ranks_text(tuple(before))} → ' if before else ''}{ranks_text(tuple(ranks or ()))}"


def _costs(change: Data, times: bool) -> Iterator[str]:
    if change["params_before"] != change["params"]:
        yield f"parameters {change['params_before']:,} → {change['params']:,}"
    if None not in (change["flops_before"], change["flops"]) and change["flops_before"] != change["flops"]:
        yield f"FLOPs {giga(change['flops_before'])} → {giga(change['flops'])}"
    latency, latency_before = change["latency_ms"], change["latency_ms_before"]
    if times and latency is not None and latency != latency_before:
        yield f"{'' if latency_before is None else f'{latency_before:.3g} → '}{latency:.3g} ms"
    if times and _has_new_error(change):
        error_before = change["error_before"]
        yield f"error {'' if error_before is None else f'{error(error_before)} → '}{error(change['error'])}"


def _has_new_error(change: Data) -> bool:
    return change["error"] is not None and change["error"] != change["error_before"]


def _rows(edit: Data) -> Iterator[tuple[str, ...]]:
    """Yield (sign, name, text, shape) for the lines of one edit."""
    before, after = edit["before"], edit["after"]
    is_pair = before is not None and after is not None
    if is_pair and not (edit["kind"] == "changed" and _node_text(before) != _node_text(after)):
        is_reshaped = before["shape"] != after["shape"] and edit["kind"] == "reshaped"
        shapes = f"{_shape(before)} → {_shape(after)}" if is_reshaped else ""
        yield "~", _node_name(after), "; ".join(edit["what"]), shapes
        return
    for sign, node in (("-", before), ("+", after)):
        if node is not None:
            yield sign, _node_name(node), _node_text(node), _shape(node)


def _node_name(node: Data) -> str:
    is_owner = node["op"] in ("call_module", "get_attr", "module")
    return str(node["target"] if is_owner and node["target"] else node["name"])


def _node_text(node: Data) -> str:
    """Return what a node computes, with the names of its inputs if it calls a function."""
    text = str(node["text"])
    if node["op"] in ("call_function", "call_method"):
        names = iter(node["inputs"])
        arguments = re.sub("%", lambda match: next(names, match[0]), text.removeprefix(node["target"]))
        text = f"{node['target']}{arguments}"
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def _shape(node: Data) -> str:
    return "" if node["shape"] is None else "×".join(map(str, node["shape"])) or "scalar"


def _reasons(skipped: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Yield a line for each name and reason; one line for three or more names that differ in numbers only."""
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
