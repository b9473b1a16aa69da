"""No test here reads a clock: the timing itself is replaced by a formula."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fxlrd import FxlrdError, Pipeline, capture, compress
from fxlrd.graph.captured import propagate
from fxlrd.graph.facts import provenance
from fxlrd.graph.inputs import Inputs
from fxlrd.layers.build import decomposed
from fxlrd.passes import Calibrate, Decompose, Snap
from fxlrd.timing.layers import ORIGINAL
from tests.support.results import reasons
from tests.support.timers import FakeTimer, SizeTimer

NOISE = 0.001


class Clock(FakeTimer):
    """A timer whose ratios are a formula of the first rank; ``timed`` has the forms that it timed."""

    def __init__(self, ratio):
        super().__init__(lambda name, _: 1.0 if name == ORIGINAL else ratio(int(name.split("x")[0])), NOISE)

    @property
    def timed(self) -> list[str]:
        return [name for names in self.rounds for name in names if name != ORIGINAL]


def staircase(step: int):
    """Time that only falls at multiples of ``step``, as with vector kernels."""
    return lambda r: 0.1 + 0.8 * (-(-r // step) * step) / 96


def linear_pair(n: int = 1, width: int = 300):
    model = nn.Sequential(*[m for _ in range(n) for m in (nn.Linear(width, width), nn.ReLU())]).double().eval()
    x = torch.randn(4, width).double()
    return model, x, Decompose(ratio=2)(capture(model, x)).graph_module  # rank 75


def ranks_of(gm) -> dict[str, tuple]:
    return {p.name: p.ranks for n in gm.graph.nodes if (p := provenance(n)) is not None and p.role != "original"}


@pytest.mark.parametrize("search", ["grid", "algorithm1"])
def test_the_rank_below_the_step_is_taken(search):
    clock = Clock(staircase(16))
    _, _, gm = linear_pair()
    result = Snap(search=search, timer=clock)(gm)
    assert ranks_of(result.graph_module)["0"] == (64,), "75 pays for 80; the right side of the drop is 64"
    assert result.modified


@pytest.mark.parametrize("search", ["grid", "algorithm1"])
def test_it_equals_decompose_at_the_snapped_rank(search):
    clock = Clock(staircase(16))
    model, x, gm = linear_pair()
    snapped = Snap(search=search, timer=clock)(gm).graph_module
    again = Decompose(ranks=64)(capture(model, x)).graph_module
    assert torch.equal(snapped(x), again(x))
    parts, error = decomposed(model[0], (64,))
    for a, b in zip(snapped.get_submodule("0"), parts, strict=True):
        assert torch.equal(a.weight, b.weight)
    node = next(n for n in snapped.graph.nodes if n.target == "0.last")
    assert provenance(node).error == error


@pytest.mark.parametrize("search", ["grid", "algorithm1"])
def test_the_original_comes_back_where_it_is_not_slower(search):
    clock = Clock(lambda r: 1.0 - NOISE / 2)
    model, x, gm = linear_pair()
    result = Snap(search=search, timer=clock)(gm)
    assert result.graph_module.get_submodule("0").weight is model[0].weight
    assert torch.equal(result.graph_module(x), model(x))
    assert [site.exact for site in result.sites] == [False]  # against the factors that it replaces
    assert ranks_of(result.graph_module) == {}


@pytest.mark.parametrize("search", ["grid", "algorithm1"])
def test_a_difference_inside_the_noise_is_no_gain(search):
    clock = Clock(lambda r: 0.8 + (NOISE / 4) * (r % 2))
    _, _, gm = linear_pair()
    result = Snap(search=search, trade=1.0, timer=clock)(gm)
    assert not result.modified
    assert ranks_of(result.graph_module)["0"] == (75,)
    assert result.skipped[0].reason.code == "no-faster-rank"


def test_no_rank_falls_below_the_floor():
    clock = Clock(staircase(16))
    _, _, gm = linear_pair()
    Snap(search="algorithm1", floor=0.9, timer=clock)(gm)
    assert min(map(int, clock.timed)) == 68
    clock.rounds.clear()
    Snap(floor=0.9, cache=False, timer=clock)(gm)
    assert clock.timed == ["75", "72"], "64 is under the floor, and so a multiple of 8 stands in"


def test_layers_of_one_signature_are_timed_once_by_grid_only():
    clock = Clock(staircase(16))
    _, _, gm = linear_pair(n=4)
    Snap(cache=False, timer=clock)(gm)
    assert clock.timed == ["75", "64"]
    clock.rounds.clear()
    Snap(search="algorithm1", cache=False, timer=clock)(gm)
    assert len(clock.timed) == 4 * len(range(57, 76))


def test_a_second_search_and_an_interrupted_one_use_what_is_known():
    clock = Clock(staircase(16))
    _, _, gm = linear_pair()

    def interrupted(*arguments, **options):
        if clock.timed:
            raise KeyboardInterrupt
        return clock(*arguments, **options)

    with pytest.raises(KeyboardInterrupt):
        Snap(search="algorithm1", timer=interrupted)(gm)
    assert 0 < len(clock.timed) < len(range(57, 76))
    Snap(search="algorithm1", timer=clock)(gm)
    assert len(clock.timed) == len(set(clock.timed)) == len(range(57, 76))
    Snap(search="algorithm1", timer=clock)(gm)
    assert len(clock.timed) == len(range(57, 76))


def test_tucker_modes_move_together():
    clock = Clock(staircase(16))
    x = torch.randn(1, 64, 9, 9)
    gm = Decompose(ratio=2)(capture(nn.Conv2d(64, 64, 3), x)).graph_module
    result = Snap(timer=clock)(gm)
    assert ranks_of(result.graph_module)["0"] == (32, 32), "as in the paper's Table 2: 38 to 32"
    propagate(result.graph_module, Inputs.of(x))


def test_a_shared_module_comes_back_at_each_call():
    clock = Clock(lambda r: 2.0)
    shared = nn.Linear(64, 64)
    model, x = nn.Sequential(shared, nn.ReLU(), shared).eval(), torch.randn(3, 64)
    result = Snap(timer=clock)(Decompose()(capture(model, x)).graph_module)
    assert torch.equal(result.graph_module(x), model(x))
    assert sum(n.target == "0" for n in result.graph_module.graph.nodes) == 2


class Pyramid(nn.Module):
    """A head that is called on levels of several sizes."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes, self.head = sizes, nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.head(nn.functional.adaptive_avg_pool2d(x, size)).mean() for size in self.sizes)


