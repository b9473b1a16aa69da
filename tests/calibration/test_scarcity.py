from __future__ import annotations

import torch
from torch import nn

from fxlrd import capture
from fxlrd.passes import Calibrate


def model() -> nn.Module:
    parts = [nn.Conv2d(3, 40, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 60), nn.Linear(60, 5)]
    return nn.Sequential(*parts).eval()


def test_layers_with_fewer_positions_than_channels_are_named_with_the_inputs_that_would_do():
    x = torch.randn(10, 3, 4, 4)
    (warning,) = Calibrate(list(x.split(5)))(capture(model(), x)).warnings
    assert warning.startswith("calibrate: 5 (10 of 60), 4 (10 of 40) have been measured at fewer positions")
    assert "60 inputs would do" in warning
    enough = torch.randn(60, 3, 4, 4)
    assert not Calibrate(enough)(capture(model(), enough)).warnings


def test_inputs_held_out_are_counted_as_inputs():
    x = torch.randn(50, 3, 4, 4)
    (warning,) = Calibrate(list(x.split(5)), holdout=True)(capture(model(), x)).warnings
    assert "5 (40 of 60) has" in warning
    assert "75 inputs would do" in warning
