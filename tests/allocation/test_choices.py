from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxlrd.allocation.choices import NEGLIGIBLE, RATIOS, Choice, Curve, candidate_ranks, pareto
from fxlrd.layers.build import decomposed
from fxlrd.layers.fit import IMPORTANCE_RIDGE, Fit, roots
from fxlrd.layers.forms import explicit_ranks, full_ranks, parameters, ranks_by_ratio
from fxlrd.layers.forms import form as layers_form
from fxlrd.layers.kinds import channels_per_group

MODULES = {
    "linear": lambda: nn.Linear(9, 14),
    "wide linear": lambda: nn.Linear(14, 9),
    "conv1x1": lambda: nn.Conv2d(9, 14, 1),
    "grouped conv1x1": lambda: nn.Conv2d(12, 8, 1, groups=2),
    "conv": lambda: nn.Conv2d(6, 8, 3),
    "flat conv": lambda: nn.Conv2d(9, 4, (1, 2)),
    "grouped conv": lambda: nn.Conv2d(8, 12, 3, groups=2),
    "conv1d": lambda: nn.Conv1d(6, 8, 3),
    "transposed1x1": lambda: nn.ConvTranspose3d(9, 14, 1),
    "grouped transposed": lambda: nn.ConvTranspose2d(8, 12, 2, groups=2),
}


def fit_for(module, weighted):
    """Moments of channels that depend on each other, by channel only, and Γ."""
    c_in, c_out, groups = channels_per_group(module)
    c_in *= groups
    second = torch.randn(c_in, 3 * c_in).double().cov()
    importance = 1e-3 * torch.randn(c_out * groups, 99).double().cov() if weighted else None
    return Fit(second, torch.zeros(c_in).double(), 0.05, importance=importance)


def weighted_size(module, fit):
    """‖Kᵀ·W·R‖², what errors of a curve with Γ are parts of."""
    reads, importance = roots(module, fit)
    w = module.weight.detach().double()[..., None].flatten(2).unflatten(0, (channels_per_group(module)[2], -1))
    w = w.transpose(1, 2) if getattr(module, "transposed", False) else w
    w = torch.einsum("gst,gsck,gcd->gtdk", importance.root, w, reads.root)
    return w.square().sum().item()


def every_rank(module):
    full = full_ranks(module)
    if len(full) == 1:
        return [(r,) for r in range(1, full[0] + 1)]
    return [(r1, r2) for r1 in [*range(1, full[0] + 1), None] for r2 in [*range(1, full[1] + 1), None] if r1 or r2]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("given", ["weight", "moments", "effect"])
def test_the_curve_is_the_squared_error_of_an_svd_and_bounds_that_of_a_tucker_form(name, given):
    module = MODULES[name]().double()
    fit = None if given == "weight" else fit_for(module, given == "effect")
    unit = weighted_size(module, fit) if given == "effect" else 1.0
    curve = Curve(module, fit)
    for ranks in every_rank(module):
        error = decomposed(module, ranks, fit=fit)[1] ** 2 * unit
        if layers_form(module) == "svd" or None in ranks:  # of one mode alone the best is known too
            assert curve.error(ranks) == pytest.approx(error, rel=1e-7, abs=1e-12 * unit)
        else:
            assert error <= curve.error(ranks) + 1e-12 * unit
            assert curve.error(ranks) <= 2 * error + 1e-12 * unit, "each mode's tail is at most the error"