def on_large_inputs(name: str, size: int) -> float:
    """Factors take half the time of the original on large inputs, and twice its time on small ones."""
    return (10.0 if size == 16 else 2.0) * (1.0 if name == ORIGINAL else 0.5 if size == 16 else 2.0)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("small", "ratio"), [(1, 9 / 12), (4, 21 / 18)])
def test_a_layer_called_at_several_sizes_takes_the_time_of_all_its_calls(first, small, ratio):
    sizes = (16, *[4] * small)
    gm = capture(Pyramid(sizes if first else sizes[::-1]).eval(), torch.randn(1, 32, 16, 16))
    decomposed = Decompose(skip=())(gm).graph_module
    result = Snap(timer=SizeTimer(on_large_inputs), cache=False, floor=1.0)(decomposed)
    (timings,) = result.timings.values()
    (form,) = (timing for name, timing in timings.items() if name != ORIGINAL)
    assert form.ratio == pytest.approx(ratio)
    assert bool(ranks_of(result.graph_module)) == (ratio < 1)


def test_the_latency_taken_is_kept():
    clock = Clock(staircase(16))
    _, _, gm = linear_pair()
    result = Snap(timer=clock)(gm)
    node = next(n for n in result.graph_module.graph.nodes if n.target == "0.first")
    assert provenance(node).latency == pytest.approx(staircase(16)(64))
    model, x, _ = linear_pair()
    result = Snap(timer=clock)(Decompose(ranks=64)(capture(model, x)).graph_module)
    factors = [p for n in result.graph_module.graph.nodes if (p := provenance(n)) is not None and p.name == "0"]
    assert [(p.ranks, p.latency) for p in factors] == [((64,), pytest.approx(staircase(16)(64)))] * 2


def test_nothing_decomposed_nothing_done():
    clock = Clock(staircase(16))
    result = Snap(timer=clock)(capture(nn.Linear(8, 8), torch.randn(1, 8)))
    assert not result.modified
    assert result.skipped == ()


def test_a_graph_without_shapes_is_left_alone_with_the_reason():
    gm = Decompose()(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(64, 64)))).graph_module
    result = Snap()(gm)
    assert not result.modified
    assert result.skipped[0].reason.code == "no-shapes"


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
def test_the_real_timing_runs(compile):
    x = torch.randn(1, 32, 6, 6)
    gm = Decompose()(capture(nn.Conv2d(32, 32, 3), x)).graph_module
    result = Snap(seconds=0.01, compile=compile)(gm)
    assert len(result.sites) + len(result.skipped) == 1
    assert result.graph_module(x).shape == (1, 32, 4, 4)


def test_bad_options():
    with pytest.raises(FxlrdError, match="did you mean grid"):
        Snap(search="gird")
    with pytest.raises(FxlrdError, match="floor"):
        Snap(floor=0)
    with pytest.raises(FxlrdError, match="seconds"):
        Snap(seconds=0)
    with pytest.raises(FxlrdError, match="trade"):
        Snap(trade=2)


