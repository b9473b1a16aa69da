"""A graph diff arranged to be read side by side: blocks of the module tree; in each, what went, came and stayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fxlrd.layers.forms import ranks_text

_TIMES = "×"


def arranged(diff: Mapping[str, Any]) -> dict[str, Any]:
    """Return the diff in blocks of the module tree, each with its changes and what is untouched between them."""
    alike = {name: run["name"] for run in diff["blocks"] for name in run["same"]}
    blocks: list[dict[str, Any]] = []
    waiting: list[str] = []  # untouched nodes, until it is clear to which block they belong
    for number, entry in enumerate(_in_order(diff)):
        if isinstance(entry, str):
            waiting.append(entry)
            continue
        name = block_name(entry["path"])
        if not blocks or blocks[-1]["name"] != name:
            stem = name.replace(".", "_") + "_"
            own = next((i for i, node in enumerate(waiting) if node.startswith(stem)), len(waiting))
            if not blocks and waiting[:own]:
                blocks.append(_block("input", None))
            if waiting[:own]:
                blocks[-1]["rows"].append(waiting[:own])
            waiting = waiting[own:]
            blocks.append(_block(name, alike.get(name)))
        if waiting:
            blocks[-1]["rows"].append(waiting)
            waiting = []
        blocks[-1]["rows"].append(_change_row(number, entry))
    if waiting:
        blocks = blocks or [_block("all", None)]
        blocks[-1]["rows"].append(waiting)
    for block in blocks:
        changes = [row for row in block["rows"] if isinstance(row, dict)]
        block["changes"] = len(changes)
        block["params"] = [sum(row["sizes"][side] for row in changes) for side in (0, 1)]
        block["open"] = bool(changes) and block["alike"] is None
    return {
        "blocks": blocks,
        "counts": [(kind, number) for kind, number in diff["counts"].items()],
        "before": diff["before"],
        "after": diff["after"],
        "notes": diff["notes"],
    }


def _block(name: str, alike: str | None) -> dict[str, Any]:
    return {"name": name, "alike": alike, "rows": []}


def block_name(path: str) -> str:
    """Return the block that a module is in: up to the first number in its path, or else what is right around it."""
    parts = path.split(".")
    for at, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: at + 1])
    return ".".join(parts[:-1]) or path


def _in_order(diff: Mapping[str, Any]) -> list[Any]:
    """Return changes and, as names, untouched nodes, in the order of the graph after.

    The diff has no positions for what is untouched: they are those that no edit takes.
    """
    taken = {edit["after"]["index"] for c in diff["changes"] for edit in c["edits"] if edit["after"] is not None}
    free = (at for at in range(diff["after"]["nodes"]) if at not in taken)
    entries: list[tuple[float, int, Any]] = [(at, 1, name) for at, name in zip(free, diff["untouched"], strict=False)]
    last = -1.0
    for entry in diff["changes"]:
        here = [edit["after"]["index"] for edit in entry["edits"] if edit["after"] is not None]
        last = min(here) if here else last + 1e-6  # of what is gone, only the order among changes is known
        entries.append((last, 0, entry))
    return [e for _, _, e in sorted(entries, key=lambda e: e[:2])]


def _change_row(number: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    ranks = ranks_text(tuple(entry["ranks"])) if entry["ranks"] else ""
    sides: list[list[dict[str, Any]]] = [[], []]
    for at, edit in enumerate(entry["edits"]):
        both = edit["before"] is not None and edit["after"] is not None
        pair = f"{number}.{at}" if both else str(number)
        for side, node in enumerate((edit["before"], edit["after"])):
            if node is not None:
                sign = "~" if both else "−" if side == 0 else "+"
                words = edit["what"] if side == 1 else ()
                sides[side].append(_node(node, entry["name"], sign, edit["kind"], pair, words))
    sizes = [entry["params_before"] or 0, entry["params"] or 0]
    return {
        "name": entry["name"],
        "kind": entry["kind"],
        "form": f"{entry['form'] or ''} {ranks.replace('x', '×')}".strip(),
        "merged": entry["merged"],
        "notes": [note for text, note in zip(entry["passes"], entry["notes"], strict=True) if not _shown(entry, text)],
        "sizes": sizes,
        "params": f"{sizes[0]:,} → {sizes[1]:,}" if sizes[0] != sizes[1] else "",
        "before": sides[0],
        "after": sides[1],
    }


def _shown(entry: Mapping[str, Any], pass_text: str) -> bool:
    """Whether a change's form and ranks, which are shown anyway, are all that the pass did."""
    decomposed = pass_text.partition("{")[0] == "decompose" and entry["form"] in ("svd", "tucker2")
    return decomposed and entry["error_of"] != "output"


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
