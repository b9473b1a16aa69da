"""compress() without timing, and what its result says of layers and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fxlrd
from fxlrd.graph.inputs import tensors

FULL_RANK = "decompose{ranks=100000}"


def quick(model: nn.Module, inputs: Any, **options: Any) -> fxlrd.Result:
    """Return the result of compress(), which times no model unless ``measure`` says so."""
    return fxlrd.compress(model, inputs, **{"measure": False, **options})


def decisions(result: fxlrd.Result) -> dict[str, str]:
    """Return by layer the report's decision."""
    return {row["name"]: row["decision"] for row in result.report.layers}


def layer_reasons(result: fxlrd.Result) -> dict[str, str]:
    """Return by layer the report's reason."""
    return {row["name"]: row["reason"] for row in result.report.layers}


def largest_error(outputs: Any, expected: Any) -> float:
    """Return the largest relative error of an output tensor, after checking their number, shapes and dtypes."""
    a, b = tensors(outputs), tensors(expected)
    assert [t.shape for t in a] == [t.shape for t in b]
    assert [t.dtype for t in a] == [t.dtype for t in b]
    return max((((x - y).norm() / y.norm()).item() for x, y in zip(a, b, strict=True)), default=0.0)


def assert_same_outputs(model: nn.Module, original: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Check that two models give the same outputs in eval mode, but for rounding in float64."""
    with torch.no_grad():
        assert largest_error(model.eval()(*args, **kwargs), original.eval()(*args, **kwargs)) < 1e-9
