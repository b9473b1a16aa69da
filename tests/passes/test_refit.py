from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxlrd import FxlrdError, Pipeline, capture
from fxlrd.graph import cost
from fxlrd.graph.facts import provenance, retained_channels
from fxlrd.graph.surgery import calls
from fxlrd.passes import Calibrate, Decompose, Merge, Refit
from fxlrd.passes.refit import RIDGE
from tests.support.results import reasons
from tests.support.tensors import images


def model() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU()),
        *(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16)),
    ).double()


def decomposed(net: nn.Module, x, ranks=3, **options):
    return Decompose(ranks=ranks)(Calibrate(x, **options)(capture(net, x)).graph_module).graph_module


def test_the_last_factor_is_the_least_squares_fit_on_what_reaches_it():
    net = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).double().eval()
    x = torch.randn(4000, 12).double()
    gm = decomposed(net, x)
    result = Refit(x, inputs=4000)(gm)
    assert [(s.name, s.exact) for s in result.sites] == [("0", False), ("2", False)]
    after = result.graph_module
    z = after.get_submodule("2.first")(torch.tanh(after.get_submodule("0.last")(after.get_submodule("0.first")(x))))
    z, y = z[:3200], net(x)[:3200]  # of a single batch the last fifth is held out
    last, centred = after.get_submodule("2.last"), z - z.mean(0)
    rest = y - last(z)
    # Where the gradient of the module docstring's objective is nought: E[rest·zᵀ] = ρ·Δ and E[rest] = 0.
    change = last.weight - gm.get_submodule("2.last").weight
    ridge = RIDGE * centred.square().mean()
    torch.testing.assert_close(rest.mT @ centred / len(z), ridge * change, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rest.mean(0), torch.zeros(12).double(), rtol=0, atol=1e-12)
    assert change.norm() > 1e-3


def test_vectors_without_a_batch_give_the_fit_of_their_batch():
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double().eval()
    x = torch.randn(200, 6).double()
    weights = []
    for example, data in ((x[0], list(x)), (x, list(x.split(1)))):
        gm = Decompose(ranks=2)(Calibrate(data, holdout=False)(capture(net, example)).graph_module).graph_module
        result = Refit(data, inputs=1200)(gm)
        assert [s.name for s in result.sites] == ["0", "2"]
        weights.append(result.graph_module.get_submodule("2.last").weight)
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)


def test_only_the_last_factors_change_and_only_in_a_copy():
    net, x = model().train(), images(32)
    gm = decomposed(net, x)
    before, own = copy.deepcopy(gm.state_dict()), copy.deepcopy(net.state_dict())
    after = Refit(x)(gm).graph_module
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())
    assert all(torch.equal(v, own[k]) for k, v in net.state_dict().items())
    changed = {k for k, v in after.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{name}.last.{part}" for name in ("3", "5", "9") for part in ("weight", "bias")}
    assert [m.training for m in net.modules()] == [True] * len(list(net.modules()))


def test_it_lowers_the_output_error_on_inputs_that_no_fit_saw():
    net, x, unseen = model().eval(), images(400), images(400)
    gm = decomposed(net, x, ranks=4)
    after = Refit(x)(gm).graph_module
    assert (after(unseen) - net(unseen)).norm() < (gm(unseen) - net(unseen)).norm()


def test_full_rank_stays_what_it_is():
    net, x = model().eval(), images(200)
    after = Refit(x)(decomposed(net, x, ranks=99)).graph_module
    torch.testing.assert_close(after(x), net(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["stride", "dilation", "same", "circular", "1x1"])
def test_merged_convs_of_any_configuration_are_refitted(kind):
    options = {
        "stride": {"stride": 2, "padding": (1, 2)},
        "dilation": {"dilation": 2},
        "same": {"padding": "same"},
        "circular": {"padding": 1, "padding_mode": "circular"},
        "1x1": {"stride": 2, "padding": 1},
    }[kind]
    last = nn.Conv2d(12, 8, 1 if kind == "1x1" else 3, **options)
    net, x = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), last).double().eval(), images(32)
    gm = Merge(ranks={"0": 6})(Calibrate(x)(capture(net, x)).graph_module).graph_module
    result = Refit(x)(gm)
    assert [s.name for s in result.sites] == ["2"]
    assert reasons(result) == {}

    def error(g) -> float:
        return (g(x) - net(x)).square().sum().item()

    # Of the fit's own inputs a least squares fit cannot be worse; the merge was one already.
    assert error(result.graph_module) <= error(gm) * (1 + 1e-9)


