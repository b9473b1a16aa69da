from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision import models, ops
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import fxlrd
from fxlrd import FxlrdError, capture
from fxlrd.allocation.plan import Plan, planned
from fxlrd.calibration.moments import moments
from fxlrd.factor.elimination import Reading, eliminate
from fxlrd.factor.interpolative import interpolate
from fxlrd.graph import cost
from fxlrd.graph.captured import propagate
from fxlrd.graph.channels import Consumer, Group, group_of
from fxlrd.graph.facts import provenance, retained_channels, shape, statistics
from fxlrd.graph.guards import NEVER_CALLED, why_not_replaceable
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.layer import statistics_of
from fxlrd.graph.surgery import calls, fork, layers
from fxlrd.layers.compose import takes_shift, weight_by_channel
from fxlrd.layers.kinds import as_layer, channel_axis
from fxlrd.passes import Branch, Calibrate, Decompose, Freeze, Merge
from tests.support.merging import Net, calibrated, conv, hooked_conv, merged, randomised
from tests.support.models import ResidualNet
from tests.support.results import reasons, site_names
from tests.support.tensors import assert_close, images, relative_error
from tests.support.timers import FakeTimer


class Interpolate(nn.Module):
    """Select channels S, interpolate all from them: what the merged network does without doing it."""

    def __init__(self, retained, matrix, shift, axis, block):
        super().__init__()
        self.retained, self.matrix, self.axis, self.block = retained, matrix, axis, block
        self.shift = torch.zeros(len(matrix)).double() if shift is None else shift

    def forward(self, x):
        rows = x.movedim(self.axis, -1).unflatten(-1, (-1, self.block))
        full = torch.einsum("...cb,dc->...db", rows[..., self.retained, :], self.matrix) + self.shift[:, None]
        return full.flatten(-2).movedim(-1, self.axis)


def group_made_by(gm: fx.GraphModule, name: str) -> Group:
    """Return the group of the channels that a layer makes."""
    return group_of(gm, calls(gm, name)[0], why_not_replaceable(gm, norms=True), sums=True)


def interpolation(gm: fx.GraphModule, consumer: Consumer, retained: torch.Tensor) -> Interpolate:
    """Return the least squares interpolation, by the moments in the graph, of what a consumer reads."""
    module = gm.get_submodule(consumer.node.target)
    measured = moments(consumer.source, channel_axis(module, len(shape(consumer.source))), consumer.block)
    nodes = calls(gm, consumer.node.target)
    if len(nodes) > 1:
        measured = statistics_of(nodes).input_moments
    shifts = takes_shift(module)
    second, mean = (measured.covariance, measured.mean) if shifts else (measured.second, None)
    matrix, shift, _ = interpolate(second, retained, weight_by_channel(module, consumer.block), measured.ridge, mean)
    return Interpolate(retained, matrix, shift, -1 if isinstance(module, nn.Linear) else 1, consumer.block)


def interpolated(original: fx.GraphModule, result) -> fx.GraphModule:
    """Return the original with select-S/interpolate-T right before each consumer of what a merge has cut."""
    gm = fork(original)
    for i, name in enumerate(site_names(result)):
        retained = retained_channels(calls(result.graph_module, name)[0])
        group = group_made_by(original, name)
        retained = retained[retained < group.channels]  # those of the first part, where there are several
        for j, consumer in enumerate(group.consumers):
            gm.add_submodule(f"fit{i}_{j}", interpolation(original, consumer, retained))
            for node in calls(gm, consumer.node.target):
                (read,) = node.all_input_nodes
                with gm.graph.inserting_before(node):
                    fit = gm.graph.call_module(f"fit{i}_{j}", (read,))
                node.replace_input_with(read, fit)
    gm.recompile()
    return gm


def small_vit() -> nn.Module:
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=96, num_classes=7
    )
    nn.init.normal_(model.heads.head.weight)
    return model


def small_swin() -> nn.Module:
    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=7)


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(inplace=True)),
            *(nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        ),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Sequential(
            *(nn.Dropout(), nn.Linear(32 * 9, 64), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10)),
        ),
    )


