"""No test here reads a clock: the times of layers, groups and models are a formula of their weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd import FxlrdError, Pipeline, capture
from fxlrd.allocation.choices import Curve
from fxlrd.allocation.measures import Params
from fxlrd.allocation.merges import mergings
from fxlrd.allocation.plan import planned
from fxlrd.capturing.model import capture_any
from fxlrd.graph import cost
from fxlrd.graph.facts import provenance
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.layer import statistics_of
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.forms import ranks_by_ratio
from fxlrd.layers.kinds import as_layer
from fxlrd.passes import Allocate, Calibrate, Decompose, Merge, Refit
from fxlrd.progress import quiet
from tests.support.models import ResidualNet
from tests.support.results import reasons
from tests.support.tensors import images
from tests.support.timers import WeightTimer


def conv(c_in: int, c_out: int, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, k, **{"padding": k // 2, **options})


def network() -> nn.Sequential:
    """A chain whose layers differ in width, in kernel, and in how much of their input and output matters."""
    model = nn.Sequential(
        *(conv(3, 16), nn.BatchNorm2d(16), nn.ReLU()),
        *(conv(16, 32), nn.BatchNorm2d(32), nn.ReLU(), conv(32, 24, stride=2), nn.ReLU()),
        *(conv(24, 48, 1), nn.BatchNorm2d(48), nn.ReLU(), conv(48, 32, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 40), nn.ReLU(), nn.Linear(40, 10)),
    )
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.3, 0.3), m.running_var.uniform_(0.05, 0.3)
    return model.double().eval()


def calibrated(model: nn.Module, x: torch.Tensor, **options):
    return Calibrate(x, effects=len(x), **options)(capture(model, x)).graph_module


def squared_error(gm, model, x) -> float:
    with torch.no_grad():
        return ((gm(x) - model(x)).square().sum() / model(x).square().sum()).item()


def curves(gm) -> dict[str, Curve]:
    return {name: Curve(m, statistics_of(calls(gm, name)).fit(m)) for name, m in list(layers(gm).items())[1:]}


def order(values) -> torch.Tensor:
    return torch.tensor(values).argsort().argsort().double()


def spearman(a, b) -> float:
    return torch.corrcoef(torch.stack([order(a), order(b)]))[0, 1].item()


def share(after, before, measure: str) -> float:
    of = {"params": cost.params, "flops": cost.flops}[measure]
    return of(after) / of(before)


def carried_out(gm):
    return Pipeline([Merge(), Decompose()])(gm).graph_module


# -- the predicted error


@pytest.mark.slow
def test_the_predicted_error_orders_changes_of_single_layers_as_the_measured_one():
    model, x, unseen = network(), images(128, size=12), images(128, size=12)
    gm = calibrated(model, x)
    predicted, measured = [], []
    for name, errors in curves(gm).items():
        for ratio in (1.25, 1.5, 2.0, 4.0):
            ranks = ranks_by_ratio(layers(gm)[name], ratio)
            predicted.append(errors.error(ranks))
            measured.append(squared_error(Decompose(ranks={name: ranks})(gm).graph_module, model, unseen))
    assert len(predicted) == 24
    assert spearman(predicted, measured) > 0.9
    factors = torch.tensor(measured) / torch.tensor(predicted)
    assert 0.75 < factors.median() < 1.25, "and in size"


@pytest.mark.slow
def test_the_predicted_error_of_a_merge_is_in_the_same_unit():
    model, x, unseen = network(), images(128, size=12), images(128, size=12)
    gm = calibrated(model, x)
    predicted, measured = [], []
    for name, merging in mergings(gm, [*layers(gm)], Params(), (), quiet).items():
        for count in list(merging.options)[::3]:
            predicted.append(merging.options[count].error)
            measured.append(squared_error(Merge(ranks={name: count})(gm).graph_module, model, unseen))
    assert len(predicted) > 10
    assert spearman(predicted, measured) > 0.95
    factors = torch.tensor(measured) / torch.tensor(predicted)
    assert 0.75 < factors.median() < 1.25, "and in size"


@pytest.mark.slow
def test_the_predicted_error_orders_whole_plans_as_the_measured_one():
    model, x, unseen = network(), images(128, size=12), images(128, size=12)
    gm = calibrated(model, x)
    predicted, measured = [], []
    for merge in (False, True):
        for params in (0.9, 0.75, 0.6, 0.5, 0.4, 0.3):
            result = Allocate(params=params, merge=merge)(gm)
            predicted.append(float(result.note.rpartition(" ")[2]))
            measured.append(squared_error(carried_out(result.graph_module), model, unseen))
    assert spearman(predicted, measured) > 0.95


# -- the budget


@pytest.mark.parametrize("measure", ["params", "flops"])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("asked", [0.4, 0.6, 0.8])
def test_the_budget_is_met(measure, merge, asked):
    gm = calibrated(network(), images(24, size=12))
    result = Allocate(**{measure: asked}, merge=merge)(gm)
    assert asked * 0.98 < share(carried_out(result.graph_module), gm, measure) <= asked
    assert f" of {measure}; predicted output error" in result.note


def inverted_bottlenecks() -> nn.Sequential:
    """Merges cut layers with and without bias on one side or on both, BatchNorms, depthwise convs and PReLUs."""
    return nn.Sequential(
        *(conv(3, 16, bias=False), nn.BatchNorm2d(16), nn.PReLU(16), conv(16, 48, 1, bias=False), nn.BatchNorm2d(48)),
        *(nn.PReLU(), conv(48, 48, 5, groups=48), nn.BatchNorm2d(48), nn.PReLU(48), conv(48, 24, 1)),
        *(conv(24, 40, 1), nn.PReLU(40), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(160, 32)),
        *(nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)),
    )


@pytest.mark.parametrize("measure", ["params", "flops"])
@pytest.mark.parametrize("asked", [0.5, 0.8])
def test_what_merges_remove_beside_weights_is_counted(measure, asked):
    x = images(24, size=12)
    gm = calibrated(inverted_bottlenecks().double().eval(), x, holdout=True)
    result = Allocate(**{measure: asked})(gm)
    assert planned(result.graph_module).retained
    promised = float(result.note.partition(" ")[0])
    for made in (
        carried_out(result.graph_module),
        Refit(x, guard=False)(carried_out(result.graph_module)).graph_module,
    ):
        assert share(made, gm, measure) == pytest.approx(promised, abs=5.1e-4)
        assert asked * 0.9 < share(made, gm, measure) <= asked, "a step of four channels is up to 7 % of this network"


class Tagger(nn.Module):
    """A language model in small: an embedding, two blocks, and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 32)
        self.blocks = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
        self.head = nn.Linear(32, 100, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.blocks(self.table(x)))