@pytest.mark.usefixtures("without_ridge")
def test_a_layer_that_is_cut_on_both_sides_is_fitted_to_the_channels_it_keeps():
    net = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(12, 12), nn.ReLU())]).double().eval()
    x = torch.randn(500, 12).double()
    gm = Merge(ranks={"0": 6, "2": 7})(Calibrate(x)(capture(net, x)).graph_module).graph_module
    result = Refit(x)(gm)
    assert [s.name for s in result.sites] == ["2", "4"]
    after, fit = result.graph_module, x[:400]
    kept = retained_channels(calls(gm, "2")[0])
    assert after.get_submodule("2").weight.shape == (7, 6)
    z, y = after.get_submodule("0")(fit).relu(), net[:3](fit)[:, kept]
    rest, centred = y - after.get_submodule("2")(z), z - z.mean(0)
    change = after.get_submodule("2").weight - gm.get_submodule("2").weight
    ridge = RIDGE * centred.square().mean()
    torch.testing.assert_close(rest.mT @ centred / len(z), ridge * change, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_refitted_says_why():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.g, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=2), nn.Linear(7, 7)

        def forward(self, x):
            return self.b(self.b(self.g(self.a(x).relu()).relu()).relu())

    net, x = Two().double().eval(), images(32)
    result = Refit(x)(decomposed(net, x, ranks={"g": 4, "b": 3}))
    assert not result.modified
    assert reasons(result) == {"b": "called-again", "g": "grouped"}


def test_nothing_to_refit():
    net, x = model().eval(), images(32)
    result = Refit(x)(Calibrate(x)(capture(net, x)).graph_module)
    assert not result.modified
    assert torch.equal(result.graph_module(x), net(x))


@pytest.mark.parametrize("guard", [True, False])
def test_a_result_that_held_out_inputs_speak_against_is_not_kept(guard):
    """Few inputs of a scale of their own: what fits them does not fit the others."""
    net, x = model().eval(), images(40)
    gm = decomposed(net, x, holdout=True)
    result = Refit(torch.full_like(images(5), 0.3) + 1e-3 * images(5), guard=guard)(gm)
    if guard:
        assert not result.modified
        assert result.note.startswith("output error on held-out inputs")
        assert result.note.endswith(": not kept")
        assert reasons(result)["3"] == "not-better"
        assert torch.equal(result.graph_module(x), gm(x))
    else:
        assert result.modified
        assert result.note == ""


def test_what_is_kept_is_better_on_held_out_inputs():
    net, x = model().eval(), images(300)
    gm = decomposed(net, x, holdout=True)
    result = Refit(x)(gm)
    assert result.modified
    held = x[-60:]  # the last fifth of one batch
    was, now = ((g(held) - net(held)).norm() / net(held).norm() for g in (gm, result.graph_module))
    assert now < was
    assert result.note == f"output error on held-out inputs {was:.3g} → {now:.3g}"


def test_only_so_many_inputs_are_used():
    net, x = model().eval(), images(8)
    gm = decomposed(net, x)
    read = [images(4) for _ in range(5)]  # one of which is held out
    assert Refit([*read, images(4) / 0], inputs=4)(gm).modified


@pytest.mark.parametrize(("width", "count"), [(1, 5), (2, 9)])
def test_inputs_beyond_those_that_give_each_layer_enough_positions_are_left_out(width, count, monkeypatch):
    net, taken = nn.Sequential(nn.Linear(16, 16)).double(), []
    gm = decomposed(net, torch.randn(2, 5, 16).double(), ranks=width)
    monkeypatch.setattr("fxlrd.passes.refit.ENOUGH", 20)  # 20 or 40 positions: 4 or 8 inputs of 5
    monkeypatch.setattr("fxlrd.passes.refit.FEWEST", 4)
    batches = (taken.append(1) or torch.randn(1, 5, 16).double() for _ in range(99))
    Refit(batches)(gm)
    assert len(taken) == count  # one of the first five is held out


def test_padding_is_no_position_that_a_layer_is_fitted_to(monkeypatch):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x, attention_mask):
            return self.layer(x) * attention_mask[..., None]

    def batch(tokens=4):
        mask = (torch.arange(4) < tokens).expand(1, 4).double()
        return {"x": torch.randn(1, 4, 16).double(), "attention_mask": mask}

    taken = []
    gm = decomposed(Masked().double(), batch(), ranks=1)
    monkeypatch.setattr("fxlrd.passes.refit.ENOUGH", 20)
    monkeypatch.setattr("fxlrd.passes.refit.FEWEST", 4)
    Refit(taken.append(1) or batch(tokens=2) for _ in range(99))(gm)  # 20 positions: 10 inputs of 2 tokens
    assert len(taken) == 12  # two are held out


def test_provenance_stays():
    net, x = model().eval(), images(32)
    after = Refit(x)(decomposed(net, x)).graph_module
    assert {p.role for n in after.graph.nodes if (p := provenance(n)) is not None and p.name == "3"} == {
        *("first", "core", "last")
    }