# Model, image size, how many producers are named as sites, and some that must be.
NETWORKS = {
    "resnet18": (models.resnet18, 64, 8, ("layer1.0.conv1", "layer4.1.conv1")),
    "resnet50": (models.resnet50, 32, 32, ("layer1.0.conv1", "layer1.0.conv2", "layer4.2.conv2")),
    "mobilenet_v2": (models.mobilenet_v2, 32, 19, ("features.2.conv.0.0", "features.18.0")),
    "mobilenet_v3_small": (models.mobilenet_v3_small, 64, 23, ("features.4.block.0.0", "features.4.block.2.fc1")),
    "efficientnet_b0": (models.efficientnet_b0, 32, 35, ("features.3.0.block.0.0", "features.3.0.block.2.fc1")),
    "vgg": (vgg, 24, 4, ("0.3", "0.6", "3.1", "3.4")),
    "vit": (small_vit, 32, 2, ("encoder.layers.encoder_layer_0.mlp.0",)),
    "swin": (small_swin, 32, 4, ("features.1.0.mlp.0", "features.3.1.mlp.0")),
}


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the model with BatchNorm statistics of ``x``: with others, random networks make the same of any image."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(x)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_that_with_interpolative_factors(name):
    build, size, count, some = NETWORKS[name]
    model, x = settled(randomised(build()), images(16, size)), images(4, size)
    original = calibrated(model, x)
    result = Merge(ratio=1.6)(original)
    assert len(result.sites) == count
    assert set(some) <= set(site_names(result))
    assert not any(site.exact for site in result.sites)
    gm = result.graph_module
    assert cost.params(gm) < cost.params(original)
    assert cost.depth(gm) == cost.depth(original)
    assert len(gm.graph.nodes) == len(original.graph.nodes)
    unseen = images(2, size)
    out = gm(unseen)
    assert relative_error(out, interpolated(original, result)(unseen)) < 1e-9
    assert relative_error(out, model(unseen)) > 1e-6, "something was cut"


