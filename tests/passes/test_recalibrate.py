from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxlrd import FxlrdError, Pipeline, capture
from fxlrd.capturing.model import capture_any
from fxlrd.graph.inputs import Inputs
from fxlrd.passes import Calibrate, Decompose, Recalibrate
from tests.support.tensors import images


def model() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16, momentum=0.3)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)),
    ).double()


def shifted(batch: int = 20) -> torch.Tensor:
    return images(batch) + 0.5


def trained() -> nn.Sequential:
    """Return the model with the statistics of many images."""
    net = model().train()
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d)):
            m.momentum = None  # the mean over batches
    with torch.no_grad():
        for _ in range(10):
            net(shifted(100))
    return net.eval()


def statistics(gm) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in gm.state_dict().items() if "running" in k}


def test_statistics_are_those_of_the_inputs():
    net, x = model().eval(), shifted()
    result = Recalibrate([x], guard=False)(capture(net, x))
    gm = result.graph_module
    assert [(s.name, s.exact) for s in result.sites] == [("1", False), ("4", False), ("9", False)]
    fit = x[:16]  # of a single batch the last fifth is held out
    seen = net[0](fit).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(gm.get_submodule("1").running_mean, seen.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gm.get_submodule("1").running_var, seen.var(0), rtol=1e-12, atol=1e-12)
    # The next one sees what the batch's own statistics make of it.
    seen = net[3](net[2](copy.deepcopy(net[1]).train()(net[0](fit)))).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(gm.get_submodule("4").running_mean, seen.mean(0), rtol=1e-12, atol=1e-12)


def test_batches_count_alike():
    net, batches = model().eval(), [shifted(), 3 * shifted(), shifted()[:10], shifted(), shifted(), shifted() / 7]
    gm = Recalibrate(batches, guard=False)(capture(net, shifted())).graph_module
    means = [net[0](x).movedim(1, -1).flatten(0, -2).mean(0) for x in batches[:4] + batches[5:]]  # the fifth is out
    torch.testing.assert_close(gm.get_submodule("1").running_mean, torch.stack(means).mean(0), rtol=1e-12, atol=1e-12)


def test_twice_is_once():
    batches = [shifted() for _ in range(7)]
    once = Recalibrate(batches)(capture(model().eval(), shifted())).graph_module
    twice = Recalibrate(batches)(once).graph_module
    for name, value in statistics(once).items():
        torch.testing.assert_close(twice.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_only_copies_change_and_modes_momentum_and_counters_stay():
    net, x = model().train(), shifted()
    net[4].eval()
    before = copy.deepcopy(net.state_dict())
    gm = capture(net, x)
    after = Recalibrate(x)(gm).graph_module
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())
    assert [m.training for m in net] == [i != 4 for i in range(11)]
    assert not torch.equal(after.get_submodule("1").running_mean, net[1].running_mean)
    assert after.get_submodule("4").momentum == 0.3
    assert after.get_submodule("4").num_batches_tracked == 0
    assert [after.get_submodule(n).training for n in ("1", "4", "9")] == [True, False, True]
    assert after.get_submodule("0") is gm.get_submodule("0"), "nothing else is copied"
    assert after.get_submodule("0").weight is net[0].weight


def test_a_norm_that_is_called_twice_sees_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.n(self.a(self.n(x)))

    x = shifted(4)
    result = Recalibrate(x, guard=False)(capture(Twice().double().eval(), x))
    assert [s.name for s in result.sites] == ["n"]
    assert result.graph_module.get_submodule("n").num_batches_tracked == 0


@pytest.mark.parametrize("guard", [True, False])
def test_it_is_kept_only_where_held_out_inputs_gain(guard):
    """Inputs of another scale than those held out make it worse."""
    net, x = trained(), shifted(60)
    gm = Decompose(ranks=12)(Calibrate(x, holdout=True)(capture(net, x)).graph_module).graph_module
    result = Recalibrate(9 * shifted(60), guard=guard)(gm)
    assert result.modified != guard
    if guard:
        assert result.note.endswith(": not kept")
        assert {s.reason.code for s in result.skipped} == {"not-better"}
        assert torch.equal(result.graph_module(x), gm(x))
        for name, value in statistics(gm).items():
            assert torch.equal(result.graph_module.state_dict()[name], value)


def test_it_is_kept_where_it_brings_the_original_back():
    net, x = trained(), shifted(200)
    gm = Calibrate(x, holdout=True)(capture(net, x)).graph_module
    off = copy.deepcopy(net[4])
    off.running_mean += 0.1  # as if a layer before had been approximated badly
    gm.set_submodule("4", off)
    result = Recalibrate(x)(gm)
    assert result.modified
    held = x[160:]
    was, now = ((g(held) - net(held)).norm() / net(held).norm() for g in (gm, result.graph_module))
    assert result.note == f"output error on held-out inputs {was:.3g} → {now:.3g}"
    assert now < was
    assert torch.equal(off.running_mean, net[4].running_mean + 0.1)


def test_batches_of_one_input_say_nothing_of_the_variance():
    net, x = model().eval(), shifted(1)
    gm = capture(net, x)
    result = Recalibrate([x, x])(gm)
    assert not result.modified
    assert {s.reason.code for s in result.skipped} == {"one-value"}
    assert torch.equal(result.graph_module(x), net(x))
    assert all(torch.equal(v, statistics(gm)[k]) for k, v in statistics(result.graph_module).items())


def test_what_is_left_alone():
    hooked = nn.BatchNorm2d(8)
    hooked.register_forward_hook(lambda *_: None)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, track_running_stats=False), hooked).double().eval()
    result = Recalibrate(shifted())(capture(net, shifted()))
    assert not result.modified
    assert [(s.name, s.reason.code) for s in result.skipped] == [("2", "hooks")]
    assert not Recalibrate(shifted())(capture(nn.Linear(9, 9).double(), shifted())).modified


def test_requests_that_cannot_be_met():
    net, x = model().eval(), shifted(4)
    for data, message in [
        (None, r"^recalibrate: no calibration inputs; give calibration="),
        ([], r"^calibration: there are no inputs"),
        (x[:, :2], r"^calibration: the model fails on batch 0"),
        (x / 0, r"^calibration: batch 0 holds NaN or Inf"),
        (x * 1e300, r"^recalibrate: the calibration inputs give NaN or Inf"),
    ]:
        with pytest.raises(FxlrdError, match=message) as error:
            Recalibrate(data)(capture(net, x))
        assert "\n" not in str(error.value)


def test_text_form():
    assert str(Pipeline.parse("recalibrate{guard=false}")) == "recalibrate{guard=false}"


class TwoWays(nn.Module):
    """Large inputs go one way, others another."""

    def __init__(self):
        super().__init__()
        self.large, self.small = (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x):
        y = self.large(x) if (x > 10).any() else torch.zeros_like(x)
        return y + self.small(x)


def test_a_norm_that_no_input_reached_has_its_old_statistics_and_says_so():
    net, example = TwoWays().double().eval(), torch.linspace(-1, 20, 64, dtype=torch.float64).reshape(8, 8)
    gm = capture_any(net, Inputs.of(example))
    data = [torch.randn(8, 8, dtype=torch.float64) for _ in range(6)]
    result = Recalibrate(data, guard=False)(gm)
    assert [site.name for site in result.sites] == ["small.1"]
    assert [(skip.name, skip.reason.code) for skip in result.skipped] == [("large.1", "not-reached")]
    assert result.graph_module.get_submodule("large.1") is gm.get_submodule("large.1")
