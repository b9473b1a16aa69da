"""What a report advises where a result is not what its user hoped for."""

from __future__ import annotations

from collections.abc import Sequence

from fxlrd.passes.allocate import Allocate
from fxlrd.pipeline import Pipeline
from fxlrd.report.rows import LayerRow
from fxlrd.timing.clock import Timing

UNFITTED = (
    "ranks and factors were chosen from the weights alone, which costs accuracy: fine-tune the result, or give "
    "calibration= (a few hundred inputs, no labels) and budget= to choose them by their effect on the model's outputs"
)
_LOSSY = 0.01
"""Relative error of a weight from which accuracy is at risk; a model whose layers are of low rank stays below."""


def advice(pipeline: Pipeline, rows: Sequence[LayerRow], timing: Timing | None) -> list[str]:
    """Return a sentence for a model that is not faster and one for factors that no data were used for.

    ``timing`` is that of the compressed model relative to the original; None if it was not timed or not changed.
    """
    texts = []
    if timing is not None and not timing.faster():
        texts.append(
            f"not faster than the original here: {1 / timing.ratio:.2f}× its speed; "
            f"try {_faster_by(pipeline)}, or another batch size"
        )
    if not _reads_data(pipeline) and any(row.ranks and (row.error or 0.0) > _LOSSY for row in rows):
        texts.append(UNFITTED)
    return texts


def _faster_by(pipeline: Pipeline) -> str:
    """Return which option may make the result faster. A plan does not read the others."""
    budgets = [each.budget for each in pipeline.passes if isinstance(each, Allocate)]
    if not budgets:
        return "a larger ratio, the ranks preset"
    return "a smaller share" if budgets[0].measure == "latency" else "a budget of latency"


def _reads_data(pipeline: Pipeline) -> bool:
    return any(getattr(p, "calibration", None) is not None for p in pipeline.passes)
