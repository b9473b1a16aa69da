from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fxlrd.factor import whiten
from fxlrd.factor.basis import EXCESS
from fxlrd.factor.svd import svd
from fxlrd.factor.tucker import tucker2
from fxlrd.factor.whiten import RIDGE, root, whitened_svd, whitened_tucker2
from tests.support.factors import second_moments, svd_product, tucker_product

S, C = 9, 14


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def correlated(count, channels):
    """Rows of channels that depend on each other and differ in size."""
    return randn(count, channels) @ randn(channels, channels) * torch.logspace(0, -2, channels, dtype=torch.float64)


def regularised(g, ridge=0.0):
    return g + torch.eye(len(g), dtype=g.dtype) * g.diagonal().mean() * (RIDGE + ridge)


def rooted(g, ridge=0.0):
    """The roots as `fxlrd.layers.roots` gives them: a batch of groups."""
    return root(g if g.dim() == 3 else g[None], ridge)


def sampled(g):
    """Data with exactly the second moments ``g``: as many rows as channels."""
    return torch.linalg.cholesky(g).mT * len(g) ** 0.5


def error(weight, other, x, gamma=None):
    """‖Γ^½·(W − W')·X‖ / ‖Γ^½·W·X‖ on data, a row a sample."""
    gamma = torch.eye(len(weight), dtype=torch.float64) if gamma is None else gamma

    def size(w):
        y = x @ w.mT
        return (y @ gamma * y).sum().sqrt()

    return (size(weight - other) / size(weight)).item()


def ridge_share(weight, x):
    """The most that the ridge can cost where the data need no more than the rank: all of W on what it adds to G."""
    added = RIDGE * second_moments(x).diagonal().mean() * weight.square().sum()
    return (added / (x @ weight.mT).square().sum(1).mean()).sqrt().item()


def finite(*factors):
    return all(f is None or bool(f.isfinite().all()) for f in factors)


@pytest.mark.parametrize("shape", [(6, 6), (3, 5, 5)])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_a_root_squares_to_the_regularised_moments(shape, ridge):
    x = randn(*shape[:-2], 40, shape[-1])
    g = x.mT @ x
    roots = root(g, ridge)
    eye = torch.eye(shape[-1], dtype=torch.float64)
    expected = g + g.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * (RIDGE + ridge) * eye
    torch.testing.assert_close(roots.root @ roots.root.mT, expected, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(roots.root @ roots.inverse, eye.expand(shape), rtol=0, atol=1e-10)


def test_the_root_of_zero_moments_is_invertible():
    roots = root(torch.stack([torch.zeros(4, 4), torch.eye(4)]))
    torch.testing.assert_close(roots.root @ roots.inverse, torch.eye(4).double().expand(2, 4, 4), rtol=0, atol=1e-12)
    assert roots.root[0].abs().max() < 1e-12, "a channel that is always zero is negligible beside others"


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("shape", [(S, C), (C, S), (S, S)])
@pytest.mark.parametrize("weighted", [False, True])
def test_svd_is_the_reduced_rank_regression(rank, shape, weighted):
    w, x = randn(1, *shape), sampled(regularised(second_moments(correlated(200, shape[1]))))
    gamma = regularised(second_moments(correlated(60, shape[0]))) if weighted else None
    pair = whitened_svd(w, rank, _exact(second_moments(x)), None if gamma is None else _exact(gamma))
    # The regression of Γ^½·W·x on x: least squares gives W back, cut to the first directions of its outputs' moments.
    half = torch.eye(shape[0], dtype=torch.float64) if gamma is None else torch.linalg.cholesky(gamma).mT
    y = x @ (half @ w[0]).mT
    values, vectors = torch.linalg.eigh(y.mT @ y)
    top = vectors[:, -rank:]
    regression = torch.linalg.solve(half, top @ top.mT @ half @ w[0])
    predicted = (values[:-rank].sum() / values.sum()).sqrt().item()
    assert pair.first.shape == (1, rank, shape[1])
    assert pair.last.shape == (1, shape[0], rank)
    torch.testing.assert_close(svd_product(pair)[0], regression, rtol=1e-7, atol=1e-7)
    assert pair.error == pytest.approx(predicted, rel=1e-9)
    assert error(w[0], svd_product(pair)[0], x, gamma) == pytest.approx(pair.error, rel=1e-9)


def _exact(g):
    """The root of ``g`` itself, without a ridge."""
    values, vectors = torch.linalg.eigh(g)
    return whiten.Root(vectors * values.sqrt() @ vectors.mT, vectors / values.sqrt() @ vectors.mT)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_neither_perturbed_factors_nor_the_plain_svd_have_a_lower_error(rank):
    w, g, gamma = randn(1, S, C), second_moments(correlated(300, C)), second_moments(correlated(300, S))
    pair = whitened_svd(w, rank, rooted(g), rooted(gamma))
    x, weight = sampled(regularised(g)), regularised(gamma)
    best = error(w[0], svd_product(pair)[0], x, weight)
    assert best == pytest.approx(pair.error, rel=1e-9)
    assert error(w[0], svd_product(svd(w, rank))[0], x, weight) > best
    for size in (1e-1, 1e-3):
        for _ in range(20):
            moved = (pair.last + size * randn(1, S, rank)) @ (pair.first + size * randn(1, rank, C))
            assert error(w[0], moved[0], x, weight) > best


def test_without_moments_it_is_the_plain_svd():
    w = randn(2, S, C)
    torch.testing.assert_close(svd_product(whitened_svd(w, 4, None))[0], svd_product(svd(w, 4))[0], rtol=0, atol=1e-12)


def test_each_group_is_fitted_to_its_own_moments():
    w, g, gamma = randn(3, S, C), *(torch.stack([second_moments(correlated(99, n)) for _ in range(3)]) for n in (C, S))
    pair = whitened_svd(w, 4, rooted(g), rooted(gamma))
    for i in range(3):
        alone = whitened_svd(w[i : i + 1], 4, rooted(g[i : i + 1]), rooted(gamma[i : i + 1]))
        torch.testing.assert_close((pair.last @ pair.first)[i], svd_product(alone)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(S, C), (C, S)])
