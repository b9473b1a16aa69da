from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxlrd.capturing.dynamo import has_layers, raise_graph, weights_of
from fxlrd.capturing.lowering import lower_graph
from fxlrd.graph.facts import provenance
from fxlrd.graph.guards import why_not_replaceable
from fxlrd.graph.surgery import layers
from fxlrd.layers.kinds import LAYERS
from fxlrd.layers.stand_ins import stand_in
from fxlrd.passes import Decompose
from fxlrd.pipeline import Pipeline
from tests.support.clothes import CLOTHES, TransposedLinear
from tests.support.dynamo import graph

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def raised(model, *inputs, **options):
    gm, values = graph(model, *inputs, **options)
    weights = weights_of(gm, values)
    return gm, values, raise_graph(gm, weights)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same", dilation=2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8))])
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", stride=2)
        self.token = nn.Parameter(torch.randn(8))
        self.register_buffer("shift", torch.randn(8))
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(block(x), inplace=True)
        x = self.reflect(x).mean((2, 3))
        return self.fc(self.norm(x + self.token) + self.shift)


@pytest.mark.parametrize("freezing", [False, True])
@torch.no_grad()
def test_stock_modules_around_the_same_parameters(freezing):
    model, x = Mixed().eval(), torch.randn(2, 3, 9, 9)
    _, _, found = raised(model, x, freezing=freezing)
    own = dict(model.named_modules())
    called = {str(n.target) for n in found.graph_module.graph.nodes if n.op == "call_module"}
    assert called == {"stem", "blocks.0.0", "blocks.0.1", "reflect", "fc"}
    for name in called:
        module = found.graph_module.get_submodule(name)
        assert type(module) is type(own[name])
        for key, parameter in own[name].named_parameters():
            assert module.get_parameter(key) is parameter
    assert {n.target for n in found.graph_module.graph.find_nodes(op="placeholder")} == {"L_x_"}
    assert torch.equal(found.graph_module(x)[0], model(x))


@pytest.mark.parametrize("freezing", [False, True])
@torch.no_grad()
def test_lowered_untouched_it_is_the_same_graph(freezing):
    model, x = Mixed().eval(), torch.randn(2, 3, 9, 9)
    gm, values, found = raised(model, x, freezing=freezing)
    lowered = lower_graph(found.graph_module, found, gm, freezing)
    assert lowered.factors == {}
    assert lowered.sources == ()

    def calls(graph):
        return [(n.op, n.target, n.args, n.kwargs) for n in graph.nodes if n.op not in ("placeholder", "get_attr")]

    assert str(calls(lowered.graph_module.graph)) == str(calls(gm.graph))
    assert [n.name for n in lowered.graph_module.graph.find_nodes(op="placeholder")] == [
        n.name for n in gm.graph.find_nodes(op="placeholder")
    ]
    assert torch.equal(lowered.graph_module(*values)[0], model(x))


@pytest.mark.parametrize("freezing", [False, True])
@torch.no_grad()
def test_factors_and_their_sources(freezing):
    model, x = Mixed().eval(), torch.randn(2, 3, 9, 9)
    gm, values, found = raised(model, x, freezing=freezing)
    done = Pipeline([Decompose(ranks={"fc": 3, "reflect": (4, None)})])(found.graph_module)
    lowered = lower_graph(done.graph_module, found, gm, freezing)
    assert len(lowered.factors) == 3 + 3
    assert len(lowered.sources) == 4
    assert all("fc" in name or "reflect" in name for name in lowered.sources)
    placed = [] if freezing else list(lowered.factors.values())
    torch.testing.assert_close(lowered.graph_module(*values, *placed)[0], done.graph_module(x)[0])
    assert not any(f.requires_grad for f in lowered.factors.values())


