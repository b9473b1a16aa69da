"""compress() of models that cannot be traced as a whole, from end to end."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxlrd
from fxlrd import Budget, FxlrdError
from fxlrd.errors import VerificationError
from fxlrd.finetuning import finetune
from fxlrd.graph.inputs import tensors
from fxlrd.passes.freeze import freeze_factors
from fxlrd.timing.clock import Timing

FULL = "decompose{ranks=100000}"


def quick(model, inputs, **options):
    return fxlrd.compress(model, inputs, **{"measure": False, **options})


def decisions(result):
    return {row["name"]: row["decision"] for row in result.report.layers}


def reasons(result):
    return {row["name"]: row["reason"] for row in result.report.layers}


def moved(a, b):
    """The relative difference of all output tensors."""
    a, b = tensors(a), tensors(b)
    assert [t.shape for t in a] == [t.shape for t in b]
    assert [t.dtype for t in a] == [t.dtype for t in b]
    return max((((x - y).norm() / y.norm()).item() for x, y in zip(a, b, strict=True)), default=0.0)


def same(found, model, *args, **kwargs):
    with torch.no_grad():
        found.eval()
        model.eval()
        assert moved(found(*args, **kwargs), model(*args, **kwargs)) < 1e-9


class Bottleneck(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 1)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.drop(self.relu(self.conv3(y) + x))


@dataclass
class Found:
    scores: torch.Tensor
    maps: list[torch.Tensor]


class Net(nn.Module):
    """Control flow on values, shapes, the mode and arguments; a class, a config and a method of its own."""

    def __init__(self, width=16):
        super().__init__()
        self.config = {"width": width}
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.block = Bottleneck(width)
        self.head = nn.Linear(width, 8)
        self.aux = nn.Linear(width, 8)
        self.wide = nn.Linear(width, 8)

    def forward(self, x, mask=None, *, scale=1.0, pack=dict):
        if not torch.isfinite(x).all():
            raise ValueError("x is not finite")
        x = self.stem(x)
        for _ in range(2 if x.shape[-1] > 8 else 1):
            x = self.block(x)
        if mask is not None:
            x = x * mask
        y = x.mean((2, 3))
        y = F.dropout(y, 0.5, self.training)
        out = self.wide(y) if y.shape[0] > 4 else self.head(y)
        if self.training:
            return {"out": out * scale, "aux": self.aux(y)}
        return pack(out * scale, x) if pack is not dict else {"out": out * scale, "map": x}

    def best(self, x):
        return self(x)["out"].argmax(1)


def net(seed=0):
    torch.manual_seed(seed)
    model = Net().double().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 2)
    return model


def images(n=2, size=8):
    return torch.randn(n, 3, size, size, dtype=torch.float64)


# -- what comes back


def test_the_model_comes_back_as_what_it_is_and_gives_the_same_at_full_rank():
    model, x = net(), images()
    result = quick(model, x, pipeline=FULL)
    assert type(result.model) is Net
    assert result.model.config == model.config
    assert result.model.config is not model.config
    assert decisions(result) == {
        "stem": "skipped", "block.conv1": "svd", "block.conv2": "tucker2", "block.conv3": "svd", "head": "svd",
        "aux": "skipped", "wide": "skipped",
    }  # fmt: skip
    assert reasons(result)["aux"].startswith("it is never called")
    assert result.report.settings["output_error"] < 1e-12
    assert result.report.before["params"] == sum(p.numel() for p in model.parameters())
    assert result.report.after["params"] == sum(p.numel() for p in result.model.parameters())
    same(result.model, model, x)
    assert torch.equal(result.model.best(x), model.best(x))


def test_control_flow_and_arguments_stay_the_users():
    model = net()
    found = quick(model, images(), pipeline=FULL).model
    mask = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    same(found, model, images(2, 12))  # the block twice
    same(found, model, images(6))  # another head
    same(found, model, images(), mask)
    same(found, model, images(), mask=None, scale=3.0)
    same(found, model, x=images(), mask=mask, scale=0.5)
    packs = {"tuple": lambda *a: a, "dataclass": lambda y, x: Found(y, [x]), "none": lambda *_: None}
    x = images()
    with torch.no_grad():
        assert moved(found(x, pack=packs["tuple"]), model(x, pack=packs["tuple"])) < 1e-9
        a, b = found(x, pack=packs["dataclass"]), model(x, pack=packs["dataclass"])
        assert moved([a.scores, *a.maps], [b.scores, *b.maps]) < 1e-9
        assert found(x, pack=packs["none"]) is None
    with pytest.raises(ValueError, match="not finite"):
        found(x * float("inf"))


def test_training_mode_is_not_frozen():
    model = net().train()
    model.block.bn2.eval()
    modes = [m.training for m in model.modules()]
    found = quick(model, images(), ratio=2.0).model
    assert [m.training for m in model.modules()] == modes
    assert found.training
    assert not found.block.bn2.training
    assert found.block.conv2.core.training
    out = found(images())
    assert set(out) == {"out", "aux"}
    assert not torch.equal(found(images())["out"], out["out"])
    (out["out"].sum() + out["aux"].sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in found.named_parameters() if "wide" not in n)


def test_the_users_model_is_not_touched_and_nothing_is_shared():
    model, x = net(), images()
    model.register_forward_hook(lambda *_: None)
    state = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    attributes = [set(vars(m)) for m in model.modules()]
    result = quick(model, x, preset="merge", calibration=[images() for _ in range(6)])
    assert "merged" in decisions(result).values()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert dict(model.named_modules()) == modules
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert len(model._forward_hooks) == len(result.model._forward_hooks) == 1
    assert not any(m._forward_hooks for m in [*modules.values()][1:])
    mine = {t.data_ptr() for t in model.state_dict().values()}
    assert not mine & {t.data_ptr() for t in result.model.state_dict().values()}


def test_the_result_does_not_keep_the_model_alive():
    model = net()
    gone = weakref.ref(model.block.conv2.weight)
    result = quick(model, images())
    del model
    gc.collect()
    assert gone() is None
    assert result.model(images())["out"].shape == (2, 8)


def test_inplace():
    model, x = net(), images()
    with torch.no_grad():
        wanted = model(x)
    block = model.block
    result = quick(model, x, pipeline=FULL, inplace=True)
    assert result.model is model
    assert model.block is block
    assert [n for n, _ in model.block.conv2.named_children()] == ["first", "core", "last"]
    assert 0 < result.report.settings["output_error"] < 1e-12  # against what it gave before
    with torch.no_grad():
        assert moved(model(x), wanted) < 1e-9


class Forgetful(Net):
    """Fails where a layer is another after it was looked at."""

    def forward(self, x):
        if hasattr(self.head, "last") and self.head.last.out_features == 8:
            raise KeyError("head")
        return super().forward(x)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_that_then_fails_is_as_it_was(inplace):
    torch.manual_seed(0)
    model = Forgetful().double().eval()
    modules = dict(model.named_modules())
    with pytest.raises(VerificationError, match=r"\(.*KeyError: 'head'\); name what reads them in skip=") as caught:
        quick(model, images(), pipeline=FULL, inplace=inplace)
    assert "\n" not in str(caught.value)
    assert dict(model.named_modules()) == modules
    quick(model, images(), pipeline=FULL, inplace=inplace, skip="head")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_the_result_is_copied_and_pickled(copied):
    found = quick(Plain().double(), torch.randn(4, 8, dtype=torch.float64)).model
    twin = copied(found)
    assert type(twin) is Plain
    same(twin, found, torch.randn(3, 8, dtype=torch.float64))


def test_its_state_is_that_of_factors_under_the_layers_names():
    model = net()
    found = quick(model, images(), ratio=2.0).model
    assert [k for k in found.state_dict() if k.startswith("block.conv2")] == [
        "block.conv2.first.weight", "block.conv2.core.weight", "block.conv2.last.weight", "block.conv2.last.bias",
    ]  # fmt: skip
    other = quick(net(1), images(), ratio=2.0).model
    other.load_state_dict(found.state_dict())
    same(other, found, images())


class Plain(nn.Module):
    def __init__(self, body=None):
        super().__init__()
        self.body = body or nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.body(x)) if x.abs().max() < 1e9 else x


def plain(body=None):
    torch.manual_seed(0)
    return Plain(body).double().eval()


def vectors(n=4):
    return torch.randn(n, 8, dtype=torch.float64)


# -- what layers may be


def test_layers_with_something_of_their_own_are_left_alone_with_a_reason():
    class Doubling(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = plain(nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)], Doubling(8, 8)))
    model.body[1].register_forward_hook(lambda m, a, y: y * 3)
    nn.utils.parametrizations.weight_norm(model.body[2])
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.body[3])
    inner = model.body[4].forward
    model.body[4].forward = lambda x: inner(x) * 5
    model.body[5].weight.register_hook(lambda g: g * 2)
    result = quick(model, vectors(), pipeline=FULL)
    assert [name for name, d in decisions(result).items() if d == "svd"] == ["body.0", "fc"]
    found = reasons(result)
    assert "has hooks" in found["body.1"]
    assert "parametrized" in found["body.2"]
    assert "has hooks" in found["body.3"]
    assert "its forward was replaced on the module itself" in found["body.4"]
    assert "its weight has hooks" in found["body.5"]
    assert "Doubling is a subclass of Linear with a behaviour of its own" in found["body.6"]
    same(result.model, model, vectors())


def test_a_shared_layer_stays_one():
    shared = nn.Linear(8, 8)
    model = plain(nn.Sequential(shared, nn.Tanh(), shared))
    model.other = shared
    found = quick(model, vectors(), pipeline="decompose{ranks=5}").model
    assert found.body[0] is found.body[2] is found.other
    assert [n for n, _ in found.other.named_children()] == ["first", "last"]
    same(found, quick(model, vectors(), pipeline="decompose{ranks=5}").model, vectors())


def test_tied_weights_stay_tied():
    model = plain()
    model.more = nn.Linear(8, 8).double()
    model.more.weight = model.fc.weight
    found = quick(model, vectors(), pipeline=FULL).model
    assert found.more.weight is found.fc.weight
    assert isinstance(found.body[0], nn.Sequential)


def test_random_forwards_and_those_that_count_their_calls():
    class Model(Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.calls += 1
            return F.dropout(super().forward(x), 0.5, True)

    torch.manual_seed(0)
    model = Model().double().eval()
    result = quick(model, vectors(), pipeline=FULL)
    assert (model.calls.item(), result.model.calls.item()) == (0, 0)
    assert result.report.settings["output_error"] < 1e-12  # with the same random numbers
    assert not torch.equal(result.model(vectors()), result.model(vectors()))


def test_a_branch_on_values_may_go_another_way_after_compression():
    class Model(Plain):
        def forward(self, x):
            y = self.body(x)
            return self.fc(y) if torch.equal(y, self.wanted) else y

    torch.manual_seed(0)
    model = Model().double().eval()
    x = vectors()
    model.wanted = model.body(x).detach()
    result = quick(model, x, pipeline="decompose{ranks=3}")
    assert isinstance(result.model.fc, nn.Sequential)
    assert result.report.settings["output_error"] > 0.1


def test_a_model_that_gives_nothing():
    class Model(Plain):
        def forward(self, x):
            self.last = super().forward(x).detach()

    torch.manual_seed(0)
    model, x = Model().double().eval(), vectors()
    result = quick(model, x, pipeline=FULL)
    assert result.report.settings["output_error"] is None
    result.model(x)
    model(x)
    assert moved(result.model.last, model.last) < 1e-9


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts(reentrant):
    class Model(Plain):
        def forward(self, x):
            y = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=reentrant)
            return self.fc(y) if y.sum() < 1e9 else y

    torch.manual_seed(0)
    model, x = Model().double().eval(), vectors(10)
    found = quick(model, x, pipeline=FULL).model
    same(found, model, x)
    found.train()(x.clone().requires_grad_()).sum().backward()
    assert found.body[0].first.weight.grad.abs().sum() > 0
    assert quick(model, x, budget=Budget(params=0.8), calibration=[vectors() for _ in range(5)]).report.after["params"]


def test_a_recurrent_model_and_attention():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Linear(8, 16), nn.LSTM(16, 16, batch_first=True)
            self.attention, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 8)

        def forward(self, x, state=None):
            y, state = self.rnn(self.embed(x), state)
            y = self.attention(y, y, y, need_weights=False)[0] if y.shape[1] > 1 else y
            return self.out(y) if y.sum() < 1e9 else y, state

    model, x = Model().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    result = quick(model, x, pipeline=FULL)
    assert decisions(result) == {"embed": "svd", "out": "svd", "attention.out_proj": "skipped"}
    assert "attention (MultiheadAttention) reads its weight itself" in reasons(result)["attention.out_proj"]
    same(result.model, model, x)
    with torch.no_grad():
        same(result.model, model, x[:, :1], model(x)[1])


def test_wrappers_are_refused():
    with pytest.raises(FxlrdError, match=r"DataParallel is a wrapper; compress model\.module"):
        quick(nn.DataParallel(plain()), vectors())


def test_what_stops_the_whole_is_told():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return F.linear(x, self.a.weight) if x.sum() < 1e9 else x

    with pytest.raises(FxlrdError, match=r"Model cannot be traced at .*; a: its weight is read by .*forward directly"):
        quick(Model().double(), vectors())


def test_the_report_says_what_was_taken(capsys):
    result = quick(net(), images())
    assert result.report.warnings[0].startswith(
        "taken as 3 regions (2 of them single layers), as the whole is not traceable: Net cannot be traced at "
    )
    assert result.report.before["depth"] is None
    assert "output error" in result.report.to_table()
    assert json.loads(json.dumps(result.report.to_dict()))["settings"]["output_error"] > 0
    assert "output_error" not in quick(net(), images(), verify=False).report.settings


def test_flops_count_every_call_of_a_region():
    def conv(count, reach, share=1):
        return 2 * 2 * 12 * 12 * count * share

    model, x = net(), images(2, 12)  # the block runs twice
    report = quick(model, x, pipeline="decompose{ranks=4,skip=stem|head}").report
    head, stem = 2 * 2 * 16 * 8, conv(27 * 16, 1)
    assert report.before["flops"] == stem + head + 2 * conv(16 * 16 * (1 + 9 + 1), 1)
    pair, triple = 2 * 16 * 4, 16 * 4 + 4 * 4 * 9 + 4 * 16
    assert report.after["flops"] == stem + head + 2 * conv(2 * pair + triple, 1)


# -- passes, through regions


def test_merge_inside_a_region_lands_in_the_model():
    model, data = net(), [images() for _ in range(6)]
    result = quick(model, data[0], pipeline="calibrate,merge{mode=interpolative,ratio=2},recalibrate", calibration=data)
    assert decisions(result)["block.conv1"] == decisions(result)["block.conv2"] == "merged"
    assert result.model.block.conv1.out_channels == result.model.block.bn1.num_features < 16
    assert result.model.block.conv2.in_channels == result.model.block.conv1.out_channels
    assert result.model(images())["out"].shape == (2, 8)
    assert result.model(images(2, 12))["out"].shape == (2, 8)


def test_exact_merge_folds_norms_only_where_no_one_else_uses_them():
    model, x = net(), images()
    result = quick(model, x, pipeline="merge{mode=exact,norms=true}")
    assert type(result.model.block.bn1) is nn.Identity
    same(result.model, model, x)

    class Peeks(Net):
        def forward(self, x):
            return super().forward(x), self.block.bn1(self.stem(x)), self.block.bn2.running_mean

    model.__class__ = Peeks
    result = quick(model, x, pipeline="merge{mode=exact,norms=true}")
    assert type(result.model.block.bn1) is nn.BatchNorm2d
    same(result.model, model, x)


def test_recalibrated_statistics_land_in_the_model():
    model, data = net(), [images() * 3 for _ in range(4)]
    result = quick(model, data[0], pipeline="recalibrate{guard=false}", calibration=data)
    assert not torch.allclose(result.model.block.bn1.running_mean, model.block.bn1.running_mean)
    y = model.block.conv1(torch.cat([model.stem(x) for x in data]))
    wanted = torch.stack([model.block.conv1(model.stem(x)).mean((0, 2, 3)) for x in data]).mean(0)
    assert y.shape[1] == 16
    assert torch.allclose(result.model.block.bn1.running_mean, wanted, atol=1e-9)


class Batch(UserDict):
    """As tokenizers of transformers give it."""


def pairs():
    return [(images(), torch.zeros(2)) for _ in range(6)]


@pytest.mark.parametrize(
    "data",
    [
        pairs,
        lambda: [{"x": images(), "scale": 2.0} for _ in range(6)],
        lambda: [Batch(x=images()) for _ in range(6)],
        lambda: (images() for _ in range(6)),
        lambda: [images(n, size) for n, size in [(2, 8), (5, 8), (1, 12), (3, 6), (6, 9), (2, 8)]],
        lambda: images(10),
        lambda: torch.utils.data.DataLoader([(x, 0) for x in images(10)], batch_size=2),
    ],
    ids=["pairs", "dicts", "userdicts", "generator", "other shapes", "tensor", "loader"],
)
def test_calibration_of_any_kind(data):
    result = quick(net(), images(), budget=Budget(params=0.8), calibration=data())
    assert result.report.after["params"] <= 0.8 * result.report.before["params"]
    assert any("fitted to data" in str(r) or "merged" in str(r) or "kept" in str(r) for r in reasons(result).values())


def test_calibration_that_fails_names_the_batch():
    with pytest.raises(FxlrdError, match=r"^calibration: the model fails on batch 1 \(float64\[2, 4, 8, 8\] on cpu\)"):
        quick(net(), images(), preset="merge", calibration=[images(), torch.randn(2, 4, 8, 8, dtype=torch.float64)])


@pytest.mark.parametrize("measure", ["params", "flops"])
def test_budgets(measure):
    data = [images() for _ in range(5)]
    result = quick(net(), data[0], budget=Budget(**{measure: 0.9}), calibration=data)
    assert 0.7 < result.report.after[measure] / result.report.before[measure] <= 0.9


def test_a_budget_of_latency_times_the_model_around_the_regions(monkeypatch):
    timed = []

    def compared(runs, *_, **__):  # what is measured here differs from day to day
        timed.append({name: type(run.__defaults__[0]) for name, run in runs.items()})
        return {name: Timing(1.0, 0.8) for name in runs}

    monkeypatch.setattr("fxlrd.passes.allocate.compare", compared)
    model = Plain(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))).eval()
    data = [torch.randn(16, 8) for _ in range(5)]
    steps = "calibrate{outputs=false},allocate{latency=0.5,seconds=0.01,merge=false},decompose"
    result = quick(model, data[0], budget=Budget(latency=0.8), calibration=data, pipeline=steps)
    assert result.report.passes[1]["note"].startswith("0.800 of latency, measured")
    assert timed == [{"whole": Plain}, {"before": Plain, "after": Plain}]


def test_fitted_factors_are_better_than_those_of_the_weights():
    model = plain()
    with torch.no_grad():
        mix = torch.randn(8, 2, dtype=torch.float64) @ torch.randn(2, 8, dtype=torch.float64)
    data = [vectors(32) @ mix for _ in range(5)]  # of rank 2: what carries nothing need not be kept
    errors = {
        fit: quick(
            model, data[0], pipeline=f"calibrate,decompose{{ranks=2,fit={fit},skip=fc|body.2}}", calibration=data
        ).report.settings["output_error"]
        for fit in ("true", "false")
    }
    assert errors["true"] < 1e-4
    assert errors["false"] > 1e-2


def test_snap_and_freeze_and_finetune():
    model, x = net().float(), images().float()
    result = quick(model, x, pipeline="decompose{ratio=2},snap{seconds=0.01},freeze")
    factored = [n for n, d in decisions(result).items() if d in ("svd", "tucker2")]
    frozen = {n for n, p in result.model.named_parameters() if not p.requires_grad}
    assert all(f"{n}.first.weight" in frozen for n in factored)
    found = quick(model, x, pipeline="decompose{ratio=2}").model
    assert "block.conv2.core.weight" in freeze_factors(found)
    before = copy.deepcopy(found.state_dict())
    loader = [(images().float(), torch.tensor([0, 1])) for _ in range(2)]
    history = finetune(
        found, loader, loss=lambda out, y: F.cross_entropy(out["out"], y), schedule="paper", progress=False
    )
    assert len(history) == 1
    after = found.state_dict()
    assert torch.equal(after["block.conv2.first.weight"], before["block.conv2.first.weight"])
    assert not torch.equal(after["block.conv2.core.weight"], before["block.conv2.core.weight"])


def test_skip_takes_full_names_and_globs():
    result = quick(net(), images(), pipeline=FULL, skip=["block.conv[13]", "head", "aux"])
    assert {n for n, d in decisions(result).items() if d != "skipped"} == {"block.conv2"}
    with pytest.raises(FxlrdError, match=r"unknown layer 'block\.conv7'"):
        quick(net(), images(), skip="block.conv7")


def test_timed_side_by_side():
    result = fxlrd.compress(plain(), vectors(), ratio=1.5)
    assert result.report.before["latency_ms"] > 0
    assert result.report.settings["speedup"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_and_channels_last(dtype):
    model = net().to(dtype).to(memory_format=torch.channels_last)
    x = images().to(dtype).contiguous(memory_format=torch.channels_last)
    result = quick(model, x, pipeline=FULL)
    assert result.report.settings["layout"] == "channels_last"
    assert all(p.dtype == dtype for p in result.model.parameters())
    assert result.model.block.conv2.core.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        out = result.model(x)
        assert out["map"].is_contiguous(memory_format=torch.channels_last)
        assert moved(out, model(x)) < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_quantized_after_compression():
    found = quick(plain().float(), vectors().float(), pipeline="decompose{ranks=6}").model
    with pytest.warns(DeprecationWarning, match="quantiz"):
        small = torch.ao.quantization.quantize_dynamic(found, {nn.Linear}, dtype=torch.qint8)
    assert type(small.body[0].first).__module__.startswith("torch.ao.nn.quantized")
    x = vectors().float()
    with torch.no_grad():
        assert moved(small(x), found(x)) < 0.1


def test_torchao_int8_weights_after_compression():
    torchao = pytest.importorskip("torchao.quantization")
    found = quick(plain().float(), vectors().float(), pipeline="decompose{ranks=6}").model
    small = copy.deepcopy(found)
    torchao.quantize_(small, torchao.Int8WeightOnlyConfig())
    x = vectors().float()
    with torch.no_grad():
        assert moved(small(x), found(x)) < 0.1


# -- transformers


def ids(shape=(2, 9)):
    return torch.randint(0, 99, shape)


def hugging_face(name):
    """A small model with random weights, and inputs for it."""
    tf = pytest.importorskip("transformers")
    small = {
        "vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    tokens = {"bos_token_id": 0, "eos_token_id": 99, "pad_token_id": 0}
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}
    whisper = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 100,
        "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, "decoder_start_token_id": 1,
    }  # fmt: skip
    made = {
        "bert": lambda: (
            tf.BertModel(tf.BertConfig(**small)),
            {"input_ids": ids(), "attention_mask": torch.ones(2, 9)},
        ),
        "gpt2": lambda: (
            tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=100, n_positions=64, **tokens)),
            {"input_ids": ids()},
        ),
        "llama": lambda: (
            tf.LlamaForCausalLM(tf.LlamaConfig(**small, num_key_value_heads=1, **tokens)),
            {"input_ids": ids()},
        ),
        "vit": lambda: (tf.ViTForImageClassification(tf.ViTConfig(**small, image_size=32, patch_size=8)), pixels),
        "whisper": lambda: (
            tf.WhisperModel(tf.WhisperConfig(**{**whisper, **tokens})),
            {"input_features": torch.randn(2, 8, 40, dtype=torch.float64), "decoder_input_ids": ids((2, 5))},
        ),
        "resnet": lambda: (
            tf.ResNetForImageClassification(
                tf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck")
            ),
            pixels,
        ),
        "deberta": lambda: (
            tf.DebertaV2Model(tf.DebertaV2Config(**small, relative_attention=True, pos_att_type=["p2c", "c2p"])),
            {"input_ids": ids()},
        ),
        "t5": lambda: (
            tf.T5ForConditionalGeneration(
                tf.T5Config(
                    vocab_size=100, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
                )
            ),
            {"input_ids": ids(), "decoder_input_ids": ids((2, 4))},
        ),
    }
    torch.manual_seed(0)
    model, inputs = made[name]()
    return model.double().eval(), inputs


MODELS = ["bert", "gpt2", "llama", "vit", "whisper", "resnet", "deberta", "t5"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers(name):
    model, inputs = hugging_face(name)
    result = quick(model, inputs, pipeline=FULL)
    assert type(result.model) is type(model)
    assert result.model.config.to_dict() == model.config.to_dict()
    assert result.report.settings["output_error"] < 1e-9
    same(result.model, model, **inputs)
    with torch.no_grad():
        found, wanted = result.model(**inputs), model(**inputs)
    assert type(found) is type(wanted)
    assert found.keys() == wanted.keys()
    cut = sum(d in ("svd", "tucker2") for d in decisions(result).values())
    assert cut >= 0.7 * len(decisions(result))
    assert all(reasons(result).values())
    assert quick(model, inputs, ratio=1.5).report.after["params"] < result.report.before["params"]


@pytest.mark.slow
def test_bert_with_another_length_and_a_mask_given_later():
    model, inputs = hugging_face("bert")
    found = quick(model, {"input_ids": inputs["input_ids"]}, pipeline=FULL).model
    mask = torch.ones(3, 12)
    mask[:, 7:] = 0
    same(found, model, input_ids=ids((3, 12)), attention_mask=mask)
    same(found, model, ids(), output_hidden_states=True)
    same(found, model, inputs_embeds=torch.randn(1, 5, 16, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generate_gives_the_same_tokens(name):
    model, inputs = hugging_face(name)
    found = quick(model, inputs, pipeline=FULL).model
    prompt = ids((2, 4))
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    assert torch.equal(found.generate(prompt, **options), model.generate(prompt, **options))
    cut = quick(model, inputs, ratio=1.5).model.generate(prompt, max_new_tokens=3)
    assert cut.shape[0] == 2


@pytest.mark.slow
def test_gpt2_has_linears_in_disguise_and_a_cache():
    model, inputs = hugging_face("gpt2")
    result = quick(model, inputs, pipeline=FULL)
    rows = {row["name"]: row for row in result.report.layers}
    assert rows["transformer.h.0.attn.c_attn"]["op"] == "Linear"
    assert rows["transformer.h.0.attn.c_attn"]["shape"] == [48, 16]
    assert rows["lm_head"]["reason"] == "its weight is shared with transformer.wte.weight"
    assert result.model.lm_head.weight is result.model.transformer.wte.weight
    with torch.no_grad():
        cache = model(ids((1, 6))).past_key_values
    step = {"input_ids": ids((1, 1)), "past_key_values": cache}
    found = quick(model, step, pipeline=FULL)
    assert cache.get_seq_length() == 6  # the example is not written into
    assert found.report.settings["output_error"] < 1e-9


@pytest.mark.slow
def test_a_hook_on_a_linear_in_disguise_keeps_it():
    model, inputs = hugging_face("gpt2")
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda m, a, y: y * 2)
    result = quick(model, inputs, pipeline=FULL)
    assert "has hooks" in reasons(result)["transformer.h.0.mlp.c_fc"]
    same(result.model, model, **inputs)


@pytest.mark.slow
def test_llama_trains_with_labels_and_saves(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, inputs = hugging_face("llama")
    found = quick(model, inputs, ratio=1.5).model.train()
    found.gradient_checkpointing_enable()
    found(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert found.model.layers[0].mlp.up_proj.first.weight.grad.abs().sum() > 0
    found.save_pretrained(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    assert torch.equal(state["model.layers.0.mlp.up_proj.last.weight"], found.model.layers[0].mlp.up_proj.last.weight)
    assert set(state) == set(found.state_dict())


@pytest.mark.slow
def test_calibrated_as_a_tokenizer_gives_batches():
    model, inputs = hugging_face("bert")
    BatchEncoding = pytest.importorskip("transformers").BatchEncoding
    data = [BatchEncoding({"input_ids": ids((3, n)), "attention_mask": torch.ones(3, n)}) for n in (4, 9, 6, 9, 5)]
    result = quick(model, BatchEncoding(inputs), budget=Budget(params=0.9), calibration=data)
    assert result.report.after["params"] <= 0.9 * result.report.before["params"]


@pytest.mark.slow
def test_vit_is_quantized_after_compression():
    model, inputs = hugging_face("vit")
    inputs = {k: v.float() for k, v in inputs.items()}
    found = quick(model.float(), inputs, ratio=1.5).model
    with pytest.warns(DeprecationWarning, match="quantiz"):
        small = torch.ao.quantization.quantize_dynamic(found, {nn.Linear}, dtype=torch.qint8)
    assert sum(type(m).__module__.startswith("torch.ao.nn.quantized") for m in small.modules()) >= 20
    with torch.no_grad():
        assert moved(small.vit(**inputs)[0], found.vit(**inputs)[0]) < 0.1


@pytest.mark.slow
def test_vit_in_torchao_int8_after_compression():
    torchao = pytest.importorskip("torchao.quantization")
    model, inputs = hugging_face("vit")
    inputs = {k: v.float() for k, v in inputs.items()}
    found = quick(model.float(), inputs, ratio=1.5).model
    small = copy.deepcopy(found)
    torchao.quantize_(small, torchao.Int8WeightOnlyConfig())
    with torch.no_grad():
        assert moved(small.vit(**inputs)[0], found.vit(**inputs)[0]) < 0.1


# -- detectors and what else torchvision has that cannot be traced


def torchvision(name):
    from torchvision.models import detection, optical_flow

    torch.manual_seed(0)
    box = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 64}
    image = [torch.rand(3, 64, 48)]
    make = {
        "fasterrcnn": lambda: (detection.fasterrcnn_mobilenet_v3_large_320_fpn(**box), (image,)),
        "ssdlite": lambda: (
            detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None),
            (image,),
        ),
        "raft": lambda: (
            optical_flow.raft_small(weights=None),
            (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)),
        ),
    }
    model, inputs = make[name]()
    return model.eval(), inputs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn", "ssdlite", "raft"])
def test_torchvision(name):
    model, inputs = torchvision(name)
    result = quick(model, inputs, ratio=2.0)
    assert type(result.model) is type(model)
    assert result.report.after["params"] < 0.75 * result.report.before["params"]
    assert result.report.after["flops"] < 0.75 * result.report.before["flops"]
    with torch.no_grad():
        out = result.model(*inputs)
    if name != "raft":
        assert set(out[0]) == {"boxes", "labels", "scores"}
        assert all(row["name"] and row["reason"] for row in result.report.layers)
    assert all(torch.isfinite(t).all() for t in tensors(out))


@pytest.mark.slow
def test_a_detector_at_full_rank_finds_the_same_and_trains():
    model, (image,) = torchvision("fasterrcnn")
    # Far from ties: the order of boxes hangs on their scores.
    result = quick(model.double(), ([i.double() for i in image],), pipeline=FULL)
    image = [torch.rand(3, 48, 64).double(), torch.rand(3, 64, 64).double()]
    with torch.no_grad():
        for a, b in zip(result.model.eval()(image), model.eval()(image), strict=True):
            assert torch.allclose(a["scores"], b["scores"], atol=1e-9)
    target = {"boxes": torch.tensor([[1.0, 1.0, 30.0, 30.0]]).double(), "labels": torch.tensor([1])}
    losses = result.model.train()(image, [target] * 2)
    sum(losses.values()).backward()
    assert {k for k in losses if "loss" in k} >= {"loss_classifier", "loss_objectness"}
