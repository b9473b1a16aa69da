from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torchvision import models

from fxlrd import capture
from fxlrd.errors import Reason
from fxlrd.graph.channels import Group, group_of
from fxlrd.graph.guards import why_not_replaceable
from fxlrd.graph.operations import features_per_channel
from fxlrd.graph.surgery import calls


def of(gm: fx.GraphModule, producer: str, sums: bool = False) -> Group | Reason:
    return group_of(gm, calls(gm, producer)[0], why_not_replaceable(gm, norms=True), sums)


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


def test_a_stage_is_one_group_of_all_that_is_added_up():
    gm = capture(models.resnet18(), torch.randn(1, 3, 64, 64))
    stream = of(gm, "layer1.1.conv2", sums=True)
    assert stream.channels == 64
    producers = ["conv1", "layer1.0.conv2", "layer1.1.conv2"]
    consumers = ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"]
    assert parts(stream) == (producers, ["bn1", "layer1.0.bn2", "layer1.1.bn2"], dict.fromkeys(consumers, 1))
    sources = {str(consumer.node.target): consumer.source for consumer in stream.consumers}
    assert len(set(sources.values())) == 3
    between = {node.name for node in stream.between}
    assert between == {"bn1", "relu", "maxpool", "layer1_0_bn2", "iadd", "layer1_0_relu_1"} | {
        "layer1_1_bn2", "iadd_1", "layer1_1_relu_1"
    }  # fmt: skip
    for producer in producers:
        assert parts(of(gm, producer, sums=True)) == parts(stream)
    last = of(gm, "layer4.0.downsample.0", sums=True)
    assert parts(last)[0] == ["layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv2"]
    assert set(parts(last)[2]) == {"layer4.1.conv1", "fc"}


class Joined(nn.Module):
    """What a layer makes, and something else added to it."""

    def __init__(self, other):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.grouped, self.one, self.norm = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 1, 1), nn.LayerNorm(8)
        self.other = other

    def forward(self, x):
        y = self.a(x)
        return self.c(y + self.other(self, x, y))


@pytest.mark.parametrize(
    ("other", "code"),
    [
        (lambda m, x, y: x, "mixed"),
        (lambda m, x, y: y.flip(1), "mixed"),
        (lambda m, x, y: m.grouped(y), "grouped"),
        (lambda m, x, y: m.norm(m.b(y)), "mixed"),
        (lambda m, x, y: m.b(y)[:, :, :, 0], "residual"),
        (lambda m, x, y: m.b(x), None),
        (lambda m, x, y: m.b(y), None),
        (lambda m, x, y: 2 * m.b(y) + m.b(y).relu(), None),
        (lambda m, x, y: m.b(y) * m.one(y), None),
        (lambda m, x, y: m.one(y) + 1, None),
    ],
)
def test_what_is_added_to_a_stream(other, code):
    group = of(capture(Joined(other).eval(), torch.randn(8, 8, 8, 8)), "a", sums=True)
    assert (group.code if isinstance(group, Reason) else None) == code


def test_a_stream_may_be_as_deep_as_it_likes():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 2)
            self.steps = nn.ModuleList(nn.Linear(4, 4) for _ in range(700))

        def forward(self, x):
            x = self.first(x)
            for step in self.steps:
                x = x + step(x.relu())
            return self.last(x)

    group = of(capture(Deep(), torch.randn(3, 2)), "first", sums=True)
    assert len(group.producers) == len(group.consumers) == 701


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