@torch.no_grad()
def test_buffers_are_not_written():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    x = torch.randn(2, 3, 5, 5)
    gm, values = graph(model, x)
    before = {k: v.clone() for k, v in model.named_buffers()}
    found = raise_graph(gm, weights_of(gm, values))
    found.graph_module(x)
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    assert [n for n in found.graph_module.graph.nodes if n.target is F.batch_norm]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.fc.weight
        self.bare = nn.Linear(6, 6)
        self.read = nn.Linear(6, 6)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x):
        x = self.tied(self.fc(x)) + F.linear(x, self.bare.weight, bias=self.bare.bias)
        x = F.linear(input=x, weight=self.bare.weight.T) + F.linear(x, self.bare.weight)
        return self.parametrized(self.read(x) * self.read.bias)


@torch.no_grad()
def test_layers_that_share_and_layers_that_are_read():
    model, x = Twice().eval(), torch.randn(2, 6)
    gm, _, found = raised(model, x)
    reasons = why_not_replaceable(found.graph_module)
    assert list(reasons) == ["fc", "tied", "read"]
    assert reasons["fc"].code == "shared-parameter"
    assert reasons["read"].code == "read-directly"
    assert torch.equal(found.graph_module(x)[0], model(x))
    lowered = lower_graph(found.graph_module, found, gm, False)
    assert lowered.factors == {}


@torch.no_grad()
def test_a_layer_that_is_called_twice_is_one_module():
    fc = nn.Linear(6, 6)
    model, x = nn.Sequential(fc, nn.ReLU(), fc).eval(), torch.randn(2, 6)
    gm, values, found = raised(model, x)
    assert list(layers(found.graph_module)) == ["0"]
    done = Pipeline([Decompose(ranks=6)])(found.graph_module)
    lowered = lower_graph(done.graph_module, found, gm, False)
    assert len(lowered.factors) == 3
    torch.testing.assert_close(lowered.graph_module(*values, *lowered.factors.values())[0], model(x))


