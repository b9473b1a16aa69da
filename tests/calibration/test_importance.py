from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from fxlrd import capture
from fxlrd.calibration.batches import as_inputs
from fxlrd.calibration.importance import FEW, PROBES, Importance
from fxlrd.calibration.metric import logits_among
from fxlrd.calibration.moments import sweep
from fxlrd.calibration.samples import POSITIONS, Samples
from fxlrd.capturing.model import capture_any
from fxlrd.graph.facts import statistics
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import calls, layers


def node(gm, name):
    return next(n for n in gm.graph.nodes if name in (n.name, str(n.target)))


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def hadamard(size):
    """Orthogonal rows of signs; ``size`` is a power of two."""
    rows = torch.ones(1, 1)
    while len(rows) < size:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows


class Exhaustive(Importance):
    """Takes orthogonal signs for all ``size`` numbers put out, each in turn: their mean is the exact expectation."""

    def __init__(self, gm, size):
        super().__init__(gm)
        self.stream = itertools.cycle(hadamard(size).flatten().tolist())

    def start(self, output, logits):
        mine = torch.tensor([next(self.stream) for _ in range(output.numel())]).view(output.shape)
        return super().start(output, logits).abs() * mine


def exact(gm, x, size):
    """Return the Γ by node that all probes together give."""
    importance = Exhaustive(gm, size)
    for _ in range(size // PROBES):
        importance.rows = 0
        importance.add(Inputs((x,)))
    return importance.gamma


def test_of_a_linear_model_it_is_the_square_of_the_jacobian():
    net, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double(), randn(4, 6)
    gm = capture(net, x)
    gamma = exact(gm, x, 16)
    z, w = net(x).detach(), net[1].weight.detach()
    torch.testing.assert_close(gamma(node(gm, "0")), 4 * w.mT @ w / z.square().sum(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gamma(node(gm, "1")), 4 * torch.eye(4).double() / z.square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rank", [1, 3])
def test_of_a_linear_model_the_prediction_is_the_relative_squared_error(rank):
    net, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double(), randn(4, 6)
    gm = capture(net, x)
    gamma = exact(gm, x, 16)(node(gm, "0"))
    change = randn(5, rank) @ randn(rank, 6)
    moved = copy.deepcopy(net)
    with torch.no_grad():
        moved[0].weight += change
        measured = (moved(x) - net(x)).square().sum() / net(x).square().sum()
    predicted = (gamma * (change @ (x.mT @ x / len(x)) @ change.mT)).sum()
    assert predicted.item() == pytest.approx(measured.item(), rel=1e-12)


class Convs(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace)

    def tail(self, y):
        y = self.relu(y)
        y = y + self.b(y)
        return self.fc(self.relu(y).mean((2, 3)))

    def forward(self, x):
        return self.tail(self.a(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_of_a_conv_it_is_summed_over_positions(inplace):
    net, x = Convs(inplace).double(), randn(2, 3, 4, 5)
    gm = capture(net, x)
    gamma = exact(gm, x, 8)(node(gm, "a"))
    j = torch.autograd.functional.jacobian(lambda y: net.tail(y.clone()), net.a(x).detach())  # N × 4 × N × C × H × W
    flat = j.movedim(3, -1).flatten(0, 1).flatten(1, -2)  # outputs × positions × C
    wanted = torch.einsum("opc,opd->cd", flat, flat) / net(x).detach().square().sum()
    torch.testing.assert_close(gamma, wanted, rtol=1e-10, atol=1e-14)


def test_over_batches_it_is_the_mean():
    net, parts = Convs().double(), [randn(2, 3, 4, 5), 2 * randn(2, 3, 4, 5)]
    gm = capture(net, parts[0])
    importance = Exhaustive(gm, 8)
    for part in parts:
        for _ in range(8 // PROBES):
            importance.add(Inputs((part,)))
    mean = (exact(gm, parts[0], 8)(node(gm, "b")) + exact(gm, parts[1], 8)(node(gm, "b"))) / 2
    torch.testing.assert_close(importance.gamma(node(gm, "b")), mean, rtol=1e-12, atol=0)


# Not b: what it reads has a mean of its own in each image, and a pool adds up errors that go the same way.
@pytest.mark.parametrize("name", ["a", "fc"])
def test_the_prediction_is_near_the_error_that_a_conv_net_makes(name):
    net, x = Convs().double(), randn(64, 3, 6, 6)
    gm = capture(net, x)
    sweep(gm, [Inputs((part,)) for part in x.split(8)], effects=64)
    seen = statistics(node(gm, name))
    predicted = measured = 0.0
    for _ in range(40):
        moved = copy.deepcopy(net)
        module = moved.get_submodule(name)
        weight = module.weight
        change = 1e-3 * randn(*weight.shape)
        with torch.no_grad():
            weight += change
            module.bias -= change.reshape(*weight.shape[:2], -1).sum(2) @ seen.input_moments.mean
            ratios = [(moved(part) - net(part)).square().sum() / net(part).square().sum() for part in x.split(8)]
        measured += torch.stack(ratios).mean().item()
        change = change.reshape(*weight.shape[:2], -1)
        covariance = seen.input_moments.covariance
        predicted += torch.einsum("st,sck,cd,tdk->", seen.importance, change, covariance, change).item()
    assert predicted == pytest.approx(measured, rel=0.25)


def test_signs_are_fair_and_the_same_each_time():
    gm = capture(nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3))
    output = randn(64, 64)
    first, again = (Importance(gm).start(output, False) for _ in "ab")
    assert torch.equal(first, again)
    signs = first * output.norm()
    torch.testing.assert_close(signs.abs(), torch.ones(64, 64).double(), rtol=1e-12, atol=0)
    assert signs.mean().abs() < 4 / 64, "four standard deviations"
    state = torch.get_rng_state()
    Importance(gm).add(Inputs((torch.randn(4, 3, generator=torch.Generator().manual_seed(1)),)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "frozen", [[], ["a.weight"], ["a.weight", "a.bias", "b.weight", "b.bias", "fc.weight", "fc.bias"]]
)
@pytest.mark.parametrize("training", [False, True])
def test_parameters_are_left_alone(frozen, training):
    net, x = Convs(), torch.randn(2, 3, 4, 5)
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    net.fc.weight.grad = torch.ones(4, 4)
    gm = capture(net, x).train(training)
    before = {name: (p.clone(), p.requires_grad, p._version) for name, p in gm.named_parameters()}
    importance = Importance(gm)
    with torch.no_grad():
        importance.add(Inputs((x,)))
    for name, p in gm.named_parameters():
        assert torch.equal(p, before[name][0])
        assert (p.requires_grad, p._version) == before[name][1:]
        assert p.grad is None or (name == "fc.weight" and torch.equal(p.grad, torch.ones(4, 4)))
    assert gm.training == training
    assert not x.requires_grad
    assert all(importance.gamma(node(gm, name)) is not None for name in layers(gm))
    assert not any(s.total.requires_grad for s in importance.sums.values())


def test_frozen_parameters_do_not_change_it():
    net, x = Convs(), torch.randn(2, 3, 4, 5)
    found = []
    for frozen in (False, True):
        gm = capture(net.requires_grad_(not frozen), x)
        importance = Importance(gm)
        importance.add(Inputs((x,)))
        found.append([importance.gamma(node(gm, name)) for name in ("a", "b", "fc")])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Outputs(nn.Module):
    """One output from both layers, one from the first alone, one of whole numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.a(x)
        return {"b": self.b(y), "y": (10 * y, y.argmax(1))}


def test_each_output_counts_alike():
    net, x = Outputs().double(), randn(4, 6)
    gm = capture(net, x)
    gamma = exact(gm, x, 32)
    w, y = net.b.weight.detach(), net.a(x).detach()
    z = net.b(y).detach()
    eye = torch.eye(4, dtype=torch.float64)
    wanted = 4 * (w.mT @ w / z.square().sum() + eye / y.square().sum())
    torch.testing.assert_close(gamma(node(gm, "a")), wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gamma(node(gm, "b")), 4 * eye / z.square().sum(), rtol=1e-12, atol=0)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.fc(x))


def test_each_call_of_a_layer_has_its_own():
    net, x = Reused().double(), randn(4, 4)
    gm = capture(net, x)
    first, last = (n for n in gm.graph.nodes if n.op == "call_module")
    gamma = exact(gm, x, 16)
    w, size = net.fc.weight.detach(), net(x).detach().square().sum()
    torch.testing.assert_close(gamma(first), 4 * w.mT @ w / size, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gamma(last), 4 * torch.eye(4).double() / size, rtol=1e-12, atol=0)


class Classes(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.fc, self.scale, self.embed = nn.Linear(6, 4), nn.Parameter(torch.ones(6)), embed

    def forward(self, x):
        classes = self.fc(x).argmax(1)
        return (classes, x * self.scale) if self.embed else classes


@pytest.mark.parametrize("embed", [False, True])
def test_no_gradient_comes_back_from_whole_numbers(embed):
    gm = capture(Classes(embed), torch.randn(3, 6))
    importance = Importance(gm)
    importance.add(Inputs((torch.randn(3, 6),)))
    assert importance.gamma(node(gm, "fc")) is None


class Dead(nn.Module):
    """A layer whose output is switched off, one whose output is thrown away, one that counts."""

    def __init__(self):
        super().__init__()
        self.off, self.lost, self.on = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.on(x) + (self.off(x) - 1e6).relu() + self.lost(x).detach()


def test_what_does_not_matter():
    gm = capture(Dead(), torch.randn(3, 6))
    importance = Importance(gm)
    importance.add(Inputs((torch.randn(3, 6),)))
    assert not importance.gamma(node(gm, "off")).any()
    assert importance.gamma(node(gm, "lost")) is None
    assert importance.gamma(node(gm, "on")).trace() > 0


def test_nothing_is_known_before_the_first_batch_or_of_outputs_that_are_not_finite():
    gm = capture(nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3))
    importance = Importance(gm)
    assert importance.gamma(node(gm, "0")) is None
    importance.add(Inputs((torch.full((4, 3), float("inf")),)))
    assert importance.gamma(node(gm, "0")) is None


def test_outputs_of_nothing_but_zeros_are_no_division_by_zero():
    net = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    gm = capture(net, randn(4, 3))
    importance = Importance(gm)
    importance.add(Inputs((torch.zeros(4, 3, dtype=torch.float64),)))
    assert importance.gamma(node(gm, "0")).isfinite().all()


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (6,)])
def test_channels_are_those_of_the_last_axis_of_a_linear(shape):
    net, x = nn.Sequential(nn.Linear(6, 4)).double(), randn(*shape)
    gm = capture(net, x)
    importance = Importance(gm)
    (inputs,) = as_inputs(gm, [x])
    importance.add(inputs)
    assert importance.gamma(node(gm, "0")).shape == (4, 4)
    count = x.numel() // 6
    wanted = count / net(x).detach().square().sum()
    torch.testing.assert_close(importance.gamma(node(gm, "0")).diagonal(), wanted.expand(4), rtol=1e-12, atol=0)


@pytest.mark.parametrize("logits", [False, True])
def test_in_float16_it_is_what_it_is_in_float64_however_small_gradients_are(logits):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8)).half()
    with torch.no_grad():
        net[1].weight *= 1e-4
        net[1].bias.normal_().mul_(10)
    x, found = torch.randn(5000, 16).half(), []
    for dtype in (torch.float16, torch.float64):
        gm = capture(copy.deepcopy(net).to(dtype), x[:2].to(dtype))
        importance = Importance(gm, softmax=logits)
        importance.add(Inputs((x.to(dtype),)))
        found.append([importance.gamma(node(gm, name)).double() for name in "01"])
    for half, double in zip(*found, strict=True):
        assert double.trace() > 0
        assert (half - double).norm() < 4 * torch.finfo(torch.float16).eps * double.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_it_is_kept_in_the_precision_of_the_algebra(dtype):
    gm = capture(Convs().to(dtype), torch.randn(2, 3, 4, 5, dtype=dtype))
    importance = Importance(gm)
    importance.add(Inputs((torch.randn(2, 3, 4, 5, dtype=dtype),)))
    gamma = importance.gamma(node(gm, "a"))
    assert gamma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.linalg.eigvalsh(gamma.double()).min() > -torch.finfo(gamma.dtype).eps * gamma.trace()


def test_an_estimate_from_few_samples_is_shrunk_towards_the_same_in_all_directions():
    few, many = (Samples(torch.zeros(40, 40, dtype=torch.float64)) for _ in "ab")
    few.add(randn(10, 1, 40))
    many.add(randn(20000, 1, 40))
    truth = torch.eye(40, dtype=torch.float64)
    for samples, count in [(few, 10), (many, 20000)]:
        assert samples.shrunk().trace() == pytest.approx(float(samples.sum().trace()))
        raw, shrunk = samples.sum() / count, samples.shrunk() / count
        assert (shrunk - truth).norm() < 0.5 * (raw - truth).norm()
        assert torch.linalg.eigvalsh(shrunk).min() > 0.3


def test_an_estimate_from_samples_that_agree_stays():
    rows = randn(1, 3, 8).expand(5, -1, -1)
    samples = Samples(torch.zeros(8, 8, dtype=torch.float64))
    samples.add(rows)
    torch.testing.assert_close(samples.shrunk(), samples.sum(), rtol=1e-12, atol=1e-12)
    wanted = 5 * rows[0].mT @ rows[0]
    torch.testing.assert_close(samples.sum(), wanted, rtol=1e-12, atol=1e-12)


def test_positions_of_one_input_are_one_sample():
    rows = randn(6, 7, 4)
    whole, parts = (Samples(torch.zeros(4, 4, dtype=torch.float64)) for _ in "ab")
    whole.add(rows)
    for each in rows:
        parts.add(each[None])
    assert whole.count == parts.count == 6
    assert whole.squares * whole.unit**4 == pytest.approx(sum(float((r.mT @ r).square().sum()) for r in rows))
    assert parts.squares * parts.unit**4 == pytest.approx(whole.squares * whole.unit**4)
    torch.testing.assert_close(whole.shrunk(), parts.shrunk(), rtol=1e-12, atol=1e-12)


def test_of_many_positions_some_stand_for_all():
    rows = randn(40, 5 * POSITIONS, 4).cumsum(2)
    wanted, samples = rows.flatten(0, 1).mT @ rows.flatten(0, 1), Samples(torch.zeros(4, 4, dtype=torch.float64))
    for each in rows:
        samples.add(each[None])
    assert samples.count == 40
    assert (samples.sum() - wanted).norm() < 0.05 * wanted.norm(), "the noise of 1/√10,240"


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_gradients_of_any_size_are_squared_in_float32(size):
    rows, samples = randn(3, 7, 4), Samples.none(torch.zeros(1), 4)
    samples.add(torch.zeros(1, 7, 4))
    samples.add(rows.float() * size)
    wanted = torch.einsum("nps,npt->st", rows, rows)
    assert samples.sum().dtype == (torch.float32 if size == 1 else torch.float64), "the square of 1e30 is not in range"
    rounding = 21 * torch.finfo(torch.float32).eps * float(wanted.diagonal().max())  # of 21 positions
    torch.testing.assert_close(samples.sum().double() / size / size, wanted, rtol=0, atol=rounding)
    squares = sum(float((r.mT @ r).square().sum()) for r in rows)
    assert samples.squares * (samples.unit / size) ** 4 == pytest.approx(squares, rel=1e-5)


def test_gradients_of_very_different_sizes_are_added_up_in_float32():
    rows, samples = randn(2, 7, 4), Samples.none(torch.zeros(1), 4)
    samples.add(rows.float() * 1e-30)
    samples.add(rows.float())
    samples.add(rows.float() * 1e-30)
    wanted = torch.einsum("nps,npt->st", rows, rows)
    rounding = 14 * torch.finfo(torch.float32).eps * float(wanted.diagonal().max())  # of 14 positions
    torch.testing.assert_close(samples.sum().double(), wanted, rtol=0, atol=rounding)
    assert samples.count == 6


@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_what_is_shrunk_in_float32_is_that_of_float64(spread):
    rows = randn(12, 7, 4) * torch.tensor([1.0, 2.0, 4.0, 8.0]).double() ** spread
    single, double = Samples.none(torch.zeros(1), 4), Samples.none(torch.zeros(1).double(), 4)
    single.add(rows.float())
    double.add(rows)
    wanted = double.shrunk()
    assert 0.01 < 1 - offdiagonal(wanted).norm() / offdiagonal(double.sum()).norm() < 0.99
    rounding = 84 * torch.finfo(torch.float32).eps * float(wanted.diagonal().max())  # of 84 positions
    torch.testing.assert_close(single.shrunk().double(), wanted, rtol=0, atol=rounding)


def offdiagonal(matrix: Tensor) -> Tensor:
    return matrix - matrix.diag().diag()


def test_further_signs_are_drawn_while_rows_of_outputs_are_few():
    gm = capture(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3))
    importance, probes = Importance(gm), []
    for _ in range(FEW // 32 + 1):
        importance.add(Inputs((torch.randn(32, 3),)))
        probes.append(importance.probes)
    assert probes == [2, 4, 5]


def test_what_a_fit_goes_by_is_shrunk():
    net, x = nn.Sequential(nn.Linear(6, 30)).double(), randn(5, 6)
    gm = capture(net, x)
    importance = Importance(gm)
    importance.add(Inputs((x,)))
    raw, shrunk = importance.gamma(node(gm, "0")), importance.estimate(node(gm, "0"))
    assert torch.linalg.matrix_rank(raw) == 10
    assert torch.linalg.eigvalsh(shrunk).min() > 0.5 * shrunk.trace() / 30


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_whether_outputs_are_logits_does_not_hang_on_the_size_of_batches(rows):
    classifier = nn.Sequential(nn.Linear(12, 12, bias=False))
    classifier[0].weight = nn.Parameter(9 * torch.eye(12))
    images = torch.eye(12).repeat(2, 1)
    whole, parts = capture(classifier, images), capture(classifier, images[:1])
    sweep(whole, [Inputs((images,))], effects=24)
    sweep(parts, [Inputs((part,)) for part in images.split(rows)], effects=24)
    assert logits_among(whole) == logits_among(parts) == (True,)


def test_few_inputs_are_added_all_the_same():
    gm = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(1, 4))
    importance = Importance(gm)
    for _ in range(3):
        importance.offer(Inputs((torch.randn(1, 4),)))
    assert not importance.sums
    assert importance.finish()
    assert importance.probes == 6


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, chosen):
        y = torch.zeros_like(x).index_put((chosen == 0,), self.a(x[chosen == 0]))
        return y.index_put((chosen == 1,), self.b(x[chosen == 1]))


def test_an_expert_without_any_tokens_in_a_batch_is_measured_in_the_others():
    torch.manual_seed(0)
    chosen = torch.arange(40) % 2
    data = [(torch.randn(40, 32), chosen) for _ in range(4)]
    model = Experts().eval()
    found = []
    for batches in (data, [*data, (torch.randn(40, 32), 1 + 0 * chosen)]):
        gm = capture_any(model, Inputs.of(data[0]))
        sweep(gm, as_inputs(gm, batches), effects=200)
        found.append(statistics(calls(gm, "a")[0]).importance)
    assert found[0] is not None
    assert found[1] is not None
    torch.testing.assert_close(found[0] / found[0].trace(), found[1] / found[1].trace())