@pytest.mark.parametrize("ratio", [lambda r: 1.0, lambda r: 0.5, staircase(16)])
@pytest.mark.parametrize("inplace", [False, True])
def test_ranks_preset_whatever_the_timing(ratio, inplace):
    """All originals back, all ranks kept, all ranks moved: the pipeline verifies, and inplace installs it."""
    clock = Clock(ratio)
    model, x, _ = linear_pair(2)
    result = compress(model, x, preset="ranks", inplace=inplace, measure=False, timer=clock)
    assert (result.model is model) == inplace
    assert result.report.after["params"] == sum(p.numel() for p in result.model.parameters())
    assert result.model.get_submodule("0")(x).shape == (4, 300)


def test_modes_come_back_after_real_timing():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64)).train()
    model[2].eval()
    x = torch.randn(4, 64)
    result = compress(model, x, pipeline="decompose,snap{seconds=0.01}", measure=False)
    assert [m.training for m in model] == [True, True, False]
    assert result.model.get_submodule("0").training


def test_a_cache_file_without_the_original_is_measured_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("FXLRD_CACHE_DIR", str(tmp_path))
    _, _, gm = linear_pair()
    clock = Clock(staircase(16))
    Snap(timer=clock)(gm)
    first = list(clock.timed)
    (path,) = tmp_path.glob("latency/*.json")
    content = json.loads(path.read_text())
    del content["timings"]["original"]
    path.write_text(json.dumps(content))
    Snap(timer=clock)(gm)
    assert clock.timed == first * 2


def test_fitted_factors_stay_fitted():
    """At a moved rank they are what decompose fits at that rank."""
    clock = Clock(staircase(16))
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU()).double().eval()
    x = torch.randn(700, 300).double()
    calibrated = Calibrate(x)(capture(model, x)).graph_module
    snapped = Snap(timer=clock)(Decompose(ratio=2)(calibrated).graph_module).graph_module
    assert ranks_of(snapped)["0"] == (64,)
    again = Decompose(ranks=64)(calibrated).graph_module
    assert torch.equal(snapped(x), again(x))
    plain = Snap(timer=clock)(Decompose(ratio=2, fit=False)(calibrated).graph_module).graph_module
    assert torch.equal(plain(x), Decompose(ranks=64, fit=False)(calibrated).graph_module(x))
    for gm, fitted in ((snapped, True), (plain, False)):
        assert {provenance(n).fitted for n in gm.graph.nodes if n.target in ("0.first", "0.last")} == {fitted}


def test_what_a_layer_was_fitted_to_survives_that_the_original_comes_back():
    clock = Clock(lambda r: 2.0)
    model, x = nn.Sequential(nn.Linear(64, 64)).double().eval(), torch.randn(100, 64).double()
    calibrated = Calibrate(x)(capture(model, x)).graph_module
    back = Snap(timer=clock)(Decompose()(calibrated).graph_module).graph_module
    assert torch.equal(back(x), model(x))
    assert torch.equal(Decompose(ranks=9)(back).graph_module(x), Decompose(ranks=9)(calibrated).graph_module(x))


def always_slower(name, _):
    return 1.0 if name == ORIGINAL else 2.0


def test_a_layer_that_took_in_its_norm_is_not_given_its_original_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()).double()
    model[1].running_mean.fill_(3.0)
    x = torch.randn(4, 32, 8, 8).double()
    gm = Pipeline.parse("decompose{ranks=32},merge{mode=exact,norms=true}")(capture(model.eval(), x)).graph_module
    result = Snap(timer=FakeTimer(always_slower), cache=False)(gm)
    torch.testing.assert_close(result.graph_module(x), model(x))


def test_a_layer_whose_constant_a_norm_took_is_not_given_its_original_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()).double().eval()
    x = 2 + torch.randn(64, 16, 6, 6).double()
    pipeline = Pipeline.parse("calibrate,decompose{ranks=8,fit=false},refit{guard=false}")
    gm = pipeline.with_options(calibration=x)(capture(model, x)).graph_module
    result = Snap(timer=FakeTimer(always_slower), cache=False)(gm)
    assert reasons(result)["0"] == "entangled"
    assert torch.equal(result.graph_module(x), gm(x))


def test_a_branched_layer_is_left_alone():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(64, 64, 3).eval(), torch.randn(1, 64, 9, 9)
    gm = Pipeline.parse("decompose{ranks=20},branch{groups=4}")(capture(conv, x)).graph_module
    result = Snap(timer=FakeTimer(lambda name, _: 1.0 if name == ORIGINAL else 0.2), cache=False)(gm)
    assert set(reasons(result).values()) == {"branched"}
