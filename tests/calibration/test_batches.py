from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxlrd
from fxlrd import FxlrdError, capture
from fxlrd.calibration.batches import (
    HOLDOUT_PERIOD,
    Variety,
    as_batches,
    as_inputs,
    failure,
    given_as,
    rows_are_examples,
    to_fit,
)
from fxlrd.graph.captured import Whole
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import fork

X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12)


def net():
    return nn.Sequential(nn.Linear(6, 3)).eval()


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
        Inputs((X,)),
        [Inputs((), {"input": X})],
        {"input": X},
        [{"input": X[:3]}, {"input": X[3:]}],
        DataLoader(TensorDataset(X, Y), batch_size=5),
        DataLoader(X, batch_size=5),
    ],
    ids=lambda data: type(data).__name__,
)
def test_batches_come_in_many_forms(data):
    found = list(as_inputs(capture(net(), X), as_batches(data)))
    assert torch.equal(torch.cat([next(iter([*each.args, *each.kwargs.values()])) for each in found]), X)
    assert all(len(each.args) + len(each.kwargs) == 1 for each in found), "labels are dropped"


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x, y, scale=2.0):
        return self.fc(x * scale + y)


def test_as_many_of_a_tuple_are_taken_as_the_model_needs():
    (found,) = as_inputs(capture(Two(), (X, X)), [(X, X + 1, Y)])
    assert len(found.args) == 2
    assert torch.equal(found.args[1], X + 1)


@pytest.mark.parametrize("data", [5, "images/", None, torch.relu])
def test_what_is_no_calibration_data(data):
    with pytest.raises(FxlrdError, match=r"^calibration: a \w+ is no calibration data; give a tensor, a list"):
        as_batches(data)


class Raising:
    """Data of one batch, and an exception after it."""

    def __iter__(self):
        yield X
        raise OSError("disk gone\nmore")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([X, X / 0], "calibration: batch 1 holds NaN or Inf"),
        ([X, "a.png"], "calibration: batch 1: a str is not a tensor"),
        (Raising(), "calibration: the data give no batch 1: OSError: disk gone"),
        ([{"input": [X * float("nan")]}], "calibration: batch 0 holds NaN or Inf"),
        (
            [{"image": X, "target": Y}],
            r"calibration: batch 0: a dict of image, target, but the model was given input: rename",
        ),
    ],
)
def test_a_bad_batch_is_named(data, message):
    with pytest.raises(FxlrdError, match=message):
        list(as_inputs(capture(net(), X), data))


def test_data_that_raise_are_the_cause_of_the_error():
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(FxlrdError, match=r"^calibration: the data give no batch 1: OSError: disk gone$") as error:
        fxlrd.compress(model, X, preset="merge", calibration=Raising(), measure=False)
    assert isinstance(error.value.__cause__, OSError)


def test_whole_numbers_are_not_looked_at_for_nan():
    assert len(list(as_inputs(capture(nn.Sequential(nn.Embedding(12, 2)), Y), [Y]))) == 1


def test_a_failure_names_the_batch_in_one_line():
    inputs = Inputs((X,))
    error = failure(3, inputs, RuntimeError("first line\nsecond"))
    assert str(error) == "calibration: the model fails on batch 3 (float32[12, 6] on cpu): RuntimeError: first line"
    assert str(failure(0, inputs, FxlrdError("no"))).endswith(": no")


# -- what is held out


def numbered(*sizes):
    """Batches whose rows are numbered from 0 on."""
    parts = torch.arange(sum(sizes)).float()[:, None].split(sizes)
    return [Inputs((part,), {"mask": part + 0.5}) for part in parts]


def divided(batches):
    """The numbers of the rows to fit to, and of those held out."""
    held_out: list[Inputs] = []
    fit = list(to_fit(batches, held_out))
    return tuple([int(v) for each in part for v in each.args[0].flatten()] for part in (fit, held_out))


@given(st.lists(st.integers(1, 12), max_size=23))
def test_a_split_is_disjoint_covers_everything_and_stays_in_order(sizes):
    fit, held_out = divided(numbered(*sizes))
    assert sorted(fit + held_out) == list(range(sum(sizes)))
    assert fit == sorted(fit)
    assert held_out == sorted(held_out)
    assert divided(numbered(*sizes)) == (fit, held_out)
    if len(sizes) >= HOLDOUT_PERIOD or any(size >= HOLDOUT_PERIOD for size in sizes):
        assert fit
        assert held_out


def test_every_fifth_batch_is_held_out():
    assert divided(numbered(*[1] * 12)) == ([0, 1, 2, 3, 5, 6, 7, 8, 10, 11], [4, 9])
    assert divided(numbered(*[1] * 5)) == ([0, 1, 2, 3], [4])


def test_of_few_batches_the_last_rows_are_held_out():
    assert divided(numbered(10)) == ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9])
    assert divided(numbered(5, 9)) == ([0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12], [4, 13])
    assert divided(numbered(4, 3)) == (list(range(7)), []), "too few to cut"
    assert divided(numbered(1)) == ([0], [])
    assert divided([]) == ([], [])


def test_all_arguments_are_cut_alike():
    held_out: list[Inputs] = []
    (fit,) = to_fit([Inputs((X, [Y, "text"]), {"z": (X + 1,), "scale": 2.0})], held_out)
    for part, where in ((fit, slice(10)), (held_out[0], slice(10, None))):
        assert torch.equal(part.args[0], X[where])
        assert torch.equal(part.args[1][0], Y[where])
        assert torch.equal(part.kwargs["z"][0], X[where] + 1)
        assert (part.args[1][1], part.kwargs["scale"]) == ("text", 2.0)


