"""Regions joined by what flows between layers, and the widths that a model's code counts on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxlrd.capturing.flow import flow
from fxlrd.capturing.regions import capture_regions
from fxlrd.capturing.widths import groups_of
from fxlrd.graph.captured import Regions, captured
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import calls, layers
from fxlrd.passes import Calibrate, Merge
from tests.support.results import reasons, site_names

X = torch.randn(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Stopped(nn.Module):
    """A feed-forward block inside control flow on values, with a layer before it."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.before = nn.Linear(8, 8)
        for name, part in parts.items():
            setattr(self, name, part)
        self.block = forward

    def forward(self, x):
        x = self.before(x)
        if x.sum() > 1e9:
            x = x * 2
        return x + self.block(self, x)


def model(forward, **parts) -> nn.Module:
    torch.manual_seed(0)
    return Stopped(forward, **parts).double().eval()


def inner(module: nn.Module, x=X) -> list[list[str]]:
    return [group.cut for group in groups_of(capture_regions(module, x))]


def gated(m, x):
    return m.down(F.silu(m.gate(x)) * m.up(x))


def packed(m, x):
    gate, up = m.wide(x).chunk(2, dim=-1)
    return m.down(torch.sigmoid(gate) * up)


def written_out(m, x):
    y = m.up(x)
    return m.down(0.5 * y * (1.0 + torch.tanh(0.79 * (y + 0.044715 * torch.pow(y, 3.0)))))


