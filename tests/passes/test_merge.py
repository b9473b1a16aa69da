from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.fx.passes.infra.pass_manager import PassManager

import fxlrd
from fxlrd import FxlrdError, Pipeline, spec
from fxlrd.graph.surgery import layers
from fxlrd.passes import Merge
from tests.support.merging import bottleneck, calibrated, conv, randomised
from tests.support.tensors import assert_close, images

MODES = ("interpolative", "exact", "relocate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, "unknown mode of merge 'best'"),
        ({"ratio": 1}, "finite number above 1"),
        ({"ranks": 0}, "at least 1"),
        ({"ranks": True}, "at least 1"),
        ({"ranks": {"0": 2.5}}, "at least 1"),
        ({"ranks": (32, 24)}, "at least 1"),
        ({"skip": (3,)}, "is not a name or glob"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(FxlrdError, match=message) as error:
        Merge(**options)
    assert "\n" not in str(error.value)


UNREAD = {
    "interpolative": {"norms": True},
    "exact": {"ratio": 2.0, "ranks": 8, "snap": True, "floor": 0.5, "compile": True, "seconds": 1.0},
    "relocate": {"norms": True, "snap": True, "floor": 0.5, "compile": True, "seconds": 1.0},
}


@pytest.mark.parametrize(("mode", "option"), [(mode, option) for mode in UNREAD for option in UNREAD[mode]])
def test_an_option_that_the_mode_does_not_read_is_an_error(mode, option):
    with pytest.raises(FxlrdError, match=f"^merge: mode {mode} does not read {option}; it reads ") as error:
        Merge(mode=mode, **{option: UNREAD[mode][option]})
    assert "\n" not in str(error.value)
    assert option not in Merge(mode=mode).reads
    assert str(error.value).endswith(
        "it reads " + ", ".join(o for o in Merge(mode=mode).reads if o not in ("mode", "timer"))
    )
    default = {option: getattr(Merge(), option)}
    assert Merge(mode=mode, **default) == Merge(mode=mode), "its default says nothing"
    with pytest.raises(FxlrdError, match=f"mode {mode} does not read {option}"):
        Pipeline.parse(f"merge{{mode={mode},{option}={str(UNREAD[mode][option]).lower()}}}")


def test_every_option_is_read_by_some_mode():
    options = {f.name for f in fields(Merge)}
    assert options == {option for mode in MODES for option in Merge(mode=mode).reads}
    for mode in MODES:
        assert options == {"timer", *Merge(mode=mode).reads, *UNREAD[mode]}


def test_options_for_all_passes_reach_the_modes_that_read_them():
    pipeline = Pipeline.parse("calibrate,merge,merge{mode=exact},merge{mode=relocate},snap")
    wanted = pipeline.with_options(ratio=3.0, skip=("0",), compile=True)
    assert str(wanted) == (
        "calibrate,merge{ratio=3,skip=0,compile=true},merge{mode=exact,skip=0},merge{mode=relocate,ratio=3,skip=0},"
        "snap{compile=true}"
    )
    exact = Pipeline.parse("merge{mode=exact}")
    assert not exact.reads("compile")
    with pytest.raises(FxlrdError, match=r"^ratio: no pass of merge\{mode=exact\} has this option"):
        exact.with_options(ratio=2.0)


def test_compress_sets_its_options_where_the_mode_reads_them():
    model, x = randomised(any_mode("exact")), images(4, 9, channels=8)
    result = fxlrd.compress(model, x, pipeline="merge{mode=exact}", compile=True, skip="2", measure=False)
    assert result.report.settings["pipeline"] == "merge{mode=exact,skip=2}"


def any_mode(mode: str) -> nn.Module:
    if mode == "exact":
        return nn.Sequential(
            nn.Sequential(conv(8, 32), nn.Dropout(), nn.BatchNorm2d(32), conv(32, 8)), nn.ReLU(), conv()
        )
    return nn.Sequential(*bottleneck(), nn.ReLU(), nn.Dropout(), nn.Conv2d(16, 4, 1))


def half(mode: str) -> Merge:
    """Return the pass, at ratio 2 in the modes that read one."""
    return Merge(mode=mode) if mode == "exact" else Merge(mode=mode, ratio=2)


@pytest.mark.parametrize("mode", MODES)
def test_modes_copies_and_gradients(mode):
    model, x = randomised(any_mode(mode)), images(4, 9, channels=8)
    gm = half(mode)(calibrated(model, x)).graph_module
    reference = gm(x)
    assert not gm.training
    twin = copy.deepcopy(gm)
    assert torch.equal(twin(x), reference)
    gm.train()
    assert all(m.training for m in gm.modules())
    gm(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gm.parameters())
    assert all(p.grad is None for p in twin.parameters())
    twin.train().eval()
    assert torch.equal(twin(x), reference)
    assert half(mode)(calibrated(model.train(), x)).graph_module.get_submodule("2").training


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_memory_format_are_kept(mode, dtype):
    model = any_mode(mode).to(dtype).to(memory_format=torch.channels_last).eval()
    x = torch.randn(4, 8, 9, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    result = half(mode)(calibrated(model, x))
    gm = result.graph_module
    assert result.modified
    assert {t.dtype for t in gm.state_dict().values() if t.is_floating_point()} == {dtype}
    for m in layers(gm).values():
        assert m.weight.is_contiguous(memory_format=torch.channels_last)
    assert gm(x).dtype == dtype
    assert gm(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", MODES)
def test_the_users_model_and_the_input_graph_stay(mode):
    model, x = randomised(any_mode(mode)), images(4, 9, channels=8)
    before, reference = copy.deepcopy(model.state_dict()), model(x)
    gm = calibrated(model, x)
    code = gm.code
    assert half(mode)(gm).modified
    assert gm.code == code
    assert torch.equal(gm(x), reference)
    assert torch.equal(model(x), reference)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("mode", MODES)
def test_inplace_and_the_report(mode):
    model, x = randomised(any_mode(mode)), images(4, 9, channels=8)
    text = f"calibrate,{spec.text(half(mode))}"
    apart = fxlrd.compress(model, x, pipeline=text, calibration=[x], measure=False)
    result = fxlrd.compress(model, x, pipeline=text, calibration=[x], measure=False, inplace=True)
    assert result.model is model
    assert_close(model(x), apart.model(x))
    assert result.report.after["params"] == sum(p.numel() for p in model.parameters())
    record = result.report.passes[-1]
    assert record["exact"] == (mode == "exact")
    assert (record["step_error"] < 1e-9) == (mode == "exact")
    decisions = {row["decision"] for row in result.report.layers}
    assert "merged" in decisions
    model.train()(x).sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_the_pass_manager_runs_it(mode):
    model, x = randomised(any_mode(mode)), images(4, 9, channels=8)
    gm = calibrated(model, x)
    expected = half(mode)(gm).graph_module
    result = PassManager(passes=[half(mode)])(gm)
    assert result.modified
    assert_close(result.graph_module(x), expected(x))


@pytest.mark.parametrize("mode", MODES)
def test_no_match_modifies_nothing(mode):
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()).eval(), torch.randn(2, 8, 6, 6)
    gm = calibrated(model, x)
    result = Merge(mode=mode)(gm)
    assert not result.modified
    assert torch.equal(result.graph_module(x), gm(x))
    assert [n.op for n in result.graph_module.graph.nodes] == [n.op for n in gm.graph.nodes]


@pytest.mark.parametrize("mode", MODES)
def test_frozen_weights_stay_frozen(mode):
    model, x = randomised(any_mode(mode)).requires_grad_(False), images(4, 9, channels=8)
    gm = half(mode)(calibrated(model, x)).graph_module
    if mode != "relocate":  # whose norms are new
        assert not any(p.requires_grad for p in gm.parameters())


@pytest.mark.parametrize(("option", "message"), [("floor", "is not a fraction"), ("seconds", "leaves no time")])
def test_options_of_timing_are_checked(option, message):
    with pytest.raises(FxlrdError, match=message):
        Merge(**{"snap": True, option: 0.0})
