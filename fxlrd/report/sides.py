"""A graph diff arranged to be read side by side, in sections: what was removed, was added, and is untouched.

A section is a block that changed alike with others (``blocks`` of `Diff.to_dict`) or else a part of the model. Of the
blocks that changed alike, only the first one's section is open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fxlrd.layers.forms import ranks_text

_TIMES = "×"


def arranged(diff: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of `Diff.to_dict` in sections, each with rows: a change, or names of untouched nodes."""
    alike = {path: block["name"] for block in diff["blocks"] for path in block["same"]}
    sections = _sections(diff, {*alike, *alike.values()})
    for section in sections:
        changes = [row for row in section["rows"] if isinstance(row, dict)]
        section["alike"] = alike.get(section["name"])
        section["changes"] = len(changes)
        section["params"] = [sum(row["sizes"][side] for row in changes) for side in (0, 1)]
        section["open"] = bool(changes) and section["alike"] is None
        for row in changes:
            inner = next((path for path in _prefixes(row["path"]) if path in alike), None)
            row["alike"] = None if inner is None or section["alike"] is not None else alike[inner]
    return {
        "sections": sections,
        "counts": [(kind, number) for kind, number in diff["counts"].items()],
        "before": diff["before"],
        "after": diff["after"],
        "notes": diff["notes"],
    }


def part_of_model(path: str) -> str:
    """Return the part of the model that a module is in: up to the first number in its path, or else its parent.

    >>> part_of_model("encoder.layer.3.attention.query"), part_of_model("pooler.dense")
    ('encoder.layer.3', 'pooler')
    """
    names = path.split(".")
    for at, name in enumerate(names[:-1]):
        if name.isdigit():
            return ".".join(names[: at + 1])
    return ".".join(names[:-1]) or path


def _prefixes(path: str) -> Iterator[str]:
    """Yield the path's enclosing modules, from the outermost on, and the path."""
    names = path.split(".")
    yield from (".".join(names[: at + 1]) for at in range(len(names)))


def _section_name(path: str, blocks: set[str]) -> str:
    """Return the outermost of the ``blocks`` that contains the part of the model, or else the part."""
    part = part_of_model(path)
    return next((block for block in _prefixes(part) if block in blocks), part)


def _sections(diff: Mapping[str, Any], blocks: set[str]) -> list[dict[str, Any]]:
    sections: list[dict[str, Any]] = []
    untouched: list[str] = []  # until it is clear to which section they belong
    for number, entry in enumerate(_in_order(diff)):
        if isinstance(entry, str):
            untouched.append(entry)
            continue
        name = _section_name(entry["path"], blocks)
        if not sections or sections[-1]["name"] != name:
            prefix = name.replace(".", "_") + "_"
            own = next((i for i, node in enumerate(untouched) if node.startswith(prefix)), len(untouched))
            if not sections and untouched[:own]:
                sections.append(_section("input"))
            if untouched[:own]:
                sections[-1]["rows"].append(untouched[:own])
            untouched = untouched[own:]
            sections.append(_section(name))
        if untouched:
            sections[-1]["rows"].append(untouched)
            untouched = []
        sections[-1]["rows"].append(_change_row(number, entry))
    if untouched:
        sections = sections or [_section("all")]
        sections[-1]["rows"].append(untouched)
    return sections


def _section(name: str) -> dict[str, Any]:
    return {"name": name, "rows": []}


def _in_order(diff: Mapping[str, Any]) -> list[Any]:
    """Return changes and, as names, untouched nodes, in the order of the graph after.

    The diff has no positions of untouched nodes: they are the positions that no edit takes.
    """
    taken = {edit["after"]["index"] for c in diff["changes"] for edit in c["edits"] if edit["after"] is not None}
    free = (at for at in range(diff["after"]["nodes"]) if at not in taken)
    entries: list[tuple[float, int, Any]] = [(at, 1, name) for at, name in zip(free, diff["untouched"], strict=False)]
    last = -1.0
    for entry in diff["changes"]:
        positions = [edit["after"]["index"] for edit in entry["edits"] if edit["after"] is not None]
        last = min(positions) if positions else last + 1e-6  # a removed node has an order among the changes only
        entries.append((last, 0, entry))
    return [e for _, _, e in sorted(entries, key=lambda e: e[:2])]


def _change_row(number: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    ranks = ranks_text(tuple(entry["ranks"])) if entry["ranks"] else ""
    sides: list[list[dict[str, Any]]] = [[], []]
    for at, edit in enumerate(entry["edits"]):
        is_pair = edit["before"] is not None and edit["after"] is not None
        pair = f"{number}.{at}" if is_pair else str(number)
        for side, node in enumerate((edit["before"], edit["after"])):
            if node is not None:
                sign = "~" if is_pair else "−" if side == 0 else "+"
                words = edit["what"] if side == 1 else ()
                sides[side].append(_node(node, entry["name"], sign, edit["kind"], pair, words))
    sizes = [entry["params_before"] or 0, entry["params"] or 0]
    return {
        "name": entry["name"],
        "path": entry["path"],
        "kind": entry["kind"],
        "form": f"{entry['form'] or ''} {ranks.replace('x', '×')}".strip(),
        "merged": entry["merged"],
        "notes": _notes(entry),
        "sizes": sizes,
        "params": f"{sizes[0]:,} → {sizes[1]:,}" if sizes[0] != sizes[1] else "",
        "before": sides[0],
        "after": sides[1],
    }


def _notes(entry: Mapping[str, Any]) -> list[str]:
    """Return the notes of a change, but not that of decompose if it only repeats the form and the ranks."""
    passes = [text.partition("{")[0] for text in entry["passes"]]
    repeats = entry["form"] in ("svd", "tucker2") and entry["ranks"] and entry["error_of"] != "output"
    return [note for name, note in zip(passes, entry["notes"], strict=True) if not (repeats and name == "decompose")]


def _node(node: Mapping[str, Any], site: str, sign: str, kind: str, pair: str, what: Sequence[str]) -> dict[str, Any]:
    name = node["target"] if node["op"] == "call_module" else node["name"]
    return {
        "sign": sign,
        "kind": kind,
        "pair": pair,
        "name": name.removeprefix(site) if name.startswith(f"{site}.") else name,
        "text": node["text"],
        "shape": _TIMES.join(map(str, node["shape"])) if node["shape"] else "",
        "what": list(what),
    }
