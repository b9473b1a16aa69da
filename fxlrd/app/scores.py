"""What the models of a command were measured at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fxlrd.app.evaluation import ACCURACY, Measure, Score
from fxlrd.progress import quiet
from fxlrd.report.report import Report


class Scores:
    """What models were measured at, if there is anything to measure them by: the original first."""

    def __init__(self, measure: Measure | None, original: nn.Module) -> None:
        self.measure = measure
        self.scores: dict[str, Score] = {}
        self.add("original", original)

    def add(self, name: str, model: nn.Module) -> None:
        """Measure a model."""
        if self.measure is not None:
            self.scores[name] = self.measure(model)

    def to_table(self) -> list[str]:
        """Return the scores as text, if there are any."""
        return [] if self.measure is None else [self.measure.table(self.scores)]

    def to_dict(self) -> dict[str, Any]:
        """Return what a report in JSON says of them."""
        return as_evaluation(self.measure, self.scores)

    def in_report(self, report: Report) -> Report:
        """Return the report with the accuracy before and after, which its page shows."""
        if self.measure is None or self.measure.kind != ACCURACY:
            return report
        first, *_, last = (score.accuracy for score in self.scores.values())
        return replace(report, before={**report.before, "accuracy": first}, after={**report.after, "accuracy": last})


class ScoresInTurn:
    """Measures the models of a frontier, which come in turn: the original, then the points."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.scores: list[Score] = []

    def __call__(self, model: nn.Module) -> float:
        """Return its accuracy, of which more is better; for a model that predicts tokens, the share of right ones."""
        self.scores.append(self.measure(model, quiet))
        return self.scores[-1].accuracy

    def named(self, names: list[str]) -> dict[str, Score]:
        """Return the scores by the names of the models."""
        return dict(zip(names, self.scores, strict=True))


def as_evaluation(measure: Measure | None, scores: dict[str, Score]) -> dict[str, Any]:
    """Return what a report in JSON says of scores; nothing if there are none."""
    return {"evaluation": measure.to_dict(scores)} if measure is not None and scores else {}
