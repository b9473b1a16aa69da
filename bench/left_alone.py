"""Which share of a model's conv and linear parameters is left alone, and why.

Embeddings, and linear layers that share the weight of one, stems and depthwise convs are not counted. Nor is it a
matter of a layer that could be decomposed, but has no form that saves parameters at the ratio.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from textwrap import shorten

from torch import nn

from fxlrd.layers.kinds import LAYERS
from fxlrd.report.report import Report

NOT_COUNTED = ("stem", "depthwise")
_LAYERS = {kind.__name__ for kind in LAYERS}
BY_CHOICE = ("too-narrow", "no-saving", "original-planned", "not-worth-it")
"""Codes of the reasons of passes that look at a layer and keep it."""


@dataclass(frozen=True)
class LeftAlone:
    """What became of a model's weights.

    Attributes:
        reasons: the share of the conv and linear parameters that is left alone for each reason: its code, or the start
            of its text.
        held_by_no_layer: the share that weights which no layer holds (experts in one tensor) have of these and of the
            conv and linear parameters together.
    """

    reasons: Mapping[str, float]
    held_by_no_layer: float

    @classmethod
    def of(cls, model: nn.Module, report: Report) -> LeftAlone:
        """Return what the report of a compression of the model says."""
        codes = {skip.name: skip.reason.code for record in report.ledger for skip in record.skipped}
        embeddings = _tied_to_embeddings(model)
        total, unheld, by_reason = 0, 0, Counter[str]()
        for row in report.layers:
            code = codes.get(row["name"]) or shorten(row["reason"], 40, placeholder=" …")
            if code in NOT_COUNTED or row["name"] in embeddings:
                continue
            if row["op"] not in _LAYERS:
                unheld += row["params_before"]
                continue
            total += row["params_before"]
            if row["decision"] in ("skipped", "original") and code not in BY_CHOICE:
                by_reason[code] += row["params_before"]
        reasons = {reason: count / total for reason, count in by_reason.most_common()}
        return cls(reasons, unheld / (total + unheld))

    @property
    def share(self) -> float:
        """The share of the conv and linear parameters that is left alone."""
        return sum(self.reasons.values())

    def __str__(self) -> str:
        parts = [f"{share:.1%} {reason}" for reason, share in list(self.reasons.items())[:3]]
        text = f"{self.share:.1%}: {', '.join(parts)}" if parts else "0"
        return f"{text}; {self.held_by_no_layer:.1%} no layer holds" if self.held_by_no_layer else text


def mean_text(models: Sequence[LeftAlone]) -> str:
    """Return the mean share over models, and the means of the first five reasons."""
    totals = Counter[str]()
    for each in models:
        totals.update(each.reasons)
    reasons = ", ".join(f"{total / len(models):.2%} {reason}" for reason, total in totals.most_common(5))
    text = f"{mean(each.share for each in models):.2%}" + (f" ({reasons})" if reasons else "")
    return f"{text}; of all weights, no layer holds {mean(each.held_by_no_layer for each in models):.2%}"


def _tied_to_embeddings(model: nn.Module) -> set[str]:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    return {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if any(id(p) in embeddings for p in module.parameters(recurse=False))
    }
