"""No test here reads a clock: a fake timer's times are those that a test states."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn

from fxlrd import FxlrdError
from fxlrd.cli import main
from fxlrd.graph.guards import NEVER_CALLED, stem_reason
from fxlrd.report.profile import profile
from fxlrd.timing.clock import Timing
from fxlrd.timing.stopwatch import REFERENCE_ALONE
from tests.support.timers import FakeTimer, SizeTimer

SECONDS = {"model": 10e-3, "original": 2e-3, "512": 1e-3, "1024": 6e-3, "2048": 50e-3}


def timer(spread: float = 0.01, form: float = 1e-3, **seconds: float) -> FakeTimer:
    """The model takes 10 ms, every layer 2 ms and a form 1 ms, unless a test says otherwise."""
    return FakeTimer(lambda name, _: {**SECONDS, **seconds}.get(name, form), spread, kernel=1e-3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.depth = nn.Conv2d(32, 32, 3, groups=32)
        self.shared = nn.Linear(32, 32)
        self.never = nn.Linear(8, 8)

    def forward(self, x):
        h = self.depth(self.conv(self.stem(x)).relu()).mean((2, 3))
        return self.shared(self.shared(h).relu())


def profiled(**options):
    return profile(Net().eval(), torch.randn(2, 3, 9, 9), **{"timer": timer(), **options})


def rows(**options) -> dict[str, dict]:
    return {row["name"]: row for row in profiled(**options).layers}


def test_what_each_layer_takes_and_could_save():
    found = profiled()
    by_name = {row["name"]: row for row in found.layers}
    conv = by_name["conv"]
    assert (conv["latency_ms"], conv["share"], conv["ratio"]) == pytest.approx((2.0, 0.2, 0.5))
    assert conv["flops"] == 2 * 2 * 7 * 7 * 32 * 32 * 9
    assert conv["rate"] == pytest.approx(conv["flops"] / 2e-3)
    assert conv["of_peak"] == pytest.approx(conv["rate"] / found.peak)
    assert conv["saves_ms"] == pytest.approx(1.0)
    assert conv["worth"]
    assert conv["ranks"] in ([19, 19], [16, 16])
    assert (conv["input"], conv["layout"]) == ([2, 32, 7, 7], "contiguous")
    assert found.total["layers_ms"] == pytest.approx(10.0)
    assert found.total["latency_ms"] == pytest.approx(10.0)
    assert found.total["saves_ms"] == pytest.approx(sum(r["saves_ms"] for r in found.layers if r["worth"]))


def test_calls_of_a_shared_layer_add_up_and_sort_it_first():
    found = rows()
    assert found["shared"]["calls"] == 2
    assert found["shared"]["latency_ms"] == pytest.approx(4.0)
    assert found["shared"]["saves_ms"] == pytest.approx(2.0)
    assert next(iter(found)) == "shared"


class Again(nn.Module):
    """No graph: how often the layer is called depends on values."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(32, 32)

    def forward(self, x):
        for _ in range(3 if bool(x.sum() > -1e9) else 1):
            x = self.one(x)
        return x


def test_calls_in_a_model_that_is_no_graph_count_too():
    (row,) = profile(Again().eval(), torch.randn(2, 32), timer=timer()).layers
    assert (row["calls"], row["latency_ms"]) == (3, pytest.approx(6.0))


def test_layers_without_a_form_say_why():
    found = rows(skip=["shared"])
    assert found["stem"]["reason"] == str(stem_reason(nn.Conv2d(3, 8, 3)))
    assert "depthwise" in found["depth"]["reason"]
    assert found["shared"]["reason"] == "skip=shared"
    assert found["never"]["reason"] == str(NEVER_CALLED)
    assert found["never"]["latency_ms"] is None
    assert not any(row["worth"] for name, row in found.items() if name != "conv")


def test_a_layer_called_at_several_sizes_is_judged_by_all_its_calls():
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x):
            return self.head(x).mean() + self.head(x[..., :4, :4]).mean()

    seconds = {("original", 16): 5e-3, ("original", 4): 1e-3, (REFERENCE_ALONE, 16): 1e-3}

    def taken(name: str, size: int) -> float:
        return seconds.get((name, size), 2e-3 if size == 16 else 3e-3)

    (row,) = profile(Pyramid().eval(), torch.randn(1, 32, 16, 16), timer=SizeTimer(taken, 0.01), cache=False).layers
    assert row["ratio"] == pytest.approx(5 / 6)
    assert row["worth"]
    assert row["saves_ms"] == pytest.approx(1.0)


