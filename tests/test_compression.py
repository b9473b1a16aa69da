from __future__ import annotations

import copy
import gc
import json
import pickle
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import googlenet, resnet18

import fxlrd
from fxlrd import Budget, FxlrdError, Pipeline
from fxlrd.passes import Decompose
from tests.support.compression import quick
from tests.support.tensors import images


def small(width: int = 32) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(width, 20),
    )


def test_the_users_model_is_not_touched_and_nothing_is_shared():
    model = small()
    before = copy.deepcopy(model.state_dict())
    result = quick(model, images(dtype=torch.float32), ratio=2.0)
    mine = {t.data_ptr() for t in model.state_dict().values() if t.numel()}
    theirs = {t.data_ptr() for t in result.model.state_dict().values() if t.numel()}
    assert not mine & theirs
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model[3], "first")


def test_the_result_does_not_keep_the_model_alive():
    model = small()
    gone = weakref.ref(model[3].weight)
    result = quick(model, images(dtype=torch.float32))
    del model
    gc.collect()
    assert gone() is None
    assert result.model(images(dtype=torch.float32)).shape == (2, 20)


def test_each_module_comes_back_in_its_own_mode():
    model = small().train()
    model[1].eval()
    result = quick(model, images(dtype=torch.float32))
    assert result.model.training
    assert not result.model.get_submodule("1").training
    assert result.model.get_submodule("3").training
    assert result.model.get_submodule("3.core").training
    assert result.model.get_submodule("6").training
    assert model.training
    assert not model[1].training
    assert not quick(small().eval(), images(dtype=torch.float32)).model.training


def test_dropout_works_again_in_training_mode():
    result = quick(small(), images(dtype=torch.float32), pipeline="decompose{ranks=99}")
    x = images(dtype=torch.float32)
    a, b = result.model.train()(x), result.model.train()(x)
    assert not torch.equal(a, b)
    assert torch.equal(result.model.eval()(x), result.model.eval()(x))


def test_inplace_puts_the_factors_into_the_users_model():
    model, x = small().eval(), images(dtype=torch.float32)
    reference = quick(model, x, ratio=2.0).model(x)
    result = quick(model, x, ratio=2.0, inplace=True)
    assert result.model is model
    assert [n for n, _ in model[3].named_children()] == ["first", "core", "last"]
    assert torch.equal(model(x), reference)


def test_inplace_reaches_every_name_of_a_shared_module():
    shared = nn.Linear(32, 32)
    model, x = nn.Sequential(shared, nn.ReLU(), shared).eval(), torch.randn(2, 32)
    quick(model, x, inplace=True)
    assert model[0] is model[2]
    assert [n for n, _ in model[0].named_children()] == ["first", "last"]


def test_the_global_random_state_is_left_alone():
    model, x = small(), images(dtype=torch.float32)
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


def test_the_report_as_json_and_as_a_table():
    result = fxlrd.compress(small(), images(dtype=torch.float32), ratio=2.0)
    data = json.loads(json.dumps(result.report.to_dict()))
    assert set(data) == {"model", "device", "settings", "before", "after", "layers", "passes", "warnings"}
    assert set(data["before"]) == set(data["after"]) == {"params", "flops", "depth", "latency_ms"}
    keys = {"name", "op", "shape", "decision", "ranks", "params", "flops", "latency_ms", "error", "reason"}
    assert all(keys <= set(row) for row in data["layers"])
    keys = {"name", "exact", "sites", "skipped", "max_abs_error", "relative_error", "seconds"}
    assert all(keys <= set(row) for row in data["passes"])
    table = result.report.to_table()
    for text in ("parameters", "FLOPs", "latency", "tucker2 at rank", "the stem reads the model's input"):
        assert text in table


def test_it_exports_like_hand_written_torch(tmp_path):
    x = images(dtype=torch.float32)
    result = quick(small().eval(), x)
    reference = result.model(x)
    assert torch.equal(pickle.loads(pickle.dumps(result.model))(x), reference)
    assert torch.equal(copy.deepcopy(result.model)(x), reference)
    exported = torch.export.export(result.model, (x,)).module()(x)
    torch.testing.assert_close(exported, reference, rtol=0, atol=0)


def test_state_dict_names_are_stable():
    names = set(quick(small(), images(dtype=torch.float32)).model.state_dict())
    assert {"3.first.weight", "3.core.weight", "3.last.weight", "3.last.bias", "7.first.weight", "0.weight"} <= names
    assert "3.first.bias" not in names


@pytest.mark.slow
def test_layers_that_only_training_calls_are_reported():
    x = torch.randn(1, 3, 64, 64)
    report = quick(googlenet(init_weights=False), x).report
    row = next(r for r in report.layers if r["name"] == "aux1.fc1")
    assert row["decision"] == "skipped"
    assert "never called in eval mode" in row["reason"]
    assert any("another path in training mode" in w for w in report.warnings)


