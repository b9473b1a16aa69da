from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd import capture
from fxlrd.allocation.merges import eliminated, interpolations, mergeable, readers
from fxlrd.calibration.batches import as_inputs
from fxlrd.calibration.moments import LARGEST, sweep
from fxlrd.factor.elimination import Reading, eliminate
from fxlrd.factor.interpolative import least_squares, lost
from fxlrd.graph.facts import statistics
from fxlrd.graph.guards import why_not_replaceable
from fxlrd.graph.surgery import annotate
from fxlrd.layers.compose import weight_by_channel
from fxlrd.layers.kinds import depthwise
from fxlrd.passes import Decompose


def choose(read, rank):
    retained = eliminated(read, rank).retained(rank)
    return retained, interpolations(read, retained)


def node(gm, name):
    return next(n for n in gm.graph.nodes if name in (n.name, str(n.target)))


def swept(model, x, **options):
    gm = capture(model, x)
    annotate(gm)
    sweep(gm, as_inputs(gm, [x]), **options)
    return gm


def found(gm, name, skip=(), stem=False):
    return mergeable(gm, node(gm, name), why_not_replaceable(gm, norms=True), skip, stem)


class Net(nn.Module):
    """A group of 8 channels with two consumers, one of 6 with one, and a depthwise conv."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)
        self.a, self.b = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.deep, self.last = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1)
        self.bn, self.relu = nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        return self.a(y), self.b(y), self.last(self.deep(self.mid(y).relu()))


def images(count=40):
    x = torch.randn(count, 3, 8, 8, dtype=torch.float64)
    return x + x.mean((2, 3), keepdim=True)


def net():
    model = Net().double().eval()
    model.bn.running_mean.normal_()
    return model


def test_depthwise():
    assert depthwise(nn.Conv2d(6, 6, 3, groups=6))
    assert depthwise(nn.Conv2d(6, 12, 3, groups=6))
    assert not depthwise(nn.Conv2d(6, 6, 3, groups=3))
    assert not depthwise(nn.Conv2d(1, 1, 3))
    assert not depthwise(nn.Linear(6, 6))


def test_what_may_be_merged():
    gm = swept(net(), images(2))
    whole = found(gm, "mid")
    assert (whole.channels, [str(p.node.target) for p in whole.producers]) == (6, ["mid"])
    assert [str(c.node.target) for c in whole.consumers] == ["last"]
    assert found(gm, "stem", stem=True).channels == 8


@pytest.mark.parametrize(
    ("name", "skip", "code"),
    [
        ("deep", (), "depthwise"),
        ("stem", (), "stem"),
        ("mid", ("la*",), "skip"),
        ("mid", ("mid",), "skip"),
        ("a", (), "model-output"),
    ],
)
def test_reasons_not_to_merge(name, skip, code):
    assert found(swept(net(), images(2)), name, skip).code == code


def test_skip_keeps_what_stands_between():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1))
    gm = swept(model.double().eval(), images(2))
    assert found(gm, "1").channels == 8
    assert found(gm, "1", skip=("2",)).code == "skip"


def test_factors_are_not_merged():
    gm = swept(net(), images(2))
    gm = Decompose(ranks={"last": 1})(gm).graph_module
    assert found(gm, "mid").code == "factor"


@pytest.mark.usefixtures("without_ridge")
def test_readers_know_what_they_read():
    model, x = net(), images()
    gm = swept(model, x, effects=40)
    whole = found(gm, "stem", stem=True)
    read = readers(gm, whole)
    y = model.relu(model.bn(model.stem(x))).detach().movedim(1, -1).flatten(0, -2)
    assert [str(r.consumer.node.target) for r in read] == ["a", "b", "mid"]
    for r in read:
        name = str(r.consumer.node.target)
        centred = y - y.mean(0) if r.mean is not None else y
        torch.testing.assert_close(r.second, centred.mT @ centred / len(y), rtol=1e-10, atol=1e-10)
        importance = statistics(node(gm, name)).importance
        assert torch.equal(r.weight, weight_by_channel(model.get_submodule(name), 1, importance))
        assert r.ridge == 0
    assert [r.mean is None for r in read] == [False, True, False], "b pads with zeros"
    for n in gm.graph.nodes:
        if statistics(n) is not None:
            statistics(n).importance = None
    assert torch.equal(readers(gm, whole)[0].weight, weight_by_channel(model.a))


def test_reasons_why_readers_know_too_little():
    gm = capture(net(), images(2))
    assert readers(gm, found(gm, "mid")).code == "no-moments"
    wide = capture(nn.Sequential(nn.Linear(1, LARGEST + 1), nn.Linear(LARGEST + 1, 1)), torch.randn(1, 1))
    assert readers(wide, found(wide, "0")).code == "too-many-channels"


def group_of(channels, consumers, samples=400):
    """A model of linear layers with one group of channels that depend on each other, and its inputs.

    Its readers have no bias, so that they take no constant.
    """

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.make = nn.Linear(channels, channels)
            self.readers = nn.ModuleList(nn.Linear(channels, n, bias=False) for n in consumers)
            with torch.no_grad():
                self.make.weight *= torch.logspace(0, -1.5, channels)

        def forward(self, x):
            y = self.make(x).relu()
            return tuple(reader(y) for reader in self.readers)

    return Model().double().eval(), torch.randn(samples, channels, dtype=torch.float64)


def curve(read, ranks):
    """The predicted error at each number of channels."""
    elimination = eliminated(read, min(ranks))
    return [elimination.error(rank) for rank in ranks]


RANKS = [1, 2, 5, 9, 11, 12]


def measured(model, y, reader, kept, matrix):
    """E‖W·(y − T·y[kept])‖² on the activations themselves."""
    return (((y - y[:, kept] @ matrix.mT) @ model.readers[reader].weight.mT).square().sum(1)).mean().item()


@pytest.mark.usefixtures("without_ridge")
def test_a_curve_is_the_error_that_is_made():
    model, x = group_of(12, [7])
    gm = swept(model, x)
    read = readers(gm, found(gm, "make"))
    y = model.make(x).relu().detach()
    whole = (y @ model.readers[0].weight.mT).square().sum(1).mean().item()
    errors = curve(read, RANKS)
    for rank, error in zip(RANKS, errors, strict=True):
        kept, ((matrix, _, relative),) = choose(read, rank)
        assert len(kept) == rank
        assert error == pytest.approx(measured(model, y, 0, kept, matrix), rel=1e-8, abs=1e-12 * whole)
        assert relative**2 == pytest.approx(error / whole, rel=1e-8, abs=1e-12)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3 * whole
    assert errors[-1] <= 1e-12 * whole, "all channels are kept"


@pytest.mark.usefixtures("without_ridge")
def test_many_readers_of_one_tensor_are_as_one_of_all_their_outputs():
    model, x = group_of(12, [7, 30, 5, 20])
    gm = swept(model, x)
    read = readers(gm, found(gm, "make"))
    apart = eliminate([Reading(r.second, r.weight, r.ridge) for r in read])
    together = eliminated(read, 0)
    assert together.dropped.tolist() == apart.dropped.tolist()
    torch.testing.assert_close(together.errors, apart.errors, rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("without_ridge")
def test_no_other_interpolation_of_the_kept_channels_is_better():
    model, x = group_of(12, [7])
    gm = swept(model, x)
    read = readers(gm, found(gm, "make"))
    y = model.make(x).relu().detach()
    kept, ((matrix, _, _),) = choose(read, 5)
    best = measured(model, y, 0, kept, matrix)
    others = [c for c in range(12) if c not in kept.tolist()]
    for _ in range(20):
        moved = matrix.clone()
        moved[others] += 1e-3 * torch.randn(len(others), 5, dtype=torch.float64)
        assert measured(model, y, 0, kept, moved) > best


@pytest.mark.usefixtures("without_ridge")
def test_consumers_agree_on_the_channels_and_their_errors_add_up():
    model, x = group_of(12, [3, 2, 3])
    gm = swept(model, x)
    read = readers(gm, found(gm, "make"))
    y = model.make(x).relu().detach()
    for rank, error in zip(RANKS, curve(read, RANKS), strict=True):
        kept, rebuilt = choose(read, rank)
        assert len(rebuilt) == 3
        made = sum(measured(model, y, i, kept, matrix) for i, (matrix, _, _) in enumerate(rebuilt))
        assert error == pytest.approx(made, rel=1e-8, abs=1e-12)


@pytest.mark.usefixtures("without_ridge")
def test_each_consumer_reads_its_own_tensor():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.make, self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(12, 5, bias=False)

        def forward(self, x):
            y = self.make(x)
            return self.a(y.relu()), self.b(y.tanh())

    model, x = Two().double().eval(), torch.randn(300, 6, dtype=torch.float64)
    gm = swept(model, x)
    read = readers(gm, found(gm, "make"))
    kept, (a, b) = choose(read, 7)
    assert b.shift is None
    y = model.make(x).detach()
    one = (y.relu() - y.relu()[:, kept] @ a.matrix.mT - a.shift) @ model.a.weight.mT
    other = (y.tanh() - y.tanh()[:, kept] @ b.matrix.mT) @ model.b.weight.mT
    made = (one.square().sum() + other.square().sum()).item() / len(x)
    assert curve(read, [7]) == pytest.approx([made], rel=1e-8)
    assert one.mean(0).abs().max() < 1e-12, "the constant is in the bias"


@pytest.mark.usefixtures("without_ridge")
def test_with_the_effect_a_curve_is_the_relative_squared_error_of_the_model():
    model, x = group_of(12, [7])
    gm = swept(model, x)
    z = model(x)[0].detach()
    # Of the model's only output, each entry matters alike.
    statistics(node(gm, "readers.0")).importance = len(x) * torch.eye(7).double() / z.square().sum()
    read = readers(gm, found(gm, "make"))
    y = model.make(x).relu().detach()
    for rank, error in zip(RANKS[:-1], curve(read, RANKS[:-1]), strict=True):
        kept, ((matrix, _, _),) = choose(read, rank)
        moved = model.readers[0](y[:, kept] @ matrix.mT)
        assert error == pytest.approx(((moved - z).square().sum() / z.square().sum()).item(), rel=1e-8)


def test_few_samples_are_fitted_with_a_ridge():
    model, x = group_of(12, [7], samples=6)
    gm = swept(model, x)
    read = readers(gm, found(gm, "make"))
    assert read[0].ridge > 0
    kept, ((matrix, _, _),) = choose(read, 4)
    assert torch.equal(matrix, least_squares(read[0].second, kept, read[0].ridge))
    assert curve(read, [4])[0] > lost(read[0].second, kept, matrix, read[0].weight), "the ridge counts"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_inputs_that_say_nothing_give_finite_curves(value):
    model, x = group_of(12, [7, 3])
    gm = swept(model, torch.full_like(x, value))
    errors = curve(readers(gm, found(gm, "make")), RANKS)
    assert all(0 <= e <= 1e-12 for e in errors), "one channel, or none, tells all others"


def test_what_is_lost_is_that_of_the_data():
    x = torch.randn(300, 20, dtype=torch.float64) @ torch.randn(20, 20).double()
    w, kept = torch.randn(6, 20).double(), torch.tensor([1, 4, 5, 17])
    g = x.mT @ x / 300
    other = torch.randn(20, 4).double()
    other[kept] = torch.eye(4).double()
    for matrix in (least_squares(g, kept), least_squares(g, kept, 0.1), other):
        wanted = ((x - x[:, kept] @ matrix.mT) @ w.mT).square().sum(1).mean().item()
        assert lost(g, kept, matrix, w) == pytest.approx(wanted, rel=1e-9)
