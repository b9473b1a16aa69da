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
from fxlrd.graph.guards import NEVER_CALLED
from fxlrd.layers.attention import PROJECTIONS
from fxlrd.passes.freeze import freeze_factors
from fxlrd.timing.clock import compare
from tests.support.compression import FULL_RANK, assert_same_outputs, decisions, largest_error, layer_reasons, quick
from tests.support.tensors import images
from tests.support.timers import KERNELS, FakeTimer


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
class Detection:
    scores: torch.Tensor
    maps: list[torch.Tensor]


class Net(nn.Module):
    """A model with control flow on values, shapes, its mode and arguments; with a config and a method of its own."""

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


def test_the_result_has_the_class_of_the_model_and_at_full_rank_its_outputs():
    model, x = net(), images(size=8)
    result = quick(model, x, pipeline=FULL_RANK)
    assert type(result.model) is Net
    assert result.model.config == model.config
    assert result.model.config is not model.config
    assert decisions(result) == {
        "stem": "skipped", "block.conv1": "svd", "block.conv2": "tucker2", "block.conv3": "svd", "head": "svd",
        "aux": "skipped", "wide": "skipped",
    }  # fmt: skip
    assert layer_reasons(result)["aux"] == str(NEVER_CALLED)
    assert result.report.settings["output_error"] < 1e-12
    assert result.report.before["params"] == sum(p.numel() for p in model.parameters())
    assert result.report.after["params"] == sum(p.numel() for p in result.model.parameters())
    assert_same_outputs(result.model, model, x)
    assert torch.equal(result.model.best(x), model.best(x))


def test_control_flow_and_arguments_work_as_in_the_original():
    model = net()
    compressed = quick(model, images(size=8), pipeline=FULL_RANK).model
    mask = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    assert_same_outputs(compressed, model, images(2, size=12))  # the block twice
    assert_same_outputs(compressed, model, images(6, size=8))  # another head
    assert_same_outputs(compressed, model, images(size=8), mask)
    assert_same_outputs(compressed, model, images(size=8), mask=None, scale=3.0)
    assert_same_outputs(compressed, model, x=images(size=8), mask=mask, scale=0.5)
    packs = {"tuple": lambda *a: a, "dataclass": lambda y, x: Detection(y, [x]), "none": lambda *_: None}
    x = images(size=8)
    with torch.no_grad():
        assert largest_error(compressed(x, pack=packs["tuple"]), model(x, pack=packs["tuple"])) < 1e-9
        a, b = compressed(x, pack=packs["dataclass"]), model(x, pack=packs["dataclass"])
        assert largest_error([a.scores, *a.maps], [b.scores, *b.maps]) < 1e-9
        assert compressed(x, pack=packs["none"]) is None
    with pytest.raises(ValueError, match="not finite"):
        compressed(x * float("inf"))


def test_training_mode_is_not_frozen():
    model = net().train()
    model.block.bn2.eval()
    modes = [m.training for m in model.modules()]
    compressed = quick(model, images(size=8), ratio=2.0).model
    assert [m.training for m in model.modules()] == modes
    assert compressed.training
    assert not compressed.block.bn2.training
    assert compressed.block.conv2.core.training
    out = compressed(images(size=8))
    assert set(out) == {"out", "aux"}
    assert not torch.equal(compressed(images(size=8))["out"], out["out"])
    (out["out"].sum() + out["aux"].sum()).backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in compressed.named_parameters() if "wide" not in n
    )


def test_the_users_model_is_not_touched_and_nothing_is_shared():
    model, x = net(), images(size=8)
    model.register_forward_hook(lambda *_: None)
    state = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    attributes = [set(vars(m)) for m in model.modules()]
    result = quick(model, x, preset="merge", calibration=[images(size=8) for _ in range(6)])
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
    result = quick(model, images(size=8))
    del model
    gc.collect()
    assert gone() is None
    assert result.model(images(size=8))["out"].shape == (2, 8)


