from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxlrd import FxlrdError, capture
from fxlrd.calibration.batches import as_batches, as_inputs
from fxlrd.calibration.importance import FEWEST, MANY, Importance
from fxlrd.calibration.moments import LARGEST, PATCHES, moments, sweep
from fxlrd.calibration.patches import patches
from fxlrd.factor.ridge import GRID
from fxlrd.graph.facts import output_moments, statistics
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.layer import statistics_of
from fxlrd.layers.fit import MOST, Moments, Statistics
from fxlrd.layers.kinds import channel_axis
from tests.support.factors import decaying


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


def test_the_covariance_is_about_the_mean():
    x = torch.randn(50, 7).double() + 3
    found = Moments.empty(7, x.device)
    found.add(x)
    torch.testing.assert_close(found.covariance, torch.cov(x.T, correction=0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("value", [0.0, 0.3, 1e3])
@pytest.mark.parametrize("count", [1, 3, 7, 1000])
def test_what_never_varies_has_a_covariance_without_negative_directions(value, count):
    found = Moments.empty(18, torch.device("cpu"))
    for part in (torch.rand(18).double() * value).expand(count, 18).split(5):
        found.add(part)
    values = torch.linalg.eigvalsh(found.covariance)
    assert values.min() >= 0
    assert values.max() <= 2e-12 * value**2


def measured(x: torch.Tensor, batch: int = 50) -> Moments:
    """Return the moments of samples that come in batches."""
    found = Moments.empty(x.shape[1], x.device)
    for part in x.split(batch):
        found.add(part)
    return found


@pytest.mark.parametrize("batch", [1, 3, 50, 200])
def test_one_position_in_eight_is_held_out_while_there_are_few(batch):
    x = torch.randn(200, 100).double()
    found = measured(x, batch)
    assert found.count == 200
    assert found.held_out.count == 200 // 8
    torch.testing.assert_close(found.second, x.mT @ x / 200, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 37, 1000, 40000])
def test_of_many_positions_some_of_all_batches_are_held_out(batch):
    # All channels are the number of the row.
    x = torch.arange(40000.0).view(-1, 1).expand(-1, 3)
    found = measured(x, batch)
    assert MOST / 2 <= found.held_out.count <= MOST
    rows = found.held_out.rows[:, 0]
    assert (rows.diff() > 0).all(), "none is held out twice"
    share = torch.arange(1, len(rows) + 1) / len(rows)
    assert (rows / len(x) - share).abs().max() < 0.05 or batch == len(x), "as many of the first as of the last"
    for block in found.held_out.blocks:
        assert (block[-1, 0] + 1) % batch == 0 or block[-1, 0] == len(x) - 1, "a block is the end of a batch"
        assert (block[:, 0].diff() == 1).all()


def test_texts_of_many_kinds_ask_for_a_ridge_however_many_their_positions():
    # The channels agree in each text, in some more than in others, as 60 texts say of 4 more.
    moments = Moments.empty(40, torch.device("cpu"))
    mixing = torch.randn(40, 40).double()
    for _ in range(64):
        of_the_text = torch.randn(4, 40).double()
        moments.add(torch.randn(400, 4).double() @ of_the_text @ mixing + 0.1 * torch.randn(400, 40).double())
    assert moments.count / 40 > 600
    assert 1e-5 < moments.ridge < GRID[-1]


def test_moments_of_two_calls_add_up():
    x = decaying(200, 100)
    both, whole = measured(x[:120], 20) + measured(x[120:], 20), measured(x, 20)
    torch.testing.assert_close(both.products, whole.products, rtol=1e-12, atol=1e-12)
    assert both.held_out.count == whole.held_out.count
    assert both.ridge == whole.ridge > 0


def test_the_ridge_is_chosen_anew_when_positions_are_added():
    x = decaying(300, 60)
    found = measured(x[:40], 20)
    few = found.ridge
    found.add(x[40:])
    assert few > found.ridge > 0


@pytest.mark.parametrize("count", [0, 1])
def test_next_to_nothing_is_regularised_most(count):
    assert measured(torch.randn(count, 8)).ridge == GRID[-1]


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
    assert set(output_moments(relu)) == {(1, 1), (3, 1)}
    check(moments(relu, 1), rows(y, 1))
    check(moments(relu, 3), rows(y, 3))
    assert moments(relu, 2) is None
    check(moments(node(gm, "x"), 1), rows(torch.cat(batches), 1))
    check(moments(node(gm, "stem"), 1), rows(torch.cat([model.stem(x) for x in batches]).detach(), 1))
    check(moments(node(gm, "c"), 3), rows(model.c(y).detach(), 3))


def test_outputs_may_be_left_out():
    gm = capture(Shared().eval(), torch.randn(2, 3, 10, 10))
    sweep(gm, as_inputs(gm, [torch.randn(2, 3, 10, 10)]), outputs=False)
    assert {n.name for n in gm.graph.nodes if output_moments(n) is not None} == {"x", "relu"}


def test_memory_does_not_grow_with_the_batches():
    gm = capture(Shared().eval(), torch.randn(2, 3, 10, 10))

    def kept(count: int) -> list[tuple]:
        sweep(gm, as_inputs(gm, (torch.randn(2, 3, 10, 10) for _ in range(count))))
        every = [m for n in gm.graph.nodes for m in (output_moments(n) or {}).values()]
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
    assert set(output_moments(node(gm, "drop"))) == {(1, 1)}


def test_the_widest_tensors_are_passed_over():
    gm = capture(nn.Sequential(nn.Linear(LARGEST + 1, 4), nn.Linear(4, 2)), torch.randn(2, LARGEST + 1))
    sweep(gm, as_inputs(gm, [torch.randn(2, LARGEST + 1)]))
    assert moments(node(gm, "input_1"), 1) is None
    assert moments(node(gm, "0"), 1).count == 2


X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12)


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
        ([{"image": X}], "calibration: batch 0: a dict of image, but the model was given input: rename its keys"),
        ([X.clamp(-1, 1) * 3e38], "gives NaN or Inf for these inputs; is their scale right, and does float32 hold"),
    ],
)
def test_batches_that_are_none(data, message):
    gm = capture(nn.Sequential(nn.Linear(6, 300), nn.Linear(300, 2)), X)
    gm.get_submodule("0").weight.data.fill_(10.0)
    with pytest.raises(FxlrdError, match=message) as error:
        sweep(gm, as_inputs(gm, as_batches(data)))
    assert "\n" not in str(error.value)
    assert not any(output_moments(n) is not None for n in gm.graph.nodes), "nothing is half-written"


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


