from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxlrd import FxlrdError, capture
from fxlrd.calibration import as_batches, as_inputs
from fxlrd.moments import LARGEST, MOMENTS, Moments, channel_axis, moments, sweep


def rows(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x.double().movedim(axis, -1).flatten(0, -2)


def check(found: Moments, expected: torch.Tensor) -> None:
    """Check moments against those of the rows ``expected``."""
    assert found.count == len(expected)
    assert found.second.dtype == found.mean.dtype == torch.float64
    torch.testing.assert_close(found.second, expected.mT @ expected / len(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.mean, expected.mean(0), rtol=1e-12, atol=1e-12)


def node(gm, name: str):
    return next(n for n in gm.graph.nodes if name in (n.name, str(n.target)))


def test_moments_are_expectations():
    x = torch.randn(50, 7)
    found = Moments.empty(7, x.device)
    for part in x.split(13):
        found.add(part)
    check(found, x.double())


def test_moments_of_nothing_are_zeros():
    found = Moments.empty(3, torch.device("cpu"))
    assert not found.second.any()
    assert not found.mean.any()


def test_a_fit_is_regularised_below_four_positions_a_channel():
    def ridge(count: int) -> float:
        return Moments(torch.zeros(8), torch.zeros(8, 8), count).ridge

    assert ridge(0) > ridge(4) > ridge(8) > ridge(31) > 0
    assert ridge(32) == ridge(10**6) == 0


@pytest.mark.parametrize(
    ("module", "dims", "axis"),
    [(nn.Conv2d(1, 1, 1), 4, 1), (nn.Conv2d(1, 1, 1), 3, 0), (nn.Linear(1, 1), 2, 1), (nn.Linear(1, 1), 4, 3)],
)
def test_the_axis_of_the_channels(module, dims, axis):
    assert channel_axis(module, dims) == axis


class Shared(nn.Module):
    """Three layers that read one tensor, a conv and a linear of its last axis among them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.a, self.b, self.c = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 3), nn.Linear(8, 2)

    def forward(self, x):
        y = self.stem(x).relu()
        return self.a(y), self.b(y), self.c(y)


def test_each_tensor_has_its_moments_once_for_each_axis():
    model, batches = Shared().eval(), [torch.randn(2, 3, 10, 10) for _ in range(3)]
    gm = capture(model, batches[0])
    sweep(gm, as_inputs(gm, batches))
    y = torch.cat([model.stem(x).relu() for x in batches]).detach()
    relu = node(gm, "relu")
    assert set(relu.meta[MOMENTS]) == {(1, 1), (3, 1)}
    check(moments(relu, 1), rows(y, 1))
    check(moments(relu, 3), rows(y, 3))
    assert moments(relu, 2) is None
    check(moments(node(gm, "x"), 1), rows(torch.cat(batches), 1))
    check(moments(node(gm, "stem"), 1), rows(torch.cat([model.stem(x) for x in batches]).detach(), 1))
    check(moments(node(gm, "c"), 3), rows(model.c(y).detach(), 3))


def test_outputs_may_be_left_out():
    gm = capture(Shared().eval(), torch.randn(2, 3, 10, 10))
    sweep(gm, as_inputs(gm, [torch.randn(2, 3, 10, 10)]), outputs=False)
    assert {n.name for n in gm.graph.nodes if MOMENTS in n.meta} == {"x", "relu"}


def test_memory_does_not_grow_with_the_batches():
    gm = capture(Shared().eval(), torch.randn(2, 3, 10, 10))

    def kept(count: int) -> list[tuple]:
        sweep(gm, as_inputs(gm, (torch.randn(2, 3, 10, 10) for _ in range(count))))
        every = [m for n in gm.graph.nodes for m in n.meta.get(MOMENTS, {}).values()]
        return [(m.products.shape, m.total.shape) for m in every]

    assert kept(1) == kept(7)
    assert len(kept(2)) == 7


FLATTENED = {
    "function": lambda x: torch.flatten(x, 1),
    "method": lambda x: x.flatten(1),
    "module": nn.Flatten(),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "with more": lambda x: torch.nn.functional.relu(x.flatten(1) * 2),
}


class Flattened(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        self.conv, self.flatten, self.drop, self.fc = nn.Conv2d(3, 4, 3), flatten, nn.Dropout(), nn.Linear(36, 2)

    def forward(self, x):
        return self.fc(self.drop(self.flatten(self.conv(x).relu())))


@pytest.mark.parametrize("name", FLATTENED)
def test_a_linear_on_a_flattened_tensor_also_sees_its_channels(name):
    model, x = Flattened(FLATTENED[name]).eval(), torch.randn(7, 3, 5, 5)
    gm = capture(model, x)
    sweep(gm, as_inputs(gm, [x]))
    flat = model.flatten(model.conv(x).relu()).detach()
    check(moments(node(gm, "drop"), 1, 9), rows(flat.unflatten(1, (4, 9)), 1))
    check(moments(node(gm, "drop"), 1), rows(flat, 1))


@pytest.mark.parametrize(
    "flatten",
    [lambda x: x.flatten(2).sum(1).repeat(1, 4), lambda x: x.permute(0, 2, 3, 1).reshape(-1, 36)],
    ids=["spatial", "fixed"],
)
def test_what_does_not_flatten_channels_has_none(flatten):
    gm = capture(Flattened(flatten).eval(), torch.randn(7, 3, 5, 5))
    sweep(gm, as_inputs(gm, [torch.randn(7, 3, 5, 5)]))
    assert set(node(gm, "drop").meta[MOMENTS]) == {(1, 1)}


def test_the_widest_tensors_are_passed_over():
    gm = capture(nn.Sequential(nn.Linear(LARGEST + 1, 4), nn.Linear(4, 2)), torch.randn(2, LARGEST + 1))
    sweep(gm, as_inputs(gm, [torch.randn(2, LARGEST + 1)]))
    assert moments(node(gm, "input_1"), 1) is None
    assert moments(node(gm, "0"), 1).count == 2


X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12)


@pytest.mark.parametrize(
    "data",
    [
        X,
        [X],
        list(X.split(5)),
        (part for part in X.split(5)),
        [(X[:4], Y[:4]), (X[4:], Y[4:])],
        [[X[:4], Y[:4]], [X[4:], Y[4:]]],
        [(X,)],
        {"input": X},
        [{"input": X[:3], "labels": Y}, {"input": X[3:]}],
        DataLoader(TensorDataset(X, Y), batch_size=5),
        DataLoader(X, batch_size=5),
    ],
    ids=["tensor", "list", "split", "generator", "pairs", "lists", "tuple", "dict", "dicts", "loader", "bare loader"],
)
def test_batches_come_in_many_forms(data):
    gm = capture(nn.Sequential(nn.Linear(6, 3)), X)
    sweep(gm, as_inputs(gm, as_batches(data)))
    check(moments(node(gm, "input_1"), 1), X.double())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x, y, scale=2.0):
        return self.fc(x * scale + y)


def test_several_arguments_and_surplus():
    gm = capture(Two(), (X, X))
    sweep(gm, as_inputs(gm, [(X, X + 1, Y), (X, X)]))
    check(moments(node(gm, "add"), 1), torch.cat([X * 2.0 + (X + 1), X * 2.0 + X]).double())


NAN = torch.full((2, 6), float("nan"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "calibration: there are no inputs"),
        (X[:0], "calibration: there are no inputs"),
        (5, "calibration: a int is no calibration data; give a tensor, a list of batches or a DataLoader"),
        ("images/", "calibration: a str is no calibration data"),
        ([X, X[:, :5]], r"calibration: the model fails on batch 1 \(float32\[12, 5\] on cpu\): RuntimeError"),
        ([X.double()], r"calibration: the model fails on batch 0 \(float64\[12, 6\] on cpu\)"),
        ([X, NAN], "calibration: batch 1 holds NaN or Inf"),
        ([(X / 0, Y)], "calibration: batch 0 holds NaN or Inf"),
        (["a.png"], "calibration: batch 0: a str is not a tensor"),
        ([{"image": X}], "calibration: the model fails on batch 0 .* argument 'input' is missing"),
        ([X.clamp(-1, 1) * 3e38], "gives NaN or Inf for these inputs; is their scale right, and does float32 hold"),
    ],
)
def test_batches_that_are_none(data, message):
    gm = capture(nn.Sequential(nn.Linear(6, 300), nn.Linear(300, 2)), X)
    gm.get_submodule("0").weight.data.fill_(10.0)
    with pytest.raises(FxlrdError, match=message) as error:
        sweep(gm, as_inputs(gm, as_batches(data)))
    assert "\n" not in str(error.value)
    assert not any(MOMENTS in n.meta for n in gm.graph.nodes), "nothing is half-written"


def test_a_generator_is_read_only_once():
    gm, data = capture(nn.Sequential(nn.Linear(6, 3)), X), (x for x in [X])
    sweep(gm, as_inputs(gm, data))
    with pytest.raises(FxlrdError, match="a generator can be read only once"):
        sweep(gm, as_inputs(gm, data))


def test_the_sweep_runs_in_eval_mode_and_without_gradients():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3)).train()
    gm = capture(model, X)
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model]
    sweep(gm, as_inputs(gm, [X]))
    assert [m.training for m in model] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not moments(node(gm, "_2"), 1).products.requires_grad