def test_pipeline_as_object_and_as_text():
    x = images(dtype=torch.float32)
    torch.manual_seed(0)
    model = small().eval()
    a = quick(model, x, pipeline=Pipeline([Decompose(ratio=3.0)])).model
    b = quick(model, x, pipeline="decompose{ratio=3}").model
    c = quick(model, x, ratio=3.0).model
    assert torch.equal(a(x), b(x))
    assert torch.equal(a(x), c(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "lord"}, "unknown preset 'lord': did you mean lrd"),
        ({"preset": "lrd", "pipeline": "decompose"}, "give one of the two"),
        ({"pipeline": "decompose", "ratio": 2.0}, "goes into the pipeline"),
        ({"ratio": 1.0}, "finite number above 1"),
        ({"ratio": float("nan")}, "finite number above 1"),
        ({"ratio": 1e6}, "ratio=1e"),
        ({"skip": "head"}, "unknown layer 'head'"),
    ],
)
def test_requests_that_cannot_be_met(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        quick(small(), images(dtype=torch.float32), **options)
    assert isinstance(caught.value, FxlrdError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "x", [torch.randn(2, 4, 9, 9), torch.randn(2, 3, 9, 9).double(), torch.zeros(2, 3, 9, 9, device="meta"), "x", None]
)
def test_inputs_that_do_not_fit(x):
    with pytest.raises(FxlrdError) as caught:
        quick(small(), x)
    assert "\n" not in str(caught.value)


def test_a_broken_model_is_named():
    model = small()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(FxlrdError, match=r"^3\.weight holds NaN or Inf"):
        quick(model, images(dtype=torch.float32))
    with pytest.raises(FxlrdError, match=r"not a torch.nn.Module"):
        quick(len, images(dtype=torch.float32))


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


def test_inplace_puts_everything_back_where_the_model_then_fails():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(32, 64, 3), nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)).view(-1, 64 if type(self.fc) is nn.Linear else 63))

    model = Reads()
    conv, fc = model.conv, model.fc
    with pytest.raises(FxlrdError, match="inplace=False"):
        fxlrd.compress(model, torch.randn(2, 32, 8, 8), inplace=True, measure=False)
    assert model.conv is conv
    assert model.fc is fc


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


def test_the_pickled_model_does_not_carry_the_example_inputs():
    model = nn.Sequential(nn.Linear(64, 64))
    result = fxlrd.compress(model, torch.randn(10_000, 64), measure=False)
    assert len(pickle.dumps(result.model)) < 100_000


def test_autocast_and_inference_mode_are_refused():
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(FxlrdError, match="autocast"):
        fxlrd.compress(model, x)
    with torch.inference_mode(), pytest.raises(FxlrdError, match="inference_mode"):
        fxlrd.compress(model, x)


def test_a_forward_with_unused_kwargs():
    class Kwargs(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x, *args, **kwargs):
            return self.fc(x)

    x = torch.randn(2, 64)
    assert fxlrd.compress(Kwargs(), x, measure=False).model(x).shape == (2, 64)


def test_kinds_of_models_that_have_to_be_unwrapped_first():
    for wrapped, remedy in [
        (torch.compile(small()), "model._orig_mod"),
        (nn.DataParallel(small()), "model.module"),
        (torch.jit.trace(small().eval(), images(dtype=torch.float32)), "the model it was made from"),
    ]:
        with pytest.raises(FxlrdError, match=remedy):
            quick(wrapped, images(dtype=torch.float32))


def test_a_list_of_passes_is_a_pipeline():
    model, x = small().eval(), images(dtype=torch.float32)
    assert torch.equal(quick(model, x, pipeline=[Decompose()]).model(x), quick(model, x).model(x))


@pytest.mark.slow
def test_inplace_counts_what_the_graph_never_calls():
    x = torch.randn(1, 3, 64, 64)
    result = quick(googlenet(init_weights=False), x, inplace=True)
    assert result.report.after["params"] == sum(p.numel() for p in result.model.parameters())


# -- budgets and preset auto

AUTO = (
    "calibrate{outputs=false,patches=1152,effects=256,holdout=true},allocate{params=0.6},"
    "merge,decompose,refit,recalibrate"
)


def many(batch: int = 20) -> torch.Tensor:
    return torch.randn(batch, 3, 9, 9)


@pytest.mark.parametrize("measure", ["params", "flops"])
def test_a_budget_is_met(measure):
    convs = [m for _ in range(5) for m in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 32, 3), *convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 20))
    result = quick(model.eval(), images(dtype=torch.float32), budget=Budget(**{measure: 0.6}), calibration=many())
    assert result.report.after[measure] / result.report.before[measure] == pytest.approx(0.6, rel=0.02)
    assert result.report.settings["pipeline"] == AUTO.replace("params", measure)
    assert [row["name"] for row in result.report.passes] == re.sub(r"{.*?}", "", AUTO).split(",")
    assert result.report.passes[1]["note"].startswith("0.")
    assert f"of {measure}; predicted output error" in result.report.to_table()


def test_auto_by_itself_is_half_the_latency():
    text = str(Pipeline.preset("auto"))
    assert "allocate{latency=0.5}" in text
    assert str(Pipeline.parse(text)) == text


