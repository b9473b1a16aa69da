"""Which share of a model's conv and linear parameters is left alone, and why.

Embeddings, and linear layers that share the weight of one, stems and depthwise convs are not counted. Nor is it a
matter of a layer that could be decomposed, but has no form that saves parameters at the ratio.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import mean
from textwrap import shorten

from torch import nn

from fxlrd.report.report import Report

NOT_COUNTED = ("stem", "depthwise")
BY_CHOICE = ("too-narrow", "no-saving", "original-planned", "not-worth-it")
"""Codes of the reasons of passes that look at a layer and keep it."""


def left_alone(model: nn.Module, report: Report) -> dict[str, float]:
    """Return the share that is left alone for each reason: its code, or the start of its text."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    tied = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if any(id(p) in embeddings for p in module.parameters(recurse=False))
    }
    codes = {skip.name: skip.reason.code for record in report.ledger for skip in record.skipped}
    total, by_reason = 0, Counter[str]()
    for row in report.layers:
        code = codes.get(row["name"]) or shorten(row["reason"], 40, placeholder=" …")
        if code in NOT_COUNTED or row["name"] in tied:
            continue
        total += row["params_before"]
        if row["decision"] in ("skipped", "original") and code not in BY_CHOICE:
            by_reason[code] += row["params_before"]
    return {reason: count / total for reason, count in by_reason.most_common()}


def as_text(shares: Mapping[str, float] | None) -> str:
    """Return the share of all reasons, and of each of the first three, in percent; nothing for what is not known."""
    if shares is None:
        return ""
    parts = ", ".join(f"{share:.1%} {reason}" for reason, share in list(shares.items())[:3])
    return f"{sum(shares.values()):.1%}: {parts}" if parts else "0"


def mean_text(models: Iterable[Mapping[str, float]]) -> str:
    """Return the mean share over models, and the means of the first five reasons."""
    listed = list(models)
    totals = Counter[str]()
    for shares in listed:
        totals.update(shares)
    reasons = ", ".join(f"{total / len(listed):.2%} {reason}" for reason, total in totals.most_common(5))
    return f"{mean(sum(shares.values()) for shares in listed):.2%}" + (f": {reasons}" if reasons else "")
