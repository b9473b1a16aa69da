from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision import models

import fxlrd
from fxlrd import capture
from fxlrd.graph import cost
from fxlrd.graph.facts import output_moments, provenance, statistics
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.compose import affine
from fxlrd.passes import Calibrate, Decompose, Merge
from fxlrd.passes.freeze import freeze_factors
from tests.support.merging import Net, conv, hooked_conv, randomised, sequence
from tests.support.results import reasons
from tests.support.tensors import assert_close, images, relative_error

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
    model, x = sequence(*copy.deepcopy(parts)), images(4, 10, channels=8)
    gm = capture(model, x)
    result = Merge(mode="exact")(gm)
    assert result.modified
    assert all(site.exact for site in result.sites)
    after = result.graph_module
    assert_close(after(x), model(x))
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
    assert_close(result.graph_module(x), model(x))


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
    "hooks": ([conv(8, 8), hooked_conv()], "hooks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_neighbours_that_do_not_compose_say_why(name):
    parts, reason = REFUSED[name]
    x = images(4, 10, channels=parts[0].in_channels)
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
    model, x = randomised(Net(f, **copy.deepcopy(modules))), images(4, 6, channels=8)
    gm = capture(model, x)
    result = Merge(mode="exact", norms=norms)(gm)
    assert not result.modified
    assert_close(result.graph_module(x), model(x))


def test_norms_are_taken_in_where_asked():
    model, x = randomised(models.resnet18()), images(2, 32)
    gm = capture(model, x)
    assert not Merge(mode="exact")(gm).modified
    result = Merge(mode="exact", norms=True)(gm)
    assert len(result.sites) == 20
    after = result.graph_module
    assert not any(isinstance(m, nn.BatchNorm2d) for m in after.modules())
    assert len(after.graph.nodes) == len(gm.graph.nodes) - 20
    assert relative_error(after(x), model(x)) < 1e-9
    scales = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert cost.params(after) == cost.params(gm) - scales, "a norm's shift becomes the conv's bias"


def test_norms_are_taken_in_where_the_layers_do_not_compose():
    model, x = sequence(conv(8, 8, 3), nn.BatchNorm2d(8), conv(8, 8, 3), nn.BatchNorm2d(8)), images(4, 6, channels=8)
    result = Merge(mode="exact", norms=True)(capture(model, x))
    assert [s.note for s in result.sites] == ["took in 1", "took in 3"]
    assert reasons(result)["0"] == "larger-kernel"
    assert_close(result.graph_module(x), model(x))
    skipped = Merge(mode="exact", norms=True, skip=("2",))(capture(model, x))
    assert not skipped.modified


def test_factors_compose_with_their_neighbours():
    """The paper's merging where it is exact: an outer factor of a Tucker form into the 1x1 conv beside it."""
    model, x = sequence(conv(16, 32, bias=False), conv(32, 32, 3), conv(32, 16)), images(4, 8, channels=16)
    gm = Decompose(ranks={"1": (12, 12)})(capture(model, x)).graph_module
    result = Merge(mode="exact")(gm)
    assert_close(result.graph_module(x), gm(x))
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
    model, x = sequence(conv(16, 32, bias=False), conv(32, 32, 3), conv(32, 16)), images(4, 8, channels=16)
    given = f"decompose{{ranks=12,skip=0|2}},merge{{mode=exact}},{after}"
    result = fxlrd.compress(model, x, pipeline=given, measure=False)
    assert [row["decision"] for row in result.report.layers] == ["merged"] * 3
    assert not result.report.passes[-1]["sites"]


def test_statistics_are_those_of_what_one_layer_reads_and_makes():
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)]
    model, x = nn.Sequential(*layers).double().eval(), torch.randn(2000, 32).double()
    composed = Merge(mode="exact")(Calibrate(x)(capture(model, x)).graph_module).graph_module
    from_one_run = Merge(ranks={"0": 40})(composed).graph_module
    measured_again = Merge(ranks={"0": 40})(Calibrate(x)(composed).graph_module).graph_module
    torch.testing.assert_close(from_one_run(x), measured_again(x))


def test_the_importance_of_a_layer_is_that_behind_the_norm_it_took_in():
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(12 * 16, 4)).double().eval()
    with torch.no_grad():
        model[3].weight.uniform_(0.1, 4.0)
    x = torch.randn(64, 8, 4, 4).double()
    calibrated = Calibrate(x, effects=64)(capture(model, x)).graph_module
    composed = Merge(mode="exact", norms=True)(calibrated).graph_module
    (before,), (node,) = (calls(gm, "2") for gm in (calibrated, composed))
    g, _ = affine(model[3])  # what the norm makes of a change of its input
    torch.testing.assert_close(torch.outer(g, g) * statistics(node).importance, statistics(before).importance)
    assert output_moments(node) is None, "no layer reads what it makes now"


def test_factors_whose_norm_was_taken_in_are_factors():
    torch.manual_seed(0)
    layers = [nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3)]
    model, x = nn.Sequential(*layers).eval(), images(2, 9, 16, dtype=torch.float32)
    text = "decompose{ratio=2},merge{mode=exact,norms=true}"
    result = fxlrd.compress(model, x, pipeline=text, measure=False)
    assert {row["decision"] for row in result.report.layers} == {"tucker2"}
    assert set(freeze_factors(result.model)) == {"0.core.weight", "3.core.weight"}