class Act(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def wide():
    return nn.Linear(8, 24)


def down():
    return nn.Linear(24, 8)


FLOWS = {
    "activation": (lambda m, x: m.down(F.gelu(m.up(x))), {"up": wide(), "down": down()}, ["up", "down"]),
    "written out": (written_out, {"up": wide(), "down": down()}, ["up", "down"]),
    "own module": (lambda m, x: m.down(m.a(m.up(x))), {"up": wide(), "a": Act(), "down": down()}, ["up", "down"]),
    "gated": (gated, {"gate": wide(), "up": wide(), "down": down()}, ["gate", "up", "down"]),
    "packed": (packed, {"wide": nn.Linear(8, 48), "down": down()}, ["wide", "down"]),
    "dropout": (
        lambda m, x: m.down(F.dropout(m.up(x).relu(), 0.1, m.training)),
        {"up": wide(), "down": down()},
        ["up", "down"],
    ),
    "clamped": (lambda m, x: m.down(m.up(x)[:, :].clamp(None, 1.0)), {"up": wide(), "down": down()}, ["up", "down"]),
    "in place": (lambda m, x: m.down(m.up(x).mul_(0.5).relu_()), {"up": wide(), "down": down()}, ["up", "down"]),
    "one after the other": (
        lambda m, x: m.down(m.up(x).relu()) + m.down(m.up(x + 1).relu()),
        {"up": wide(), "down": down()},
        ["up", "down"],
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_layers_are_joined_through_code_that_cannot_be_traced(name):
    forward, parts, expected = FLOWS[name]
    assert inner(model(forward, **parts)) == [expected]


def test_the_joined_layers_are_cut_under_the_users_forward():
    original = model(gated, gate=wide(), up=wide(), down=down())
    cut = Merge(ranks={"gate": 9})(
        Calibrate(torch.randn(200, 7, 8, dtype=torch.float64))(capture_regions(original, X)).graph_module
    )
    assert site_names(cut) == ["gate"]
    record = captured(cut.graph_module)
    assert isinstance(record, Regions)
    smaller = record.runnable(cut.graph_module)
    assert (smaller.gate.out_features, smaller.up.out_features, smaller.down.in_features) == (9, 9, 9)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    rows = [(smaller.gate.weight[i] == original.gate.weight).all(1).nonzero().item() for i in range(9)]
    h = (F.silu(original.gate(x)) * original.up(x))[..., rows]
    y = original.before(x)
    h = (F.silu(original.gate(y)) * original.up(y))[..., rows]
    assert torch.allclose(smaller(x), y + F.linear(h, smaller.down.weight, smaller.down.bias), rtol=1e-12, atol=1e-12)


MIXED = {
    "norm between": (lambda m, x: m.down(m.n(m.up(x))), {"up": wide(), "n": nn.LayerNorm(24), "down": down()}),
    "functional norm": (lambda m, x: m.down(F.layer_norm(m.up(x), (24,))), {"up": wide(), "down": down()}),
    "read elsewhere": (lambda m, x: (lambda h: m.down(h.relu()) + h.mean())(m.up(x)), {"up": wide(), "down": down()}),
    "read as a number": (
        lambda m, x: (lambda h: m.down(h.relu()) * h.detach().amax().item())(m.up(x)),
        {"up": wide(), "down": down()},
    ),
    "read by another view": (
        lambda m, x: (lambda h: m.down(h.relu()) + h[..., :8])(m.up(x)),
        {"up": wide(), "down": down()},
    ),
    "softmax": (lambda m, x: m.down(m.up(x).softmax(-1)), {"up": wide(), "down": down()}),
    "heads": (lambda m, x: m.down(m.up(x).view(3, 7, 4, 6).relu().flatten(2)), {"up": wide(), "down": down()}),
    "numpy": (
        lambda m, x: (lambda h: m.down(h.relu()) * float(h.detach().numpy().max()))(m.up(x)),
        {"up": wide(), "down": down()},
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_is_read_otherwise_keeps_its_width(name):
    forward, parts = MIXED[name]
    assert inner(model(forward, **parts)) == []


def test_a_depthwise_conv_is_in_the_group_of_the_layer_that_feeds_it():
    class Inverted(nn.Module):
        def __init__(self):
            super().__init__()
            self.expand, self.depth, self.reduce = (
                nn.Conv2d(8, 20, 1),
                nn.Conv2d(20, 20, 3, groups=20),
                nn.Conv2d(20, 8, 1),
            )

        def forward(self, x):
            return self.reduce(self.depth(self.expand(x).relu()).relu())

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Inverted()

        def forward(self, x):
            return self.part(x) if x.sum() < 1e9 else x

    assert inner(Around().double().eval(), torch.randn(1, 8, 5, 5, dtype=torch.float64)) == [
        ["part.expand", "part.reduce"]
    ]


class Counting(nn.Module):
    """Can be traced, but its code counts on 24 units."""

    def __init__(self, step):
        super().__init__()
        self.up, self.down, self.step = wide(), down(), step

    def forward(self, x):
        return self.down(self.step(self.up(x).relu()))


def on_one_row(m, x):
    return m.down(m.up(x).relu()) if len(x) > 1 else m.up(x)[..., 16:]


def in_training(m, x):
    y = m.up(x)
    return m.down(y.relu()) if not m.training else y[..., 16:]


def on_many_rows(m, x):
    y = m.up(x).relu()
    return m.down(y) if len(x) < 10 else m.down(y.reshape(-1, 24)).view(x.shape)


def with_gradients(m, x):
    y = m.up(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * torch.ones(24, dtype=y.dtype))
    return m.down(y.relu())


def on_four_rows(m, x):
    y = m.up(x).relu()
    return m.down(y) if len(x) != 4 else m.down(y.reshape(-1, 24)).view(x.shape)


def test_a_model_that_makes_much_is_tried_on_one_row_more(monkeypatch):
    module = model(on_four_rows, up=wide(), down=down())
    assert inner(module) != []
    monkeypatch.setattr("fxlrd.capturing.widths._MANY", 0)
    assert inner(module) == []


@pytest.mark.parametrize("forward", [on_one_row, on_many_rows, in_training, with_gradients])
def test_ways_that_the_example_does_not_take_are_tried(forward):
    module = model(forward, up=wide(), down=down())
    assert inner(module) == []
    gm = capture_regions(module, X)
    assert captured(gm).fixed_widths == {"up"}


WIDTHS = {
    "split": lambda h: sum(h.split(24, dim=-1)),
    "expanded": lambda h: h * torch.ones(24, dtype=h.dtype),
    "checked": lambda h: h * float(h.shape[-1] == 24),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_a_width_that_the_code_counts_on_is_kept(name):
    assert inner(model(lambda m, x: m.part(x), part=Counting(WIDTHS[name]))) == []


def test_a_width_that_only_a_trial_shows_is_named():
    module = model(lambda m, x: m.part(x), part=Counting(WIDTHS["checked"]))
    gm = Calibrate(X)(capture_regions(module, X)).graph_module
    assert captured(gm).fixed_widths == {"part.up"}
    assert reasons(Merge()(gm))["part.up"] == "fixed-width"


class Stream(nn.Module):
    """What two layers make is added up; with ``counting`` the code reads how many units that are."""

    def __init__(self, counting):
        super().__init__()
        self.up, self.more, self.down, self.counting = wide(), nn.Linear(24, 24), down(), counting

    def forward(self, x):
        y = self.up(x)
        y = y + self.more(y.relu())
        return self.down(y / self.more.out_features if self.counting else y)


@pytest.mark.parametrize(("counting", "fixed"), [(True, {"part.up", "part.more"}), (False, set())])
def test_a_width_of_a_residual_stream_is_tried_too(counting, fixed):
    gm = capture_regions(model(lambda m, x: m.part(x), part=Stream(counting)), X)
    assert captured(gm).fixed_widths == fixed
    assert inner(model(lambda m, x: m.part(x), part=Stream(counting))) == []
    streams = [set(group.cut) for group in groups_of(gm, sums=True)]
    assert streams == ([] if counting else [{"part.up", "part.more", "part.down"}])


def test_a_width_of_a_stream_that_is_read_outside_of_its_region_is_kept():
    def forward(m, x):
        y = m.part(x)
        return y / m.part.more.out_features if len(x) else y

    gm = capture_regions(model(forward, part=Stream(False)), X)
    assert captured(gm).fixed_widths == {"part.up", "part.more"}


def test_the_flow_of_a_run_has_the_models_names_and_leaves_the_model_as_it_was():
    module = model(gated, gate=wide(), up=wide(), down=down())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    gm = flow(module, Inputs.of(X))
    assert list(layers(gm)) == ["before", "gate", "up", "down"]
    assert all(node.meta["tensor_meta"].shape[0] == 3 for node in calls(gm, "down"))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class Experts(nn.Module):
    """Experts in modules, each called on the rows that are routed to it, with the sizes that come of that."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.up, self.down = (nn.ModuleList(make() for _ in range(3)) for make in (wide, down))

    def forward(self, x):
        rows, chosen = x.flatten(0, 1), self.router(x).flatten(0, 1).argmax(-1)
        out = torch.zeros_like(rows)
        for half in (slice(None, 9), slice(9, None)):
            for i in range(3):
                routed = torch.nonzero(chosen[half] == i).flatten() + (half.start or 0)
                out[routed] = self.down[i](F.silu(self.up[i](rows[routed])))
        return out.view(x.shape)


def test_experts_are_cut_in_all_their_calls():
    torch.manual_seed(0)
    module = Experts().double().eval()
    expected = [[f"up.{i}", f"down.{i}"] for i in range(3)]
    assert sorted(inner(module)) == sorted(expected)
    gm = Calibrate([torch.randn(3, 7, 8, dtype=torch.float64) for _ in range(6)])(capture_regions(module, X))
    cut = Merge(ranks={"up.1": 10})(gm.graph_module).graph_module
    smaller = captured(cut).runnable(cut)
    assert (smaller.up[1].out_features, smaller.down[1].in_features) == (10, 10)
    assert smaller(torch.randn(2, 5, 8, dtype=torch.float64)).shape == (2, 5, 8)
