"""Whole torchvision architectures: each layer accounted for, the result runs, and the report adds up."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import fxlrd
from bench import zoo
from fxlrd.errors import FxlrdError
from fxlrd.graph.inputs import tensors
from fxlrd.graph.run import run
from fxlrd.layers.kinds import LAYERS

pytestmark = pytest.mark.slow

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
    if name == "vgg16_bn":  # the SVD of its first linear layer would take a minute
        model.classifier[0], model.classifier[3] = nn.Linear(25088, 256), nn.Linear(256, 4096)
    x = torch.randn(2, 3, SIZES[name], SIZES[name])
    reference = model(x)
    result = fxlrd.compress(model, x, ratio=2.0, measure=False)
    report = result.report

    rows = {row["name"]: row for row in report.layers}
    expected = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    attentions = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    expected += [f"{name}.{role}_proj" for name in attentions for role in "qkv"]
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


# One of each other family, the smallest; True where it is taken by regions. `python -m bench.zoo` has them all.
FAMILIES = {
    "googlenet": False,
    "lraspp_mobilenet_v3_large": False,
    "mc3_18": False,
    "mnasnet0_5": False,
    "mobilenet_v3_small": False,
    "shufflenet_v2_x0_5": False,
    "squeezenet1_1": False,
    "swin_v2_t": False,
    "fasterrcnn_mobilenet_v3_large_320_fpn": True,
    "raft_small": True,
    "ssdlite320_mobilenet_v3_large": True,
    "swin3d_t": True,
}


@pytest.mark.parametrize(("name", "regions"), FAMILIES.items())
def test_family(name, regions):
    model, inputs = zoo.build(name), zoo.inputs(name)
    reference = tensors(run(model, inputs))
    result = fxlrd.compress(model, inputs, ratio=2.0, measure=False)
    report = result.report

    assert any(w.startswith("taken as") for w in report.warnings) == regions
    assert isinstance(result.model, torch.fx.GraphModule) != regions
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}
    assert sorted(row["name"] for row in report.layers) == sorted(layers)
    assert all(row["reason"] for row in report.layers)
    assert any(row["decision"] in ("svd", "tucker2") for row in report.layers)

    assert report.after["params"] == sum(p.numel() for p in result.model.parameters())
    with FlopCounterMode(display=False) as counter:
        out = tensors(run(result.model, inputs))
    assert all(t.isfinite().all() for t in out)
    if "rcnn" not in name:  # other boxes, other FLOPs
        assert report.after["flops"] == counter.get_total_flops() < report.before["flops"]
        assert [t.dtype for t in out] == [t.dtype for t in reference]
    again = tensors(run(model, inputs))
    assert all(torch.equal(a, b) for a, b in zip(again, reference, strict=True)), "the user's model changed"


@pytest.mark.parametrize("name", ["raft_small", "ssdlite320_mobilenet_v3_large"])
def test_full_rank_in_place_is_exact_by_regions(name):
    model, inputs = zoo.build(name), zoo.inputs(name)
    report = fxlrd.compress(model, inputs, pipeline="decompose{ranks=9999}", measure=False, inplace=True).report
    assert report.passes[0]["relative_error"] < 1e-4


def test_zoo_names():
    assert zoo.names("resnet50, swin_*") == [
        "resnet50",
        "swin_b",
        "swin_s",
        "swin_t",
        "swin_v2_b",
        "swin_v2_s",
        "swin_v2_t",
    ]
    assert not any(n.startswith("quantized") for n in zoo.names())
    with pytest.raises(FxlrdError, match="resnet49: no model"):
        zoo.names("resnet50,resnet49")