def test_a_budget_of_the_layers_alone_and_a_word_on_embeddings():
    x = torch.arange(100).view(20, 5)
    gm = calibrated(Tagger().double().eval(), x)
    result = Allocate(layers=0.6)(gm)
    after = carried_out(result.graph_module)
    blocks, rest = cost.params(gm.get_submodule("blocks")), cost.params(gm.get_submodule("table"))
    assert 0.55 < cost.params(after.get_submodule("blocks")) / blocks <= 0.6
    assert after.get_submodule("head").weight is after.get_submodule("table").weight
    assert result.note.startswith(f"{cost.params(after.get_submodule('blocks')) / blocks:.3f} of layers (")
    assert f"({cost.params(after) / (blocks + rest):.3f} of params)" in result.note
    assert result.warnings == ()
    (warning,) = Allocate(params=0.8)(gm).warnings
    assert warning.startswith(f"allocate: {rest / (rest + blocks):.0%} of the parameters are embeddings")


def test_a_model_whose_output_does_not_depend_on_its_layers():
    model, x = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)), nn.Linear(32, 8)), torch.randn(64, 32)
    nn.init.zeros_(model[-1].weight), nn.init.zeros_(model[-1].bias)
    gm = calibrated(model, x)
    result = Allocate(params=0.7)(gm)
    assert 0.66 < share(carried_out(result.graph_module), gm, "params") <= 0.7
    ranks = planned(result.graph_module).ranks
    assert all(rank > 4 for name, (rank,) in ranks.items() if name != "6"), "no layer but the zeros is cut to nothing"
    assert "does not depend on the layers" in result.warnings[0]
    nn.init.normal_(model[-1].weight)
    assert not Allocate(params=0.7)(calibrated(model, x)).warnings


