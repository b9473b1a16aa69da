from __future__ import annotations

import copy

import pytest
from torch import fx, nn

from fxlrd.differences.compare import diff
from fxlrd.differences.items import graph_items
from fxlrd.differences.match import match
from tests.support.graphs import chain, change_kinds, graph_module


def pairs(before: fx.GraphModule, after: fx.GraphModule) -> dict[str, str]:
    return {x.name: y.name for x, y in match(graph_items(before), graph_items(after)).to_after.items()}


def test_every_node_of_a_copy_is_paired_with_itself(graph):
    names = [n.name for n in graph.graph.nodes]
    assert pairs(graph, copy.deepcopy(graph)) == dict(zip(names, names, strict=True))


def test_a_layer_is_paired_with_none_of_its_factors_and_all_else_with_itself(graph, decomposed):
    layers = {site.name.replace(".", "_") for site in decomposed.ledger[0].sites}
    names = [n.name for n in graph.graph.nodes if n.name not in layers]
    assert pairs(graph, decomposed.graph_module) == dict(zip(names, names, strict=True))


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        ("a !relu b", "a !gelu b", {"relu": "rewritten"}),
        ("a !relu b", "a b", {"relu": "removed"}),
        ("a b", "a act b", {"act": "added"}),
        ("a !relu b", "a act b", {"relu": "rewritten"}),
        ("a act b bn", "a b act bn", {"act": "moved", "b": "moved", "bn": "moved"}),
        ("a !relu !relu b", "a !relu b", {"relu_1": "removed"}),
        ("a !relu !gelu !relu b", "a !relu !relu b", {"gelu": "removed"}),
        ("act a act", "act a", {"act": "removed"}),
        # The relu is paired by what reads it, and not with the relu of the same name.
        ("!relu !sigmoid !relu b", "!tanh !relu b", {"relu": "rewritten"}),
    ],
)
def test_small_edits(before, after, kinds, parts):
    one, two = (graph_module(chain(text), **parts) for text in (before, after))
    assert change_kinds(diff(one, two)) == kinds


def test_a_model_under_another_name_is_renamed(parts):
    inside = fx.symbolic_trace(nn.Sequential(parts["a"], parts["bn"], parts["b"]))
    outside = fx.symbolic_trace(nn.Sequential(nn.Sequential(parts["a"], parts["bn"], parts["b"])))
    assert change_kinds(diff(inside, outside)) == {"0": "renamed", "1": "renamed", "2": "renamed"}
    named = fx.symbolic_trace(nn.ModuleDict({"model": nn.Sequential(*parts.values())})["model"])
    copies = dict(zip("pqrs", copy.deepcopy(nn.ModuleList(parts.values())), strict=True))
    assert change_kinds(diff(named, graph_module(chain("p q r s"), **copies))) == dict.fromkeys(
        ["input_1", *"0123"], "renamed"
    )
