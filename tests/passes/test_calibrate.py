from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.utils.data import DataLoader, TensorDataset

import fxlrd
from fxlrd import FxlrdError, Pipeline, capture
from fxlrd.calibration.holdout import Disabled, held_out
from fxlrd.calibration.moments import moments
from fxlrd.capturing.model import capture_any
from fxlrd.graph.facts import output_moments, statistics
from fxlrd.graph.inputs import Inputs
from fxlrd.passes import Calibrate, Merge


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def images(batch: int = 6) -> torch.Tensor:
    return torch.randn(batch, 3, 9, 9)


def with_moments(gm) -> list[str]:
    return [n.name for n in gm.graph.nodes if output_moments(n) is not None]


def test_moments_are_left_on_a_copy():
    net, x = model(), images()
    gm = capture(net, x)
    before, code = copy.deepcopy(net.state_dict()), gm.code
    result = Calibrate(x)(gm)
    assert not result.modified
    assert result.sites == result.skipped == ()
    assert with_moments(gm) == []
    assert with_moments(result.graph_module) == ["input_1", "_0", "_2", "_3"]
    assert result.graph_module.code == gm.code == code
    assert torch.equal(result.graph_module(x), net(x))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    seen = net[:3](x).detach().double().movedim(1, -1).flatten(0, -2)
    (node,) = (n for n in result.graph_module.graph.nodes if n.name == "_2")
    torch.testing.assert_close(moments(node, 1).second, seen.mT @ seen / len(seen), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments(node, 1).mean, seen.mean(0), rtol=1e-12, atol=1e-12)


def test_outputs_may_be_left_out():
    assert with_moments(Calibrate(images(), outputs=False)(capture(model(), images())).graph_module) == [
        "input_1",
        "_2",
    ]


def test_a_second_sweep_replaces_the_first():
    x = images()
    gm = Calibrate(x)(Calibrate(images(20))(capture(model(), x)).graph_module).graph_module
    (node,) = (n for n in gm.graph.nodes if n.name == "input_1")
    assert moments(node, 1).count == 6 * 81