@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0, 5.0])
def test_never_worse_than_the_uniform_ratio_at_its_cost(ratio):
    gm = calibrated(network(), images(24, size=12))
    errors = curves(gm)
    uniform = {name: ranks_by_ratio(layers(gm)[name], ratio) for name in errors}
    at = share(Decompose(ranks=uniform)(gm).graph_module, gm, "params")

    def total(ranks) -> float:
        return sum(errors[name].error(each) for name, each in ranks.items())

    plain = planned(Allocate(params=at, merge=False)(gm).graph_module)
    assert total(plain.ranks) <= total(uniform)
    # With merges to choose from too it can only get better.
    without, with_merges = (float(Allocate(params=at, merge=m)(gm).note.rpartition(" ")[2]) for m in (False, True))
    assert with_merges <= without


@pytest.mark.parametrize("measure", ["params", "flops"])
def test_a_budget_out_of_reach_says_what_is_within(measure):
    gm = calibrated(network(), images(24, size=12))
    with pytest.raises(FxlrdError, match=rf"^allocate: {measure}=0.001 is out of reach: .* leave 0\.\d\d\d") as error:
        Allocate(**{measure: 0.001})(gm)
    assert "\n" not in str(error.value)
    within = float(str(error.value).partition("leave ")[2].split()[0])
    assert share(carried_out(Allocate(**{measure: within})(gm).graph_module), gm, measure) <= within * 1.02


@pytest.mark.parametrize("measure", ["params", "flops", "latency"])
def test_a_model_in_which_nothing_can_be_cheaper(measure):
    gm = capture(nn.Sequential(nn.ReLU(), nn.Flatten()), images(2, size=12))
    with pytest.raises(FxlrdError, match="nothing in it can be made cheaper"):
        Allocate(**{measure: 0.5})(gm)
    gm = capture(nn.Sequential(conv(3, 8), nn.ReLU()), images(2, size=12).float())
    if measure != "latency":
        with pytest.raises(FxlrdError, match="nothing in it can be made cheaper"):
            Allocate(**{measure: 0.5})(gm)


# -- latency


REST = 1000


def seconds(name: str, weights: int) -> float:
    """A device whose layers take a microsecond a weight, and the rest of the network a thousand."""
    return (weights + REST * (name in ("model", "before", "after"))) * 1e-6


def model_seconds(gm) -> float:
    return seconds("model", sum(as_layer(m).weight.numel() for m in layers(gm).values()))


