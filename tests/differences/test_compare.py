from __future__ import annotations

import copy
import json
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxlrd
from fxlrd import FxlrdError, Pipeline
from fxlrd.differences.compare import Steps, diff
from fxlrd.differences.model import KINDS
from tests.support.graphs import change_kinds
from tests.support.models import ResidualNet


def test_fxlrd_diff_is_a_function():
    assert callable(fxlrd.diff)
    assert fxlrd.diff is diff


def test_nothing_differs_from_itself_or_a_copy(graph):
    for other in (graph, copy.deepcopy(graph), fx.symbolic_trace(graph)):
        d = diff(graph, other)
        assert not d
        assert d.changes == ()
        assert d.to_text() == ""
        assert d.to_dict()["same"] is True
        assert len(d.untouched) == len(graph.graph.nodes)


def test_the_same_class_with_other_weights_differs_in_values_only(graph):
    torch.manual_seed(1)
    other = fxlrd.capture(ResidualNet(blocks=4).eval(), torch.randn(2, 3, 8, 8))
    assert set(change_kinds(diff(graph, other)).values()) == {"values"}


@pytest.mark.parametrize(
    ("spec", "kinds"),
    [
        ("recalibrate", {"values"}),
        ("decompose{ratio=2},freeze", {"trainable"}),
        ("decompose{ratio=2},branch{groups=2,steps=5}", {"changed"}),
        ("calibrate", set()),
    ],
)
def test_steps_of_a_pipeline(spec, kinds, graph):
    steps = Steps()
    pipeline = Pipeline.parse(spec)
    if "calib" in spec:
        pipeline = pipeline.with_options(calibration=[torch.randn(16, 3, 8, 8) + 1])
    done = pipeline(graph, callback=steps)
    assert len(steps.names) == len(pipeline.passes) + 1
    d = steps.diff(-2, -1, report=done)
    assert set(change_kinds(d).values()) == kinds
    assert [p["text"] for p in d.passes] == [done.ledger[-1].text]
    with pytest.raises(FxlrdError, match="there are 0 input, 1"):
        steps.diff(0, 7)


def test_a_result_of_compress_is_compared_with_the_model_by_names(net):
    result = fxlrd.compress(net, torch.randn(2, 3, 8, 8), measure=False)
    d = diff(net, result)
    assert change_kinds(d)["blocks.0.conv1"] == "rewritten"
    assert d.skipped
    assert d.changes[0].figures["ranks"] == [19, 19]
    assert "compared by the names" in d.to_text()
    assert not diff(net, copy.deepcopy(net))


class Turning(nn.Module):
    """No graph: what it does depends on values."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(32, 32)

    def forward(self, x):
        return self.one(x) if bool(x.sum() > -1e9) else x


def test_a_model_around_regions_is_compared_by_names():
    model = Turning().eval()
    result = fxlrd.compress(model, torch.randn(2, 32), measure=False)
    assert isinstance(result.model, Turning)
    assert change_kinds(diff(model, result)) == {"one": "rewritten"}
    assert "modules" in diff(model, result).to_text()


class Other(Turning):
    """The same modules, in other code."""

    def forward(self, x):
        return -super().forward(x)


def test_other_code_around_the_same_modules_is_a_change():
    one, two = Turning(), Other()
    two.load_state_dict(one.state_dict())
    d = diff(one, two)
    assert change_kinds(d) == {"Turning": "changed"}
    assert "+ Other" in d.to_text()
    inside = diff(nn.Sequential(one), nn.Sequential(two))
    assert change_kinds(inside) == {"0": "changed"}
    assert inside.untouched == ("0.one",)
    assert not diff(nn.Sequential(two), nn.Sequential(two))
    graphs = [nn.Sequential(nn.Sequential(nn.Linear(4, 4))), fx.symbolic_trace(nn.Sequential(nn.Sequential()))]
    graphs[1].add_module("0", nn.Module())
    graphs[1].get_submodule("0").add_module("0", graphs[0][0][0])
    assert not diff(*graphs), "what a graph has around modules runs no code"


class Holds(nn.Module):
    """A parameter, and nothing that a graph could call."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return x * self.scale