@pytest.mark.parametrize(
    "other", [torch.tensor(1.0), torch.randn(6), torch.randn(1, 6)], ids=["number", "vector", "broadcast"]
)
def test_arguments_without_a_common_batch_are_not_cut(other):
    held_out: list[Inputs] = []
    (fit,) = to_fit([Inputs((X, other))], held_out)
    assert torch.equal(fit.args[0], X)
    assert not held_out


def test_a_stream_is_not_read_ahead_of_more_than_it_must():
    read = []

    def stream():
        for i in range(20):
            read.append(i)
            yield Inputs((X,))

    found = to_fit(stream(), [])
    next(found)
    assert len(read) == HOLDOUT_PERIOD
    for _ in range(HOLDOUT_PERIOD - 1):
        next(found)
    assert len(read) == HOLDOUT_PERIOD + 1, "the fifth is held out, the sixth handed on at once"


# -- a call is made as the example inputs were


def one(example, batch, names=("x", "mask")):
    return given_as(Inputs.of(example), batch, names)


@pytest.mark.parametrize(
    ("example", "batch", "args", "kwargs"),
    [
        ({"x": 0}, {"x": X, "labels": Y}, (), {"x": X}),
        ({"x": 0}, ({"x": X}, Y), (), {"x": X}),
        ({"x": 0, "mask": 0}, (X, Y), (), {"x": X, "mask": Y}),
        ({"x": 0}, X, (), {"x": X}),
        ({"x": 0}, (X, Y), (), {"x": X}),
        ((0,), {"x": X, "labels": Y}, (), {"x": X}),
        ((0, 0), {"x": X, "mask": Y}, (), {"x": X, "mask": Y}),
        ((0,), (X, Y), (X,), {}),
        (({"image": 0},), {"image": X, "target": Y}, ({"image": X, "target": Y},), {}),
        (({"image": 0},), ({"image": X}, Y), ({"image": X},), {}),
        (Inputs((0,), {"mask": 0}), (X, Y), (X,), {"mask": Y}),
        (Inputs((0,), {"mask": 0}), (X,), (X,), {}),
    ],
)
def test_a_batch_is_given_as_the_example_was(example, batch, args, kwargs):
    inputs = one(example, batch)
    assert inputs.args == args or all(a is b for a, b in zip(inputs.args, args, strict=True))
    assert list(inputs.kwargs) == list(kwargs)
    assert all(inputs.kwargs[k] is v for k, v in kwargs.items())


def test_minus_infinity_is_how_masks_are_written():
    mask = torch.full((6, 6), float("-inf")).triu(1)
    assert len(list(as_inputs(capture(Two(), (X[:6], mask)), [(X[:6], mask)]))) == 1
    with pytest.raises(FxlrdError, match="batch 0 holds NaN or Inf"):
        list(as_inputs(capture(net(), X), [X.abs() / 0]))


class Aggregate(nn.Module):
    """The rows of x are the nodes of one graph, the second argument is its adjacency matrix."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x, adjacency):
        return adjacency @ self.fc(x)


@pytest.mark.parametrize(
    ("model", "inputs", "wanted"),
    [
        (net(), (X,), True),
        (nn.Sequential(nn.Linear(6, 3), nn.Flatten(0)), (X,), True),
        (Aggregate(), (X, torch.eye(12)), False),
        (nn.Linear(12, 3), (X[:, 0],), False),
        (nn.Sequential(nn.Linear(6, 3), nn.Softmax(0)), (X,), False),
    ],
    ids=["images", "flat outputs", "graph", "vector", "normalised over rows"],
)
def test_rows_are_examples_only_if_the_outputs_are_cut_alike(model, inputs, wanted):
    gm = capture(model, inputs)
    first = Inputs(tuple(t[:9] for t in inputs))
    assert rows_are_examples(gm, Inputs(inputs), first) is wanted


def test_rows_are_compared_once_for_a_graph_its_copies_and_inputs_of_one_form(monkeypatch):
    runs: list[int] = []
    outputs = Whole.outputs

    def counted(self, gm, inputs):
        runs.append(len(inputs.args[0]))
        return outputs(self, gm, inputs)

    monkeypatch.setattr(Whole, "outputs", counted)
    gm = capture(net(), X)
    assert rows_are_examples(gm, Inputs((X,)), Inputs((X[:9],)))
    assert rows_are_examples(fork(gm), Inputs((X[:8],)), Inputs((X[:7],)))
    assert runs == [12, 9]
    assert not rows_are_examples(gm, Inputs((X[0],)), Inputs((X[0, :4],)))


def test_what_is_not_divisible_is_fitted_to_as_a_whole():
    held_out: list[Inputs] = []
    (fit,) = to_fit([Inputs((X,))], held_out, lambda inputs, rows: False)
    assert fit.args[0] is X
    assert not held_out


@pytest.mark.parametrize(
    ("batches", "none"),
    [
        ([X], False),
        ([X[:1]], False),
        ([X[:1], X[:1]], True),
        ([torch.ones(4, 6)] * 3, True),
        ([torch.ones(4, 6), torch.ones(4, 6) * 2], False),
        ([torch.ones(4, 6), torch.ones(4, 5)], False),
        ([], False),
    ],
)
def test_inputs_that_are_all_alike(batches, none):
    variety = Variety()
    assert len(list(variety.watch(Inputs((b,)) for b in batches))) == len(batches)
    assert variety.none is none
