"""compress() from a model to a result: inputs of any form, budgets, the report."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import googlenet, resnet18

import fxlrd
from fxlrd import Budget, FxlrdError
from fxlrd.graph.guards import NEVER_CALLED, stem_reason
from tests.support.compression import quick
from tests.support.models import classifier
from tests.support.tensors import images


def image(batch: int = 2) -> torch.Tensor:
    return images(batch, dtype=torch.float32)


def test_the_global_random_state_is_left_alone():
    model, x = classifier(), image()
    state = torch.get_rng_state()
    quick(model, x)
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_as_tuple_and_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(32, 32)

        def forward(self, x, y, scale=None):
            return self.a(x) + y if scale is None else scale * self.a(x)

    model, x, y = Two().eval(), torch.randn(2, 32), torch.randn(2, 32)
    by_position = quick(model, (x, y))
    by_name = quick(model, {"y": y, "x": x})
    assert torch.equal(by_position.model(x, y), by_name.model(x=x, y=y))
    assert "frozen arguments of forward: scale=None" in by_name.report.warnings[0]
    with pytest.raises(Exception, match="scale"):
        by_name.model(x, y, scale=torch.ones(1))
    own = quick(model, (x, y), inplace=True)
    assert not any("frozen" in text for text in own.report.warnings), "the user's forward still takes it"
    assert own.model(x, y, scale=torch.ones(1)).shape == (2, 32)


def test_the_report_as_json_and_as_a_table():
    result = fxlrd.compress(classifier(), image(), ratio=2.0)
    data = json.loads(json.dumps(result.report.to_dict()))
    assert set(data) == {"model", "device", "settings", "before", "after", "layers", "passes", "warnings"}
    assert set(data["before"]) == set(data["after"]) == {"params", "flops", "depth", "latency_ms"}
    keys = {"name", "op", "shape", "decision", "ranks", "params", "flops", "latency_ms", "error", "reason"}
    assert all(keys <= set(row) for row in data["layers"])
    keys = {"name", "exact", "sites", "skipped", "max_abs_error", "relative_error", "seconds"}
    assert all(keys <= set(row) for row in data["passes"])
    table = result.report.to_table()
    for text in ("parameters", "FLOPs", "latency", "tucker2 at rank", str(stem_reason(nn.Conv2d(3, 8, 3)))):
        assert text in table


@pytest.mark.slow
def test_layers_that_only_training_calls_are_reported():
    x = torch.randn(1, 3, 64, 64)
    report = quick(googlenet(init_weights=False), x).report
    row = next(r for r in report.layers if r["name"] == "aux1.fc1")
    assert row["decision"] == "skipped"
    assert row["reason"] == str(NEVER_CALLED)
    assert any("another path in training mode" in w for w in report.warnings)


@pytest.mark.parametrize(
    "x", [torch.randn(2, 4, 9, 9), torch.randn(2, 3, 9, 9).double(), torch.zeros(2, 3, 9, 9, device="meta"), "x", None]
)
def test_inputs_that_do_not_fit(x):
    with pytest.raises(FxlrdError) as caught:
        quick(classifier(), x)
    assert "\n" not in str(caught.value)


def test_a_broken_model_is_named():
    model = classifier()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(FxlrdError, match=r"^3\.weight holds NaN or Inf"):
        quick(model, image())
    with pytest.raises(FxlrdError, match=r"not a torch.nn.Module"):
        quick(len, image())


def test_a_model_that_cannot_be_traced_says_where():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            while x.sum() > 0:
                x = x - self.a(x).abs() - 1
            return x

    place = re.escape(Path(__file__).name)
    with pytest.raises(FxlrdError, match=rf"^0 \(Loop\) cannot be traced at {place}:\d+: ") as caught:
        quick(nn.Sequential(Loop()), torch.randn(1, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_under_inductor():
    x = torch.randn(1, 3, 33, 33)
    result = fxlrd.compress(resnet18().eval(), x, pipeline="decompose,snap{seconds=0.01}", compile=True, measure=False)
    assert result.report.settings["pipeline"] == "decompose,snap{compile=true,seconds=0.01}"


@pytest.mark.parametrize("first", [lambda x: x.add_(1), torch.relu_], ids=["add_", "relu_"])
def test_example_inputs_are_not_written_into(first):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            x = first(x)
            return self.fc(x)

    x = torch.randn(2, 64)
    before = x.clone()
    fxlrd.compress(Writes(), x)
    assert torch.equal(x, before)


def test_a_forward_with_unused_kwargs():
    class Kwargs(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x, *args, **kwargs):
            return self.fc(x)

    x = torch.randn(2, 64)
    assert fxlrd.compress(Kwargs(), x, measure=False).model(x).shape == (2, 64)


AUTO = (
    "calibrate{outputs=false,patches=1152,effects=256,holdout=true},allocate{params=0.6,measured=32},"
    "merge,decompose,refit,recalibrate"
)


@pytest.mark.parametrize("measure", ["params", "flops"])
def test_a_budget_is_met(measure):
    convs = [m for _ in range(5) for m in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 32, 3), *convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 20))
    result = quick(model.eval(), image(), budget=Budget(**{measure: 0.6}), calibration=image(20))
    assert result.report.after[measure] / result.report.before[measure] == pytest.approx(0.6, rel=0.02)
    assert result.report.settings["pipeline"] == AUTO.replace("params", measure)
    assert [row["name"] for row in result.report.passes] == re.sub(r"{.*?}", "", AUTO).split(",")
    assert result.report.passes[1]["note"].startswith("0.")
    assert f"of {measure}; predicted output error" in result.report.to_table()


@pytest.mark.parametrize("kind", ["generator", "loader", "pairs", "dict"])
def test_calibration_data_of_any_kind_are_read_once(kind):
    x, batches = image(), image(24).split(4)
    data = {
        "generator": (b for b in batches),
        "loader": DataLoader(TensorDataset(torch.cat(batches), torch.arange(24)), batch_size=4),
        "pairs": [(b, torch.arange(4)) for b in batches],
        "dict": {"input": torch.cat(batches)},
    }[kind]
    model = classifier().eval()
    result = quick(model, x, budget=Budget(params=0.6), calibration=data)
    expected = quick(model, x, budget=Budget(params=0.6), calibration=torch.cat(batches) if kind == "dict" else batches)
    assert torch.equal(result.model(x), expected.model(x))


class Heads(nn.Module):
    """Two inputs; two outputs, one of whole numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 24), nn.Linear(16, 24)

    def forward(self, x, y):
        z = self.b(self.a(x).relu()) + self.c(y)
        return {"scores": z, "best": z.argmax(1)}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


