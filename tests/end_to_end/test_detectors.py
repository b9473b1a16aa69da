"""compress() of detectors, and of optical flow, of torchvision, which cannot be traced."""

from __future__ import annotations

import pytest
import torch

from fxlrd.graph.inputs import tensors
from tests.support.compression import FULL_RANK, quick

pytestmark = pytest.mark.slow


def torchvision(name):
    from torchvision.models import detection, optical_flow

    torch.manual_seed(0)
    box = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 64}
    image = [torch.rand(3, 64, 48)]
    make = {
        "fasterrcnn": lambda: (detection.fasterrcnn_mobilenet_v3_large_320_fpn(**box), (image,)),
        "ssdlite": lambda: (
            detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None),
            (image,),
        ),
        "raft": lambda: (
            optical_flow.raft_small(weights=None),
            (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)),
        ),
    }
    model, inputs = make[name]()
    return model.eval(), inputs


@pytest.mark.parametrize("name", ["fasterrcnn", "ssdlite", "raft"])
def test_torchvision_models_that_cannot_be_traced(name):
    model, inputs = torchvision(name)
    result = quick(model, inputs, ratio=2.0)
    assert type(result.model) is type(model)
    assert result.report.after["params"] < 0.75 * result.report.before["params"]
    assert result.report.after["flops"] < 0.75 * result.report.before["flops"]
    with torch.no_grad():
        out = result.model(*inputs)
    if name != "raft":
        assert set(out[0]) == {"boxes", "labels", "scores"}
        assert all(row["name"] and row["reason"] for row in result.report.layers)
    assert all(torch.isfinite(t).all() for t in tensors(out))


def test_a_detector_at_full_rank_gives_the_same_scores_and_trains():
    model, (image,) = torchvision("fasterrcnn")
    # Far from ties: the order of boxes hangs on their scores.
    result = quick(model.double(), ([i.double() for i in image],), pipeline=FULL_RANK)
    image = [torch.rand(3, 48, 64).double(), torch.rand(3, 64, 64).double()]
    with torch.no_grad():
        for a, b in zip(result.model.eval()(image), model.eval()(image), strict=True):
            assert torch.allclose(a["scores"], b["scores"], atol=1e-9)
    target = {"boxes": torch.tensor([[1.0, 1.0, 30.0, 30.0]]).double(), "labels": torch.tensor([1])}
    losses = result.model.train()(image, [target] * 2)
    sum(losses.values()).backward()
    assert {k for k in losses if "loss" in k} >= {"loss_classifier", "loss_objectness"}
