"""A difference as data: edits, changes, the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxlrd.differences.match import Item

KINDS = (
    "rewritten", "merged", "changed", "moved", "renamed", "values", "trainable", "reshaped", "added", "removed",
)  # fmt: skip
_LARGEST = 16
"""Unrelated nodes in one place are told as one rewrite up to so many; more are two models with nothing in common."""


@dataclass(frozen=True)
class Edit:
    """One node that went (``after`` is None), came (``before`` is None) or stayed and is not the same.

    ``kind`` is went, came, or one of those of a change; ``what`` says in words what is not the same.
    """

    kind: str
    before: Item | None
    after: Item | None
    what: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, see `Diff.to_dict`."""
        return {
            "kind": self.kind,
            "before": None if self.before is None else _node(self.before),
            "after": None if self.after is None else _node(self.after),
            "what": list(self.what),
        }


def _node(item: Item) -> dict[str, Any]:
    return {
        "index": item.index,
        "name": item.name,
        "op": item.op,
        "target": item.target,
        "text": item.text,
        "role": None if item.known is None else item.known.role,
        "shape": None if item.shape is None else list(item.shape),
        "params": item.params,
        "flops": item.flops,
        "inputs": [i.name for i in item.inputs],
    }


@dataclass(frozen=True)
class Change:
    """What became of one site, see `Diff.to_dict` for the fields."""

    name: str
    kind: str
    edits: tuple[Edit, ...]
    path: str
    form: str | None = None
    merged: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def went(self) -> list[Item]:
        """The nodes of before that have no counterpart."""
        return [e.before for e in self.edits if e.kind == "went" and e.before is not None]

    @property
    def came(self) -> list[Item]:
        """The nodes of after that have no counterpart."""
        return [e.after for e in self.edits if e.kind == "came" and e.after is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, see `Diff.to_dict`."""
        return {
            "name": self.name,
            "kind": self.kind,
            "form": self.form,
            "path": self.path,
            **self.figures,
            "merged": list(self.merged),
            "passes": list(self.passes),
            "notes": list(self.notes),
            "edits": [edit.to_dict() for edit in self.edits],
        }


@dataclass(frozen=True)
class Diff:
    """The difference of two graphs; false where there is none. See `to_dict` for the fields."""

    before: dict[str, Any]
    after: dict[str, Any]
    changes: tuple[Change, ...]
    untouched: tuple[str, ...]
    skipped: tuple[dict[str, str], ...] = ()
    passes: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes)

    def to_text(self, *, color: bool = False, times: bool = True) -> str:
        """Return the difference as text, the empty string where there is nothing to say.

        Each change is a headline and a line for each node that went (-), came (+) or is not the same (~); nothing in
        a line depends on other lines. ``times=False`` leaves out what was measured, which no two runs have in common.
        """
        from fxlrd.differences.text import whole

        return whole(self, color, times)

    def to_html(self, path: str | Path) -> None:
        """Write the difference as one HTML page that needs nothing else."""
        from fxlrd.files import write_out
        from fxlrd.report.html import diff_page

        write_out(Path(path), diff_page(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as plain data, fit for JSON.

        ``before``, ``after``: of each side as a whole ``model`` (class name), ``nodes``, ``params``, ``flops``,
        ``depth`` (None where it is not known: no shapes, no graph).

        ``same``: whether there is no change. ``counts``: number of changes by kind (see the module docstring; those
        that occur only), and of nodes ``untouched``.

        ``changes``: in the order of the graph, a dict each of

        - ``name``: the original module's name, or that of the first node; ``kind``; ``path``: where it is in the tree
          of modules, for grouping
        - ``form``: svd, tucker2, branched, merged or original, where after has provenance that says so; else None
        - ``ranks_before``, ``ranks``: lists of int or None (a mode that is not cut), or None
        - ``params_before``, ``params``, ``flops_before``, ``flops``: of the nodes of the site; FLOPs may be None
        - ``latency_ms_before``, ``latency_ms``: where a pass measured them, else None
        - ``error_before``, ``error``: relative error of the site's form, or None; ``error_of``: weight, or
          output where it was fitted to calibration inputs
        - ``merged``: names of other sites whose nodes went into this one
        - ``passes``: what changed the site, in the order of application, and ``notes``, what each says of it (both
          need ``report=``)
        - ``edits``: its nodes that are not the same, in the order of the graph, each with ``kind`` (went, came or a
          kind of change), ``before`` and ``after`` (None, or ``index`` in its graph, ``name``, ``op``, ``target``,
          ``text``, ``role``, ``shape`` (or None), ``params``, ``flops``, ``inputs``: names of nodes), and ``what``,
          words on what is not the same (empty for went and came)

        ``untouched``: names of the nodes of after that did not change. ``skipped``: layers that were left alone, each
        ``name`` and ``reason``. ``passes``: those applied, in order, each ``text``, ``sites``, ``skipped`` (numbers).
        ``blocks``: runs of blocks that changed alike, each ``name`` (the first) and ``same`` (the others), as paths:
        all changes under ``same`` are those under ``name`` but for what was measured. ``notes``: what should be known
        of the comparison itself.
        """
        from fxlrd.differences.blocks import runs

        counts = {kind: n for kind in KINDS if (n := sum(c.kind == kind for c in self.changes))}
        return {
            "before": dict(self.before),
            "after": dict(self.after),
            "same": not self,
            "counts": {**counts, "untouched": len(self.untouched)},
            "changes": [change.to_dict() for change in self.changes],
            "untouched": list(self.untouched),
            "skipped": [dict(s) for s in self.skipped],
            "passes": [dict(p) for p in self.passes],
            "blocks": [{"name": name, "same": list(same)} for name, same in runs(self.changes)],
            "notes": list(self.notes),
        }