# -- patches


@st.composite
def convs(draw):
    stride = draw(st.sampled_from([1, 2, 3, (2, 1)]))
    return nn.Conv2d(
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 2), (2, 2), (4, 1)])),
        stride=stride,
        padding=draw(st.sampled_from([0, 1, 2, (0, 2), (1, 0), "valid"] + ["same"] * (3 if stride == 1 else 0))),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
        dilation=draw(st.sampled_from([1, 2, (1, 2), (3, 1)])),
        bias=False,
        dtype=torch.float64,
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(deadline=None, max_examples=200)
@given(convs(), st.sampled_from([(10, 10), (11, 13)]), st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_the_weight_times_the_patches_is_the_output(conv, size, memory_format):
    x = torch.randn(2, conv.in_channels, *size, dtype=torch.float64).contiguous(memory_format=memory_format)
    torch.testing.assert_close(patches(conv, x) @ conv.weight.flatten(1).mT, rows(conv(x), 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
def test_patches_are_taken_in_float64(mode):
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode).bfloat16()
    x = torch.randn(1, 2, 5, 5).bfloat16().requires_grad_()
    found = patches(conv, x)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert torch.equal(found, patches(conv, x.double()))


SEQUENCES = [
    (nn.Conv1d(3, 4, 3, stride=2, padding=1), (9,)),
    (nn.Conv1d(3, 4, 4, padding="same", padding_mode="circular", dilation=2), (9,)),
    (nn.Conv3d(3, 4, (2, 1, 3), stride=(1, 2, 1), padding=(0, 1, 2)), (4, 5, 6)),
    (nn.Conv3d(3, 4, 3, padding=1, padding_mode="reflect"), (4, 5, 6)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("conv", "size"), SEQUENCES)
def test_patches_of_sequences_and_of_volumes(conv, size):
    conv, x = conv.double(), torch.randn(2, 3, *size).double()
    wanted = rows(conv(x) - conv.bias.view(-1, *[1] * len(size)), 1)
    torch.testing.assert_close(patches(conv, x) @ conv.weight.flatten(1).mT, wanted, rtol=0, atol=1e-12)
    assert torch.equal(patches(conv, x[0]), patches(conv, x[:1]))
    model = nn.Sequential(conv)
    for batched in (True, False):
        saw = statistics(node(swept(model, [x if batched else x[0]], patches=99), "0"))
        check(saw.patch_moments, patches(conv, x if batched else x[0]))
        check(saw.input_moments, rows(x if batched else x[:1], 1))


def test_some_patches_are_evenly_spread():
    conv, x = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 12, 12)
    every = patches(conv, x)
    assert torch.equal(patches(conv, x, 57), every[::7])
    assert torch.equal(patches(conv, x, 50), every[::9]), "an odd step"
    assert torch.equal(patches(conv, x, 10**6), every)


class Kernels(nn.Module):
    """Convs of several kinds that read one tensor."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect")
        self.b, self.c = nn.Conv2d(3, 4, (1, 3)), nn.Conv2d(3, 4, 5, padding=2)
        self.point, self.grouped = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 3, groups=3)

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x), self.point(x), self.grouped(x)


def swept(model, batches, **options):
    gm = capture(model, batches[0])
    sweep(gm, as_inputs(gm, batches), **options)
    return gm


def test_moments_of_patches():
    model, batches = Kernels(), [torch.randn(3, 3, 3, 4), torch.randn(9, 3, 3, 4)]
    gm = swept(model, batches, patches=27)
    for name in ("a", "b"):
        found = statistics(node(gm, name))
        check(found.patch_moments, torch.cat([patches(model.get_submodule(name), x) for x in batches]))
        check(found.input_moments, rows(torch.cat(batches), 1))
    for name in ("c", "point", "grouped"):  # too large, nothing to it, and not of one kernel
        assert statistics(node(gm, name)).patch_moments is None
    assert all(statistics(node(swept(model, batches), name)).patch_moments is None for name in "ab")


def test_an_image_without_a_batch_has_the_same_patches():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), torch.randn(3, 6, 8)
    check(statistics(node(swept(model, [x], patches=27), "0")).patch_moments, patches(model[0], x[None]))


def test_of_large_images_enough_patches_are_taken():
    model, x = nn.Sequential(nn.Conv2d(1, 2, 2)), torch.randn(20, 1, 33, 33)
    found = statistics(node(swept(model, [x], patches=4), "0")).patch_moments
    assert PATCHES * 4 / 2 < found.count < PATCHES * 4 * 2
    # Every place is as good as another: moments are near those of all patches, ±6 standard deviations.
    assert (found.second - torch.eye(4)).abs().max() < 6 * (2 / found.count) ** 0.5
    assert found.mean.abs().max() < 6 * found.count**-0.5


# -- what is seen of a layer


def test_what_a_layer_is_fitted_to():
    model, x = Kernels().double(), torch.randn(3, 3, 6, 8).double() + 1
    gm = swept(model, [x], patches=27, effects=1)
    saw = statistics(node(gm, "a"))
    fit = saw.fit(model.a)
    seen_there = patches(model.a, x)
    torch.testing.assert_close(fit.covariance, torch.cov(rows(x, 1).T, correction=0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fit.mean, rows(x, 1).mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fit.patch_covariance, torch.cov(seen_there.T, correction=0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fit.patch_mean, seen_there.mean(0), rtol=1e-12, atol=1e-12)
    assert (fit.ridge, fit.patch_ridge) == (saw.input_moments.ridge, saw.patch_moments.ridge)
    assert torch.equal(fit.importance, saw.importance)
    assert statistics(node(gm, "grouped")).fit(model.grouped).covariance.shape == (3, 3)
    assert statistics(node(gm, "point")).fit(model.point).patch_covariance is None


def test_what_was_seen_of_another_layer_fits_none():
    gm = swept(Kernels(), [torch.randn(3, 3, 6, 8)], patches=27)
    saw = statistics(node(gm, "a"))
    assert saw.fit(nn.Conv2d(4, 4, 3)) is None
    assert saw.fit(nn.Linear(4, 2)) is None
    assert saw.fit(nn.Conv2d(3, 4, 5)).patch_covariance is None, "the patches are of another kernel"
    assert Statistics().fit(nn.Conv2d(3, 4, 3)) is None
    assert Statistics(Moments.empty(3, torch.device("cpu"))).fit(nn.Conv2d(3, 4, 3)) is None, "it has seen nothing"


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(self.conv(x).relu())


def test_all_calls_of_a_layer_add_up():
    model, x = Twice().double(), torch.randn(4, 3, 6, 8).double()
    gm = swept(model, [x], patches=27, effects=4)
    calls = [n for n in gm.graph.nodes if n.op == "call_module"]
    both, y = statistics_of(calls), model.conv(x).relu().detach()
    check(both.input_moments, rows(torch.cat([x, y]), 1))
    check(both.patch_moments, torch.cat([patches(model.conv, x), patches(model.conv, y)]))
    torch.testing.assert_close(both.importance, sum(statistics(n).importance for n in calls), rtol=1e-12, atol=0)
    assert statistics_of([calls[0], calls[0]]) is statistics(calls[0]), "the factors of a layer share one"
    assert statistics_of([n for n in gm.graph.nodes if n.op != "call_module"]) is None


def test_a_sum_knows_only_what_both_know():
    a, b = Moments.empty(3, torch.device("cpu")), Moments.empty(3, torch.device("cpu"))
    both = Statistics(a, a, torch.eye(2)) + Statistics(b)
    assert both.input_moments is not None
    assert both.patch_moments is both.importance is None
    assert (Statistics() + Statistics()).input_moments is None


def test_a_layer_has_what_it_reads_along_its_own_axis():
    gm = swept(Shared().eval(), [torch.randn(2, 3, 10, 10)])
    assert len(statistics(node(gm, "a")).input_moments.total) == 6
    assert len(statistics(node(gm, "c")).input_moments.total) == 8
    assert statistics(node(gm, "a")).input_moments is statistics(node(gm, "b")).input_moments


def test_effects_are_measured_on_so_many_inputs():
    model, batches = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), list(torch.randn(6, 2, 3, 5, 5))
    for count, used in ((0, 0), (1, 1), (2, 1), (3, 2), (100, 6)):
        gm = swept(model, batches, effects=count)
        importance = Importance(gm)
        for x in batches[:used]:
            importance.add(Inputs((x,)))
        for name in "02":
            found, wanted = statistics(node(gm, name)).importance, importance.estimate(node(gm, name))
            assert found is wanted is None if used == 0 else torch.equal(found, wanted)


def test_a_second_sweep_leaves_nothing_of_the_first():
    gm = swept(Kernels(), [torch.randn(3, 3, 6, 8)], patches=27, effects=3)
    sweep(gm, as_inputs(gm, [torch.randn(5, 3, 6, 8)]))
    saw = statistics(node(gm, "a"))
    assert saw.input_moments.count == 5 * 48
    assert saw.patch_moments is saw.importance is None


def test_patches_of_zeros_are_like_any():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    fit = statistics(node(swept(model, [torch.zeros(2, 3, 5, 5)], patches=27, effects=2), "0")).fit(model[0])
    assert not fit.covariance.any()
    assert not fit.patch_covariance.any()
    assert fit.importance.isfinite().all()


class ReadAfterAnInPlaceActivation(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.enter, self.deep, self.short = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3), nn.Conv2d(4, 2, 3)
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, x):
        y = self.enter(x)
        z = self.act(y)
        return self.deep(z) + self.short(y if self.act.inplace else z)


@pytest.mark.parametrize("outputs", [True, False])
def test_moments_are_of_what_is_really_read(outputs):
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    fits = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = ReadAfterAnInPlaceActivation(inplace).double().eval()
        gm = capture(model, x)
        sweep(gm, [Inputs((x,))], outputs=outputs, patches=100)
        fits.append([statistics(node(gm, name)) for name in ("deep", "short")])
    for one, other in zip(*fits, strict=True):
        torch.testing.assert_close(one.input_moments.second, other.input_moments.second, rtol=1e-14, atol=0)
        torch.testing.assert_close(one.patch_moments.second, other.patch_moments.second, rtol=1e-14, atol=0)
    if outputs:
        made = moments(node(capture(model, x), "enter"), 1)
        assert made is None, "a sweep writes to its own graph only"


@pytest.mark.parametrize(
    ("shape", "backwards"), [((MANY // FEWEST,), FEWEST), ((1,), 5 * FEWEST), ((2, MANY // FEWEST), 5 * FEWEST)]
)
def test_outputs_for_long_sequences_need_few_inputs_for_effects(monkeypatch, shape, backwards):
    added = []
    add = Importance._add
    monkeypatch.setattr(Importance, "_add", lambda self, x, others: added.append(x) or add(self, x, others))
    batches = [torch.randn(4, *shape, 3) for _ in range(5 * FEWEST // 4)]
    gm = swept(nn.Sequential(nn.Linear(3, 2)), batches, effects=5 * FEWEST)
    assert sum(len(inputs.args[0]) for inputs in added) == backwards
    measured = statistics(node(gm, "0"))
    assert measured.input_moments.count == 5 * FEWEST * math.prod(shape), "moments are those of all inputs"
    assert measured.importance.isfinite().all()