def test_inplace():
    model, x = net(), images(size=8)
    with torch.no_grad():
        expected = model(x)
    block = model.block
    result = quick(model, x, pipeline=FULL_RANK, inplace=True)
    assert result.model is model
    assert model.block is block
    assert [n for n, _ in model.block.conv2.named_children()] == ["first", "core", "last"]
    assert 0 < result.report.settings["output_error"] < 1e-12  # against what it gave before
    with torch.no_grad():
        assert largest_error(model(x), expected) < 1e-9


class Refusing(Net):
    """Fails once its head is decomposed."""

    def forward(self, x):
        if hasattr(self.head, "last") and self.head.last.out_features == 8:
            raise KeyError("head")
        return super().forward(x)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_that_fails_with_its_new_layers_is_restored(inplace):
    torch.manual_seed(0)
    model = Refusing().double().eval()
    modules = dict(model.named_modules())
    with pytest.raises(VerificationError, match=r"\(.*KeyError: 'head'\); name what reads them in skip=") as caught:
        quick(model, images(size=8), pipeline=FULL_RANK, inplace=inplace)
    assert "\n" not in str(caught.value)
    assert dict(model.named_modules()) == modules
    quick(model, images(size=8), pipeline=FULL_RANK, inplace=inplace, skip="head")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_the_result_is_copied_and_pickled(copied):
    compressed = quick(Plain().double(), torch.randn(4, 8, dtype=torch.float64)).model
    twin = copied(compressed)
    assert type(twin) is Plain
    assert_same_outputs(twin, compressed, torch.randn(3, 8, dtype=torch.float64))


def test_the_state_dict_has_factors_under_the_names_of_their_layers():
    model = net()
    compressed = quick(model, images(size=8), ratio=2.0).model
    assert [k for k in compressed.state_dict() if k.startswith("block.conv2")] == [
        "block.conv2.first.weight", "block.conv2.core.weight", "block.conv2.last.weight", "block.conv2.last.bias",
    ]  # fmt: skip
    other = quick(net(1), images(size=8), ratio=2.0).model
    other.load_state_dict(compressed.state_dict())
    assert_same_outputs(other, compressed, images(size=8))


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


def test_layers_with_hooks_or_a_forward_of_their_own_are_left_alone_with_a_reason():
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
    result = quick(model, vectors(), pipeline=FULL_RANK)
    assert [name for name, d in decisions(result).items() if d == "svd"] == ["body.0", "fc"]
    codes = {skip.name: skip.reason.code for skip in result.report.ledger[0].skipped}
    assert codes == {
        "body.1": "hooks",
        "body.2": "parametrized",
        "body.3": "hooks",
        "body.4": "own-forward",
        "body.5": "hooks",
        "body.6": "subclass",
    }
    assert_same_outputs(result.model, model, vectors())


def test_a_shared_layer_stays_shared():
    shared = nn.Linear(8, 8)
    model = plain(nn.Sequential(shared, nn.Tanh(), shared))
    model.other = shared
    compressed = quick(model, vectors(), pipeline="decompose{ranks=5}").model
    assert compressed.body[0] is compressed.body[2] is compressed.other
    assert [n for n, _ in compressed.other.named_children()] == ["first", "last"]
    assert_same_outputs(compressed, quick(model, vectors(), pipeline="decompose{ranks=5}").model, vectors())


def test_tied_weights_stay_tied():
    model = plain()
    model.more = nn.Linear(8, 8).double()
    model.more.weight = model.fc.weight
    compressed = quick(model, vectors(), pipeline=FULL_RANK).model
    assert compressed.more.weight is compressed.fc.weight
    assert isinstance(compressed.body[0], nn.Sequential)


