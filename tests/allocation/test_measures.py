from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxlrd import FxlrdError, capture
from fxlrd.allocation.measures import Flops, Latency, LayerParams, Params, curve_of, flops, forms_of
from fxlrd.allocation.merges import mergeable
from fxlrd.graph import cost
from fxlrd.graph.guards import why_not_replaceable
from fxlrd.graph.layer import layers_of
from fxlrd.graph.surgery import calls
from fxlrd.layers.build import decomposed
from fxlrd.layers.forms import parameters
from fxlrd.passes import Calibrate
from fxlrd.timing.stopwatch import Stopwatch
from tests.support.timers import FakeTimer, WeightTimer

COSTED = [
    (nn.Linear(9, 14), (5, 9), [(3,)]),
    (nn.Linear(9, 14), (2, 3, 9), [(3,)]),
    (nn.Conv2d(9, 14, 1, stride=2), (2, 9, 7, 6), [(3,)]),
    (nn.Conv2d(9, 14, 1), (9, 7, 6), [(3,)]),
    (nn.Conv2d(12, 8, 1, groups=4), (2, 12, 7, 6), [(1,)]),
    (nn.Conv2d(6, 8, 3), (2, 6, 7, 6), [(2, 3), (None, 3), (2, None)]),
    (nn.Conv2d(6, 8, (3, 2), stride=2, padding=2, dilation=2), (2, 6, 9, 8), [(2, 3), (None, 3), (2, None)]),
    (nn.Conv2d(8, 12, 3, groups=2, padding="same"), (2, 8, 7, 6), [(2, 3), (None, 3), (2, None)]),
    (nn.Conv1d(6, 8, 3, stride=2), (2, 6, 9), [(2, 3), (None, 3), (2, None)]),
    (nn.Conv1d(9, 14, 1), (9, 7), [(3,)]),
    (nn.Conv3d(6, 8, (1, 2, 3), stride=(1, 2, 1)), (2, 6, 4, 5, 6), [(2, 3), (None, 3), (2, None)]),
    (nn.ConvTranspose2d(6, 8, 2, stride=2), (2, 6, 4, 5), [(2, 3), (None, 3), (2, None)]),
    (nn.ConvTranspose1d(6, 8, 4, stride=2, padding=1, groups=2), (6, 5), [(2, 3), (None, 3), (2, None)]),
    (nn.ConvTranspose3d(9, 14, 1, stride=2, output_padding=1), (2, 9, 3, 4, 5), [(3,)]),
]


@pytest.mark.parametrize(("module", "shape", "ranks"), COSTED)
def test_flops_are_those_that_torch_counts(module, shape, ranks):
    x = torch.randn(shape)
    gm = capture(nn.Sequential(module), x)
    (node,) = (n for n in gm.graph.nodes if n.op == "call_module")
    for each in [None, *ranks]:
        form = module if each is None else decomposed(module, each)[0]
        with FlopCounterMode(display=False) as counter:
            form(x)
        assert flops(node, module, each) == counter.get_total_flops()