def shared() -> nn.Module:
    twice = nn.Conv2d(32, 32, 3, padding=1)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), twice, nn.ReLU(), twice, nn.Flatten(), nn.Linear(32 * 49, 4))


def tied() -> nn.Module:
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(32, 32), nn.ReLU())])
    model[2].weight = model[4].weight
    return model


def classes() -> nn.Module:
    class Best(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 24), Best())


def grouped() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=4), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32)),
        *(nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 16, 1)),
    )


def odd() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 3, stride=2), nn.ReLU(), nn.Conv2d(24, 32, (3, 5), padding=(1, 3), dilation=(2, 1))),
        *(nn.ReLU(), nn.Conv2d(32, 32, 3, padding="same", padding_mode="circular"), nn.ReLU(inplace=True)),
        *(nn.Conv2d(32, 32, (1, 3), padding=(0, 2), stride=(1, 2)), nn.ReLU(), nn.Conv2d(32, 16, 1, stride=2)),
    )


KINDS = {
    "two inputs": (Heads, lambda n: (torch.randn(n, 32), torch.randn(n, 16))),
    "inputs by name": (Heads, lambda n: {"y": torch.randn(n, 16), "x": torch.randn(n, 32)}),
    "attention": (Attention, lambda n: torch.randn(n, 5, 32)),
    "shared": (shared, image),
    "tied": (tied, lambda n: torch.randn(n, 32)),
    "classes": (classes, lambda n: torch.randn(n, 32)),
    "tokens": (
        lambda: nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)),
        lambda n: torch.randint(0, 50, (n, 7)),
    ),
    "grouped": (grouped, image),
    "odd": (odd, lambda n: torch.randn(n, 3, 17, 17)),
    "double": (lambda: classifier().double(), lambda n: image(n).double()),
    "bfloat16": (lambda: classifier().bfloat16(), lambda n: image(n).bfloat16()),
    "channels_last": (
        lambda: classifier().to(memory_format=torch.channels_last),
        lambda n: image(n).contiguous(memory_format=torch.channels_last),
    ),
    "a batch of one": (classifier, lambda n: image(1)),
    "unbatched": (lambda: odd()[2:], lambda n: torch.randn(24, 17, 17)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_auto_on_any_kind_of_model(kind):
    build, data = KINDS[kind]
    model, x = build().eval(), data(3)
    calibration = [data(10) for _ in range(5)]
    before = copy.deepcopy(model.state_dict())
    result = quick(model, x, budget=Budget(params=0.75), calibration=calibration)
    assert result.report.after["params"] <= 0.75 * 1.02 * result.report.before["params"]
    assert result.report.passes[-1]["relative_error"] < 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    quick(model, x, budget=Budget(params=0.75), calibration=calibration, inplace=True)
