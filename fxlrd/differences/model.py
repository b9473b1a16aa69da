"""A difference as data: edits of nodes, changes of layers, blocks that changed alike, and the `Diff` of them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxlrd.differences import text
from fxlrd.differences.items import Item
from fxlrd.files import write_out

KINDS = (
    "rewritten", "merged", "changed", "moved", "renamed", "values", "trainable", "reshaped", "added", "removed",
)  # fmt: skip
"""The kinds of a change, see fxlrd/differences/compare.py. Where several apply to a node, the first one is its kind."""


@dataclass(frozen=True)
class Edit:
    """A node that was removed (``after`` is None), was added (``before`` is None) or is paired but not the same.

    ``kind`` is went, came, or a kind of change; ``what`` says in words what is not the same.
    """

    kind: str
    before: Item | None
    after: Item | None
    what: tuple[str, ...] = ()

    @property
    def items(self) -> list[Item]:
        """The nodes of the edit: one, or a pair."""
        return [i for i in (self.before, self.after) if i is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, see `Diff.to_dict`."""
        return {
            "kind": self.kind,
            "before": None if self.before is None else self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
            "what": list(self.what),
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
        """The nodes of the graph before that have no counterpart."""
        return [e.before for e in self.edits if e.kind == "went" and e.before is not None]

    @property
    def came(self) -> list[Item]:
        """The nodes of the graph after that have no counterpart."""
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
class Block:
    """A module, by its path, and the paths of the siblings right after it that changed in the same way."""

    name: str
    same: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, see `Diff.to_dict`."""
        return {"name": self.name, "same": list(self.same)}


@dataclass(frozen=True, repr=False)
class Diff:
    """The difference of two graphs; false where there is none. See `to_dict` for the fields.

    ``str()`` of it is its text.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    changes: tuple[Change, ...]
    untouched: tuple[str, ...]
    blocks: tuple[Block, ...] = ()
    skipped: tuple[dict[str, str], ...] = ()
    passes: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        counts = [f"{number} {kind}" for kind, number in self._counts().items()] or ["no changes"]
        return f"Diff({', '.join(counts)}, {len(self.untouched)} nodes untouched)"

    def _repr_html_(self) -> str:
        """Return figures and changes as HTML, for a notebook."""
        from fxlrd.report.html import diff_fragment

        return diff_fragment(self.to_dict())

    def to_text(self, *, color: bool = False, times: bool = True) -> str:
        """Return the difference as text, the empty string where there is nothing to say.

        Each change is a headline and a line for each node that was removed (-), was added (+) or is not the same (~);
        no line depends on other changes. ``times=False`` leaves out what was measured, which no two runs have in
        common. ``color`` adds ANSI colours.
        """
        return text.to_text(self.to_dict(), color=color, times=times)

    def to_html(self, path: str | Path) -> None:
        """Write the difference as one self-contained HTML page."""
        from fxlrd.report.html import diff_page

        write_out(Path(path), diff_page(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as plain data, fit for JSON.

        ``before``, ``after``: for each side its ``model`` (class name), ``nodes``, ``params``, ``flops``, ``depth``
        (None where it is unknown: no shapes, no graph).

        ``same``: whether there is no change. ``counts``: number of changes by kind (see fxlrd/differences/compare.py;
        only those that occur), and of nodes ``untouched``.

        ``changes``: a dict for each, in the order of the graph:

        - ``name``: the original module's name, or that of the first node; ``kind``; ``path``: its place in the tree
          of modules
        - ``form``: svd, tucker2, branched, merged or original, if the provenance of the nodes after says so; else None
        - ``ranks_before``, ``ranks``: lists of int or None (a mode that is not cut), or None
        - ``params_before``, ``params``, ``flops_before``, ``flops``: of the nodes of the site; FLOPs may be None
        - ``latency_ms_before``, ``latency_ms``: where a pass measured them, else None
        - ``error_before``, ``error``: relative error of the site's form, or None; ``error_of``: weight, or
          output if it was fitted to calibration inputs
        - ``merged``: names of other sites whose nodes were merged into this one
        - ``passes``: what changed the site, in the order of application, and ``notes``, what each says of it (both
          need ``report=``)
        - ``edits``: its nodes that are not the same, in the order of the graph, each with ``kind`` (went, came or a
          kind of change), ``before`` and ``after`` (None, or ``index`` in its graph, ``name``, ``op``, ``target``,
          ``text``, ``role``, ``shape`` (or None), ``params``, ``flops``, ``inputs``: names of nodes), and ``what``,
          words on what is not the same (empty for went and came)

        ``untouched``: names of the nodes after that did not change. ``skipped``: layers that were left alone, each
        ``name`` and ``reason``. ``passes``: those applied, in order, each ``text``, ``sites``, ``skipped`` (numbers).
        ``blocks``: runs of blocks that changed alike, each ``name`` (the first) and ``same`` (the others), as paths:
        the changes inside each of ``same`` are those inside ``name``, except for measurements. ``notes``: remarks on
        the comparison itself.
        """
        return {
            "before": dict(self.before),
            "after": dict(self.after),
            "same": not self,
            "counts": {**self._counts(), "untouched": len(self.untouched)},
            "changes": [change.to_dict() for change in self.changes],
            "untouched": list(self.untouched),
            "skipped": [dict(s) for s in self.skipped],
            "passes": [dict(p) for p in self.passes],
            "blocks": [block.to_dict() for block in self.blocks],
            "notes": list(self.notes),
        }

    def _counts(self) -> dict[str, int]:
        return {kind: n for kind in KINDS if (n := sum(c.kind == kind for c in self.changes))}