def test_nothing_of_the_calibration_stays_and_nothing_is_touched():
    model = small().train()
    model[3].requires_grad_(False).eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    data = many(400)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    result = quick(model, images(dtype=torch.float32), budget=Budget(params=0.6), calibration=data)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False] * 2 + [True] * 2
    assert [p.grad is not None for p in model.parameters()] == [True] + [False] * 7
    mine, theirs = (
        {t.untyped_storage().data_ptr() for t in m.state_dict().values() if t.numel()} for m in (model, result.model)
    )
    assert not mine & theirs
    assert not [key for key in result.model.meta if str(key).startswith("fxlrd")]
    gone = weakref.ref(data)
    del data
    gc.collect()
    assert gone() is None
    kept = sum(t.numel() * t.element_size() for t in result.model.state_dict().values())
    assert len(pickle.dumps(result.model)) < kept + 30_000
    for copied in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        x = images(dtype=torch.float32)
        assert torch.equal(copied.eval()(x), result.model.eval()(x))


def test_a_result_can_be_compressed_again():
    x = images(dtype=torch.float32)
    first = quick(small().eval(), x, budget=Budget(params=0.8), calibration=many())
    again = Pipeline.parse("decompose{ranks=2}")(fxlrd.capture(first.model, x))
    assert again.modified, "the plan that was carried out is gone"


def test_inplace_gives_what_a_copy_gives():
    model, x, data = small().eval(), images(dtype=torch.float32), many()
    options = {"budget": Budget(params=0.6), "calibration": data}
    copied = quick(model, x, **options)
    result = quick(model, x, inplace=True, **options)
    assert result.model is model
    assert torch.equal(model(x), copied.model(x))


def test_skip_reaches_allocate_merge_and_decompose():
    model, x = small().eval(), images(dtype=torch.float32)
    result = quick(model, x, budget=Budget(params=0.95), calibration=many(), skip="3")
    assert torch.equal(result.model.get_submodule("3").weight, model[3].weight)
    assert next(r for r in result.report.layers if r["name"] == "3")["decision"] in ("original", "skipped")


@pytest.mark.parametrize("kind", ["generator", "loader", "pairs", "dict"])
def test_data_that_several_passes_read_is_read_once(kind):
    x, batches = images(dtype=torch.float32), many(24).split(4)
    data = {
        "generator": (b for b in batches),
        "loader": DataLoader(TensorDataset(torch.cat(batches), torch.arange(24)), batch_size=4),
        "pairs": [(b, torch.arange(4)) for b in batches],
        "dict": {"input": torch.cat(batches)},
    }[kind]
    model = small().eval()
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
    "shared": (shared, many),
    "tied": (tied, lambda n: torch.randn(n, 32)),
    "classes": (classes, lambda n: torch.randn(n, 32)),
    "tokens": (
        lambda: nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)),
        lambda n: torch.randint(0, 50, (n, 7)),
    ),
    "grouped": (grouped, many),
    "odd": (odd, lambda n: torch.randn(n, 3, 17, 17)),
    "double": (lambda: small().double(), lambda n: many(n).double()),
    "bfloat16": (lambda: small().bfloat16(), lambda n: many(n).bfloat16()),
    "channels_last": (
        lambda: small().to(memory_format=torch.channels_last),
        lambda n: many(n).contiguous(memory_format=torch.channels_last),
    ),
    "a batch of one": (small, lambda n: many(1)),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5}, r"^budget: give fxlrd.Budget\(latency=0.5\), or params or flops, not 0.5"),
        ({"budget": Budget(params=0.5), "ratio": 2.0}, "^ratio and budget: give one of the two"),
        ({"budget": Budget(params=0.5), "preset": "lrd"}, "^budget: only allocate spends one, and decompose has none"),
        ({"budget": Budget(params=0.5), "pipeline": "decompose"}, "use preset auto"),
        ({"budget": Budget(params=0.5)}, "^calibrate: no calibration inputs; give calibration="),
        ({"budget": Budget(params=0.01), "calibration": many()}, r"params=0.01 is out of reach: .* leave 0\.\d+ of it"),
        ({"preset": "auto", "ratio": 2.0, "calibration": many()}, "^ratio: .*; give budget=, not ratio="),
        ({"pipeline": "decompose,refit"}, "^refit: no calibration inputs"),
        ({"pipeline": "decompose,refit", "calibration": many()}, "^refit: .* run calibrate before"),
        ({"pipeline": "decompose,recalibrate"}, "^recalibrate: no calibration inputs"),
        ({"pipeline": "decompose", "calibration": many()}, "^calibration: no pass of decompose"),
        ({"budget": Budget(params=0.5), "calibration": []}, "^calibration: there are no inputs"),
        ({"budget": Budget(params=0.5), "calibration": many().to("meta")}, "on meta"),
        ({"budget": Budget(params=0.5), "calibration": many().double()}, "the model fails on batch 0"),
    ],
)
def test_budgets_that_cannot_be_met(options, message):
    with pytest.raises(FxlrdError, match=message) as caught:
        quick(small(), images(dtype=torch.float32), **options)
    assert "\n" not in str(caught.value)