def test_without_inputs_it_says_what_to_give():
    with pytest.raises(FxlrdError, match=r"^calibrate: no calibration inputs; give calibration=") as error:
        Calibrate()(capture(model(), images()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("data", [5, "images", [images(), torch.randn(2, 4, 9, 9)], [], [images() / 0]])
def test_bad_data_is_one_line(data, progress):
    with pytest.raises(FxlrdError, match=r"^calibration: ") as error:
        fxlrd.compress(model(), images(), preset="merge", calibration=data, measure=False, progress=progress)
    assert "\n" not in str(error.value)


def test_the_bar_counts_the_batches():
    seen = []

    def progress(items, label):
        for item in items:
            seen.append(label)
            yield item

    Calibrate([images(), images(), images()])(capture(model(), images()), progress)
    Calibrate(images())(capture(model(), images()), progress)
    assert seen == ["calibrate"] * 4


def test_data_has_no_text_form():
    assert str(Pipeline([Calibrate(images())])) == "calibrate"
    assert str(Pipeline.parse("calibrate{outputs=false}")) == "calibrate{outputs=false}"
    assert Calibrate(images()) == Calibrate()
    assert "tensor" not in repr(Calibrate(images()))
    with pytest.raises(FxlrdError, match="unknown option of calibrate 'calibration'"):
        Pipeline.parse("calibrate{calibration=x}")


def test_a_loader_goes_through_compress_and_the_pass_manager():
    data = DataLoader(TensorDataset(images(20), torch.arange(20)), batch_size=8)
    result = fxlrd.compress(model(), images(), preset="merge", calibration=data, measure=False)
    assert [row["name"] for row in result.report.passes][:2] == ["calibrate", "merge"]
    assert result.report.passes[0]["exact"]
    assert result.report.passes[0]["step_error"] == 0
    managed = PassManager(passes=[Calibrate(data), Merge(ranks={"0": 3})])(capture(model(), images()))
    assert managed.modified
    assert managed.graph_module.get_submodule("0").out_channels == 3


def test_training_mode_stays():
    net = model().train()
    gm = Calibrate(images())(capture(net, images())).graph_module
    assert all(m.training for m in net)
    assert gm.get_submodule("1").num_batches_tracked == 0


@pytest.mark.parametrize("kind", ["pairs", "lists", "dict", "tuple", "tensor", "loader", "generator"])
def test_the_forms_that_data_may_have(kind):
    x, y = images(8), torch.arange(8)
    data = {
        "pairs": [(x[:4], y[:4]), (x[4:], y[4:])],
        "lists": [[x[:4], y[:4]], [x[4:], y[4:]]],
        "dict": {"input": x},
        "tuple": [(x[:4],), (x[4:],)],
        "tensor": x,
        "loader": DataLoader(TensorDataset(x, y), batch_size=4),
        "generator": (part for part in x.split(4)),
    }[kind]
    gm = Calibrate(data)(capture(model(), images())).graph_module
    found = moments(next(n for n in gm.graph.nodes if n.name == "input_1"), 1)
    rows = x.double().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(found.second, rows.mT @ rows / len(rows), rtol=1e-12, atol=1e-12)


def exhausted():
    data = (x for x in [images()])
    list(data)
    return data


BAD = {
    "exhausted": (exhausted, "there are no inputs; a generator can be read only once"),
    "shape": (lambda: [images(), torch.randn(2, 4, 9, 9)], "the model fails on batch 1"),
    "nan": (lambda: [images(), images() * float("nan")], "batch 1 holds NaN or Inf"),
    "device": (lambda: images().to("meta"), "9, 9] on meta)"),
    "dtype": (lambda: images().double(), "the model fails on batch 0 (float64["),
    "whole numbers": (lambda: images().long(), "the model fails on batch 0 (int64["),
    "text": (lambda: ["a"], "batch 0: a str is not a tensor"),
    "labels first": (lambda: [(torch.arange(6), images())], "the model fails on batch 0 (int64["),
    "wrong name": (lambda: {"pixels": images()}, "a dict of pixels, but the model was given input: rename its keys"),
    "empty batch": (lambda: [images(0)], "there are no inputs"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("options", [{}, {"effects": 8, "patches": 64, "holdout": True}], ids=["plain", "auto"])
def test_bad_data_names_the_batch(name, options):
    make, message = BAD[name]
    with pytest.raises(FxlrdError, match=r"^calibration: ") as error:
        Calibrate(make(), **options)(capture(model(), images()))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_held_out_is_not_in_the_moments():
    x, net = images(10), model()
    gm = Calibrate(x, holdout=True)(capture(net, images())).graph_module
    found = moments(next(n for n in gm.graph.nodes if n.name == "input_1"), 1)
    assert found.count == 8 * 81
    judge = held_out(gm)
    assert torch.equal(judge.inputs[0].args[0], x[8:])
    assert torch.equal(judge.outputs[0][0], net(x[8:]))
    assert held_out(Calibrate(x)(gm).graph_module) == Disabled(), "a second sweep replaces what the first held out"


def test_effects_leave_no_gradients_and_the_model_as_it_was():
    net, x = model().train().requires_grad_(False), images()
    net[0].weight.requires_grad_(True)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = copy.deepcopy(net.state_dict())
    gm = Calibrate(x, effects=6)(capture(net, x)).graph_module
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert [p.requires_grad for p in net.parameters()] == [True] + [False] * 5
    assert all(p.grad is None for p in net[1:].parameters())
    assert all(m.training for m in net)
    assert sum(statistics(n).importance is not None for n in gm.graph.nodes if statistics(n) is not None) == 2


def test_a_model_without_layers_has_nothing_to_measure():
    net = nn.Sequential(nn.ReLU(), nn.Flatten())
    assert not Calibrate(images(), effects=6)(capture(net, images())).modified


def test_inputs_that_are_all_alike_are_said_and_nothing_is_fitted_to_them():
    net = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)).eval()
    x = torch.randn(4, 8, 9, 9)
    steps = "calibrate{effects=8,holdout=true},decompose{ratio=2},refit"
    alike = fxlrd.compress(net, x, pipeline=steps, calibration=[torch.ones(4, 8, 9, 9)] * 6, measure=False)
    plain = fxlrd.compress(net, x, pipeline="decompose{ratio=2}", measure=False)
    assert any("all calibration inputs are alike" in text for text in alike.report.warnings)
    assert all(torch.equal(a, b) for a, b in zip(alike.model.parameters(), plain.model.parameters(), strict=True))
    assert not any(
        "alike" in text
        for text in fxlrd.compress(
            net, x, pipeline=steps, calibration=[torch.randn(4, 8, 9, 9) for _ in range(6)], measure=False
        ).report.warnings
    )


class Experts(nn.Module):
    """Each row goes to one of two experts, by its first entry."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, chosen):
        y = torch.zeros_like(x)
        y = y.index_put((chosen == 0,), self.a(x[chosen == 0]))
        return y.index_put((chosen == 1,), self.b(x[chosen == 1]))


def test_an_expert_that_no_input_reached_is_left_alone():
    x, chosen = torch.randn(40, 32), torch.arange(40) % 2
    data = [(torch.randn(40, 32), torch.zeros(40, dtype=torch.int64)) for _ in range(5)]
    gm = capture(Experts().eval(), (x, chosen))
    result = Pipeline.parse("calibrate,decompose").with_options(calibration=data)(gm)
    (skip,) = result.ledger[1].skipped
    assert (skip.name, skip.reason.code) == ("b", "not-reached")


class Branching(nn.Module):
    """Large inputs go one way, others another; each way has layers that a BatchNorm follows."""

    def __init__(self):
        super().__init__()
        self.large = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32))
        self.small = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32))

    def forward(self, x):
        y = self.large(x * 2) if (x > 10).any() else torch.zeros_like(x)
        return y + self.small(x)


def test_a_region_that_no_input_called_is_left_alone_and_gives_no_data():
    """The example calls both branches; the calibration inputs call one."""
    example, data = torch.randn(8, 32) + 9, [torch.randn(8, 32) for _ in range(6)]
    gm = capture_any(Branching().eval(), Inputs.of((example,)))
    steps = Pipeline.parse("calibrate,decompose,refit,recalibrate").with_options(calibration=data)
    _, decompose, _, recalibrate = steps(gm).ledger
    assert {site.name for site in decompose.sites} == {"small.0", "small.2"}
    for record, names in ((decompose, {"large.0", "large.2"}), (recalibrate, {"large.1"})):
        assert {skip.name: skip.reason.code for skip in record.skipped} == dict.fromkeys(names, "not-reached")
    assert {site.name for site in recalibrate.sites} == {"small.1"}

    result = fxlrd.compress(
        Branching().eval(), example, pipeline="decompose,recalibrate", calibration=data, measure=False
    ).model
    assert torch.equal(result.large[1].running_mean, torch.zeros(32))
    assert not torch.equal(result.small[1].running_mean, torch.zeros(32))