class Never(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(32, 32)

    def forward(self, x):
        return 2 * x


def test_layers_none_of_which_is_called():
    found = profile(Never(), torch.randn(2, 32), timer=timer())
    (row,) = found.layers
    assert row["reason"] == str(NEVER_CALLED)
    assert row.keys() == rows()["conv"].keys()
    assert found.total["layers_ms"] == 0
    assert "peak: not measured" in found.to_table()


@pytest.mark.parametrize(
    ("form", "spread", "model", "saves", "reason"),
    [
        (1.96e-3, 0.1, 10e-3, 0.0, "its form is not faster by more than the noise"),
        (3e-3, 0.1, 10e-3, 0.0, "its form is not faster"),
        (1.92e-3, 0.01, 10e-3, 0.08, "saves less than 10% of its time"),
        (1e-3, 0.01, 2.0, 1.0, "saves less than 0.1% of the model's time"),
    ],
)
def test_a_layer_that_is_not_worth_it_says_why(form, spread, model, saves, reason):
    conv = rows(timer=timer(spread, form, model=model))["conv"]
    assert not conv["worth"]
    assert conv["saves_ms"] == pytest.approx(saves)
    assert conv["reason"] == reason


def busy(timer: FakeTimer, slowdown: float) -> FakeTimer:
    """Return the timer on a machine that takes ``slowdown`` times as long for everything."""
    return FakeTimer(
        lambda name, asked: slowdown * timer.seconds_of(name, asked), timer.spread, slowdown * timer.kernel
    )


@pytest.mark.parametrize("slowdown", [0.2, 5.0])
def test_layers_timed_under_other_load_are_in_seconds_of_this_profile(slowdown):
    """Timings from a quiet day beside the model's on a busy one gave rates of 488 % of the peak, and layers that took
    9 % of the model.
    """
    profiled(timer=timer())
    result = profiled(timer=busy(timer(), slowdown))
    conv = next(row for row in result.layers if row["name"] == "conv")
    assert result.total["latency_ms"] == pytest.approx(10 * slowdown)
    assert result.total["layers_ms"] == pytest.approx(10 * slowdown)
    assert (conv["latency_ms"], conv["share"]) == pytest.approx((2 * slowdown, 0.2))
    assert conv["of_peak"] == pytest.approx(rows()["conv"]["of_peak"])
    assert result.peak == pytest.approx(2 * 1024**3 / 6e-3 / slowdown)
    (doubt,) = result.warnings
    assert "up to 5.0× as fast or as slow when some of the layers were timed" in doubt
    assert f"warning: {doubt}" in result.to_table()


def test_a_profile_that_adds_up_has_no_warnings():
    result = profiled()
    assert result.warnings == result.to_dict()["warnings"] == []
    assert "warning" not in result.to_table()
    assert "?" not in result.to_table()


def test_layers_that_take_longer_than_their_model_are_called_in_doubt():
    result = profiled(timer=timer(model=6e-3))
    (doubt,) = result.warnings
    assert doubt.startswith("the layers, timed alone, add up to 167% of the model's time")
    (rest,) = (line for line in result.to_table().splitlines() if line.startswith("the rest"))
    assert rest.split() == ["the", "rest", "?", "?"]
    assert profiled(timer=timer(model=9.5e-3)).warnings == [], "as caches may do"


def test_a_rate_above_the_peak_is_called_in_doubt():
    flops = rows()["conv"]["flops"]
    result = profiled(cache=False, timer=timer(original=flops / (4 * 2 * 1024**3 / 6e-3), model=1.0))
    assert max(row["of_peak"] for row in result.layers if row["of_peak"]) == pytest.approx(4)
    (doubt,) = result.warnings
    assert doubt.startswith("rates above the peak (1 layers, up to 400% of it)")
    assert "400% ?" in result.to_table()


def test_other_load_is_mentioned():
    quiet = timer()

    def busy(variants, device, seconds):
        timings = quiet(variants, device)
        alone = timings.pop(REFERENCE_ALONE, None)
        return timings if alone is None else {**timings, REFERENCE_ALONE: Timing(alone.seconds / 2)}

    (doubt,) = profiled(timer=busy).warnings
    assert doubt == "there is other load on this machine: what lasts as long as the model takes 2.0× its time"


def test_a_model_whose_time_varies_is_called_in_doubt():
    (doubt,) = profiled(timer=timer(spread=3.0)).warnings
    assert doubt.startswith("the model's time is uncertain by ± ")


def test_the_model_stays_as_it_is():
    model = Net().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    profile(model, torch.randn(2, 3, 9, 9), timer=timer())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_cannot_be_profiled():
    with pytest.raises(FxlrdError, match="finite number above 1"):
        profile(Net(), torch.randn(2, 3, 9, 9), ratio=1)
    with pytest.raises(FxlrdError, match="unknown layer"):
        profile(Net(), torch.randn(2, 3, 9, 9), skip=["nothing"])
    nothing = profile(nn.Sequential(nn.ReLU()), torch.randn(2, 3), timer=timer())
    assert nothing.layers == []
    assert "peak: not measured" in nothing.to_table()


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fxlrd.report.profile.profile", partial(profile, timer=timer()))
    path = tmp_path / "p.json"
    command = ["profile", "torchvision:resnet18", "--input", "3x32x32", "--json", str(path)]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "worth decomposing: 20 of 21 layers" in out
    assert str(stem_reason(nn.Conv2d(3, 64, 7))) in out
    assert "the rest" in out
    data = json.loads(path.read_text())
    assert len(data["layers"]) == 21
    assert data["total"]["params"] == 11_689_512
    assert main([*command[:-1], "no/such/folder/p.json"]) == 2
    assert "does not exist" in capsys.readouterr().err


class Counting(nn.Module):
    """It counts its calls in eval mode, in an attribute, and scales its weight down in the first."""

    def __init__(self):
        super().__init__()
        self.calls, self.fc = 0, nn.Linear(32, 32)

    def forward(self, x):
        if not self.calls:
            self.fc.weight.data.mul_(0.5)
        self.calls += 1
        return self.fc(x)


def test_the_model_is_left_as_it_was():
    model = Counting().eval()
    weight = model.fc.weight.detach().clone()
    profile(model, torch.randn(2, 32), timer=timer())
    assert model.calls == 0
    assert torch.equal(model.fc.weight, weight)
