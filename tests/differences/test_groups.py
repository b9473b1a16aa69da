from __future__ import annotations

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from fxlrd import Pipeline
from fxlrd.differences.compare import diff
from fxlrd.differences.groups import LARGEST, DisjointSets
from tests.support.graphs import chain, change_kinds, graph_module
from tests.support.models import ResidualNet


def test_an_element_is_alone_until_it_is_united():
    sets = DisjointSets()
    assert sets.find("a") == "a"
    sets.unite(["a", "b"])
    assert sets.find("b") == "a"
    assert sets.find("c") == "c"


def test_the_first_elements_representative_stays():
    sets = DisjointSets()
    sets.unite("ab")
    sets.unite("cd")
    sets.unite("db")
    assert {sets.find(element) for element in "abcd"} == {"c"}


@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), max_size=12))
def test_sets_are_those_of_repeated_merging(unions):
    sets = DisjointSets()
    expected = {i: {i} for i in range(13)}
    for union in unions:
        sets.unite(union)
        merged = set().union(*(expected[i] for i in union))
        expected |= dict.fromkeys(merged, merged)
    for i, members in expected.items():
        assert {j for j in range(13) if sets.find(j) == sets.find(i)} == members


def test_a_chain_of_a_hundred_thousand_unions_can_be_searched():
    sets = DisjointSets()
    for i in range(100_000):
        sets.unite([i + 1, i])
    assert sets.find(0) == 100_000


def test_a_layer_replaced_under_unrelated_names_is_one_rewrite(parts):
    one = graph_module(chain("a act b"), **parts)
    two = graph_module(chain("p q act b"), p=nn.Linear(4, 1), q=nn.Linear(1, 4), **parts)
    d = diff(one, two)
    assert change_kinds(d) == {"a": "rewritten"}
    assert [e.kind for e in d.changes[0].edits] == ["went", "came", "came"]


def test_many_nodes_in_one_place_are_no_rewrite_of_each_other(parts):
    one = graph_module(chain("a !relu b"), **parts)
    some = graph_module(chain(f"a {'!gelu ' * LARGEST} b"), **parts)
    more = graph_module(chain(f"a {'!gelu ' * (LARGEST + 1)} b"), **parts)
    assert change_kinds(diff(one, some)) == {"relu": "rewritten"}
    assert set(change_kinds(diff(one, more)).values()) == {"added", "removed"}


def test_two_replacements_in_one_place_are_two_changes(parts):
    def build(*names):
        return lambda graph, x: graph.call_function(torch.cat, ([graph.call_method(name, (x,)) for name in names],))

    d = diff(graph_module(build("exp", "sin")), graph_module(build("log", "cos")))
    assert change_kinds(d) == {"exp": "rewritten", "sin": "rewritten"}
    assert [[i.name for e in c.edits for i in e.items] for c in d.changes] == [["exp", "log"], ["sin", "cos"]]


def test_a_composed_layer_is_merged_and_its_neighbours_are_untouched(graph):
    d = diff(graph, Pipeline.parse("merge{mode=exact,norms=true}")(graph))
    assert change_kinds(d) == {f"blocks.{i}.conv1": "merged" for i in range(4)}
    assert [c.merged for c in d.changes] == [(f"blocks.{i}.bn1",) for i in range(4)]
    assert "blocks_0_relu" in d.untouched


def test_folding_by_another_tool_is_merged_too():
    from torch.fx.experimental.optimization import fuse

    model = ResidualNet(blocks=4).eval()
    for block in model.blocks:
        nn.init.uniform_(block.bn1.running_var)
    d = diff(fx.symbolic_trace(model), fuse(model))
    assert change_kinds(d) == {f"blocks.{i}.conv1": "merged" for i in range(4)}


def test_a_function_without_weights_is_not_merged_into_changed_weights(parts):
    one = graph_module(chain("a act b"), **parts)
    with torch.no_grad():
        b = copy.deepcopy(parts["b"])
        b.weight.mul_(2)
    two = graph_module(chain("a b"), **parts | {"b": b})
    assert change_kinds(diff(one, two)) == {"act": "removed", "b": "values"}
