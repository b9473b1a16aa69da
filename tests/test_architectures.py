"""Whole torchvision architectures: each layer accounted for, the result runs, and the report adds up."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import fxlrd

# Image sizes as small as the architecture takes, for the suite's sake.
SIZES = {
    "resnet18": 64,
    "resnet50": 64,
    "resnet101": 64,
    "resnet152": 64,
    "vgg16_bn": 32,
    "mobilenet_v2": 64,
    "efficientnet_b0": 64,
    "densenet121": 64,
    "convnext_tiny": 64,
    "regnet_y_400mf": 64,
    "vit_b_16": 224,
    "swin_t": 64,
}


@pytest.mark.parametrize("name", SIZES)
def test_compress(name):
    model = models.get_model(name, weights=None).eval()
    x = torch.randn(2, 3, SIZES[name], SIZES[name])
    reference = model(x)
    result = fxlrd.compress(model, x, ratio=2.0, measure=False)
    report = result.report

    rows = {row["name"]: row for row in report.layers}
    expected = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sorted(rows) == sorted(expected)
    for row in rows.values():
        assert row["decision"] in ("svd", "tucker2", "skipped")
        assert row["reason"]
        assert row["params"] < row["params_before"] or row["decision"] == "skipped"

    out = result.model(x)
    assert out.shape == reference.shape
    assert out.dtype == reference.dtype
    assert out.isfinite().all()
    assert torch.equal(model(x), reference), "the user's model changed"

    assert report.after["params"] == sum(p.numel() for p in result.model.parameters())
    others = report.before["params"] - sum(row["params_before"] for row in rows.values())
    assert report.after["params"] == others + sum(row["params"] for row in rows.values())
    with FlopCounterMode(display=False) as counter:
        result.model(x)
    assert report.after["flops"] == counter.get_total_flops()
    assert report.after["flops"] < report.before["flops"]


@pytest.mark.parametrize(("name", "size"), [("resnet18", 64), ("mobilenet_v2", 64), ("swin_t", 64)])
def test_full_rank_is_exact(name, size):
    model = models.get_model(name, weights=None).double().eval()
    x = torch.randn(1, 3, size, size).double()
    result = fxlrd.compress(model, x, pipeline="decompose{ranks=9999}", measure=False)
    assert result.report.passes[0]["relative_error"] < 1e-9
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)
