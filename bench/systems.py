"""The paper's five systems as pipelines, and what they make of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from bench.speed import KEPT
from fxlrd import Pipeline
from fxlrd.graph import cost
from fxlrd.pipeline import PRESETS
from fxlrd.progress import bar

ORIGINAL = "original"
SYSTEMS = {
    "Vanilla LRD": PRESETS["lrd"],
    "Optimized Ranks": PRESETS["ranks"],
    "Layer Freezing": PRESETS["freeze"],
    "Layer Merging": "calibrate{outputs=false},merge",
    "Layer Branching": PRESETS["branch"],
}
"""The rows of the paper's tables. What fits merged weights to data changes no shapes, and is left out of timings."""
TIMED = "snap"
"""A pipeline with this in its text takes ranks by timing: parameters and FLOPs depend on the device too."""
OURS = {
    f"Layer Freezing, {KEPT}": PRESETS["freeze"],
    "Layer Merging, snapped": "calibrate{outputs=false},merge{snap=true}",
    "Layer Merging, snapped, BatchNorm folded": "calibrate{outputs=false},merge{snap=true},"
    "merge{mode=exact,norms=true}",
}
"""Rows that the paper does not have."""


def compressed(gm: fx.GraphModule, text: str, calibration: list[Tensor], compile: bool = False) -> fx.GraphModule:
    """Return what a pipeline makes of a captured model; outputs are not verified."""
    pipeline = Pipeline.parse(text)
    if pipeline.reads("calibration"):
        pipeline = pipeline.with_options(calibration=calibration)
    if compile and pipeline.reads("compile"):
        pipeline = pipeline.with_options(compile=True)
    return pipeline(gm, verify=False, progress=bar).graph_module


def counts(gm: fx.GraphModule, batch: int) -> dict[str, Any]:
    """Return depth, parameters and FLOPs an image of a model captured with a batch of images."""
    return {"layers": cost.depth(gm), "params": cost.params(gm), "flops": cost.flops(gm) / batch}
