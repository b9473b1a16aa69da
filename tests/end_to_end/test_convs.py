"""Networks of convs of one, two and three dimensions, transposed or not, from end to end."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video import r3d_18

import fxlrd
from fxlrd import Budget, FxlrdError, capture
from fxlrd.allocation.plan import planned
from fxlrd.graph.surgery import layers
from fxlrd.layers.kinds import LAYERS, op
from fxlrd.passes import Allocate, Calibrate
from tests.support.cases import cases


class Ears(nn.Module):
    """What Whisper does to a spectrogram, and a layer of what follows."""

    def __init__(self, mels=80, width=96):
        super().__init__()
        self.conv1 = nn.Conv1d(mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        x = nn.functional.gelu(self.conv1(x))
        x = nn.functional.gelu(self.conv2(x)).permute(0, 2, 1)
        return self.fc(self.norm(x))


class UNet(nn.Module):
    def __init__(self, width=32, kernel=2):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(2 * width)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, kernel, stride=2, padding=kernel // 2 - 1)
        self.out = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Conv2d(2 * width, 4, 1)

    def forward(self, x):
        wide = self.stem(x).relu()
        x = self.middle(self.norm(self.down(wide)).relu()).relu()
        return self.head(self.out(torch.cat([self.up(x), wide], 1)).relu())


NETWORKS = {
    "r3d_18": (lambda: r3d_18(), (1, 3, 4, 32, 32), {"stem.0"}, {"Conv3d", "Linear"}),
    "Whisper's front end": (Ears, (2, 80, 20), set(), {"Conv1d", "Linear"}),
    "U-Net": (UNet, (2, 3, 8, 8), {"stem"}, {"Conv2d", "ConvTranspose2d"}),
}


@pytest.mark.parametrize("name", cases(NETWORKS, slow=["r3d_18"]))
def test_networks_decompose(name):
    build, shape, skipped, ops = NETWORKS[name]
    model, x = build().eval(), torch.randn(shape)
    result = fxlrd.compress(model, x, preset="lrd", ratio=2, measure=False)
    report = result.report
    rows = {row["name"]: row for row in report.layers}
    assert set(rows) == {n for n, m in model.named_modules() if isinstance(m, LAYERS)}
    assert {row["op"] for row in rows.values()} == ops
    assert all(row["shape"] == list(model.get_submodule(n).weight.shape) for n, row in rows.items())
    assert {n for n, row in rows.items() if row["decision"] == "skipped"} == skipped
    for row in rows.values():
        assert row["decision"] == "skipped" or 2 * row["params"] <= row["params_before"] + 2 * row["shape"][0] + 200
    assert result.model(x).shape == model(x).shape
    assert report.after["params"] < 0.55 * report.before["params"]
    with FlopCounterMode(display=False) as counter:
        result.model(x)
    assert report.after["flops"] == counter.get_total_flops() < report.before["flops"]
    assert report.after["depth"] > report.before["depth"]
    assert next(iter(ops)) in report.to_table()


@pytest.mark.parametrize("name", cases(NETWORKS, slow=["r3d_18"]))
def test_networks_at_full_rank_are_exact(name):
    build, shape, _, _ = NETWORKS[name]
    model, x = build().double().eval(), torch.randn(shape).double()
    result = fxlrd.compress(model, x, pipeline="decompose{ranks=9999}", measure=False)
    assert len(result.report.passes[0]["sites"]) >= 3
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)


TINY = {
    "Conv1d": (lambda: nn.Sequential(Ears(24, 32), nn.Linear(32, 24)), (2, 24, 12)),
    "U-Net": (lambda: UNet(16, 4), (2, 3, 8, 8)),
    "Conv3d": (
        lambda: nn.Sequential(
            *(nn.Conv3d(3, 24, 3), nn.BatchNorm3d(24), nn.ReLU(), nn.Conv3d(24, 24, 3, padding=1), nn.BatchNorm3d(24)),
            *(nn.ReLU(), nn.ConvTranspose3d(24, 16, 2, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 8)),
        ),
        (2, 3, 4, 6, 6),
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_preset_ranks(name):
    build, shape = TINY[name]
    model, x = build().eval(), torch.randn(shape)
    result = fxlrd.compress(model, x, pipeline="decompose{ratio=2},snap{seconds=0.1}", measure=False)
    assert {row["decision"] for row in result.report.layers} <= {"svd", "tucker2", "original", "skipped"}
    assert result.model(x).shape == model(x).shape


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["params", "flops"])
@pytest.mark.parametrize("name", TINY)
def test_preset_auto(name, measure):
    build, shape = TINY[name]
    model, x = build().eval(), torch.randn(shape)
    data = [torch.randn(8, *shape[1:]) for _ in range(5)]
    before = copy.deepcopy(model.state_dict())
    budget = Budget(**{measure: 0.5})
    result = fxlrd.compress(model, x, budget=budget, calibration=data, measure=False)
    assert result.report.after[measure] <= 0.5 * 1.02 * result.report.before[measure]
    assert result.report.passes[-1]["relative_error"] < 0.9
    changed = {row["op"] for row in result.report.layers if row["decision"] in ("svd", "tucker2")}
    assert changed & {"Conv1d", "Conv3d", "ConvTranspose2d", "ConvTranspose3d"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_a_budget_of_latency_on_convs_of_any_kind():
    build, shape = TINY["U-Net"]
    gm = capture(build().eval(), torch.randn(shape))
    gm = Calibrate(torch.randn(10, *shape[1:]), effects=8)(gm).graph_module
    assert {op(m) for m in layers(gm).values()} == {"Conv2d", "ConvTranspose2d"}
    with suppress(FxlrdError):  # so small a network may have no faster form here
        plan = planned(Allocate(latency=0.999, seconds=0.1)(gm).graph_module)
        assert set(plan.ranks) < set(layers(gm))