class Owns(nn.Module):
    """Tensors beside its parts: a graph has a module of no class in its place."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(32, 32)
        self.holds = Holds()
        self.register_buffer("shift", torch.ones(32))

    def forward(self, x):
        return self.holds(self.one(x)) + self.shift


def test_a_loaded_model_is_that_which_was_saved(tmp_path):
    result = fxlrd.compress(Owns().eval(), torch.randn(2, 32), measure=False)
    fxlrd.save(result, tmp_path)
    loaded = fxlrd.load(tmp_path, Owns())
    assert not diff(result, loaded)
    assert not diff(loaded, result)
    with torch.no_grad():
        loaded.shift.add_(1)
        loaded.holds.scale.add_(1)
    assert list(change_kinds(diff(result, loaded)).values()) == ["values", "values"]


def test_an_argument_that_is_no_model(graph):
    with pytest.raises(FxlrdError, match="before is a str"):
        diff("a", graph)
    with pytest.raises(FxlrdError, match="after has weights that are not initialised yet"):
        diff(nn.Sequential(nn.ReLU()), nn.Sequential(nn.LazyLinear(2)))


@st.composite
def graphs(draw) -> fx.GraphModule:
    root, graph = nn.Module(), fx.Graph()
    root.shared = nn.Tanh()
    nodes = [graph.placeholder("x"), graph.placeholder("y")]
    for i in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["module", "shared", "relu", "neg", "add"]))
        value = draw(st.sampled_from(nodes))
        if kind == "module":
            setattr(root, f"m{i}", nn.Linear(2, 2))
            nodes.append(graph.call_module(f"m{i}", (value,)))
        elif kind == "shared":
            nodes.append(graph.call_module("shared", (value,)))
        elif kind == "relu":
            nodes.append(graph.call_function(F.relu, (value,)))
        elif kind == "neg":
            nodes.append(graph.call_method("neg", (value,)))
        else:
            nodes.append(graph.call_function(operator.add, (value, draw(st.sampled_from(nodes)))))
    graph.output(tuple(nodes[-2:]))
    return fx.GraphModule(root, graph)


def check_every_node_once(one: fx.GraphModule, two: fx.GraphModule) -> None:
    d = diff(one, two)
    edits = [e for c in d.changes for e in c.edits]
    removed = [e.before.name for e in edits if e.before is not None]
    added = [e.after.name for e in edits if e.after is not None]
    assert len(set(removed)) == len(removed)
    assert len(set(added)) == len(added)
    assert sorted(added + list(d.untouched)) == sorted(n.name for n in two.graph.nodes)
    went = sum(e.after is None for e in edits)
    paired = sum(e.before is not None and e.after is not None for e in edits)
    assert went + paired + len(d.untouched) == len(one.graph.nodes)
    assert {c.kind for c in d.changes} <= set(KINDS)
    names = [name for block in d.to_dict()["blocks"] for name in block["same"]]
    assert len(set(names)) == len(names)
    d.to_text(color=True)
    json.dumps(d.to_dict())


@settings(max_examples=40, deadline=None)
@given(graphs(), graphs())
def test_every_node_is_in_one_change_at_most_and_none_is_lost(one, two):
    check_every_node_once(one, two)


@settings(max_examples=40, deadline=None)
@given(graphs(), st.data())
def test_a_graph_is_itself_and_one_other_argument_is_seen(gm, data):
    assert not diff(gm, gm)
    assert not diff(gm, copy.deepcopy(gm))
    other = copy.deepcopy(gm)
    nodes = [n for n in other.graph.nodes if n.op not in ("placeholder", "output")]
    node = data.draw(st.sampled_from(nodes))
    with other.graph.inserting_after(node):
        new = other.graph.call_method("exp", (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    other.recompile()
    d = diff(gm, other)
    assert change_kinds(d) == {"exp": "added"}
    assert change_kinds(diff(other, gm)) == {"exp": "removed"}
    check_every_node_once(gm, other)