def test_forwards_that_are_random_or_count_their_calls():
    class Model(Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.calls += 1
            return F.dropout(super().forward(x), 0.5, True)

    torch.manual_seed(0)
    model = Model().double().eval()
    result = quick(model, vectors(), pipeline=FULL_RANK)
    assert (model.calls.item(), result.model.calls.item()) == (0, 0)
    assert result.report.settings["output_error"] < 1e-12  # with the same random numbers
    assert not torch.equal(result.model(vectors()), result.model(vectors()))


def test_a_branch_on_values_may_go_another_way_after_compression():
    class Model(Plain):
        def forward(self, x):
            y = self.body(x)
            return self.fc(y) if torch.equal(y, self.expected) else y

    torch.manual_seed(0)
    model = Model().double().eval()
    x = vectors()
    model.expected = model.body(x).detach()
    result = quick(model, x, pipeline="decompose{ranks=3}")
    assert isinstance(result.model.fc, nn.Sequential)
    assert result.report.settings["output_error"] > 0.1


def test_a_model_without_outputs():
    class Model(Plain):
        def forward(self, x):
            self.last = super().forward(x).detach()

    torch.manual_seed(0)
    model, x = Model().double().eval(), vectors()
    result = quick(model, x, pipeline=FULL_RANK)
    assert result.report.settings["output_error"] is None
    result.model(x)
    model(x)
    assert largest_error(result.model.last, model.last) < 1e-9


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts(reentrant):
    class Model(Plain):
        def forward(self, x):
            y = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=reentrant)
            return self.fc(y) if y.sum() < 1e9 else y

    torch.manual_seed(0)
    model, x = Model().double().eval(), vectors(10)
    compressed = quick(model, x, pipeline=FULL_RANK).model
    assert_same_outputs(compressed, model, x)
    compressed.train()(x.clone().requires_grad_()).sum().backward()
    assert compressed.body[0].first.weight.grad.abs().sum() > 0
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
    result = quick(model, x, pipeline=FULL_RANK)
    projections = {f"attention.{role}": "svd" for role in PROJECTIONS}
    recurrent = {f"rnn.weight_{kind}_l0": "skipped" for kind in ("ih", "hh")}
    assert decisions(result) == {"embed": "svd", "out": "svd"} | projections | recurrent
    assert_same_outputs(result.model, model, x)
    with torch.no_grad():
        assert_same_outputs(result.model, model, x[:, :1], model(x)[1])


def test_wrappers_are_refused():
    with pytest.raises(FxlrdError, match=r"DataParallel is a wrapper; compress model\.module"):
        quick(nn.DataParallel(plain()), vectors())


def test_a_model_without_layers_that_can_be_replaced_is_refused_with_the_cause():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return F.linear(x, self.a.weight) if x.sum() < 1e9 else x

    with pytest.raises(FxlrdError, match=r"Model cannot be traced at .*; a: its weight is read by .*forward directly"):
        quick(Model().double(), vectors())


def test_the_report_counts_the_regions_and_says_why_there_are_some(capsys):
    result = quick(net(), images(size=8))
    assert result.report.warnings[0].startswith(
        "taken as 3 regions (2 of them single layers), as it cannot be captured as a whole: Net cannot be traced at "
    )
    assert result.report.before["depth"] is None
    assert "output error" in result.report.to_table()
    assert json.loads(json.dumps(result.report.to_dict()))["settings"]["output_error"] > 0
    assert "output_error" not in quick(net(), images(size=8), verify=False).report.settings


def test_flops_count_every_call_of_a_region():
    def conv(count, reach, share=1):
        return 2 * 2 * 12 * 12 * count * share

    model, x = net(), images(2, size=12)  # the block runs twice
    report = quick(model, x, pipeline="decompose{ranks=4,skip=stem|head}").report
    head, stem = 2 * 2 * 16 * 8, conv(27 * 16, 1)
    assert report.before["flops"] == stem + head + 2 * conv(16 * 16 * (1 + 9 + 1), 1)
    pair, triple = 2 * 16 * 4, 16 * 4 + 4 * 4 * 9 + 4 * 16
    assert report.after["flops"] == stem + head + 2 * conv(2 * pair + triple, 1)


def test_merge_inside_a_region_lands_in_the_model():
    model, data = net(), [images(size=8) for _ in range(6)]
    result = quick(model, data[0], pipeline="calibrate,merge{mode=interpolative,ratio=2},recalibrate", calibration=data)
    assert decisions(result)["block.conv1"] == decisions(result)["block.conv2"] == "merged"
    assert result.model.block.conv1.out_channels == result.model.block.bn1.num_features < 16
    assert result.model.block.conv2.in_channels == result.model.block.conv1.out_channels
    assert result.model(images(size=8))["out"].shape == (2, 8)
    assert result.model(images(2, size=12))["out"].shape == (2, 8)


