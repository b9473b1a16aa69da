from __future__ import annotations

import copy
import operator

import torch
from torch import fx, nn

import fxlrd
from fxlrd.differences.compare import diff
from tests.support.graphs import chain, change_kinds, graph_module
from tests.support.models import ResidualNet


def test_arguments_and_operands():
    def build(args):
        return graph_module(lambda g, x: g.call_function(torch.flatten, (g.call_function(operator.sub, args(g, x)), 1)))

    one = build(lambda g, x: (x, 1))
    assert change_kinds(diff(one, build(lambda g, x: (x, 2)))) == {"sub": "changed"}
    assert "sub(x, 2)" in diff(one, build(lambda g, x: (x, 2))).to_text()
    two = graph_module(lambda g, x: g.call_function(operator.sub, (x, g.call_method("neg", (x,)))))
    three = graph_module(lambda g, x: g.call_function(operator.sub, (g.call_method("neg", (x,)), x)))
    assert "moved" in change_kinds(diff(two, three)).values()


def test_arguments_in_another_order_are_moved():
    def build(*names):
        graph = fx.Graph()
        args = {name: graph.placeholder(name) for name in names}
        graph.output(graph.call_function(operator.sub, (args["x"], args["y"])))
        return fx.GraphModule(nn.Module(), graph)

    d = diff(build("x", "y"), build("y", "x"))
    assert change_kinds(d) == {"y": "moved", "x": "moved"}
    assert "y: moved, argument 1 instead of 2" in d.to_text()
    assert change_kinds(diff(build("x", "y"), build("z", "x", "y"))) == {"z": "added"}


def test_a_change_that_the_text_of_a_node_does_not_show_is_in_words():
    def build(result, default=1):
        graph = fx.Graph()
        x = graph.placeholder("x", default_value=default)
        graph.output(result(graph.call_module("act", (x,))))
        root = nn.Module()
        root.act = nn.ReLU()
        return fx.GraphModule(root, graph)

    one = build(lambda y: y)
    assert "output: changed, (%) → ({'y': %})\n" in diff(one, build(lambda y: {"y": y})).to_text() + "\n"
    assert "x: changed, (1) → (2)\n" in diff(one, build(lambda y: y, default=2)).to_text() + "\n"


def test_shapes_are_not_compared_between_different_inputs():
    model = ResidualNet(blocks=4).eval()
    d = diff(*(fxlrd.capture(model, torch.randn(2, 3, size, size)) for size in (8, 10)))
    assert not d
    assert d.notes


def test_dtype_and_weights(parts):
    one = graph_module(chain("a act"), **parts)
    two = graph_module(chain("a act"), **parts | {"a": copy.deepcopy(parts["a"]).double()})
    assert change_kinds(diff(one, two)) == {"a": "values"}
    assert not diff(one, two, values=False)
    assert "float32[4, 4] → float64[4, 4]" in diff(one, two).to_text()
    three = copy.deepcopy(one)
    with torch.no_grad():
        three.a.weight *= 1.5
    assert "weight moved by 0.5" in diff(one, three).to_text()