@pytest.mark.parametrize(
    "module", [nn.ConvTranspose2d(6, 8, 2, stride=2), nn.ConvTranspose1d(6, 8, 1, stride=3, output_padding=2)]
)
def test_the_curve_of_an_upsampling_counts_each_output_once(module):
    module, shape = module.double(), (50, 6, 4, 5)[: module.weight.dim()]
    x = torch.randn(shape).double()
    x = x - x.transpose(0, 1).flatten(1).mean(1).view(-1, *[1] * (len(shape) - 2))
    made = module(x).transpose(0, 1).flatten(1)
    # What the effect on a model would be that puts out just this: Σ g·gᵀ over all positions of a unit effect each.
    importance = made.shape[1] / made.square().sum().item() * torch.eye(8).double()
    fit = Fit(x.transpose(0, 1).flatten(1).cov(correction=0), torch.zeros(6).double(), importance=importance)
    for ranks in every_rank(module):
        if len(ranks) == 1 or None in ranks:
            form = decomposed(module, ranks, fit=fit)[0]
            lost = (form(x) - module(x)).square().sum().item() / made.square().sum().item()
            found = Curve(module, fit).error(ranks) / (1 + IMPORTANCE_RIDGE)
            assert found == pytest.approx(lost, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_the_curve_falls_from_all_to_nothing(name):
    module = MODULES[name]().double()
    given = fit_for(module, True)
    for fit, unit in ((None, 1.0), (given, weighted_size(module, given))):
        curve, full = Curve(module, fit), full_ranks(module)
        assert curve.error(tuple(0 for _ in full)) == pytest.approx(unit, rel=1e-9)
        assert curve.error(full) <= 1e-12 * unit
        assert curve.error(tuple(10 * r for r in full)) == curve.error(full)
        for axis in range(len(full)):
            errors = [curve.error(tuple(r if i == axis else full[i] for i in range(len(full)))) for r in range(9)]
            assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_not_cut_counts_as_full_rank(name):
    module = MODULES[name]()
    curve, full = Curve(module, None), full_ranks(module)
    if len(full) == 2:
        assert curve.error((2, None)) == curve.error((2, full[1]))
        assert curve.error((None, 2)) == curve.error((full[0], 2))


@pytest.mark.parametrize(
    ("name", "zero"), [("grouped conv", "weight"), ("grouped transposed", "inputs"), ("wide linear", "importance")]
)
def test_the_curve_of_zero_weights_inputs_or_importance_is_zero(name, zero):
    module = MODULES[name]().to(torch.bfloat16)
    fit = fit_for(module, True)
    if zero == "weight":
        nn.init.zeros_(module.weight)
    zeroed = {"inputs": {"covariance": 0 * fit.covariance}, "importance": {"importance": 0 * fit.importance}}.get(
        zero, {}
    )
    fit = fit._replace(**zeroed)
    if zero == "importance":  # of equal errors, the nearest form is the best
        own = Curve(module, fit._replace(importance=None))
        assert all(
            Curve(module, fit).error(r) == pytest.approx(NEGLIGIBLE * own.error(r), abs=1e-24)
            for r in every_rank(module)
        )
        return
    size = module.weight.detach().double().square().sum().item()
    assert all(0 <= Curve(module, fit).error(ranks) <= 1e-25 * size for ranks in every_rank(module))


def test_a_group_that_is_never_on_costs_nothing():
    module = nn.Conv2d(12, 8, 1, groups=2).double()
    fit = fit_for(module, True)
    alone = nn.Conv2d(6, 4, 1).double()
    alone.weight.data = module.weight[:4].detach()
    on = Fit(fit.covariance[:6, :6], fit.mean[:6], fit.ridge, importance=fit.importance[:4, :4])
    fit.covariance[6:] = fit.covariance[:, 6:] = 0
    assert Curve(module, fit).error((2,)) == pytest.approx(Curve(alone, on).error((2,)), rel=1e-9)


# -- ranks worth looking at


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.sampled_from([1, 3, (1, 3)]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 4, 8]),
)
def test_candidates_save_parameters_and_are_multiples(c_in, c_out, kernel, groups, multiple):
    conv = nn.Conv2d(c_in * groups, c_out * groups, kernel, groups=groups, device="meta")
    found = candidate_ranks(conv, multiple=multiple)
    full = full_ranks(conv)
    assert len(found) == len(set(found)) <= 400
    for ranks in found:
        assert parameters(conv, ranks) < conv.weight.numel()
        assert explicit_ranks(conv, ranks) == ranks
        assert all(r is None or r < top for r, top in zip(ranks, full, strict=True))
        assert all(r is None or r * groups % multiple == 0 for r in ranks)
    if min(c_in, c_out) == 1:
        assert found == []
    elif multiple == 1:
        by_ratio = [ranks_by_ratio(conv, ratio) for ratio in RATIOS]
        assert set(found) >= {r for r in by_ratio if isinstance(r, tuple)}


def test_candidates_of_small_layers_are_all_ranks_that_save_parameters():
    assert candidate_ranks(nn.Linear(8, 12)) == [(1,), (2,), (3,), (4,)]
    conv = nn.Conv2d(3, 4, 3)
    tops = [(r1, r2) for r1 in (1, 2, None) for r2 in (1, 2, 3, None) if r1 or r2]
    assert set(candidate_ranks(conv)) == {r for r in tops if parameters(conv, r) < conv.weight.numel()}
    assert candidate_ranks(nn.Conv2d(8, 8, 3, groups=8)) == []


def test_candidates_of_large_layers_are_spread_evenly():
    found = candidate_ranks(nn.Linear(1024, 1024, device="meta"), ratios=(), multiple=8)
    assert found == [(r,) for r in range(32, 512, 32)]
    assert (409,) in candidate_ranks(nn.Linear(1024, 1024, device="meta"), ratios=(1.25,))


# -- which of them are not beaten


def beaten(choice, others):
    return any(
        o.cost <= choice.cost and o.error <= choice.error and (o.cost, o.error) != (choice.cost, choice.error)
        for o in others
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=40))
def test_pareto_keeps_what_is_not_beaten(pairs):
    every = [Choice((i + 1,), error, cost) for i, (error, cost) in enumerate(pairs)]
    front = pareto(every)
    assert {(c.cost, c.error) for c in front} == {(c.cost, c.error) for c in every if not beaten(c, every)}
    assert [c.cost for c in front] == sorted({c.cost for c in front})
    assert [c.error for c in front] == sorted({c.error for c in front}, reverse=True)
    assert pareto(front) == front


@pytest.mark.parametrize("most", [2, 5, 48])
def test_a_long_front_is_thinned_out_evenly(most):
    every = [Choice((i,), 100.0 - i, i) for i in range(100)]
    found = pareto(random.Random(0).sample(every, 100), most)
    assert len(found) == most
    assert (found[0], found[-1]) == (every[0], every[-1])
    steps = [b.cost - a.cost for a, b in itertools.pairwise(found)]
    assert max(steps) - min(steps) <= 1