# Model, image size, channels to retain: of residual streams and of a layer inside a block.
STREAMS = {
    "resnet18": (models.resnet18, 64, {"layer1.0.conv2": 50, "layer3.1.conv2": 100, "layer3.1.conv1": 120}),
    "resnet50": (models.resnet50, 32, {"layer1.0.conv3": 150, "layer1.1.conv1": 40, "layer4.0.downsample.0": 900}),
    "mobilenet_v2": (models.mobilenet_v2, 32, {"features.4.conv.2": 20, "features.5.conv.0.0": 90}),
    "efficientnet_b0": (models.efficientnet_b0, 32, {"features.3.0.block.3.0": 30, "features.3.1.block.0.0": 200}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMS)
def test_a_residual_stream_is_cut_by_name(name):
    build, size, ranks = STREAMS[name]
    model, x = settled(randomised(build()), images(16, size)), images(4, size)
    original = calibrated(model, x)
    result = Merge(ranks=ranks)(original)
    gm = result.graph_module
    for layer, count in ranks.items():
        assert as_layer(gm.get_submodule(layer)).weight.shape[0] == count
    assert len(gm.graph.nodes) == len(original.graph.nodes)
    unseen = images(2, size)
    assert relative_error(gm(unseen), interpolated(original, result)(unseen)) < 1e-9
    assert relative_error(gm(unseen), model(unseen)) > 1e-6, "something was cut"


def test_a_ratio_leaves_residual_streams_as_they_are():
    model, x = randomised(ResidualNet(8)), images(4, 8)
    assert {reasons(merged(model, x))[f"blocks.{i}.conv2"] for i in (0, 1)} == {"residual"}
    assert reasons(merged(model, x, ranks={"blocks.*": 4}))["blocks.0.conv2"] == "residual"
    result = merged(model, x, ranks={"blocks.1.conv2": 5})
    assert site_names(result) == ["blocks.1.conv2"]
    assert result.graph_module.get_submodule("stem").out_channels == 5
    assert {"stem", "blocks.0.conv2"}.isdisjoint(reasons(result)), "they are cut with it"


def test_a_depthwise_conv_that_is_cut_with_a_stream_is_not_left_alone():
    model = Net(lambda m, x: (lambda y: m.last(m.dw(y) + m.step(y)))(m.first(x)), first=conv(), step=conv())
    model.dw, model.last = conv(groups=8), conv()
    result = merged(randomised(model), images(4, 6, channels=8), ranks={"step": 5})
    assert result.graph_module.get_submodule("dw").groups == 5
    assert {"dw", "first", "step"}.isdisjoint(reasons(result))


def test_a_name_comes_before_a_glob_and_one_stream_has_one_number():
    model, x = randomised(ResidualNet(8)), images(4, 8)
    result = merged(model, x, ranks={"blocks.*": 3, "blocks.1.conv2": 5})
    assert result.graph_module.get_submodule("stem").out_channels == 5
    assert result.graph_module.get_submodule("blocks.1.conv1").out_channels == 3
    message = r"^merge: blocks\.0\.conv2 and blocks\.1\.conv2 make the same channels: ranks= asks for 6 and 5; name one"
    with pytest.raises(FxlrdError, match=message):
        merged(model, x, ranks={"blocks.1.conv2": 5, "blocks.0.conv2": 6})


def test_channels_are_chosen_in_one_unit_for_all_that_read_them():
    """A reader whose weight is a thousand times as large, and what follows it as much smaller, says no more."""
    retained = []
    for factor in (1.0, 1e3):
        torch.manual_seed(0)
        model, x = randomised(ResidualNet(8)), images(4, 8)
        block = model.blocks[0]
        with torch.no_grad():
            block.conv1.weight *= factor
            for buffer, power in ((block.bn1.running_mean, 1), (block.bn1.running_var, 2)):
                buffer *= factor**power
        block.bn1.eps = 1e-12
        gm = merged(model, x, ranks={"blocks.1.conv2": 4}).graph_module
        retained.append(retained_channels(calls(gm, "blocks.1.conv2")[0]))
    assert torch.equal(*retained)


@pytest.mark.usefixtures("without_ridge")
def test_channels_of_a_stream_that_others_determine_cost_nothing():
    """Eight channels of which four are twice the others, in the stem and in all that is added to it."""
    model, x = randomised(ResidualNet(8)), images(20, 8)
    with torch.no_grad():
        for conv in (model.stem, *(block.conv2 for block in model.blocks)):
            conv.weight[4:] = 2 * conv.weight[:4]
            conv.bias[4:] = 2 * conv.bias[:4]
    result = merged(model, x, ranks={"blocks.1.conv2": 4})
    assert result.graph_module.get_submodule("head").in_features == 4
    unseen = images(3, 8)
    assert relative_error(result.graph_module(unseen), model(unseen)) < 1e-9


class Steps(nn.Module):
    """x + f(x) twice, of a layer that reads and makes the same channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.step, self.out = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        y = y + self.step(y.tanh())
        return self.out(y + self.step(y.tanh()))


def test_a_layer_that_reads_and_makes_the_same_channels():
    model = Steps(6).double().eval()
    with torch.no_grad():
        for layer in (model.into, model.step):
            layer.weight[3:], layer.bias[3:] = layer.weight[:3], layer.bias[:3]
    result = merged(model, torch.randn(200, 4).double(), ranks={"step": 3})
    assert result.graph_module.get_submodule("step").weight.shape == (3, 3)
    unseen = torch.randn(20, 4).double()
    assert relative_error(result.graph_module(unseen), model(unseen)) < 1e-9


@pytest.mark.slow
def test_retained_channels_and_interpolation_come_from_the_moments_on_the_nodes():
    model, x = randomised(models.resnet18()), images(4, 64)
    original = calibrated(model, x)
    result = Merge()(original)
    assert len(result.sites) == 8
    for name in site_names(result):
        (consumer,) = group_made_by(original, name).consumers
        target = consumer.node.target
        retained = retained_channels(calls(result.graph_module, name)[0])
        measured = moments(consumer.source, 1)
        read = Reading(measured.second, weight_by_channel(original.get_submodule(target)), measured.ridge)
        assert torch.equal(retained, eliminate([read]).retained(len(retained)))
        matrix = interpolation(original, consumer, retained).matrix
        folded = torch.einsum("scij,cr->srij", original.get_submodule(target).weight, matrix)
        torch.testing.assert_close(result.graph_module.get_submodule(target).weight, folded, rtol=1e-12, atol=1e-12)
        made = original.get_submodule(name).weight[retained]
        assert torch.equal(result.graph_module.get_submodule(name).weight, made)


@pytest.mark.slow
def test_what_reads_a_squeeze_excitation_reads_the_same_channels():
    model, x = randomised(models.efficientnet_b0()), images(4, 32)
    gm = merged(model, x, ratio=2).graph_module
    expand, depthwise, squeeze, excite, project = (
        gm.get_submodule(f"features.3.0.block.{part}") for part in ("0.0", "1.0", "2.fc1", "2.fc2", "3.0")
    )
    assert expand.out_channels == 72
    assert depthwise.in_channels == depthwise.out_channels == depthwise.groups == 72
    assert squeeze.in_channels == excite.out_channels == project.in_channels == 72
    assert gm.get_submodule("features.3.0.block.1.1").num_features == 72


class Dependent(nn.Module):
    """A chain in which only a few channels of each tensor are more than copies, but for a positive scale."""

    def __init__(self, linear: bool = False):
        super().__init__()
        self.a = nn.Linear(6, 24) if linear else nn.Conv2d(6, 24, 1)
        self.b = nn.Linear(24, 30) if linear else nn.Conv2d(24, 30, 3, padding=1)
        self.c = nn.Linear(30, 10) if linear else nn.Conv2d(30, 10, 1)
        for m, base in ((self.a, 5), (self.b, 7)):
            n = len(m.weight)
            scale = torch.rand(n) + 0.5
            m.weight.data = m.weight[torch.arange(n) % base] * scale.view(-1, *[1] * (m.weight.dim() - 1))
            m.bias.data = m.bias[torch.arange(n) % base] * scale

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


@pytest.mark.parametrize("linear", [False, True])
def test_dependent_channels_are_left_out_for_nothing(linear):
    torch.set_default_dtype(torch.float64)
    try:
        model = Dependent(linear).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    x = torch.randn(400, 6).double() if linear else images(4, 12, channels=6)
    result = merged(model, x, ranks={"a": 5, "b": 7})
    assert site_names(result) == ["a", "b"]
    assert_close(result.graph_module(x), model(x))
    fewer = merged(model, x, ranks={"a": 4, "b": 6})
    assert relative_error(fewer.graph_module(x), model(x)) > 1e-3


def test_the_predicted_error_is_measured_on_the_calibration_inputs():
    model = nn.Sequential(nn.Conv2d(6, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 12, 1, bias=False))
    model, x = randomised(model), images(4, 12, channels=6)
    result = merged(model, x, ranks={"0": 9})
    known = provenance(calls(result.graph_module, "3")[0])
    assert known.error == pytest.approx(relative_error(result.graph_module(x), model(x)), rel=1e-9)
    assert known.ranks == (9, None)
    assert provenance(calls(result.graph_module, "0")[0]).ranks == (None, 9)
    assert {provenance(n).role for n in result.graph_module.graph.nodes if provenance(n)} == {"merged", "original"}


PAPER = {"resnet50": (50, -51.5, -55.1), "resnet101": (101, -56.4, -58.9), "resnet152": (152, -58.1, -60.2)}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_figures(name):
    depth, params, flops = PAPER[name]
    model = models.get_model(name, weights=None).eval()
    before = capture(model, torch.randn(1, 3, 224, 224))
    result = Merge(ratio=2.75)(Calibrate(torch.randn(2, 3, 64, 64), outputs=False)(before).graph_module)
    after = result.graph_module
    propagate(after, Inputs.of(torch.randn(1, 3, 224, 224)))
    assert cost.depth(after) == cost.depth(before) == depth
    assert 100 * (cost.params(after) / cost.params(before) - 1) == pytest.approx(params, abs=0.7)
    assert 100 * (cost.flops(after) / cost.flops(before) - 1) == pytest.approx(flops, abs=0.7)
    untouched = [n for n in layers(before) if "downsample" in n or n in ("conv1", "fc")]
    assert len(untouched) == 6
    for target in untouched:
        assert after.get_submodule(target) is before.get_submodule(target)


@pytest.mark.slow
def test_the_rank_is_that_of_equation_7_beside_a_spatial_conv():
    gm = merged(models.resnet50().eval().float(), torch.randn(2, 3, 32, 32)).graph_module
    r = fxlrd.ranks.tucker2_rank(512, 512, 3, 2.75)
    assert gm.get_submodule("layer4.2.conv2").weight.shape == (r, r, 3, 3)
    assert gm.get_submodule("layer4.2.conv1").weight.shape == (r, 2048, 1, 1)
    assert gm.get_submodule("layer4.2.conv3").weight.shape == (2048, r, 1, 1)
    assert gm.get_submodule("layer4.2.bn2").num_features == r


FREE: dict = {
    "functional": (lambda m, x: m.b(torch.nn.functional.relu(m.a(x)) * 2), {"a": conv(), "b": conv()}),
    "scalar": (lambda m, x: m.b((m.a(x) + 1).clamp(0, 2) / 3), {"a": conv(), "b": conv(k=3)}),
    "prelu": (lambda m, x: m.b(m.p(m.a(x))), {"a": conv(), "p": nn.PReLU(8), "b": conv()}),
    "one prelu": (lambda m, x: m.b(m.p(m.a(x))), {"a": conv(), "p": nn.PReLU(), "b": conv()}),
    "bare norm": (lambda m, x: m.b(m.n(m.a(x))), {"a": conv(), "n": nn.BatchNorm2d(8, affine=False), "b": conv()}),
    "batch norm": (
        lambda m, x: m.b(m.n(m.a(x))),
        {"a": conv(), "n": nn.BatchNorm2d(8, track_running_stats=False), "b": conv()},
    ),
    "gated": (lambda m, x: m.b(m.a(x).sigmoid() * m.c(x)), {"a": conv(), "c": conv(k=3), "b": conv()}),
    "depthwise": (
        lambda m, x: m.b(m.d(m.a(x)).relu()),
        {"a": conv(), "d": conv(k=3, groups=8, stride=2), "b": conv()},
    ),
    "flatten": (lambda m, x: m.b(torch.flatten(m.a(x), 1).relu()), {"a": conv(), "b": nn.Linear(8 * 36, 5)}),
    "view": (lambda m, x: m.b(m.a(x).view(x.size(0), -1)), {"a": conv(), "b": nn.Linear(8 * 36, 5)}),
    "own view": (
        lambda m, x: (lambda y: m.b(y.view(y.size(0), -1).tanh()))(m.a(x)),
        {"a": conv(), "b": nn.Linear(8 * 36, 5)},
    ),
    "shape view": (
        lambda m, x: (lambda y: m.b(y.reshape(y.shape[0], -1)))(m.a(x)),
        {"a": conv(), "b": nn.Linear(8 * 36, 5)},
    ),
    "mean": (lambda m, x: m.b(m.a(x).relu().mean([2, 3])), {"a": conv(), "b": nn.Linear(8, 5)}),
    "linear": (lambda m, x: m.b(m.a(x).relu()), {"a": nn.Linear(6, 8), "b": nn.Linear(8, 5)}),
}


def packed(m, x):
    up, gate = m.a(x).chunk(2, dim=-1)
    return m.b(up * torch.nn.functional.silu(gate))


def written_out(m, x):
    y = m.a(x)
    return m.b(0.5 * y * (1 + torch.tanh(0.8 * (y + 0.04 * torch.pow(y, 3)))))


class Own(nn.Module):
    """An activation that no list has."""

    def forward(self, x):
        return torch.atan(x) * x.clamp_min(0).sqrt()


class NormAndActivation(nn.BatchNorm2d):
    """Norm with an activation inside, as timm has it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.PReLU(channels)

    def forward(self, x):
        return self.act(super().forward(x))


class Scale(nn.Module):
    """A norm that is frozen, with buffers only."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.register_buffer("scale", torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x):
        return x * self.scale + torch.arange(self.channels).view(-1, 1, 1) * 0


FREE["norm and activation"] = (lambda m, x: m.b(m.n(m.a(x))), {"a": conv(), "n": NormAndActivation(8), "b": conv()})
FREE["frozen"] = (lambda m, x: m.b(m.n(m.a(x))), {"a": conv(), "n": Scale(8), "b": conv()})
FREE["spatial gate"] = (lambda m, x: m.b(m.a(x) * m.c(x)), {"a": conv(), "c": conv(c_out=1), "b": conv()})
FREE["called twice"] = (lambda m, x: m.b(m.a(x).relu()) + m.b(m.a(x.flip(0))), {"a": conv(), "b": conv()})
FREE["own activation"] = (lambda m, x: m.b(m.o(m.a(x))), {"a": conv(), "o": Own(), "b": conv()})
FREE["written out"] = (written_out, {"a": nn.Linear(6, 8), "b": nn.Linear(8, 5)})
FREE["packed"] = (packed, {"a": nn.Linear(6, 16), "b": nn.Linear(8, 5)})
FREE["glu"] = (lambda m, x: m.b(torch.nn.functional.glu(m.a(x))), {"a": nn.Linear(6, 16), "b": nn.Linear(8, 5)})
FREE["glu module"] = (lambda m, x: m.b(m.g(m.a(x))), {"a": nn.Linear(6, 16), "g": nn.GLU(), "b": nn.Linear(8, 5)})
FREE["two readers"] = (
    lambda m, x: (lambda y: m.b(y.relu()) + m.c(y))(m.a(x)),
    {"a": conv(), "b": conv(k=3), "c": conv()},
)


@pytest.mark.parametrize("name", FREE)
def test_what_lies_between_and_treats_each_channel_alone(name):
    f, modules = FREE[name]
    model, x = randomised(Net(f, **copy.deepcopy(modules))), images(40, 6, channels=8)
    original = calibrated(model, x)
    result = Merge(ranks={"a": 5})(original)
    assert site_names(result) == ["a"]
    unseen = images(40, 6, channels=8)
    assert_close(result.graph_module(unseen), interpolated(original, result)(unseen))
    assert relative_error(result.graph_module(unseen), model(unseen)) > 1e-6


@pytest.mark.parametrize("name", ["packed", "glu", "linear"])
def test_the_ratio_is_one_of_channels_where_no_kernel_is_larger(name):
    """Halves of a layer that a gate multiplies are one set of channels."""
    f, modules = FREE[name]
    x = images(40, 6, channels=8)
    gm = merged(randomised(Net(f, **copy.deepcopy(modules))), x, ratio=1.5).graph_module
    width = modules["a"].out_features
    assert (gm.a.out_features, gm.b.in_features) == (5 * width // 8, 5), "5 = floor(8 / 1.5)"


def split_by_size(m, x):
    up, gate = m.a(x).mul(2).split(8, dim=-1)
    return m.b(gate.sigmoid() * up)


class OtherFlatten(nn.Flatten):
    """Flattens channels last."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


class Interleaved(nn.GLU):
    def forward(self, x):
        return x[..., ::2] * torch.sigmoid(x[..., 1::2])


class Noise(nn.Module):
    """Counts on eight channels in training mode."""

    def forward(self, x):
        return x.relu() * (1 + torch.randn(8, 1, 1)) if self.training else x.relu()


def hooked(module):
    module.register_forward_hook(lambda m, args, output: output.cumsum(1))
    return module


def replaced(module):
    module.forward = lambda x: x.relu().cumsum(1)
    return module


MIXED = {
    "split by size": (split_by_size, {"a": nn.Linear(6, 16), "b": nn.Linear(8, 5)}, "mixed", "split"),
    "own flatten": (
        lambda m, x: m.b(m.flat(m.a(x))),
        {"a": conv(), "flat": OtherFlatten(), "b": nn.Linear(288, 5)},
        "mixed",
        "flat",
    ),
    "own glu": (
        lambda m, x: m.b(m.g(m.a(x))),
        {"a": nn.Linear(6, 16), "g": Interleaved(), "b": nn.Linear(8, 5)},
        "mixed",
        "g",
    ),
    "noise": (lambda m, x: m.b(m.n(m.a(x))), {"a": conv(), "n": Noise(), "b": conv()}, "mixed", "n"),
    "hooked activation": (
        lambda m, x: m.b(m.r(m.a(x))),
        {"a": conv(), "r": hooked(nn.ReLU()), "b": conv()},
        "hooks",
        "r: ",
    ),
    "hooked pooling": (
        lambda m, x: m.b(m.r(m.a(x))),
        {"a": conv(), "r": hooked(nn.MaxPool2d(2)), "b": conv()},
        "hooks",
        "r: ",
    ),
    "replaced forward": (
        lambda m, x: m.b(m.r(m.a(x))),
        {"a": conv(), "r": replaced(nn.ReLU()), "b": conv()},
        "own-forward",
        "r: ",
    ),
    "output": (lambda m, x: (lambda y: (m.b(y), y))(m.a(x)), {"a": conv(), "b": conv()}, "model-output", ""),
    "shared": (lambda m, x: m.b(m.b(m.a(x))), {"a": conv(), "b": conv()}, "model-output", ""),
    "shared norm": (
        lambda m, x: m.b(m.n(m.a(m.n(x)))),
        {"a": conv(), "n": nn.BatchNorm2d(8), "b": conv()},
        "mixed",
        "x",
    ),
    "grouped consumer": (lambda m, x: m.b(m.a(x)), {"a": conv(), "b": conv(groups=2)}, "grouped", "b"),
    "grouped producer": (lambda m, x: m.b(m.a(x)), {"a": conv(groups=2), "b": conv()}, "grouped", "a"),
    "layer norm": (
        lambda m, x: m.b(m.n(m.a(x))),
        {"a": nn.Linear(6, 8), "n": nn.LayerNorm(8), "b": nn.Linear(8, 5)},
        "norm-over-channels",
        "n",
    ),
    "softmax": (lambda m, x: m.b(m.a(x).softmax(1)), {"a": conv(), "b": conv()}, "mixed", "softmax"),
    "cat": (lambda m, x: m.b(torch.cat([m.a(x), x], 1)), {"a": conv(), "b": conv(16)}, "mixed", "cat"),
    "hooks": (lambda m, x: m.b(m.a(x)), {"a": conv(), "b": hooked_conv()}, "hooks", "b: "),
    "sequence": (
        lambda m, x: m.b(m.a(x).flatten(2)),
        {"a": conv(), "b": nn.Conv1d(8, 5, 1)},
        "mixed",
        "flatten",
    ),
    "transposed": (
        lambda m, x: m.b(m.a(x)),
        {"a": conv(), "b": nn.ConvTranspose2d(8, 5, 2, stride=2)},
        "layer-type",
        "b",
    ),
    "after transposed": (
        lambda m, x: m.b(m.a(x)),
        {"a": nn.ConvTranspose2d(8, 8, 2), "b": conv()},
        "layer-type",
        "a",
    ),
    "other axis": (lambda m, x: m.b(m.a(x)), {"a": conv(), "b": nn.Linear(6, 5)}, "other-axis", "b"),
    "conv on linear": (lambda m, x: m.b(m.a(x)), {"a": nn.Linear(6, 6), "b": conv()}, "other-axis", "b"),
    "dead end": (lambda m, x: m.b(x) + m.a(x).sum() * 0, {"a": conv(), "b": conv()}, "mixed", "sum_1"),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_is_left_alone_says_why(name):
    f, modules, code, culprit = MIXED[name]
    model, x = randomised(Net(f, **copy.deepcopy(modules))), images(4, 6, channels=8)
    gm = calibrated(model, x)
    result = Merge(ratio=2)(gm)
    assert "a" not in site_names(result)
    reason = next(skip.reason for skip in result.skipped if skip.name == "a")
    assert reason.code == code
    assert culprit in reason.text
    if not result.modified:
        assert result.graph_module.code == gm.code
    with pytest.raises(FxlrdError, match=r"^merge: a cannot be merged: ") as error:
        Merge(ranks={"a": 4})(gm)
    assert str(reason) in str(error.value)
    assert "\n" not in str(error.value)


def test_tied_weights_are_left_alone():
    model = Net(lambda m, x: m.b(m.a(x)), a=conv(bias=False), b=conv(bias=False)).double().eval()
    model.b.weight = model.a.weight
    x = images(4, 6, channels=8)
    result = merged(model, x)
    assert not result.modified
    assert reasons(result)["a"] == "shared-parameter"


def test_unbatched_images_are_left_alone():
    model = nn.Sequential(conv(), nn.ReLU(), conv()).double().eval()
    result = merged(model, torch.randn(8, 6, 6).double())
    assert not result.modified
    assert reasons(result)["0"] == "other-axis"


def test_without_calibration_nothing_is_merged():
    model, x = nn.Sequential(conv(), nn.ReLU(), conv()).eval(), torch.randn(2, 8, 6, 6)
    gm = capture(model, x)
    result = Merge()(gm)
    assert not result.modified
    assert reasons(result)["0"] == "no-moments"
    with pytest.raises(FxlrdError, match=r"^merge: 0 cannot be merged: .*run calibrate first"):
        Merge(ranks={"0": 4})(gm)


def chain() -> nn.Sequential:
    return nn.Sequential(conv(8, 16), nn.ReLU(), conv(16, 16, 3), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 4))


def test_skip_and_ranks():
    gm = calibrated(chain().double().eval(), images(4, 8, channels=8))
    assert site_names(Merge(ratio=2)(gm)) == ["0", "2", "4"]
    result = Merge(ratio=2, skip=("2",))(gm)
    assert site_names(result) == ["4"]
    assert reasons(result)["0"] == "skip"
    assert reasons(result)["2"] == "skip"
    some = Merge(ranks={"[02]": 7})(gm)
    assert site_names(some) == ["0", "2"]
    assert reasons(some)["4"] == "unnamed"
    widths = [m.weight.shape[:2] for m in layers(some.graph_module).values()]
    assert widths == [(7, 8), (7, 7), (16, 7), (4, 16)]
    everywhere = Merge(ranks=5)(gm)
    assert [m.weight.shape[:2] for m in layers(everywhere.graph_module).values()] == [(5, 8), (5, 5), (5, 5), (4, 5)]
    assert everywhere.sites[0].note.startswith("5 of 16 channels kept, the others interpolated in 2 (error 0.")
    full = Merge(ranks=16)(gm)
    assert not full.modified
    assert reasons(full)["0"] == "no-saving"
    assert reasons(Merge(ratio=1000)(gm))["4"] == "no-channels"


def test_names_that_fit_no_layer():
    gm = calibrated(chain().double().eval(), images(4, 8, channels=8))
    for options in ({"skip": ("9",)}, {"ranks": {"9": 3}}):
        with pytest.raises(FxlrdError, match="unknown layer '9'"):
            Merge(**options)(gm)
    with pytest.raises(FxlrdError, match=r"^merge: 6 cannot be merged: its output"):
        Merge(ranks={"6": 2})(gm)
    model = Net(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(), unused=conv()).double().eval()
    with pytest.raises(FxlrdError, match=f"^merge: unused cannot be merged: {NEVER_CALLED}$"):
        merged(model, images(4, 6, channels=8), ranks={"unused": 3})


def test_the_stem_is_cut_only_by_name():
    model, x = randomised(vgg()), images(4, 24)
    assert reasons(merged(model, x))["0.0"] == "stem"
    assert site_names(merged(model, x, ranks={"0.0": 5})) == ["0.0"]


def test_a_second_merge_asks_for_fresh_moments():
    x = images(4, 8, channels=8)
    once = Merge(ratio=2)(calibrated(chain().double().eval(), x)).graph_module
    again = Merge(ranks=3)(once)
    assert not again.modified
    assert reasons(again)["0"] == "no-moments"
    fresh = Merge(ranks=3)(Calibrate(x)(once).graph_module)
    assert site_names(fresh) == ["0", "2", "4"]
    assert provenance(calls(fresh.graph_module, "2")[0]).ranks == (3, 3)


def test_low_rank_factors_are_not_merged_into():
    x = images(4, 8, channels=8)
    gm = Calibrate(x)(Decompose(ranks=6)(capture(chain().double().eval(), x)).graph_module).graph_module
    result = Merge(ratio=2)(gm)
    assert not result.modified
    assert reasons(result)["2"] == "factor"


@pytest.mark.slow
def test_merging_goes_before_what_decomposes():
    model, x = randomised(models.resnet18()), images(2, 64)
    gm = Merge()(calibrated(model, x)).graph_module
    for step in (Decompose(ratio=2), Branch(groups=2), Freeze()):
        gm = step(gm).graph_module
    assert gm(x).isfinite().all()


def test_torchvision_squeeze_excitation_alone():
    model = nn.Sequential(conv(8, 16), ops.SqueezeExcitation(16, 4), conv(16, 8)).double().eval()
    x = images(80, 8, channels=8)
    result = merged(model, x, ranks={"0": 15})
    assert site_names(result) == ["0"]
    assert "interpolated in 1.fc1, 2" in result.sites[0].note or "interpolated in 2, 1.fc1" in result.sites[0].note


def test_snap_takes_the_hardware_multiple_that_pays():
    timer = FakeTimer(lambda name, _: 0.1 + -(-int(name) // 16) * 0.1, spread=0.001)
    model = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 8)).double().eval()
    x = torch.randn(200, 64).double()
    gm = Calibrate([x])(capture(model, x)).graph_module
    result = Merge(ranks=39, snap=True, timer=timer)(gm)
    assert timer.rounds == [["39", "32"]]
    assert result.graph_module.get_submodule("0").out_features == 32
    assert Merge(ranks=39)(gm).graph_module.get_submodule("0").out_features == 39


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vgg11_bn"])
def test_snap_really_times_groups_of_every_kind(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = models.get_model(name, weights=None).eval()
    if name == "vgg11_bn":
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(2), nn.Linear(2048, 10)
    gm = Calibrate([x], outputs=False)(capture(model, x)).graph_module
    result = Merge(snap=True, seconds=0.01)(gm)
    assert result.modified
    assert result.graph_module(x).shape == model(x).shape


def test_a_plan_is_carried_out():
    gm = calibrated(chain().double().eval(), images(4, 8, channels=8))
    planned.record(gm, Plan({}, {"0": 8, "4": 4}))
    result, same = Merge()(gm), Merge(ranks={"0": 8, "4": 4})(gm)
    assert site_names(result) == ["0", "4"]
    x = images(4, 8, channels=8)
    assert torch.equal(result.graph_module(x), same.graph_module(x))
    assert reasons(result) == {"2": "original-planned", "6": "original-planned"}
    assert site_names(Merge(ranks=8)(gm)) == ["0", "2", "4"], "ranks= comes before a plan"
    planned.record(gm, Plan({}, {"0": 4}, channels={"0": torch.tensor([0, 2, 5, 7])}))
    (first,) = calls(Merge()(gm).graph_module, "0")
    assert retained_channels(first).tolist() == [0, 2, 5, 7], "those that it names"
    planned.record(gm, Plan())
    assert not Merge().__call__(gm).modified
    assert not Merge(snap=True)(gm).modified


@pytest.mark.slow
def test_a_layer_that_is_cut_on_both_sides_knows_what_its_remaining_outputs_matter():
    """A squeeze-excitation's second layer loses outputs with the expansion, then inputs with the first one."""
    model, x = randomised(models.mobilenet_v3_small()), images(4, 32)
    gm = Calibrate(x, effects=4)(capture(model, x)).graph_module
    result = Merge(ratio=2)(gm)
    assert {"features.4.block.0.0", "features.4.block.2.fc1"} <= set(site_names(result))
    for graph in (result.graph_module, gm):  # the graph that came in keeps its own
        (node,) = calls(graph, "features.4.block.2.fc2")
        assert len(statistics(node).importance) == graph.get_submodule("features.4.block.2.fc2").out_channels


def propagated(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for child in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
        child.register_forward_hook(lambda _, __, y: found.append(y))
    model(x)
    return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_stays(layout):
    model = nn.Sequential(conv(8, 16), nn.ReLU(), conv(16, 16, 1), nn.ReLU(), conv(16, 16, 3), nn.ReLU(), conv(16, 4))
    model = model.double().eval().to(memory_format=layout)
    x = images(4, 9, channels=8).contiguous(memory_format=layout)
    gm = merged(model, x, ranks=8).graph_module
    for before, after in zip(propagated(model, x), propagated(gm, x), strict=True):
        assert after.is_contiguous(memory_format=layout) == before.is_contiguous(memory_format=layout)
