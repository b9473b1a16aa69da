"""Reports to make pages of: a real one, with names that are markup, and large ones made up."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd.report.report import Report

EVIL = "<script>hacked = 1</script>"


def net() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(48, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU())

    parts: dict[str, nn.Module] = {
        "stem": nn.Conv2d(3, 48, 3, padding=1),
        "stage": nn.Sequential(block(), block()),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        EVIL: nn.Linear(48, 48),
        "relu": nn.ReLU(),
        "head": nn.Linear(48, 10),
    }
    return nn.Sequential(OrderedDict(parts))


@pytest.fixture(scope="session")
def report() -> Report:
    """Of a small network; nothing in it was timed."""
    torch.manual_seed(0)
    return fxlrd.compress(net(), torch.randn(2, 3, 12, 12), pipeline="decompose{skip=head}", measure=False).report


@pytest.fixture
def plain(report) -> dict[str, Any]:
    """The report as plain data, with timings made up, which so do not depend on the machine."""
    data = report.to_dict()
    timings = {
        "original": {"ms": 2.0, "ratio": 1.0, "spread": 0.0},
        "24x24": {"ms": 1.5, "ratio": 0.75, "spread": 0.02},
        "16x16": {"ms": 1.0, "ratio": 0.5, "spread": 0.01},
    }
    first = {"decision": "tucker2", "ranks": [16, 16], "error": 0.5, "timings": timings, "latency_ms_before": 2.0}
    rows = [dict(row, timings={}, latency_ms=None, latency_ms_before=None) for row in data["layers"]]
    rows[1] |= first | {"latency_ms": 1.0}
    rows[2] |= first | {"latency_ms": 1.0, "error": 0.25}
    settings = dict(data["settings"], speedup=1.5, speedup_spread=0.1)
    before, after = dict(data["before"], latency_ms=30.0), dict(data["after"], latency_ms=20.0)
    return data | {"layers": rows, "settings": settings, "before": before, "after": after}


@pytest.fixture
def large(plain) -> dict[str, Any]:
    """Of a model with 1,000 layers."""
    row = plain["layers"][1]
    return plain | {
        "layers": [dict(row, name=f"encoder.blocks.{i // 4}.conv{i % 4}", error=i / 1000) for i in range(1000)]
    }


@pytest.fixture
def variants() -> list[dict[str, Any]]:
    """Rows of a comparison such as the demo's."""
    keys = ("name", "accuracy", "recalibrated", "params", "flops", "latency_ms", "speed", "speed_spread")
    rows = [
        ("original", 0.95, 0.948, 867_690, 13_080_000_000, 72.5, 1.0, 0.0),
        ("lrd", 0.549, 0.542, 426_076, 6_720_000_000, 64.6, 1.11, 0.01),
        ("merge", 0.939, 0.939, 432_614, 6_230_000_000, 53.8, 1.33, 0.02),
        ("auto", 0.947, 0.948, 433_322, 9_450_000_000, 63.0, 1.16, 0.03),
    ]
    return [dict(zip(keys, row, strict=True)) for row in rows]
