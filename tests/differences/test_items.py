from __future__ import annotations

import copy
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

import fxlrd
from fxlrd.differences.compare import diff
from fxlrd.differences.items import graph_items, tree_items
from tests.support.graphs import change_kinds, graph_module
from tests.support.models import ResidualNet


def test_a_text_has_a_sign_for_each_input_and_no_names():
    def build(graph, x):
        return graph.call_function(operator.add, (graph.call_module("act", (x,)), x), {"alpha": 2})

    _, act, add, _ = graph_items(graph_module(build, act=nn.ReLU()))
    assert (act.text, act.call, act.site) == ("ReLU()", "(%)", "act")
    assert (add.text, add.call, add.site) == ("add(%, %, alpha=2)", "(%, %, alpha=2)", None)
    assert [i.name for i in add.inputs] == ["act", "x"]
    assert [i.name for i in act.users] == ["add"]


def test_the_site_of_a_factor_is_its_layer(decomposed):
    items = [i for i in graph_items(decomposed.graph_module) if i.target.startswith("blocks.0.conv1")]
    assert [i.target for i in items] == [f"blocks.0.conv1.{role}" for role in ("first", "core", "last")]
    assert {i.site for i in items} == {"blocks.0.conv1"}
    assert all(i.is_factor for i in items)


def test_a_read_parameter_counts_its_numbers():
    root = nn.Module()
    root.p = nn.Parameter(torch.ones(3))
    graph = fx.Graph()
    graph.output(graph.get_attr("p"))
    read, _ = graph_items(fx.GraphModule(root, graph))
    assert (read.params, read.text, read.site) == (3, "Parameter[3]", "p")


def test_modules_of_a_tree_own_tensors_or_have_no_children():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    model[0].register_buffer("shift", torch.ones(2))
    assert [(i.name, i.params) for i in tree_items(model, model)] == [("0", 0), ("0.0", 6), ("0.1", 0)]


def test_retraced_factors_are_still_those_of_their_layer():
    model = ResidualNet(blocks=4).eval()
    result = fxlrd.compress(model, torch.randn(2, 3, 8, 8), measure=False)
    plain = fx.symbolic_trace(copy.deepcopy(result.model))
    for node in plain.graph.nodes:
        node.meta.clear()
    assert {i.site for i in graph_items(plain) if i.target.startswith("blocks.2.conv1.")} == {"blocks.2.conv1"}
    assert change_kinds(diff(fx.symbolic_trace(model), plain))["blocks.2.conv1"] == "rewritten"
    assert change_kinds(diff(plain, fx.symbolic_trace(model)))["blocks.2.conv1"] == "rewritten"


def test_a_function_is_named_with_its_module():
    _, gelu, silu, _ = graph_items(graph_module(lambda g, x: g.call_function(F.silu, (g.call_function(F.gelu, (x,)),))))
    assert (gelu.target, silu.target) == ("torch.gelu", "torch.nn.functional.silu")
