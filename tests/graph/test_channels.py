from __future__ import annotations

import torch
from torch import fx, nn
from torchvision import models

from fxlrd import capture
from fxlrd.errors import Reason
from fxlrd.graph.channels import Group, group_of
from fxlrd.graph.guards import why_not_replaceable
from fxlrd.graph.operations import features_per_channel
from fxlrd.graph.surgery import calls


def of(gm: fx.GraphModule, producer: str) -> Group | Reason:
    return group_of(gm, calls(gm, producer)[0], why_not_replaceable(gm, norms=True))


def targets(nodes) -> list[str]:
    return sorted(str(getattr(n, "node", n).target) for n in nodes)


def parts(found: Group) -> tuple[list[str], list[str], dict[str, int]]:
    return (
        targets(found.producers),
        targets(found.through),
        {str(c.node.target): c.block for c in found.consumers},
    )


def test_a_bottleneck_has_two_groups():
    gm = capture(models.resnet50(), torch.randn(1, 3, 64, 64))
    first = of(gm, "layer2.0.conv1")
    assert first.channels == 128
    assert parts(first) == (["layer2.0.conv1"], ["layer2.0.bn1"], {"layer2.0.conv2": 1})
    assert parts(of(gm, "layer2.0.conv2")) == (["layer2.0.conv2"], ["layer2.0.bn2"], {"layer2.0.conv3": 1})
    assert of(gm, "layer2.0.conv3").code == "residual"
    assert of(gm, "fc").code == "model-output"


def test_an_inverted_residual_is_one_group_with_its_squeeze_excitation():
    gm = capture(models.efficientnet_b0(), torch.randn(1, 3, 64, 64))
    block = "features.3.0.block"
    for producer in (f"{block}.0.0", f"{block}.2.fc2"):
        found = of(gm, producer)
        assert found.channels == 144
        assert parts(found) == (
            [f"{block}.0.0", f"{block}.2.fc2"],
            [f"{block}.0.1", f"{block}.1.0", f"{block}.1.1"],
            {f"{block}.2.fc1": 1, f"{block}.3.0": 1},
        )
        assert {c.source.name for c in found.consumers if "fc1" in str(c.node.target)} == {
            next(c.node for c in found.consumers if "fc1" in str(c.node.target)).all_input_nodes[0].name
        }
    assert parts(of(gm, f"{block}.2.fc1")) == ([f"{block}.2.fc1"], [], {f"{block}.2.fc2": 1})


def test_a_flatten_makes_blocks():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Dropout(), nn.Linear(48, 5)
    )
    gm = capture(model, torch.randn(2, 3, 9, 9))
    (consumer,) = of(gm, "0").consumers
    assert (consumer.block, consumer.source.target) == (6, "4")
    assert features_per_channel(gm, consumer.source) == 6
    assert features_per_channel(gm, calls(gm, "2")[0]) == 1


def test_a_flatten_of_one_position_makes_none():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 5))
    assert parts(of(capture(model, torch.randn(2, 3, 9, 9)), "0")) == (["0"], ["3"], {"4": 1})


def test_blocks_pass_elementwise_operations_only():
    model = nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten(), nn.BatchNorm1d(32), nn.Linear(32, 5))
    assert of(capture(model, torch.randn(2, 3, 9, 9)), "0").code == "mixed"


def test_a_mlp():
    gm = capture(nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Dropout(), nn.Linear(9, 4)), torch.randn(2, 5, 4))
    assert parts(of(gm, "0")) == (["0"], [], {"3": 1})


def test_a_norm_over_another_axis_mixes():
    gm = capture(nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)), torch.randn(2, 9, 4))
    assert of(gm, "0").code == "mixed"
    gm = capture(nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)), torch.randn(2, 4))
    assert parts(of(gm, "0")) == (["0"], ["1"], {"2": 1})


def test_buffers_alone_go_with_the_channels():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 5, 1))
    assert parts(of(capture(model, torch.randn(2, 3, 4, 4)), "0")) == (["0"], ["1"], {"2": 1})


def test_shapes_have_to_be_known():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1))
    gm = fx.symbolic_trace(model)
    assert of(gm, "0").code == "no-shapes"


def test_nothing_reads_it():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            y = self.a(x)
            torch._assert(y.size(0) > 0, "a batch")
            return x

    assert of(fx.symbolic_trace(Dead()), "a").code == "unread"