@torch.no_grad()
def test_two_models_in_one_graph_and_a_bare_layer():
    a, b, x = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)), torch.randn(2, 6)
    _, _, found = raised(lambda v: b(a(v)), x)
    assert list(layers(found.graph_module)) == ["a", "b.0"]
    torch._dynamo.reset()
    _, _, found = raised(a, x)
    assert list(layers(found.graph_module)) == ["0"]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
        (nn.Conv2d(4, 6, (3, 1), dilation=(1, 2)), (2, 4, 9, 9)),
        (nn.Conv2d(4, 6, 3, padding="same"), (4, 9, 9)),
        (nn.Conv3d(4, 6, 3, stride=(1, 2, 1)), (2, 4, 5, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2), (2, 4, 9, 9)),
        (nn.ConvTranspose3d(4, 6, 2, bias=False), (2, 4, 5, 5, 5)),
        (nn.Linear(4, 6, bias=False), (2, 7, 4)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
@torch.no_grad()
def test_every_layer_there_and_back(module, shape):
    model, x = nn.Sequential(nn.Identity(), module).eval(), torch.randn(shape)
    gm, values, found = raised(model, x)
    expected = isinstance(module, LAYERS)
    assert has_layers(gm, weights_of(gm, values)) is expected
    assert torch.equal(found.graph_module(x)[0], model(x))
    assert list(layers(found.graph_module)) == (["1"] if expected else [])
    if expected:
        assert repr(found.graph_module.get_submodule("1")) == repr(module)
        # Another module in its place goes back as a function, too.
        twin = type(module).__new__(type(module))
        twin.__dict__.update({k: dict(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()})
        twin.weight = nn.Parameter(module.weight * 2)
        found.graph_module.set_submodule("1", twin)
        lowered = lower_graph(found.graph_module, found, gm, False)
        assert list(lowered.factors) == ["fxlrd_1_weight"]
        want = nn.Sequential(twin)(x)
        torch.testing.assert_close(lowered.graph_module(*values, *lowered.factors.values())[0], want)


@torch.no_grad()
def test_a_norm_raised_and_replaced():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    gm, values, found = raised(model, x)
    done = Pipeline.parse("merge{mode=exact,norms=true}")(found.graph_module)
    lowered = lower_graph(done.graph_module, found, gm, False)
    torch.testing.assert_close(lowered.graph_module(*values, *lowered.factors.values())[0], model(x))
    assert len(lowered.sources) > 4


@torch.no_grad()
def test_sizes_that_are_symbols():
    model, x = Mixed().eval(), torch.randn(2, 3, 9, 9)
    gm, values, found = raised(model, x, dynamic=True)
    assert set(layers(found.graph_module)) == {"stem", "blocks.0.0", "reflect", "fc"}
    lowered = lower_graph(found.graph_module, found, gm, False)
    assert len(lowered.graph_module.graph.find_nodes(op="placeholder")) == len(values)


@torch.no_grad()
def test_provenance_names_the_layer():
    _, _, found = raised(Mixed().eval(), torch.randn(2, 3, 9, 9))
    done = Pipeline([Decompose(ranks={"fc": 3})])(found.graph_module)
    roles = [(p.name, p.role) for n in done.graph_module.graph.nodes if (p := provenance(n)) is not None]
    assert ("fc", "first") in roles
    assert ("stem", "original") in roles


@pytest.mark.parametrize("cls", CLOTHES)
@pytest.mark.parametrize("freezing", [False, True])
@torch.no_grad()
def test_a_linear_in_other_clothes_is_raised_and_untouched_goes_back_as_it_was(cls, freezing):
    model, x = nn.Sequential(cls(6, 4), nn.ReLU(), cls(4, 6)).double().eval(), torch.randn(2, 3, 6).double()
    gm, values, found = raised(model, x, freezing=freezing)
    assert has_layers(gm, found.weights)
    own = {name: stand_in(model.get_submodule(name)) for name in "02"}
    assert {name: m.weight.data_ptr() for name, m in layers(found.graph_module).items()} == {
        name: layer.weight.data_ptr() for name, layer in own.items()
    }
    torch.testing.assert_close(found.graph_module(x)[0], model(x))
    lowered = lower_graph(found.graph_module, found, gm, freezing)
    assert lowered.factors == {}
    assert lowered.sources == ()
    assert torch.equal(lowered.graph_module(*values)[0], model(x))
    done = Pipeline([Decompose(ranks={"2": 2})])(found.graph_module)
    lowered = lower_graph(done.graph_module, found, gm, freezing)
    assert len(lowered.sources) == len(list(found.graph_module.get_submodule("2").parameters()))
    placed = [] if freezing else list(lowered.factors.values())
    torch.testing.assert_close(lowered.graph_module(*values, *placed)[0], done.graph_module(x)[0])


class Several(nn.Module):
    """Products that are no layer: scaled, of two weights, beside a module."""

    def __init__(self):
        super().__init__()
        self.scaled = Product(lambda m, x: F.linear(x, m.weight) * 2)
        self.twice = Product(lambda m, x: F.linear(x, m.weight) + F.linear(x, m.weight.T))
        self.squared = Product(lambda m, x: x @ (m.weight * m.weight))
        self.batched = Product(lambda m, x: torch.einsum("bi,bo,io->bo", x, x, m.weight))
        self.holder = Product(lambda m, x: m.act(F.linear(x, m.weight)))
        self.holder.act = nn.ReLU()

    def forward(self, x):
        return self.scaled(x) + self.twice(x) + self.squared(x) + self.batched(x) + self.holder(x)


class Product(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.of = forward

    def forward(self, x):
        return self.of(self, x)


@torch.no_grad()
def test_products_that_are_no_layer_stay_functions():
    gm, values, found = raised(Several().eval(), torch.randn(2, 6))
    assert not layers(found.graph_module)
    assert not has_layers(gm, weights_of(gm, values))


@torch.no_grad()
def test_one_that_is_called_with_two_shapes_is_one_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = TransposedLinear(6, 6)

        def forward(self, x):
            return self.fc(self.fc(x)[:1])

    model, x = Model().eval(), torch.randn(2, 3, 6)
    gm, values, found = raised(model, x)
    assert list(layers(found.graph_module)) == ["fc"]
    assert torch.equal(lower_graph(found.graph_module, found, gm, False).graph_module(*values)[0], model(x))