def test_requests_that_cannot_be_met():
    net, x = model().eval(), images(4)
    for refit, gm, message in [
        (Refit(), decomposed(net, x), r"^refit: no calibration inputs; give calibration="),
        (Refit(x), Decompose(ranks=3)(capture(net, x)).graph_module, r"^refit: .* run calibrate before"),
        (Refit([]), decomposed(net, x), r"^calibration: there are no inputs"),
        (Refit(x[:, :2]), decomposed(net, x), r"^calibration: the model fails on batch 0"),
        (Refit(x / 0), decomposed(net, x), r"^calibration: batch 0 holds NaN or Inf"),
    ]:
        with pytest.raises(FxlrdError, match=message) as error:
            refit(gm)
        assert "\n" not in str(error.value)


def test_text_form():
    assert str(Pipeline.parse("refit{inputs=64,guard=false}")) == "refit{inputs=64,guard=false}"
    assert str(Pipeline([Refit(images(32))])) == "refit"


@pytest.mark.parametrize("norm", [True, False])
def test_a_layer_without_bias_gets_none_but_the_norm_after_it_takes_the_constant(norm):
    torch.manual_seed(0)
    after = [nn.BatchNorm2d(8)] if norm else []
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 1, bias=False), *after)
    model = model.double().eval()
    if norm:
        nn.init.uniform_(model[3].running_mean, -0.2, 0.2)
    x = [torch.randn(4, 3, 8, 8).double() for _ in range(4)]
    merged = Merge(ranks={"0": 10})(Calibrate(x)(capture(model, x[0])).graph_module).graph_module
    mean = None if not norm else merged.get_submodule("3").running_mean.clone()
    refitted = Refit(x, guard=False)(merged).graph_module
    assert cost.params(refitted) == cost.params(merged)
    assert refitted.get_submodule("2").bias is None

    def error(gm):
        return sum((gm(each) - model(each)).square().sum().item() for each in x)

    assert error(refitted) <= error(merged) * (1 + 1e-9)
    if norm:
        assert merged.get_submodule("3").running_mean.equal(mean)
        before = torch.cat([nn.Sequential(*refitted.children())[:3](each) for each in x])
        original = torch.cat([model[:3](each) for each in x])
        shift = mean - refitted.get_submodule("3").running_mean
        gap = (original - before).transpose(0, 1).flatten(1).mean(1)
        assert torch.allclose(shift, gap, rtol=1e-6), "the mean output is restored"


def test_what_took_in_a_neighbour_is_not_fitted_to_the_original_layer():
    torch.manual_seed(0)
    x = torch.randn(40, 16, 8, 8).double()
    convs = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 16, 1)).double().eval()
    text = "calibrate,decompose{ranks=12,skip=0|2},merge{mode=exact}"
    gm = Pipeline.parse(text).with_options(calibration=x)(capture(convs, x)).graph_module
    result = Refit(x, guard=False)(gm)
    assert set(reasons(result).values()) == {"entangled"}
    assert torch.equal(result.graph_module(x), gm(x))


def test_what_works_in_rank_space_is_not_fitted():
    torch.manual_seed(0)
    x = torch.randn(40, 8, 8, 8).double()
    parts = [nn.Conv2d(8, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)]
    model = nn.Sequential(*parts, nn.ReLU(), nn.Conv2d(32, 8, 1)).double().eval()
    gm = Merge(mode="relocate", ranks=12)(Calibrate(x)(capture(model, x)).graph_module).graph_module
    assert set(reasons(Refit(x, guard=False)(gm)).values()) == {"entangled"}


@pytest.mark.parametrize("length", [16, 20])
def test_a_norm_over_positions_takes_no_constant_of_channels(length):
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16, bias=False), nn.BatchNorm1d(length)]
    model, x = nn.Sequential(*layers).double().eval(), torch.randn(200, length, 16).double()
    gm = Merge(ranks={"0": 16})(Calibrate(x)(capture(model, x)).graph_module).graph_module
    fitted = Refit(x, guard=False)(gm).graph_module
    assert torch.equal(fitted.get_submodule("3").running_mean, model[3].running_mean)
    assert fitted.get_submodule("2").bias is None


def test_factors_whose_norm_was_taken_in_are_not_fitted_to_the_layer_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()).double().eval()
    x = torch.randn(40, 16, 8, 8).double()
    gm = Decompose(ranks={"0": (None, 12)})(Calibrate(x)(capture(model, x)).graph_module).graph_module
    gm = Merge(mode="exact", norms=True)(gm).graph_module
    result = Refit(x, guard=False)(gm)
    assert reasons(result) == {"0": "entangled"}
    assert torch.equal(result.graph_module(x), gm(x))
