from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd import FxlrdError
from fxlrd.budget import Budget
from fxlrd.cli import main
from fxlrd.errors import BudgetError
from fxlrd.passes import Calibrate
from tests.support.compression import largest_error
from tests.support.timers import WeightTimer

BUDGETS = ["params=0.8", "params=0.6", "params=0.4"]


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(32, 8)).double()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(32, 32, generator=generator, dtype=torch.float64) / torch.arange(1, 33)
    return [torch.randn(16, 32, generator=generator, dtype=torch.float64) @ mix for _ in range(10)]


def frontier(net: nn.Module, **options):
    data = batches()
    return fxlrd.frontier(net, data[0], **{"calibration": data, "budgets": BUDGETS, "measure": False, **options})


def test_points_are_what_compress_gives_and_cost_one_calibration(monkeypatch):
    runs = []
    call = Calibrate.__call__
    monkeypatch.setattr(Calibrate, "__call__", lambda *a, **k: runs.append(1) or call(*a, **k))
    net, data = model(), batches()
    before = copy.deepcopy(net.state_dict())
    tried = frontier(net, budgets=[*BUDGETS[1:], "params=0.8"])
    assert len(runs) == 1
    assert [str(point.budget) for point in tried.points] == BUDGETS
    errors = [point.error for point in tried.points]
    assert errors == sorted(errors)
    for point in tried.points:
        result = point.result()
        share = result.report.after["params"] / result.report.before["params"]
        assert share <= point.budget.share
        alone = fxlrd.compress(net, data[0], budget=point.budget, calibration=data, measure=False)
        assert result.report.after["params"] == pytest.approx(alone.report.after["params"], rel=0.05)
        assert result.report.passes[0] | {"seconds": 0} == alone.report.passes[0] | {"seconds": 0}
        unseen = torch.randn(64, 32, dtype=torch.float64) @ torch.diag(1 / torch.arange(1, 33, dtype=torch.float64))
        errors = [largest_error(m.eval()(unseen), net.eval()(unseen)) for m in (result.model, alone.model)]
        assert errors[0] < 1.2 * errors[1]
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_one_budget_gives_exactly_what_compress_gives():
    net, data = model(), batches()
    (point,) = frontier(net, budgets=Budget(params=0.5)).points
    alone = fxlrd.compress(net, data[0], budget=Budget(params=0.5), calibration=data, measure=False)
    result = point.result()
    assert result.report.layers == alone.report.layers
    assert torch.equal(result.model(data[0]), alone.model(data[0]))
    again = point.result().model
    assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in result.model.parameters()}
    assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in net.parameters()}


def test_latency_is_timed_side_by_side_and_what_is_out_of_reach_is_said():
    timer = WeightTimer(lambda name, weights: 1e-3 * weights)
    tried = frontier(model(), budgets=(0.8, 0.5, 0.01), measure=True, timer=timer)
    assert set(tried.missed) == {"latency=0.01"}
    assert "out of reach" in tried.missed["latency=0.01"]
    for point in tried.points:
        assert point.speed == pytest.approx(1 / point.budget.share, rel=0.15)
    assert timer.rounds[-1] == ["before", "latency=0.8", "latency=0.5"]
    text = tried.to_table()
    assert "latency=0.5" in text
    assert "latency=0.01: allocate: latency=0.01 is out of reach" in text
    with pytest.raises(BudgetError, match="out of reach"):
        frontier(model(), budgets="params=0.001")


def test_the_users_function_measures_models_of_its_own():
    net, data = model(), batches()
    expected = net.eval()(data[0])

    def evaluate(candidate: nn.Module) -> torch.Tensor:
        loss = -(candidate(data[0]) - expected).norm()
        with torch.no_grad():
            next(candidate.parameters()).zero_()  # nobody else's
        return loss

    tried = frontier(net, evaluate=evaluate)
    assert tried.original["accuracy"] == 0
    losses = [-point.accuracy for point in tried.points]
    assert 0 < losses[0] < losses[1] < losses[2]
    assert tried.fastest(accuracy=-losses[1]) is tried.points[1]
    assert tried.fastest(error=tried.points[0].error) is tried.points[0]
    assert (tried.points[0].result().model(data[0]) - expected).norm().item() == pytest.approx(losses[0])
    with pytest.raises(FxlrdError, match="no point is within error=1e-09"):
        tried.fastest(error=1e-9)


def test_a_function_that_fails_does_so_before_the_work(monkeypatch):
    monkeypatch.setattr("fxlrd.tradeoffs.carry_out", pytest.fail)
    with pytest.raises(FxlrdError, match="evaluate fails on the original: ValueError"):
        frontier(model(), evaluate=lambda m: int("x"))


def test_a_point_of_weights_that_have_changed_since_is_refused():
    net = model()
    tried = frontier(net, budgets=BUDGETS[:1])
    with torch.no_grad():
        net[0][0].weight.mul_(2)
    with pytest.raises(FxlrdError, match="weights have changed"):
        tried.points[0].result()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": []}, "budgets is empty"),
        ({"budgets": [1.5]}, "latency=1.5 is not a fraction"),
        ({"pipeline": "decompose"}, "only allocate spends one"),
        ({"pipeline": "calibrate,allocate{params=0.5},allocate{params=0.5}"}, "has 2"),
        ({"calibration": None}, "no calibration inputs"),
    ],
)
def test_requests_that_cannot_be_met(options, message):
    with pytest.raises(FxlrdError, match=message):
        frontier(model(), **options)


def test_command_writes_table_json_page_and_models(tmp_path, capsys, monkeypatch):
    (tmp_path / "frontier_toy.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))\n"
        "def first(model):\n    return model(torch.ones(1, 16))[0, 0].item()\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["frontier", "frontier_toy:make", "--input", "16", "--batch", "8", "--calibration", "random"]
    options = ["--budgets", "params=0.8,0.6", "--evaluate", "frontier_toy:first"]
    files = ["--json", "f.json", "--html", "f.html", "--save", "models"]
    assert main([*command, *options, *files]) == 0
    out, err = capsys.readouterr()
    assert "params=0.6" in out
    assert err == ""
    data = json.loads((tmp_path / "f.json").read_text())
    assert [point["budget"] for point in data["points"]] == ["params=0.8", "params=0.6"]
    assert data["original"]["accuracy"] is not None
    assert 'data-chart="frontier"' in (tmp_path / "f.html").read_text()
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["params=0.6", "params=0.8"]
    assert main([*command, "--budgets", "bytes=0.5"]) == 2
    assert "unknown budget 'bytes'" in capsys.readouterr().err
