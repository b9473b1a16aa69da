"""What a report says about each pass: which sites it changed, and which it left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class PassRecord:
    """One pass: its text form, its note and timings (by ranks) for each site, and its reason for each skipped layer."""

    text: str
    notes: Mapping[str, str]
    timings: Mapping[str, Mapping[str, Any]]
    skipped: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, see `Diff.to_dict`."""
        return {"text": self.text, "sites": len(self.notes), "skipped": len(self.skipped)}


def ledger_of(report: Any) -> list[Any]:
    """Return the records of a report, a result or a ledger, one for each pass; [] for anything else.

    A record is one of a pipeline's ledger or, in a report that was read from a file, a dict.
    """
    if isinstance(report, nn.Module):
        return []
    for name in ("report", "ledger", "passes"):  # a report that was read from a file has no ledger
        report = getattr(report, name, None) or report
    if isinstance(report, Mapping):
        report = report.get("passes", ())
    if not isinstance(report, Sequence) or isinstance(report, str):
        return []
    return [p for p in report if isinstance(p, Mapping) or hasattr(p, "skipped")]


def pass_records(report: Any) -> list[PassRecord]:
    """Return what a report, a result or a ledger says about each pass."""
    return [_pass_record(record) for record in ledger_of(report)]


def _pass_record(record: Any) -> PassRecord:
    sites, skipped = _field(record, "sites"), _field(record, "skipped")
    return PassRecord(
        _field(record, "text"),
        {_field(s, "name"): _field(s, "note") for s in sites},
        {_field(s, "name"): _field(s, "timings") or {} for s in sites},
        {_field(s, "name"): str(_field(s, "reason")) for s in skipped},
    )


def _field(record: Any, name: str) -> Any:
    return record.get(name, "") if isinstance(record, Mapping) else getattr(record, name, "")