def test_exact_merge_folds_norms_only_where_no_one_else_uses_them():
    model, x = net(), images(size=8)
    result = quick(model, x, pipeline="merge{mode=exact,norms=true}")
    assert isinstance(result.model.block.bn1, nn.Identity)
    assert_same_outputs(result.model, model, x)

    class Peeks(Net):
        def forward(self, x):
            return super().forward(x), self.block.bn1(self.stem(x)), self.block.bn2.running_mean

    model.__class__ = Peeks
    result = quick(model, x, pipeline="merge{mode=exact,norms=true}")
    assert type(result.model.block.bn1) is nn.BatchNorm2d
    assert_same_outputs(result.model, model, x)


def test_recalibrated_statistics_land_in_the_model():
    model, data = net(), [images(size=8) * 3 for _ in range(4)]
    result = quick(model, data[0], pipeline="recalibrate{guard=false}", calibration=data)
    assert not torch.allclose(result.model.block.bn1.running_mean, model.block.bn1.running_mean)
    y = model.block.conv1(torch.cat([model.stem(x) for x in data]))
    expected = torch.stack([model.block.conv1(model.stem(x)).mean((0, 2, 3)) for x in data]).mean(0)
    assert y.shape[1] == 16
    assert torch.allclose(result.model.block.bn1.running_mean, expected, atol=1e-9)


class Batch(UserDict):
    """A mapping that is no dict, as tokenizers of transformers return."""


def pairs():
    return [(images(size=8), torch.zeros(2)) for _ in range(6)]


@pytest.mark.parametrize(
    "data",
    [
        pairs,
        lambda: [{"x": images(size=8), "scale": 2.0} for _ in range(6)],
        lambda: [Batch(x=images(size=8)) for _ in range(6)],
        lambda: (images(size=8) for _ in range(6)),
        lambda: [images(n, size=size) for n, size in [(2, 8), (5, 8), (1, 12), (3, 6), (6, 9), (2, 8)]],
        lambda: images(10, size=8),
        lambda: torch.utils.data.DataLoader([(x, 0) for x in images(10, size=8)], batch_size=2),
    ],
    ids=["pairs", "dicts", "userdicts", "generator", "other shapes", "tensor", "loader"],
)
def test_calibration_data_of_any_form(data):
    result = quick(net(), images(size=8), budget=Budget(params=0.8), calibration=data())
    assert result.report.after["params"] <= 0.8 * result.report.before["params"]
    assert any(
        "fitted to data" in str(r) or "merged" in str(r) or "kept" in str(r) for r in layer_reasons(result).values()
    )


def test_calibration_that_fails_names_the_batch():
    with pytest.raises(FxlrdError, match=r"^calibration: the model fails on batch 1 \(float64\[2, 4, 8, 8\] on cpu\)"):
        quick(
            net(),
            images(size=8),
            preset="merge",
            calibration=[images(size=8), torch.randn(2, 4, 8, 8, dtype=torch.float64)],
        )


@pytest.mark.parametrize("measure", ["params", "flops"])
def test_a_budget_is_met(measure):
    data = [images(size=8) for _ in range(5)]
    result = quick(net(), data[0], budget=Budget(**{measure: 0.9}), calibration=data)
    assert 0.7 < result.report.after[measure] / result.report.before[measure] <= 0.9


def test_a_budget_of_latency_times_the_model_around_the_regions():
    timed = []

    def timer(variants, device, seconds):
        if not any(isinstance(root, Plain) for workload in variants.values() for root in workload.modules):
            return compare(variants, device, seconds)
        timed.append([name for name in variants if name not in KERNELS])
        return FakeTimer(lambda name, _: {"after": 0.8}.get(name, 1.0))(variants, device)

    model = Plain(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))).eval()
    data = [torch.randn(16, 8) for _ in range(5)]
    steps = "calibrate{outputs=false},allocate{latency=0.5,seconds=0.01,merge=false},decompose"
    result = quick(model, data[0], budget=Budget(latency=0.8), calibration=data, pipeline=steps, timer=timer)
    assert result.report.passes[1]["note"].startswith("0.800 of latency, measured")
    assert timed == [["model"], ["before", "after"]]