class Twice(nn.Module):
    """Two layers, of which one is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return self.b(self.a(self.a(x).relu()).relu())


X = torch.randn(64, 32)


def microseconds() -> WeightTimer:
    """Return a timer by which layers take a microsecond a weight, and models as much for their rest as ten weights."""
    return WeightTimer(lambda name, weights: (weights + 10 * (name == "model")) * 1e-6)


def priced(measure, gm=None, cut=True):
    gm = capture(Twice(), X) if gm is None else gm
    return {layer.name: forms_of(layer, measure, curve_of(layer) if cut else None) for layer in layers_of(gm)}


@pytest.mark.parametrize("measure", [Params(), Flops(), Latency(Stopwatch(cached=False, timer=microseconds()))])
def test_forms_are_cheaper_than_the_original_which_is_last(measure):
    for forms in priced(measure).values():
        *cheaper, original = forms
        assert (original.ranks, original.error) == (None, 0.0)
        assert cheaper
        assert [form.cost for form in cheaper] == sorted({form.cost for form in cheaper})
        assert [form.error for form in cheaper] == sorted({form.error for form in cheaper}, reverse=True)
        assert all(form.cost < original.cost for form in cheaper)


@pytest.mark.parametrize("measure", [Params(), Flops(), Latency(Stopwatch(cached=False, timer=microseconds()))])
def test_a_layer_that_is_not_to_be_cut_has_its_original_only(measure):
    assert [len(forms) for forms in priced(measure, cut=False).values()] == [1, 1]


@pytest.mark.parametrize("fitted", [False, True])
def test_parameters_are_those_of_the_factors(fitted):
    gm = capture(Twice(), X)
    gm = Calibrate(X)(gm).graph_module if fitted else gm
    for name, (form, *_, original) in priced(Params(), gm).items():
        module = gm.get_submodule(name)
        assert original.cost == cost.params(module)
        fit = next(layer for layer in layers_of(gm) if layer.name == name).statistics
        factors = decomposed(module, form.ranks, fit=fit.fit(module) if fitted else None)[0]
        assert form.cost == cost.params(factors)


def test_flops_and_latency_are_those_of_all_calls():
    computed, timed = priced(Flops()), priced(Latency(Stopwatch(cached=False, timer=microseconds())))
    assert computed["a"][-1].cost == 2 * computed["b"][-1].cost == 2 * 2 * 64 * 32 * 32
    assert timed["a"][-1].cost == pytest.approx(2 * timed["b"][-1].cost)
    assert timed["b"][-1].cost == pytest.approx(32 * 32 * 1e-6)
    for form in timed["b"][:-1]:
        assert form.cost == pytest.approx(parameters(nn.Linear(32, 32), form.ranks) * 1e-6)


def test_of_many_forms_eight_are_timed_at_hardware_multiples():
    timer = microseconds()
    measure = Latency(Stopwatch(cached=False, timer=timer))
    (forms,) = priced(measure, capture(nn.Sequential(nn.Linear(512, 512)), torch.randn(2, 512))).values()
    (names,) = timer.rounds
    assert len(names) == 1 + 8
    assert [rank % 16 for (rank,) in (form.ranks for form in forms[:-1])] == [0] * 8
    assert set(measure.timings["0"]) == set(names)


def test_a_layer_whose_input_has_no_shape_cannot_be_timed():
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(32, 32)))
    (reason,) = priced(Latency(Stopwatch(timer=microseconds())), gm).values()
    assert reason.code == "no-shapes"


def test_the_share_of_a_merge_is_that_of_its_channels_or_of_its_time():
    gm = capture(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(2, 8))
    group = mergeable(gm, calls(gm, "0")[0], why_not_replaceable(gm, norms=True), ())
    assert Params().shares(gm, group, [16, 48]) == Flops().shares(gm, group, [16, 48]) == {16: 0.25, 48: 0.75}
    timer = FakeTimer(lambda name, _: {"64": 4.0, "48": 2.0, "16": 1.0}[name])
    assert Latency(Stopwatch(timer=timer)).shares(gm, group, [16, 48]) == {16: 0.25, 48: 0.5}


def test_what_is_between_layers_is_timed():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 8, 3)).eval()
    gm = capture(model, torch.randn(2, 3, 8, 8))
    group = mergeable(gm, calls(gm, "0")[0], why_not_replaceable(gm, norms=True), (), stem=True)
    timer = FakeTimer(lambda name, _: {"all": 3.0}[name])
    assert Latency(Stopwatch(timer=timer)).between(gm, group) == pytest.approx(3.0)
    assert Latency(Stopwatch(under_inductor="int8", timer=timer)).between(gm, group) == 0.0
    assert len(timer.rounds) == 1
    assert Params().between(gm, group) == 128


def test_totals():
    gm = capture(Twice(), X)
    assert Params().total(gm, 0) == cost.params(gm)
    assert LayerParams().total(gm, 5.0) == 5.0
    assert Flops().total(gm, 0) == cost.flops(gm)
    latency = Latency(Stopwatch(timer=microseconds()))
    assert latency.total(gm, 0) == pytest.approx((2 * 32 * 32 + 10) * 1e-6)
    bare = torch.fx.symbolic_trace(Twice())
    for measure, message in ((Flops(), "give example inputs"), (latency, "needs a captured model")):
        with pytest.raises(FxlrdError, match=message):
            measure.total(bare, 0)