def test_svd_factors_share_their_singular_values(shape):
    pair = whitened_svd(
        randn(1, *shape),
        5,
        rooted(second_moments(correlated(200, shape[1]))),
        rooted(second_moments(randn(50, shape[0]))),
    )
    values = torch.linalg.svdvals(svd_product(pair)[0])[:5]
    torch.testing.assert_close(torch.linalg.svdvals(pair.first[0]), values.sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.linalg.svdvals(pair.last[0]), values.sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(pair.first[0].norm(dim=1), pair.last[0].norm(dim=0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(S, C), (C, S)])
def test_svd_at_full_rank_is_exact(shape):
    w = randn(1, *shape)
    pair = whitened_svd(
        w, S, rooted(second_moments(correlated(200, shape[1]))), rooted(second_moments(correlated(200, shape[0])))
    )
    torch.testing.assert_close(svd_product(pair)[0], w[0], rtol=0, atol=1e-9)
    assert pair.error < 1e-12


def test_data_of_low_rank_are_fitted_up_to_the_ridge():
    w, x = randn(1, S, C), randn(400, 3) @ randn(3, C)
    pair = whitened_svd(w, 3, rooted(second_moments(x)))
    assert error(w[0], svd_product(pair)[0], x) < ridge_share(w[0], x)
    assert error(w[0], svd_product(svd(w, 3))[0], x) > 0.1


# -- Tucker-2


def image(n=6, channels=6, height=9, width=8):
    """Smooth images with channels that depend on each other."""
    x = F.avg_pool2d(randn(n, channels, height + 2, width + 2), 3, stride=1)
    return torch.einsum("dc,nchw->ndhw", correlated(channels, channels), x)


def unfolded(x, kernel):
    columns = F.unfold(x, kernel)
    return columns.mT.reshape(-1, columns.shape[1])


KERNEL = (3, 2)
CASES = [(3, 4), (2, 2), (5, 1), (None, 4), (3, None), (6, 3)]


def tucker(w, ranks, x, gamma=None):
    """Factors fitted to the patches of images."""
    reads = rooted(second_moments(x.movedim(1, -1).flatten(0, -2)))
    matters = None if gamma is None else rooted(gamma)
    return whitened_tucker2(w, *ranks, reads, matters, second_moments(unfolded(x, KERNEL)))


@pytest.mark.parametrize("ranks", CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_tucker_error_is_the_error_on_the_patches(ranks, weighted):
    w, x = randn(1, 7, 6, *KERNEL), image()
    gamma = second_moments(correlated(99, 7)) if weighted else None
    triple = tucker(w, ranks, x, gamma)
    data = sampled(regularised(second_moments(unfolded(x, KERNEL))))
    weight = None if gamma is None else regularised(gamma)
    actual = error(w[0].flatten(1), tucker_product(triple)[0].flatten(1), data, weight)
    assert actual == pytest.approx(triple.error, rel=1e-8)
    plain = tucker_product(tucker2(w, *ranks, sweeps=5))[0].flatten(1)
    assert actual < error(w[0].flatten(1), plain, data, weight)


def test_tucker_error_on_actual_outputs():
    w, x = randn(1, 7, 6, *KERNEL), image(20)
    triple = tucker(w, (3, 4), x)
    expected, lost = F.conv2d(x, w[0]), F.conv2d(x, w[0] - tucker_product(triple)[0])
    # The ridge adds about RIDGE · mean variance · ‖W − W'‖², in relation to the outputs' size.
    patches = unfolded(x, KERNEL)
    extra = RIDGE * second_moments(patches).diagonal().mean() * len(patches)

    def size(outputs, weight):
        return outputs.square().sum() + extra * weight.square().sum()

    actual = (size(lost, w[0] - tucker_product(triple)[0]) / size(expected, w[0])).sqrt().item()
    assert actual == pytest.approx(triple.error, rel=1e-8)


@pytest.mark.parametrize("ranks", CASES)
def test_without_patches_the_error_is_as_if_positions_were_uncorrelated(ranks):
    w, g, gamma = (
        randn(2, 7, 6, *KERNEL),
        *(torch.stack([second_moments(correlated(99, n)) for _ in "ab"]) for n in (6, 7)),
    )
    triple = whitened_tucker2(w, *ranks, rooted(g), rooted(gamma))
    lost, total = (
        sum(
            torch.einsum("sck,cd,tdk,st->", v[i].flatten(2), regularised(g[i]), v[i].flatten(2), regularised(gamma[i]))
            for i in range(2)
        )
        for v in (w - tucker_product(triple), w)
    )
    assert triple.error == pytest.approx((lost / total).sqrt().item(), rel=1e-8)


@pytest.mark.parametrize("ranks", [(3, 4), (2, 2), (5, 1), (3, None)])
def test_alternation_never_rises(ranks, monkeypatch):
    w, x = randn(1, 7, 6, *KERNEL), image()
    data = sampled(regularised(second_moments(unfolded(x, KERNEL))))
    start = whitened_tucker2(w, *ranks, rooted(second_moments(x.movedim(1, -1).flatten(0, -2))))
    errors = [error(w[0].flatten(1), tucker_product(start)[0].flatten(1), data)]
    monkeypatch.setattr(whiten, "_ENOUGH", 0.0)
    for rounds in (1, 2, 3, 5, 8, 20):
        monkeypatch.setattr(whiten, "_ROUNDS", rounds)
        errors.append(tucker(w, ranks, x).error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[1], "refining the first factor pays"


@pytest.mark.parametrize("ranks", [(2, 3), (4, 2)])
def test_no_perturbation_of_refined_factors_lowers_the_error(ranks, monkeypatch):
    monkeypatch.setattr(whiten, "_ENOUGH", 0.0)
    monkeypatch.setattr(whiten, "_ROUNDS", 3000)
    w, x = randn(1, 5, 4, *KERNEL), image(channels=4)
    triple = tucker(w, ranks, x)
    data = sampled(regularised(second_moments(unfolded(x, KERNEL))))
    for size in (1e-1, 1e-2):
        for _ in range(20):
            moved = triple._replace(
                first=triple.first + size * randn(*triple.first.shape),
                core=triple.core + size * randn(*triple.core.shape),
                last=triple.last + size * randn(*triple.last.shape),
            )
            assert error(w[0].flatten(1), tucker_product(moved)[0].flatten(1), data) > triple.error


@pytest.mark.parametrize("source", ["moments", "patches"])
@pytest.mark.parametrize("ranks", [(6, 7), (None, 7), (6, None)])
def test_tucker_at_full_rank_is_exact(source, ranks):
    w, x = randn(1, 7, 6, *KERNEL), image()
    gamma = second_moments(correlated(99, 7))
    if source == "patches":
        triple = tucker(w, ranks, x, gamma)
    else:
        triple = whitened_tucker2(w, *ranks, rooted(second_moments(x.movedim(1, -1).flatten(0, -2))), rooted(gamma))
    torch.testing.assert_close(tucker_product(triple), w, rtol=0, atol=1e-8)
    assert triple.error < 1e-7, "the square root of rounding"


@pytest.mark.parametrize("source", ["moments", "patches"])
def test_a_planted_form_is_reproduced(source):
    w = torch.einsum("so,orkl,rc->sckl", randn(7, 3), randn(3, 2, *KERNEL), randn(2, 6))[None]
    x = image()
    reads = rooted(second_moments(x.movedim(1, -1).flatten(0, -2)))
    triple = whitened_tucker2(
        w, 2, 3, reads, None, second_moments(unfolded(x, KERNEL)) if source == "patches" else None
    )
    torch.testing.assert_close(tucker_product(triple), w, rtol=0, atol=1e-7)


def test_images_of_few_independent_channels_are_fitted_up_to_the_ridge():
    w, x = randn(1, 7, 6, *KERNEL), torch.einsum("dc,nchw->ndhw", randn(6, 2), image(channels=2))
    triple, patches = tucker(w, (2, None), x), unfolded(x, KERNEL)
    assert error(w[0].flatten(1), tucker_product(triple)[0].flatten(1), patches) < ridge_share(w[0].flatten(1), patches)
    plain = tucker_product(tucker2(w, 2, None))[0].flatten(1)
    assert error(w[0].flatten(1), plain, patches) > 0.1


@pytest.mark.parametrize("source", ["nothing", "moments", "patches"])
@pytest.mark.parametrize("ranks", CASES)
def test_outer_tucker_factors_are_orthonormal(source, ranks):
    w, x, gamma = randn(1, 7, 6, *KERNEL), image(), rooted(second_moments(correlated(99, 7)))
    reads = rooted(second_moments(x.movedim(1, -1).flatten(0, -2)))
    triple = {
        "nothing": lambda: whitened_tucker2(w, *ranks, None),
        "moments": lambda: whitened_tucker2(w, *ranks, reads, gamma),
        "patches": lambda: whitened_tucker2(w, *ranks, reads, gamma, second_moments(unfolded(x, KERNEL))),
    }[source]()
    r1, r2 = ranks
    assert triple.core.shape == (1, r2 or 7, r1 or 6, *KERNEL)
    assert (triple.first is None, triple.last is None) == (r1 is None, r2 is None)
    if r1:
        torch.testing.assert_close(triple.first[0] @ triple.first[0].mT, torch.eye(r1).double(), rtol=0, atol=1e-12)
    if r2:
        torch.testing.assert_close(triple.last[0].mT @ triple.last[0], torch.eye(r2).double(), rtol=0, atol=1e-12)


# -- data that says little

POOR = {
    "zeros": lambda c: torch.zeros(50, c),
    "one sample": lambda c: torch.randn(1, c),
    "few samples": lambda c: torch.randn(c // 2, c),
    "dead channels": lambda c: torch.randn(200, c) * (torch.arange(c) % 3 > 0),
    "one channel": lambda c: torch.randn(200, c) * (torch.arange(c) == 1),
    "constant": lambda c: torch.ones(50, c) * 0.3,
    "faint": lambda c: torch.randn(200, c) * torch.logspace(0, -12, c),
    "tiny": lambda c: torch.randn(200, c) * 1e-9,
    "huge": lambda c: torch.randn(200, c) * 1e9,
}


def assert_moderate(product, weight, weighted):
    """Check that factors are neither lost nor blown up: Γ alone may make directions of the weight large."""
    assert 0.05 * weight.norm() < product.norm() < (1e3 if weighted else 20) * weight.norm()


@pytest.mark.parametrize("poor", POOR)
@pytest.mark.parametrize("weighted", [False, True])
def test_svd_of_poor_data_is_finite_and_no_worse_than_predicted(poor, weighted):
    for rank in (1, 5, S):
        w, x = randn(1, S, C), POOR[poor](C).double()
        gamma = second_moments(POOR[poor](S).double()) if weighted else None
        pair = whitened_svd(w, rank, rooted(second_moments(x)), None if gamma is None else rooted(gamma))
        assert finite(*pair[:2])
        assert math.isfinite(pair.error)
        assert_moderate(svd_product(pair), w, weighted)
        if x.any():
            data, weight = sampled(regularised(second_moments(x))), None if gamma is None else regularised(gamma)
            assert error(w[0], svd_product(pair)[0], data, weight) <= pair.error * (1 + EXCESS) + 1e-12


@pytest.mark.parametrize("poor", POOR)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_tucker_of_poor_data_is_finite(poor, weighted, ridge):
    for ranks in ((3, 4), (1, 1), (None, 4), (3, None)):
        w, x = randn(1, 7, 6, *KERNEL), POOR[poor](6 * 6).double()
        by_channel = rooted(second_moments(x.unflatten(1, (6, 6)).mT.flatten(0, 1)), ridge)
        gamma = rooted(second_moments(POOR[poor](7).double())) if weighted else None
        triple = whitened_tucker2(w, *ranks, by_channel, gamma, second_moments(x))
        assert finite(*triple[:3])
        assert 0 <= triple.error <= 1
        assert_moderate(tucker_product(triple), w, weighted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_everything_runs_in_float64_whatever_the_weight(dtype):
    w, x = torch.randn(1, 7, 6, *KERNEL).to(dtype), image()
    for actual, expected in (
        (tucker(w, (3, 4), x), tucker(w.double(), (3, 4), x)),
        (whitened_svd(w.flatten(2), 4, None), whitened_svd(w.double().flatten(2), 4, None)),
    ):
        assert actual.error == expected.error
        assert all(torch.equal(a, b) for a, b in zip(actual[:-1], expected[:-1], strict=True))


def test_inputs_that_are_always_zero_give_the_factors_of_the_weight_alone():
    w = randn(1, 7, 6, *KERNEL)
    nothing = torch.zeros(6, 6), torch.zeros(36, 36)
    triple = whitened_tucker2(w, 3, 4, rooted(nothing[0]), None, nothing[1])
    assert triple.error == pytest.approx(tucker2(w, 3, 4, sweeps=2).error, rel=1e-9)
    pair = whitened_svd(w.flatten(2), 3, rooted(torch.zeros(36, 36)), rooted(torch.zeros(7, 7)))
    assert pair.error == pytest.approx(svd(w.flatten(2), 3).error, rel=1e-9)


def test_zero_weights():
    x = image()
    pair = whitened_svd(torch.zeros(1, S, 6), 2, rooted(second_moments(x.movedim(1, -1).flatten(0, -2))))
    triple = tucker(torch.zeros(1, 7, 6, *KERNEL), (2, 3), x)
    assert pair.error == triple.error == 0
    assert finite(*pair[:2], *triple[:3])
    assert not svd_product(pair)[0].any()
    assert not tucker_product(triple).any()


def test_a_group_whose_inputs_are_always_zero_does_not_count():
    w = randn(2, S, C)
    g = torch.stack([second_moments(correlated(99, C)), torch.zeros(C, C)])
    pair = whitened_svd(w, 3, rooted(g))
    assert pair.error == pytest.approx(whitened_svd(w[:1], 3, rooted(g[:1])).error, rel=1e-9)


def test_moments_that_rounding_left_indefinite_have_a_root_too():
    negative = torch.diag(torch.tensor([1.0, 1e-3, -1e-4], dtype=torch.float64))
    roots = root(negative)
    torch.testing.assert_close(roots.root @ roots.inverse, torch.eye(3).double(), rtol=0, atol=1e-12)
    assert (roots.root @ roots.root.mT)[2, 2] == pytest.approx(RIDGE * negative.diagonal().mean().item(), rel=1e-4)


def test_a_regression_on_channels_of_which_one_is_always_zero_is_that_on_the_others():
    x, target = torch.randn(100, 8).double(), torch.randn(5, 8).double()
    x[:, 3] = 0
    moments = second_moments(1e-3 * x)
    core, last = whiten._regressed(target, None, moments, 8, None)
    assert last is None
    alive = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(core[:, alive], target[:, alive], rtol=0, atol=1e-7)
