from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torchvision import models, ops
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import fxlrd
from fxlrd import FxlrdError, capture
from fxlrd.allocation.plan import Plan, leave
from fxlrd.calibration.moments import moments
from fxlrd.factor.interpolative import least_squares, select
from fxlrd.graph import cost
from fxlrd.graph.captured import propagate
from fxlrd.graph.facts import provenance, statistics
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import calls, fork, layers
from fxlrd.layers.compose import importance
from fxlrd.passes import Branch, Calibrate, Decompose, Freeze, Merge
from fxlrd.passes import merge as module_under_test
from fxlrd.timing.clock import Timing


def randomised(model: nn.Module) -> nn.Module:
    """Return the model in float64 and eval mode, with BatchNorms that do something."""
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for t, low in ((m.running_mean, -0.5), (m.running_var, 0.5), (m.weight, 0.5), (m.bias, -0.5)):
                if t is not None:
                    t.detach().uniform_(low, low + 1)
    return model.double().eval()


def images(size: int, batch: int = 4, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size).double()


def calibrated(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    return Calibrate(x)(capture(model, x)).graph_module


def merged(model: nn.Module, x: torch.Tensor, **options):
    return Merge(**options)(calibrated(model, x))


def reasons(result) -> dict[str, str]:
    return {skip.name: skip.reason.code for skip in result.skipped}


def names(result) -> list[str]:
    return [site.name for site in result.sites]


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class Interpolate(nn.Module):
    """Select channels S, interpolate all from them: what the merged network does without doing it."""

    def __init__(self, kept, matrix, axis, block):
        super().__init__()
        self.kept, self.matrix, self.axis, self.block = kept, matrix, axis, block

    def forward(self, x):
        rows = x.movedim(self.axis, -1).unflatten(-1, (-1, self.block))
        full = torch.einsum("...cb,dc->...db", rows[..., self.kept, :], self.matrix)
        return full.flatten(-2).movedim(-1, self.axis)


def spied(monkeypatch) -> list:
    """Return a list that fills with (consumers, kept, matrices) of every group that is cut."""
    found = []
    choose = module_under_test.choose

    def spy(readers, rank):
        kept, matrices, errors = choose(readers, rank)
        found.append(([r.consumer for r in readers], kept, matrices))
        return kept, matrices, errors

    monkeypatch.setattr(module_under_test, "choose", spy)
    return found


def interpolated(original: fx.GraphModule, cuts: list) -> fx.GraphModule:
    """Return the original with select-S/interpolate-T right before each consumer."""
    gm = fork(original)
    for i, (consumers, kept, matrices) in enumerate(cuts):
        for j, (consumer, matrix) in enumerate(zip(consumers, matrices, strict=True)):
            (node,) = calls(gm, str(consumer.node.target))
            linear = isinstance(gm.get_submodule(str(node.target)), nn.Linear)
            (given,) = node.all_input_nodes
            gm.add_submodule(f"fit{i}_{j}", Interpolate(kept, matrix, -1 if linear else 1, consumer.block))
            with gm.graph.inserting_before(node):
                fit = gm.graph.call_module(f"fit{i}_{j}", (given,))
            node.replace_input_with(given, fit)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_that_with_interpolative_factors(name, monkeypatch):
    build, size, count, some = NETWORKS[name]
    model, x = randomised(build()), images(size)
    original = calibrated(model, x)
    cuts = spied(monkeypatch)
    result = Merge(ratio=1.6)(original)
    assert len(result.sites) == len(cuts) == count
    assert set(some) <= set(names(result))
    assert not any(site.exact for site in result.sites)
    gm = result.graph_module
    assert cost.params(gm) < cost.params(original)
    assert cost.depth(gm) == cost.depth(original)
    assert len(gm.graph.nodes) == len(original.graph.nodes)
    unseen = images(size, batch=2)
    out = gm(unseen)
    assert gap(out, interpolated(original, cuts)(unseen)) < 1e-9
    assert gap(out, model(unseen)) > 1e-4, "something was cut"


@pytest.mark.slow
def test_kept_channels_and_interpolation_come_from_the_moments_on_the_nodes(monkeypatch):
    model, x = randomised(models.resnet18()), images(64)
    original = calibrated(model, x)
    cuts = spied(monkeypatch)
    Merge()(original)
    for (consumer,), kept, (matrix,) in cuts:
        (node,) = calls(original, str(consumer.node.target))
        found = moments(node.all_input_nodes[0], 1)
        expected = select(found.second, len(kept), importance(original.get_submodule(str(node.target))))
        assert torch.equal(kept, expected)
        torch.testing.assert_close(matrix, least_squares(found.second, kept, found.ridge), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_what_reads_a_squeeze_excitation_reads_the_same_channels():
    model, x = randomised(models.efficientnet_b0()), images(32)
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
    x = torch.randn(400, 6).double() if linear else images(12, channels=6)
    result = merged(model, x, ranks={"a": 5, "b": 7})
    assert names(result) == ["a", "b"]
    close(result.graph_module(x), model(x))
    fewer = merged(model, x, ranks={"a": 4, "b": 6})
    assert gap(fewer.graph_module(x), model(x)) > 1e-3


def test_the_predicted_error_is_measured_on_the_calibration_inputs():
    model = nn.Sequential(nn.Conv2d(6, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 12, 1, bias=False))
    model, x = randomised(model), images(12, channels=6)
    result = merged(model, x, ranks={"0": 9})
    known = provenance(calls(result.graph_module, "3")[0])
    assert known.error == pytest.approx(gap(result.graph_module(x), model(x)), rel=1e-9)
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


class Net(nn.Module):
    """A model given by its modules and a function of them."""

    def __init__(self, f, **modules):
        super().__init__()
        self.f = f
        for name, m in modules.items():
            setattr(self, name, m)

    def forward(self, x):
        return self.f(self, x)


def conv(c_in: int = 8, c_out: int = 8, k: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, k, padding=k // 2, **options)


def hooked() -> nn.Conv2d:
    m = conv()
    m.register_forward_hook(lambda *_: None)
    return m


def tied(m: Net) -> Net:
    m.b.weight = m.a.weight
    return m


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
FREE["two readers"] = (
    lambda m, x: (lambda y: m.b(y.relu()) + m.c(y))(m.a(x)),
    {"a": conv(), "b": conv(k=3), "c": conv()},
)


@pytest.mark.parametrize("name", FREE)
def test_what_lies_between_and_treats_each_channel_alone(name, monkeypatch):
    f, modules = FREE[name]
    model, x = randomised(Net(f, **copy.deepcopy(modules))), images(6, batch=40, channels=8)
    original = calibrated(model, x)
    cuts = spied(monkeypatch)
    result = Merge(ranks={"a": 5})(original)
    assert names(result) == ["a"]
    unseen = images(6, batch=40, channels=8)
    close(result.graph_module(unseen), interpolated(original, cuts)(unseen))
    assert gap(result.graph_module(unseen), model(unseen)) > 1e-6


MIXED = {
    "residual": (lambda m, x: m.b(m.a(x)) + m.a(x), {"a": conv(), "b": conv()}, "called-again", "a"),
    "joins": (lambda m, x: (lambda y: m.b(y) + y)(m.a(x)), {"a": conv(), "b": conv()}, "residual", "add"),
    "output": (lambda m, x: (lambda y: (m.b(y), y))(m.a(x)), {"a": conv(), "b": conv()}, "model-output", ""),
    "shared": (lambda m, x: m.b(m.b(m.a(x))), {"a": conv(), "b": conv()}, "called-again", "b"),
    "shared norm": (
        lambda m, x: m.b(m.n(m.a(m.n(x)))),
        {"a": conv(), "n": nn.BatchNorm2d(8), "b": conv()},
        "called-again",
        "n",
    ),
    "grouped consumer": (lambda m, x: m.b(m.a(x)), {"a": conv(), "b": conv(groups=2)}, "grouped", "b"),
    "grouped producer": (lambda m, x: m.b(m.a(x)), {"a": conv(groups=2), "b": conv()}, "grouped", "a"),
    "layer norm": (
        lambda m, x: m.b(m.n(m.a(x))),
        {"a": nn.Linear(6, 8), "n": nn.LayerNorm(8), "b": nn.Linear(8, 5)},
        "mixed",
        "n",
    ),
    "softmax": (lambda m, x: m.b(m.a(x).softmax(1)), {"a": conv(), "b": conv()}, "mixed", "softmax"),
    "cat": (lambda m, x: m.b(torch.cat([m.a(x), x], 1)), {"a": conv(), "b": conv(16)}, "mixed", "cat"),
    "hooks": (lambda m, x: m.b(m.a(x)), {"a": conv(), "b": hooked()}, "hooks", "b: "),
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
    "spatial gate": (
        lambda m, x: m.b(m.a(x) * m.c(x)),
        {"a": conv(), "c": conv(c_out=1), "b": conv()},
        "other-channels",
        "c",
    ),
    "dead end": (lambda m, x: m.b(x) + m.a(x).sum() * 0, {"a": conv(), "b": conv()}, "mixed", "sum_1"),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_is_left_alone_says_why(name):
    f, modules, code, culprit = MIXED[name]
    model, x = randomised(Net(f, **copy.deepcopy(modules))), images(6, channels=8)
    gm = calibrated(model, x)
    result = Merge(ratio=2)(gm)
    assert "a" not in names(result)
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
    model = tied(Net(lambda m, x: m.b(m.a(x)), a=conv(bias=False), b=conv(bias=False))).double().eval()
    x = images(6, channels=8)
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
    gm = calibrated(chain().double().eval(), images(8, channels=8))
    assert names(Merge(ratio=2)(gm)) == ["0", "2", "4"]
    result = Merge(ratio=2, skip=("2",))(gm)
    assert names(result) == ["4"]
    assert reasons(result)["0"] == "skip"
    assert reasons(result)["2"] == "skip"
    some = Merge(ranks={"[02]": 7})(gm)
    assert names(some) == ["0", "2"]
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, "unknown mode of merge 'best'"),
        ({"ratio": 1}, "finite number above 1"),
        ({"ranks": 0}, "at least 1"),
        ({"ranks": True}, "at least 1"),
        ({"ranks": {"0": 2.5}}, "at least 1"),
        ({"ranks": (32, 24)}, "at least 1"),
        ({"skip": (3,)}, "is not a name or glob"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(FxlrdError, match=message) as error:
        Merge(**options)
    assert "\n" not in str(error.value)


def test_names_that_fit_no_layer():
    gm = calibrated(chain().double().eval(), images(8, channels=8))
    for options in ({"skip": ("9",)}, {"ranks": {"9": 3}}):
        with pytest.raises(FxlrdError, match="unknown layer '9'"):
            Merge(**options)(gm)
    with pytest.raises(FxlrdError, match=r"^merge: 6 cannot be merged: its output is an output of the model"):
        Merge(ranks={"6": 2})(gm)
    model = Net(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(), unused=conv()).double().eval()
    with pytest.raises(FxlrdError, match=r"^merge: unused cannot be merged: it is never called"):
        merged(model, images(6, channels=8), ranks={"unused": 3})


def test_the_stem_is_cut_only_by_name():
    model, x = randomised(vgg()), images(24)
    assert reasons(merged(model, x))["0.0"] == "stem"
    assert names(merged(model, x, ranks={"0.0": 5})) == ["0.0"]


def test_a_second_merge_asks_for_fresh_moments():
    x = images(8, channels=8)
    once = Merge(ratio=2)(calibrated(chain().double().eval(), x)).graph_module
    again = Merge(ranks=3)(once)
    assert not again.modified
    assert reasons(again)["0"] == "no-moments"
    fresh = Merge(ranks=3)(Calibrate(x)(once).graph_module)
    assert names(fresh) == ["0", "2", "4"]
    assert provenance(calls(fresh.graph_module, "2")[0]).ranks == (3, 3)


def test_low_rank_factors_are_not_merged_into():
    x = images(8, channels=8)
    gm = Calibrate(x)(Decompose(ranks=6)(capture(chain().double().eval(), x)).graph_module).graph_module
    result = Merge(ratio=2)(gm)
    assert not result.modified
    assert reasons(result)["2"] == "factor"


# -- exact


def sequence(*modules: nn.Module) -> nn.Module:
    return randomised(nn.Sequential(*modules))


COMPOSED = {
    "1x1 1x1": ([conv(8, 32), conv(32, 4)], 1),
    "strides": ([conv(8, 32, stride=2), conv(32, 4, stride=3)], 1),
    "padded 1x1 first": ([nn.Conv2d(8, 32, 1, padding=1), conv(32, 4)], 1),
    "1x1 into kxk": ([conv(8, 32, bias=False), conv(32, 8, 3)], 1),
    "1x1 into kxk, no padding": ([conv(8, 32), nn.Conv2d(32, 8, 3)], 1),
    "1x1 into kxk, stride and dilation": ([conv(8, 32, bias=False), nn.Conv2d(32, 8, 3, 2, 2, 2)], 1),
    "1x1 into same": ([conv(8, 32, bias=False), nn.Conv2d(32, 8, 3, padding="same")], 1),
    "1x1 into valid": ([conv(8, 32), nn.Conv2d(32, 8, (3, 1), padding="valid")], 1),
    "1x1 into circular": ([conv(8, 32), conv(32, 8, 3, padding_mode="circular")], 1),
    "1x1 into reflect": ([conv(8, 32), conv(32, 8, 3, padding_mode="reflect")], 1),
    "kxk into 1x1": ([conv(8, 32, 3, stride=2), conv(32, 4, stride=2)], 1),
    "same kxk into 1x1": ([nn.Conv2d(8, 32, 3, padding="same"), nn.Conv2d(32, 4, 1, padding="same")], 1),
    "norm": ([conv(8, 32), nn.BatchNorm2d(32), conv(32, 4, bias=False)], 1),
    "bare norm": ([conv(8, 32), nn.BatchNorm2d(32, affine=False), conv(32, 4)], 1),
    "two norms": ([conv(8, 32), nn.BatchNorm2d(32), nn.Identity(), nn.BatchNorm2d(32), conv(32, 4)], 1),
    "dropout": ([conv(8, 32), nn.Dropout(), nn.Dropout2d(), nn.Identity(), conv(32, 4)], 1),
    "three": ([conv(8, 32), conv(32, 32), nn.BatchNorm2d(32), conv(32, 4)], 1),
    "four, a kxk among them": ([conv(8, 32, bias=False), conv(32, 32, 3), conv(32, 64), conv(64, 4)], 1),
    "two chains": ([conv(8, 32), conv(32, 8), nn.ReLU(), conv(8, 32), conv(32, 8)], 2),
    "linear": ([nn.Linear(10, 40), nn.Dropout(), nn.Linear(40, 5)], 1),
    "linear, no bias": ([nn.Linear(10, 40, bias=False), nn.Identity(), nn.Linear(40, 5, bias=False)], 1),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_affine_neighbours_become_one_layer(name):
    parts, left = COMPOSED[name]
    model, x = sequence(*copy.deepcopy(parts)), images(10, channels=8)
    gm = capture(model, x)
    result = Merge(mode="exact")(gm)
    assert result.modified
    assert all(site.exact for site in result.sites)
    after = result.graph_module
    close(after(x), model(x))
    found = layers(after)
    assert len(found) == left
    assert len(result.sites) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in parts) - left
    activations = sum(isinstance(m, nn.ReLU) for m in parts)
    assert len(after.graph.nodes) == 2 + left + activations
    assert cost.params(after) == sum(p.numel() for m in found.values() for p in m.parameters())
    assert cost.params(after) < cost.params(gm)
    assert all(
        (m.bias is not None) == any(p.bias is not None for p in parts if hasattr(p, "bias")) for m in found.values()
    )
    again = Merge(mode="exact")(after)
    assert not again.modified
    assert again.graph_module.code == after.code


def test_a_linear_chain_with_a_norm():
    model, x = sequence(nn.Linear(10, 40), nn.BatchNorm1d(40), nn.Linear(40, 5)), torch.randn(7, 10).double()
    result = Merge(mode="exact")(capture(model, x))
    assert len(layers(result.graph_module)) == 1
    close(result.graph_module(x), model(x))


REFUSED = {
    "border": ([conv(8, 32), conv(32, 8, 3)], "border"),
    "norm at the border": (
        [conv(8, 32, bias=False), nn.BatchNorm2d(32), conv(32, 8, 3)],
        "border",
    ),
    "same at the border": ([conv(8, 32), nn.Conv2d(32, 8, 3, padding="same")], "border"),
    "cost": ([conv(32, 4), conv(4, 32)], "costs-more"),
    "stride saves": ([conv(8, 8, stride=4), conv(8, 512, 3)], "own-stride"),
    "padding between": ([conv(8, 32), nn.Conv2d(32, 4, 1, padding=1)], "own-padding"),
    "own padding": ([nn.Conv2d(8, 32, 1, padding=1, bias=False), nn.Conv2d(32, 8, 3)], "own-stride"),
    "two kxk": ([conv(8, 32, 3), conv(32, 8, 3)], "larger-kernel"),
    "groups": ([conv(8, 32), conv(32, 8, groups=2)], "grouped"),
    "kinds": ([conv(8, 32), nn.Linear(10, 5)], "conv-linear"),
    "same stride": ([nn.Conv2d(8, 32, 3, padding="same"), conv(32, 4, stride=2)], "same-padding"),
    "hooks": ([conv(8, 8), hooked()], "hooks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_neighbours_that_do_not_compose_say_why(name):
    parts, reason = REFUSED[name]
    x = images(10, channels=parts[0].in_channels)
    gm = capture(sequence(*copy.deepcopy(parts)), x)
    result = Merge(mode="exact")(gm)
    assert not result.modified
    assert reasons(result)["0"] == reason
    assert result.graph_module.code == gm.code


class Norm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).abs()


BROKEN = {
    "activation": (lambda m, x: m.b(m.a(x).relu()), {"a": conv(), "b": conv()}),
    "residual": (lambda m, x: (lambda y: m.b(y) + y)(m.a(x)), {"a": conv(), "b": conv()}),
    "output": (lambda m, x: m.output(x), {"output": conv()}),
    "a layer called output": (lambda m, x: m.output(m.a(x).relu()), {"a": conv(), "output": conv()}),
    "running": (
        lambda m, x: m.b(m.n(m.a(x))),
        {"a": conv(8, 32), "n": nn.BatchNorm2d(32, track_running_stats=False), "b": conv(32, 8)},
    ),
    "a norm of one's own": (lambda m, x: m.b(m.n(m.a(x))), {"a": conv(8, 32), "n": Norm(32), "b": conv(32, 8)}),
    "norm over the other axis": (
        lambda m, x: m.b(m.n(m.a(x[:, :, 0]))),
        {"a": nn.Linear(6, 8), "n": nn.BatchNorm1d(8), "b": nn.Linear(8, 2)},
    ),
    "shared": (lambda m, x: m.a(m.a(x)), {"a": conv()}),
}


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_affine_chain_stays(name, norms):
    f, modules = BROKEN[name]
    model, x = randomised(Net(f, **copy.deepcopy(modules))), images(6, channels=8)
    gm = capture(model, x)
    result = Merge(mode="exact", norms=norms)(gm)
    assert not result.modified
    close(result.graph_module(x), model(x))


def test_norms_are_taken_in_where_asked():
    model, x = randomised(models.resnet18()), images(32, batch=2)
    gm = capture(model, x)
    assert not Merge(mode="exact")(gm).modified
    result = Merge(mode="exact", norms=True)(gm)
    assert len(result.sites) == 20
    after = result.graph_module
    assert not any(isinstance(m, nn.BatchNorm2d) for m in after.modules())
    assert len(after.graph.nodes) == len(gm.graph.nodes) - 20
    assert gap(after(x), model(x)) < 1e-9
    scales = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert cost.params(after) == cost.params(gm) - scales, "a norm's shift becomes the conv's bias"


def test_norms_are_taken_in_where_the_layers_do_not_compose():
    model, x = sequence(conv(8, 8, 3), nn.BatchNorm2d(8), conv(8, 8, 3), nn.BatchNorm2d(8)), images(6, channels=8)
    result = Merge(mode="exact", norms=True)(capture(model, x))
    assert [s.note for s in result.sites] == ["took in 1", "took in 3"]
    assert reasons(result)["0"] == "larger-kernel"
    close(result.graph_module(x), model(x))
    skipped = Merge(mode="exact", norms=True, skip=("2",))(capture(model, x))
    assert not skipped.modified


def test_factors_compose_with_their_neighbours():
    """The paper's merging where it is exact: an outer factor of a Tucker form into the 1x1 conv beside it."""
    model, x = sequence(conv(16, 32, bias=False), conv(32, 32, 3), conv(32, 16)), images(8, channels=16)
    gm = Decompose(ranks={"1": (12, 12)})(capture(model, x)).graph_module
    result = Merge(mode="exact")(gm)
    close(result.graph_module(x), gm(x))
    assert [tuple(m.weight.shape) for m in layers(result.graph_module).values()] == [
        (12, 16, 1, 1),
        (12, 12, 3, 3),
        (16, 12, 1, 1),
    ]
    known = [provenance(n) for n in result.graph_module.graph.nodes if n.op == "call_module"]
    assert [(p.name, p.role) for p in known] == [("1", "merged"), ("1", "merged"), ("2", "merged")]
    assert known[1].ranks == (12, 12)


@pytest.mark.parametrize("after", ["snap", "branch{groups=2}", "freeze", "decompose", "merge{mode=exact}"])
def test_what_is_left_of_composed_factors_is_no_form(after):
    model, x = sequence(conv(16, 32, bias=False), conv(32, 32, 3), conv(32, 16)), images(8, channels=16)
    given = f"decompose{{ranks=12,skip=0|2}},merge{{mode=exact}},{after}"
    result = fxlrd.compress(model, x, pipeline=given, measure=False)
    assert [row["decision"] for row in result.report.layers] == ["merged"] * 3
    assert not result.report.passes[-1]["sites"]


# -- relocate


def bottleneck(act: type[nn.Module] = nn.ReLU, c: int = 12) -> list[nn.Module]:
    return [
        *(conv(8, c, bias=False), nn.BatchNorm2d(c), act()),
        *(conv(c, c, 3, stride=2), nn.BatchNorm2d(c), act()),
        conv(c, 16),
    ]


def test_relocate_at_full_rank_without_an_activation_is_exact():
    model, x = sequence(*bottleneck(nn.Identity)), images(9, channels=8)
    result = Merge(mode="relocate", ranks=12)(capture(model, x))
    assert names(result) == ["3"]
    assert not result.sites[0].exact, "it is labelled by what it is in general"
    close(result.graph_module(x), model(x))


def test_relocate_over_a_norm_of_constant_scale_and_no_shift_is_the_tucker_form():
    model, x = sequence(*bottleneck(nn.Identity)), images(9, channels=8)
    for m in (model[1], model[4]):
        m.weight.data.fill_(0.7)
        m.running_var.fill_(2.0)
        m.running_mean.zero_()
        m.bias.data.zero_()
    model[3].bias.data.zero_()
    result = Merge(mode="relocate", ranks=5)(capture(model, x))
    tucker = Decompose(ranks={"3": (5, 5)})(capture(model, x)).graph_module
    close(result.graph_module(x), tucker(x))
    assert provenance(calls(result.graph_module, "3")[0]).error == pytest.approx(
        provenance(calls(tucker, "3.core")[0]).error, rel=1e-9
    )


@pytest.mark.slow
def test_relocate_in_bottlenecks():
    model, x = randomised(models.resnet50()), images(32, batch=2)
    gm = capture(model, x)
    result = Merge(mode="relocate")(gm)
    assert names(result) == [n for n in layers(gm) if n.endswith(".conv2")]
    assert len(result.sites) == 16
    assert not any(site.exact for site in result.sites)
    assert all("fine-tune" in site.note for site in result.sites)
    after = result.graph_module
    assert cost.depth(after) == 50
    r = fxlrd.ranks.tucker2_rank(512, 512, 3, 2.75)
    assert after.get_submodule("layer4.2.conv2").weight.shape == (r, r, 3, 3)
    assert after.get_submodule("layer4.2.bn1").num_features == after.get_submodule("layer4.2.bn2").num_features == r
    same = Merge()(calibrated(model, x)).graph_module
    assert cost.params(after) == cost.params(same), "the shapes of the interpolative form"
    assert after(x).isfinite().all()


LEFT = {
    "basic block": ([conv(8, 8, 3), nn.ReLU(), conv(8, 8, 3)], "0", "not-between"),
    "norm after": (
        [conv(), nn.ReLU(), nn.BatchNorm2d(8), conv(k=3), conv()],
        "3",
        "not-between",
    ),
    "statistics of the batch": (
        [conv(), nn.BatchNorm2d(8, track_running_stats=False), conv(k=3), conv()],
        "2",
        "not-between",
    ),
    "groups": ([conv(), conv(k=3, groups=2), conv()], "1", "grouped"),
    "hooks": ([hooked(), conv(k=3), conv()], "1", "hooks"),
    "narrow": ([conv(8, 2), conv(2, 2, 3), conv(2, 8)], "1", "no-channels"),
    "thin": ([conv(8, 8), conv(8, 64, 3), conv(64, 8)], "1", "no-saving"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_relocate_leaves_alone_says_why(name):
    parts, site, reason = LEFT[name]
    gm = capture(sequence(*copy.deepcopy(parts)), images(8, channels=8))
    ratio = 1.01 if name == "thin" else 60.0 if name == "narrow" else 2.0
    result = Merge(mode="relocate", ratio=ratio)(gm)
    assert not result.modified
    assert reasons(result)[site] == reason
    with pytest.raises(FxlrdError, match=rf"^merge: {site} cannot be merged: "):
        Merge(mode="relocate", ratio=ratio, ranks={site: 3}, skip=site)(gm)


def test_relocate_takes_skip_and_ranks():
    model, x = sequence(*bottleneck(), nn.ReLU()), images(9, channels=8)
    gm = capture(model, x)
    assert reasons(Merge(mode="relocate", skip=("3",))(gm))["3"] == "skip"
    assert reasons(Merge(mode="relocate", skip=("0",))(gm))["3"] == "skip"
    assert reasons(Merge(mode="relocate", ranks={"[0]": 3})(gm))["3"] == "unnamed"
    named = Merge(mode="relocate", ranks={"3": 4})(gm)
    assert named.graph_module.get_submodule("3").weight.shape == (4, 4, 3, 3)


# -- every mode

MODES = ("interpolative", "exact", "relocate")


def any_mode(mode: str) -> nn.Module:
    if mode == "exact":
        return nn.Sequential(
            nn.Sequential(conv(8, 32), nn.Dropout(), nn.BatchNorm2d(32), conv(32, 8)), nn.ReLU(), conv()
        )
    return nn.Sequential(*bottleneck(), nn.ReLU(), nn.Dropout(), nn.Conv2d(16, 4, 1))


@pytest.mark.parametrize("mode", MODES)
def test_modes_copies_and_gradients(mode):
    model, x = randomised(any_mode(mode)), images(9, channels=8)
    gm = Merge(mode=mode, ratio=2)(calibrated(model, x)).graph_module
    reference = gm(x)
    assert not gm.training
    twin = copy.deepcopy(gm)
    assert torch.equal(twin(x), reference)
    gm.train()
    assert all(m.training for m in gm.modules())
    gm(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gm.parameters())
    assert all(p.grad is None for p in twin.parameters())
    twin.train().eval()
    assert torch.equal(twin(x), reference)
    assert Merge(mode=mode, ratio=2)(calibrated(model.train(), x)).graph_module.get_submodule("2").training


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_memory_format_are_kept(mode, dtype):
    model = any_mode(mode).to(dtype).to(memory_format=torch.channels_last).eval()
    x = torch.randn(4, 8, 9, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    result = Merge(mode=mode, ratio=2)(calibrated(model, x))
    gm = result.graph_module
    assert result.modified
    assert {t.dtype for t in gm.state_dict().values() if t.is_floating_point()} == {dtype}
    for m in layers(gm).values():
        assert m.weight.is_contiguous(memory_format=torch.channels_last)
    assert gm(x).dtype == dtype
    assert gm(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", MODES)
def test_the_users_model_and_the_input_graph_stay(mode):
    model, x = randomised(any_mode(mode)), images(9, channels=8)
    before, reference = copy.deepcopy(model.state_dict()), model(x)
    gm = calibrated(model, x)
    code = gm.code
    assert Merge(mode=mode, ratio=2)(gm).modified
    assert gm.code == code
    assert torch.equal(gm(x), reference)
    assert torch.equal(model(x), reference)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("mode", MODES)
def test_inplace_and_the_report(mode):
    model, x = randomised(any_mode(mode)), images(9, channels=8)
    given = f"calibrate,merge{{mode={mode},ratio=2}}"
    apart = fxlrd.compress(model, x, pipeline=given, calibration=[x], measure=False)
    result = fxlrd.compress(model, x, pipeline=given, calibration=[x], measure=False, inplace=True)
    assert result.model is model
    close(model(x), apart.model(x))
    assert result.report.after["params"] == sum(p.numel() for p in model.parameters())
    record = result.report.passes[-1]
    assert record["exact"] == (mode == "exact")
    assert (record["step_error"] < 1e-9) == (mode == "exact")
    decisions = {row["decision"] for row in result.report.layers}
    assert "merged" in decisions
    model.train()(x).sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_the_pass_manager_runs_it(mode):
    model, x = randomised(any_mode(mode)), images(9, channels=8)
    gm = calibrated(model, x)
    expected = Merge(mode=mode, ratio=2)(gm).graph_module
    result = PassManager(passes=[Merge(mode=mode, ratio=2)])(gm)
    assert result.modified
    close(result.graph_module(x), expected(x))


@pytest.mark.parametrize("mode", MODES)
def test_no_match_modifies_nothing(mode):
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()).eval(), torch.randn(2, 8, 6, 6)
    gm = calibrated(model, x)
    result = Merge(mode=mode)(gm)
    assert not result.modified
    assert torch.equal(result.graph_module(x), gm(x))
    assert [n.op for n in result.graph_module.graph.nodes] == [n.op for n in gm.graph.nodes]


@pytest.mark.parametrize("mode", MODES)
def test_frozen_weights_stay_frozen(mode):
    model, x = randomised(any_mode(mode)).requires_grad_(False), images(9, channels=8)
    gm = Merge(mode=mode, ratio=2)(calibrated(model, x)).graph_module
    if mode != "relocate":  # whose norms are new
        assert not any(p.requires_grad for p in gm.parameters())


@pytest.mark.slow
def test_merging_goes_before_what_decomposes():
    model, x = randomised(models.resnet18()), images(64, batch=2)
    gm = Merge()(calibrated(model, x)).graph_module
    for step in (Decompose(ratio=2), Branch(groups=2), Freeze()):
        gm = step(gm).graph_module
    assert gm(x).isfinite().all()


def test_torchvision_squeeze_excitation_alone():
    model = nn.Sequential(conv(8, 16), ops.SqueezeExcitation(16, 4), conv(16, 8)).double().eval()
    x = images(8, channels=8, batch=80)
    result = merged(model, x, ranks={"0": 15})
    assert names(result) == ["0"]
    assert "interpolated in 1.fc1, 2" in result.sites[0].note or "interpolated in 2, 1.fc1" in result.sites[0].note


def test_snap_takes_the_hardware_multiple_that_pays(monkeypatch):
    asked = []

    def staircase(gm, whole, ranks, under_inductor, seconds):
        asked.append(list(ranks))
        return {str(r): Timing(0.1 + -(-r // 16) * 0.1, 0.1 + -(-r // 16) * 0.1, 0.001) for r in ranks}

    monkeypatch.setattr(module_under_test, "time_group", staircase)
    model = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 8)).double().eval()
    x = torch.randn(200, 64).double()
    gm = Calibrate([x])(capture(model, x)).graph_module
    result = Merge(ranks=39, snap=True)(gm)
    assert asked == [[39, 32]]
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
    gm = calibrated(chain().double().eval(), images(8, channels=8))
    leave(gm, Plan({}, {"0": 8, "4": 4}))
    result, same = Merge()(gm), Merge(ranks={"0": 8, "4": 4})(gm)
    assert names(result) == ["0", "4"]
    x = images(8, channels=8)
    assert torch.equal(result.graph_module(x), same.graph_module(x))
    assert reasons(result) == {"2": "original-planned", "6": "original-planned"}
    assert names(Merge(ranks=8)(gm)) == ["0", "2", "4"], "ranks= comes before a plan"
    leave(gm, Plan())
    assert not Merge().__call__(gm).modified
    assert not Merge(snap=True)(gm).modified


@pytest.mark.slow
def test_a_layer_that_is_cut_on_both_sides_knows_what_its_remaining_outputs_matter():
    """A squeeze-excitation's second layer loses outputs with the expansion, then inputs with the first one."""
    model, x = randomised(models.mobilenet_v3_small()), images(32)
    gm = Calibrate(x, effects=4)(capture(model, x)).graph_module
    result = Merge(ratio=2)(gm)
    assert {"features.4.block.0.0", "features.4.block.2.fc1"} <= set(names(result))
    for graph in (result.graph_module, gm):  # the graph that came in keeps its own
        (node,) = calls(graph, "features.4.block.2.fc2")
        assert len(statistics(node).matters) == graph.get_submodule("features.4.block.2.fc2").out_channels


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_stays(layout):
    model = nn.Sequential(conv(8, 16), nn.ReLU(), conv(16, 16, 1), nn.ReLU(), conv(16, 16, 3), nn.ReLU(), conv(16, 4))
    model = model.double().eval().to(memory_format=layout)
    x = images(9, channels=8).contiguous(memory_format=layout)
    gm = merged(model, x, ranks=8).graph_module
    for before, after in zip(propagated(model, x), propagated(gm, x), strict=True):
        assert after.is_contiguous(memory_format=layout) == before.is_contiguous(memory_format=layout)


def propagated(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for child in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
        child.register_forward_hook(lambda _, __, y: found.append(y))
    model(x)
    return found