def test_fitted_factors_are_better_than_those_of_the_weights():
    model = plain()
    with torch.no_grad():
        mix = torch.randn(8, 2, dtype=torch.float64) @ torch.randn(2, 8, dtype=torch.float64)
    data = [vectors(32) @ mix for _ in range(5)]  # of rank 2: two directions are enough
    errors = {
        fit: quick(
            model, data[0], pipeline=f"calibrate,decompose{{ranks=2,fit={fit},skip=fc|body.2}}", calibration=data
        ).report.settings["output_error"]
        for fit in ("true", "false")
    }
    assert errors["true"] < 1e-4
    assert errors["false"] > 1e-2


def test_snap_and_freeze_and_finetune():
    model, x = net().float(), images(size=8).float()
    result = quick(model, x, pipeline="decompose{ratio=2},snap{seconds=0.01},freeze")
    factored = [n for n, d in decisions(result).items() if d in ("svd", "tucker2")]
    frozen = {n for n, p in result.model.named_parameters() if not p.requires_grad}
    assert all(f"{n}.first.weight" in frozen for n in factored)
    compressed = quick(model, x, pipeline="decompose{ratio=2}").model
    assert "block.conv2.core.weight" in freeze_factors(compressed)
    before = copy.deepcopy(compressed.state_dict())
    loader = [(images(size=8).float(), torch.tensor([0, 1])) for _ in range(2)]
    history = finetune(
        compressed, loader, loss=lambda out, y: F.cross_entropy(out["out"], y), schedule="paper", progress=False
    )
    assert len(history) == 1
    after = compressed.state_dict()
    assert torch.equal(after["block.conv2.first.weight"], before["block.conv2.first.weight"])
    assert not torch.equal(after["block.conv2.core.weight"], before["block.conv2.core.weight"])


def test_skip_takes_full_names_and_globs():
    result = quick(net(), images(size=8), pipeline=FULL_RANK, skip=["block.conv[13]", "head", "aux"])
    assert {n for n, d in decisions(result).items() if d != "skipped"} == {"block.conv2"}
    with pytest.raises(FxlrdError, match=r"unknown layer 'block\.conv7'"):
        quick(net(), images(size=8), skip="block.conv7")


def test_latency_is_measured_before_and_after():
    result = fxlrd.compress(plain(), vectors(), ratio=1.5)
    assert result.report.before["latency_ms"] > 0
    assert result.report.settings["speedup"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_and_channels_last(dtype):
    model = net().to(dtype).to(memory_format=torch.channels_last)
    x = images(size=8).to(dtype).contiguous(memory_format=torch.channels_last)
    result = quick(model, x, pipeline=FULL_RANK)
    assert result.report.settings["layout"] == "channels_last"
    assert all(p.dtype == dtype for p in result.model.parameters())
    assert result.model.block.conv2.core.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        out = result.model(x)
        assert out["map"].is_contiguous(memory_format=torch.channels_last)
        assert largest_error(out, model(x)) < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_quantized_after_compression():
    compressed = quick(plain().float(), vectors().float(), pipeline="decompose{ranks=6}").model
    with pytest.warns(DeprecationWarning, match="quantiz"):
        small = torch.ao.quantization.quantize_dynamic(compressed, {nn.Linear}, dtype=torch.qint8)
    assert type(small.body[0].first).__module__.startswith("torch.ao.nn.quantized")
    x = vectors().float()
    with torch.no_grad():
        assert largest_error(small(x), compressed(x)) < 0.1


def test_torchao_int8_weights_after_compression():
    torchao = pytest.importorskip("torchao.quantization")
    compressed = quick(plain().float(), vectors().float(), pipeline="decompose{ranks=6}").model
    small = copy.deepcopy(compressed)
    torchao.quantize_(small, torchao.Int8WeightOnlyConfig())
    x = vectors().float()
    with torch.no_grad():
        assert largest_error(small(x), compressed(x)) < 0.1
