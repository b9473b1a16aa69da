"""No test here reads a clock: `compare` is replaced by a formula of the parameters."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fxlrd import FxlrdError
from fxlrd.cli import main
from fxlrd.graph.guards import stem_reason
from fxlrd.report import profile as module
from fxlrd.report.profile import matmul_rate, profile
from fxlrd.timing import layers as layer_latency
from fxlrd.timing.clock import Timing

TIMES = {"model": Timing(10e-3), "512": Timing(1e-3), "1024": Timing(6e-3), "2048": Timing(50e-3)}


@pytest.fixture(autouse=True)
def timed(monkeypatch) -> dict[str, Timing]:
    """The model takes 10 ms, every layer 2 ms, a form half of that unless a test says otherwise; returns the latter."""
    forms: dict[str, Timing] = {}

    def compare(calls, device, seconds):
        found = {}
        for name, call in calls.items():
            if name == "original":
                found[name] = Timing(2e-3)
            elif name in TIMES:
                found[name] = TIMES[name]
            else:
                found[name] = forms.get(name, Timing(1e-3, 0.5, 0.01))
            if name not in ("1024", "2048"):
                call()
        return found

    monkeypatch.setattr(layer_latency, "compare", compare)
    monkeypatch.setattr(module, "compare", compare)
    return forms


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


def rows(**options) -> dict[str, dict]:
    found = profile(Net().eval(), torch.randn(2, 3, 9, 9), **options)
    return {row["name"]: row for row in found.layers}


def test_what_each_layer_takes_and_could_save():
    found = profile(Net().eval(), torch.randn(2, 3, 9, 9))
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
    (row,) = profile(Again().eval(), torch.randn(2, 32)).layers
    assert (row["calls"], row["latency_ms"]) == (3, pytest.approx(6.0))


def test_layers_without_a_form_say_why():
    found = rows(skip=["shared"])
    assert found["stem"]["reason"] == str(stem_reason(nn.Conv2d(3, 8, 3)))
    assert "depthwise" in found["depth"]["reason"]
    assert found["shared"]["reason"] == "skip=shared"
    assert found["never"]["reason"].startswith("it is never called")
    assert found["never"]["latency_ms"] is None
    assert not any(row["worth"] for name, row in found.items() if name != "conv")


class Never(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(32, 32)

    def forward(self, x):
        return 2 * x


def test_layers_none_of_which_is_called():
    found = profile(Never(), torch.randn(2, 32))
    (row,) = found.layers
    assert row["reason"].startswith("it is never called")
    assert row.keys() == rows()["conv"].keys()
    assert found.total["layers_ms"] == 0
    assert "peak: not measured" in found.to_table()


@pytest.mark.parametrize(
    ("timing", "whole", "saves", "reason"),
    [
        (Timing(1.9e-3, 0.98, 0.1), 10e-3, 0.0, "its form is not faster by more than the noise"),
        (Timing(3e-3, 1.5, 0.1), 10e-3, 0.0, "its form is not faster"),
        (Timing(1.9e-3, 0.96, 0.01), 10e-3, 0.08, "saves less than 10% of its time"),
        (Timing(1e-3, 0.5, 0.01), 2.0, 1.0, "saves less than 0.1% of the model's time"),
    ],
)
def test_a_layer_that_is_not_worth_it_says_why(timing, whole, saves, reason, timed, monkeypatch):
    timed |= dict.fromkeys(["19x19", "16x16"], timing)
    monkeypatch.setitem(TIMES, "model", Timing(whole))
    conv = rows()["conv"]
    assert not conv["worth"]
    assert conv["saves_ms"] == pytest.approx(saves)
    assert conv["reason"] == reason


def test_the_peak_is_the_fastest_multiply_and_is_kept():
    assert matmul_rate(torch.float32, torch.device("cpu")) == pytest.approx(2 * 1024**3 / 6e-3)
    TIMES["512"], slow = Timing(1e-9), TIMES["512"]
    try:
        assert matmul_rate(torch.float32, torch.device("cpu")) == pytest.approx(2 * 1024**3 / 6e-3)
        assert matmul_rate(torch.float32, torch.device("cpu"), cache=False) == pytest.approx(2 * 512**3 / 1e-9)
    finally:
        TIMES["512"] = slow


def test_a_dtype_without_kernels_is_not_multiplied_at_large_sizes(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "compare", lambda c, device, seconds: asked.extend(c) or dict.fromkeys(c, Timing(0.5)))
    matmul_rate(torch.bfloat16, torch.device("cpu"), cache=False)
    assert asked == ["512"]


def test_the_model_stays_as_it_is():
    model = Net().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    profile(model, torch.randn(2, 3, 9, 9))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_cannot_be_profiled():
    with pytest.raises(FxlrdError, match="finite number above 1"):
        profile(Net(), torch.randn(2, 3, 9, 9), ratio=1)
    with pytest.raises(FxlrdError, match="unknown layer"):
        profile(Net(), torch.randn(2, 3, 9, 9), skip=["nothing"])
    nothing = profile(nn.Sequential(nn.ReLU()), torch.randn(2, 3))
    assert nothing.layers == []
    assert "peak: not measured" in nothing.to_table()


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "p.json"
    command = ["profile", "torchvision:resnet18", "--input", "3x32x32", "--json", str(path)]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "worth decomposing: 20 of 21 layers" in out
    assert "the stem reads the model's input" in out
    assert "the rest" in out
    data = json.loads(path.read_text())
    assert len(data["layers"]) == 21
    assert data["total"]["params"] == 11_689_512
    assert main([*command[:-1], "no/such/folder/p.json"]) == 2
    assert "does not exist" in capsys.readouterr().err
