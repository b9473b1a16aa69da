"""When a report says that accuracy is at risk, or that the result is slow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd import Budget, Pipeline
from fxlrd.passes import Calibrate, Decompose
from fxlrd.report.advice import UNFITTED, advice
from fxlrd.timing.clock import Timing


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48)).eval()


def low_rank() -> nn.Module:
    model = net()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.randn(layer.out_features, 4) @ torch.randn(4, layer.in_features))
    return model


def inputs(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 48)


def warnings(model: nn.Module, **options) -> list[str]:
    return fxlrd.compress(model, inputs(), measure=False, **options).report.warnings


@pytest.mark.parametrize("options", [{}, {"ratio": 3.0}, {"preset": "freeze"}, {"pipeline": "decompose{ratio=4}"}])
def test_without_calibration_the_report_says_what_it_would_bring(options):
    assert warnings(net(), **options) == [UNFITTED]
    assert "\n" not in UNFITTED
    assert "calibration=" in UNFITTED


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (net(), {"budget": Budget(params=0.7), "calibration": inputs(100)}),
        (net(), {"pipeline": Pipeline([Calibrate([inputs(100)]), Decompose()])}),
        (net(), {"skip": "*"}),
        (net(), {"pipeline": "decompose{ranks=99}"}),
        (low_rank(), {}),
    ],
    ids=["budget", "calibrated by a pass", "nothing decomposed", "full rank", "layers of low rank"],
)
def test_nothing_is_said_where_data_were_used_or_nothing_is_lost(model, options):
    assert warnings(model, **options) == []


def test_a_result_that_is_not_faster_is_no_success():
    pipeline = Pipeline.parse("decompose")
    assert advice(pipeline, [], None) == []
    assert advice(pipeline, [], Timing(1.0, 0.5, 0.1)) == []
    (text,) = advice(pipeline, [], Timing(1.0, 0.95, 0.1))
    assert text.startswith("not faster than the original here: 1.05× its speed; try a larger ratio")


@pytest.mark.parametrize(
    ("budget", "remedy"), [("params=0.5", "a budget of latency"), ("latency=0.9", "a smaller share")]
)
def test_a_plan_that_is_not_faster_is_advised_what_plans_read(budget, remedy):
    (text,) = advice(Pipeline.parse(f"allocate{{{budget}}},decompose"), [], Timing(1.0, 1.02, 0.1))
    assert text.endswith(f"; try {remedy}, or another batch size")
