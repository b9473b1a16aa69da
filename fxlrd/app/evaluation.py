"""What a model loses: accuracy on labelled examples, perplexity on text, or how often it still answers the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from fxlrd.app.examples import Examples
from fxlrd.errors import FxlrdError, one_line
from fxlrd.escaping import visible
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.run import evaluating
from fxlrd.progress import Progress, bar

ACCURACY, AGREEMENT, PERPLEXITY = "accuracy", "agreement", "perplexity"


class Score(NamedTuple):
    """The share of right answers (0…1) and, of a model that predicts the next token, the perplexity."""

    accuracy: float
    perplexity: float | None = None


@dataclass(frozen=True)
class Measure:
    """Measures models on examples.

    Attributes:
        kind: accuracy, of labelled examples; agreement with the original's answers; or perplexity.
        examples: what they are measured on; labels are the right answers.
        size: of a batch.
    """

    kind: str
    examples: Examples
    size: int

    def __call__(self, model: nn.Module, progress: Progress[Any] = bar) -> Score:
        """Measure a model, in eval mode."""
        total = right = 0.0
        count = 0
        with evaluating(model), torch.no_grad():
            for inputs, labels in progress(self.examples.batches(self.size), "measuring"):
                scores = scores_on(self.examples.where, model, inputs).float()
                if self.kind == PERPLEXITY:
                    labels, scores = inputs["input_ids"][:, 1:].flatten(), scores[:, :-1].flatten(0, 1)
                    total += F.cross_entropy(scores, labels, reduction="sum").item()
                right += int((scores.argmax(-1) == labels.to(scores.device)).sum())
                count += len(labels)
        perplexity = math.exp(min(total / count, 700)) if self.kind == PERPLEXITY else None
        return Score(right / count, perplexity)

    def value(self, score: Score) -> float:
        """Return the figure that stands for a score."""
        return score.accuracy if score.perplexity is None else score.perplexity

    def table(self, scores: Mapping[str, Score]) -> str:
        """Return the scores of models as text, the original's first."""
        first = next(iter(scores.values()))
        rows = [
            [name, self._text(score), "" if score is first else self._change(first, score)]
            for name, score in scores.items()
        ]
        align = ("left", "right", "right")
        headers = ["", self.kind, "change"]
        text = tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True, colalign=align)
        return f"{self.title}\n\n{text}"

    def to_dict(self, scores: Mapping[str, Score]) -> dict[str, Any]:
        """Return the scores as plain data."""
        values = {name: self.value(score) for name, score in scores.items()}
        return {"measure": self.kind, "on": self.examples.where, "examples": len(self.examples), "models": values}

    @property
    def title(self) -> str:
        """What is measured, on what."""
        on = f"{len(self.examples):,} {self.examples.noun} of {visible(self.examples.where)} that no fit has seen"
        what = {ACCURACY: "top-1 accuracy", AGREEMENT: "answers that are the original's,", PERPLEXITY: "perplexity"}
        return f"{what[self.kind]} on {on}"

    def _text(self, score: Score) -> str:
        return f"{100 * score.accuracy:.1f} %" if score.perplexity is None else f"{score.perplexity:.4g}"

    def _change(self, first: Score, score: Score) -> str:
        if first.perplexity is None or score.perplexity is None:
            return f"{100 * (score.accuracy - first.accuracy):+.1f} points"
        return f"{100 * (score.perplexity / first.perplexity - 1):+.1f} %"


def measure_for(model: nn.Module, examples: Examples, size: int) -> Measure | None:
    """Return what measures models on these examples; None where outputs are no scores of classes or tokens.

    Where classes are not known, the right answers are those of ``model``, the original.
    """
    if not len(examples):
        return None
    if examples.noun == "sequences":
        return Measure(PERPLEXITY, examples, size)
    if examples.labels:
        return Measure(ACCURACY, examples, size)
    if not outputs_of(model, examples):
        return None
    answers: dict[int, int] = {}
    with evaluating(model), torch.no_grad():
        for start in range(0, len(examples), size):
            inputs, numbers = examples.read(examples.numbers[start : start + size])
            if numbers:
                answers.update(zip(numbers, scores_on(examples.where, model, inputs).argmax(-1).tolist(), strict=True))
    labels = [answers.get(number, 0) for number in range(max(examples.numbers) + 1)]
    return Measure(AGREEMENT, replace(examples, labels=labels), size)


def outputs_of(model: nn.Module, examples: Examples) -> int | None:
    """Return how many classes a model tells apart, if its outputs are one score for each."""
    inputs, _ = next(iter(examples.batches(1)))
    with evaluating(model), torch.no_grad():
        scores = _tensor(_output(examples.where, model, inputs))
    if scores is None:
        return None
    return scores.shape[1] if scores.dim() == 2 and scores.shape[1] > 1 else None


def scores_on(where: str, model: nn.Module, inputs: Any) -> Tensor:
    """Return a model's scores. Raises FxlrdError where it fails on the inputs, and where it gives none."""
    scores = _tensor(_output(where, model, inputs))
    if scores is None:
        raise FxlrdError(f"{where}: a {type(model).__name__} gives no scores of classes or tokens")
    return scores


def _output(where: str, model: nn.Module, inputs: Any) -> Any:
    arguments = Inputs.of(inputs)
    try:
        return model(*arguments.args, **arguments.kwargs)
    except Exception as error:
        raise FxlrdError(f"{where}: the model fails on it: {one_line(error)}") from error


def _tensor(output: Any) -> Tensor | None:
    """Return the scores in a model's output, if there are any."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None