@pytest.mark.parametrize("asked", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("merge", [False, True])
def test_a_latency_budget_is_met_by_the_model(asked, merge):
    gm = calibrated(network(), images(24, size=12))
    result = Allocate(latency=asked, merge=merge, timer=WeightTimer(seconds))(gm)
    after = carried_out(result.graph_module)
    assert model_seconds(after) / model_seconds(gm) == pytest.approx(asked, rel=0.02)
    assert result.note.startswith(f"{model_seconds(after) / model_seconds(gm):.3f} of latency, measured; ")


def test_a_latency_budget_is_met_although_the_model_takes_longer_than_its_layers():
    """The budget for the layers is moved until the model, as it is measured, meets it."""
    gm = calibrated(network(), images(24, size=12))
    original = model_seconds(gm)

    def slower(name, weights):  # a form that is cheaper by itself saves less in the model
        alone = seconds(name, weights)
        return original * (alone / original) ** 0.7 if name == "after" else alone

    result = Allocate(latency=0.6, timer=WeightTimer(slower))(gm)
    after = carried_out(result.graph_module)
    assert (model_seconds(after) / original) ** 0.7 == pytest.approx(0.6, rel=0.02)


def test_what_is_between_layers_takes_no_longer_than_the_rest_of_the_model():
    gm = calibrated(network(), images(24, size=12))
    timer = WeightTimer(lambda name, weights: 1.0 if name == "all" else seconds(name, weights))
    allocate = Allocate(latency=0.6, timer=timer)
    problem = allocate.priced(gm, [allocate.budget]).problem
    betweens = [merging.between for merging in problem.groups.values()]
    assert sum(betweens) == pytest.approx(REST * 1e-6)
    assert len(set(betweens)) == 1 < len(betweens)


@pytest.mark.usefixtures("without_ridge")
def test_a_stem_that_is_cut_with_its_stream_is_not_left_alone():
    model = ResidualNet(16).double().eval()
    with torch.no_grad():
        for layer in (model.stem, *(block.conv2 for block in model.blocks)):  # half of the stream says nothing new
            layer.weight[8:], layer.bias[8:] = layer.weight[:8], layer.bias[:8]
    gm = calibrated(model, images(24, size=12))
    result = Allocate(flops=0.5)(gm)
    assert "blocks.0.conv2" in planned(result.graph_module).retained
    assert "stem" not in reasons(result)
    after = carried_out(result.graph_module)
    assert after.get_submodule("stem").out_channels < 16
    assert reasons(Allocate(flops=0.7, merge=False)(gm))["stem"] == "stem"
    for merge in (True, False):
        with pytest.raises(FxlrdError, match="is out of reach") as error:
            Allocate(params=0.001, merge=merge)(gm)
        assert ("the stem reads the model's input" in str(error.value)) is not merge


def test_a_latency_out_of_reach_says_what_is_within():
    gm, timer = calibrated(network(), images(24, size=12)), WeightTimer(seconds)
    with pytest.raises(FxlrdError, match=r"^allocate: latency=0.01 is out of reach: the fastest forms take ") as error:
        Allocate(latency=0.01, timer=timer)(gm)
    within = float(str(error.value).partition("take ")[2].split()[0])
    assert within > REST * 1e-6 / model_seconds(gm)
    assert planned(Allocate(latency=within, timer=timer)(gm).graph_module)


def test_layers_that_take_longer_than_their_model_are_called_in_doubt():
    gm = calibrated(network(), images(24, size=12))

    def busy(name, weights):  # while the layers are timed, but not the kernel that they are compared with
        return seconds(name, weights) * (1 if name in ("model", "before", "after") else 3)

    result = Allocate(latency=0.6, timer=WeightTimer(busy))(gm)
    (warning,) = result.warnings
    share = 3 * (model_seconds(gm) - REST * 1e-6) / model_seconds(gm)
    assert warning.startswith(f"allocate: the layers, timed alone, add up to {share:.0%} of the model's time")
    after = carried_out(result.graph_module)
    assert model_seconds(after) / model_seconds(gm) == pytest.approx(0.6, rel=0.02), "it is measured"
    assert Allocate(latency=0.6, cache=False, timer=WeightTimer(seconds))(gm).warnings == ()


@pytest.mark.parametrize("slowdown", [0.2, 5.0])
def test_timings_of_another_day_give_the_plan_of_today(slowdown):
    """The seconds of layers on disk and of the model are not of the same minutes."""
    gm = calibrated(network(), images(24, size=12))
    plan = planned(Allocate(latency=0.6, timer=WeightTimer(seconds))(gm).graph_module)
    timer = WeightTimer(lambda name, weights: slowdown * seconds(name, weights), kernel=slowdown)
    result = Allocate(latency=0.6, timer=timer)(gm)
    assert planned(result.graph_module) == plan
    assert result.warnings == ()
    assert all(set(names) <= {"model", "before", "after"} for names in timer.rounds), "no layer was timed again"


def test_a_device_on_which_nothing_is_faster():
    timer = WeightTimer(
        lambda name, weights: 1.1 if name == "after" else 1.0 if name == "before" else seconds(name, weights)
    )
    with pytest.raises(FxlrdError, match="no form of its layers is faster here"):
        Allocate(latency=0.5, timer=timer)(calibrated(network(), images(24, size=12)))


class Counting(nn.Module):
    """A model that counts its calls in a buffer, and whose forward cannot be traced."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.head = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += bool(x.abs().max() < 1e9)
        return self.head(self.wide(self.stem(x).relu()).relu())


def test_timing_leaves_the_buffers_of_the_model_as_they_were():
    model, x = Counting().double().eval(), torch.randn(32, 8).double()
    gm = Calibrate(x)(capture_any(model, Inputs.of(x))).graph_module
    calls = float(model.calls)
    timer = WeightTimer(seconds)
    Allocate(latency=0.9, merge=False, timer=timer)(gm)
    assert [names for names in timer.rounds if "after" in names], "a model was called"
    assert float(model.calls) == calls


# -- what is left alone


def test_layers_that_are_left_alone_say_why():
    model = nn.Sequential(
        *(conv(3, 32), nn.ReLU(), conv(32, 32, groups=32), nn.ReLU(), conv(32, 32, 1), nn.ReLU()),
        *(conv(32, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16)),
    )
    gm = calibrated(model.double().eval(), images(24, size=12))
    result = Allocate(params=0.95, skip=("6",))(gm)
    assert not result.modified
    assert result.graph_module.code == gm.code
    found = reasons(result)
    assert found["0"] == "stem"
    assert found["2"] == "depthwise"
    assert found["6"] == "skip"
    plan = planned(result.graph_module)
    assert not {"0", "2", "6"} & {*plan.ranks, *plan.retained}
    assert planned(gm) is None, "the graph that came in has no plan"


def test_what_stands_decomposed_already_is_left_alone():
    gm = Decompose(ranks={"3": 4})(calibrated(network(), images(24, size=12))).graph_module
    result = Allocate(params=0.8)(gm)
    assert {v for k, v in reasons(result).items() if k.startswith("3.")} == {"factor"}


def test_a_layer_that_is_called_twice_costs_its_flops_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.b(self.a(self.a(x).relu()).relu())

    x = torch.randn(400, 32).double()
    gm = calibrated(Twice().double().eval(), x)
    for measure in ("params", "flops"):
        result = Allocate(**{measure: 0.7})(gm)
        assert share(carried_out(result.graph_module), gm, measure) == pytest.approx(0.7, rel=0.05)
        assert share(carried_out(result.graph_module), gm, measure) <= 0.7


def test_without_calibration_the_weights_are_judged():
    gm = capture(network(), images(24, size=12))
    result = Allocate(params=0.6)(gm)
    assert planned(result.graph_module).retained == {}
    after = carried_out(result.graph_module)
    assert share(after, gm, "params") == pytest.approx(0.6, rel=0.02)
    assert not any(provenance(n).fitted for n in after.graph.nodes if provenance(n) is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of params, flops, latency or layers"),
        ({"params": 0.5, "latency": 0.5}, "got params and latency"),
        ({"params": 1.0}, "params=1.0 is not a fraction"),
        ({"flops": -0.5}, "flops=-0.5 is not a fraction"),
        ({"latency": float("nan")}, "latency=nan is not a fraction"),
        ({"latency": "half"}, "latency='half' is not a fraction"),
        ({"params": 0.5, "seconds": 0}, "leaves no time"),
        ({"params": 0.5, "skip": (3,)}, "3 is not a name"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(FxlrdError, match=message) as error:
        Allocate(**options)
    assert "\n" not in str(error.value)


def test_a_plan_does_not_depend_on_the_scale_of_activations():
    """Without Γ the errors of merges and of factors are in one unit."""

    def plan(scale):
        torch.manual_seed(0)
        layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        model = nn.Sequential(*layers).double().eval()
        with torch.no_grad():  # the same function
            model[2].weight.mul_(scale)
            model[2].bias.mul_(scale)
            model[4].weight.div_(scale)
        x = torch.randn(2000, 64).double()
        made = planned(Allocate(params=0.6)(Calibrate(x)(capture(model, x)).graph_module).graph_module)
        return dict(made.retained), dict(made.ranks)

    assert plan(1e-4) == plan(1.0) == plan(1e4)


def test_merged_layers_have_no_other_form_but_lose_channels():
    torch.manual_seed(0)
    blocks = [layer for _ in range(3) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())]
    model, x = nn.Sequential(*blocks).double().eval(), torch.randn(40, 32, 8, 8).double()
    start = "merge{mode=exact,norms=true},calibrate{effects=40}"

    def made(text):
        return Pipeline.parse(f"{start},{text}").with_options(calibration=x)(capture(model, x)).graph_module

    with pytest.raises(FxlrdError, match="allocate"):
        made("allocate{params=0.7,merge=false},decompose")
    small = made("allocate{params=0.7},merge,decompose")
    assert cost.params(small) <= 0.7 * cost.params(model)


def test_a_plan_whose_merges_were_not_made_is_refused():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    model, x = nn.Sequential(*layers).double().eval(), torch.randn(2000, 64).double()
    gm = Allocate(params=0.5)(Calibrate(x, effects=64)(capture(model, x)).graph_module).graph_module
    assert planned(gm).retained
    with pytest.raises(FxlrdError, match=r"has planned to merge the channels of .*: put merge before decompose"):
        Decompose()(gm)
    Decompose()(Merge()(gm).graph_module)
