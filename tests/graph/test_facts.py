from __future__ import annotations

import torch
from torch import fx, nn

from fxlrd.capturing.whole import capture
from fxlrd.graph.captured import captured
from fxlrd.graph.facts import Fact, Provenance, flops, forget, inherited, output_moments, provenance, shape, times


def graph():
    return capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU()).eval(), torch.randn(2, 4))


def node_of(gm, target):
    return next(n for n in gm.graph.nodes if n.target == target)


def test_a_fact_is_read_as_it_was_recorded_and_only_if_it_is_of_its_kind():
    count, node = Fact("count", int), fx.Graph().placeholder("x")
    assert count(node) is None
    count.record(node, 3)
    count.record(node, 4)
    assert count(node) == 4
    assert Fact("count", str)(node) is None
    count.drop(node)
    count.drop(node)
    assert count(node) is None


def test_what_a_propagation_left_on_a_node():
    gm = graph()
    assert shape(node_of(gm, "0")) == (2, 6)
    assert flops(node_of(gm, "0")) == 2 * 2 * 4 * 6
    assert times(node_of(gm, "0")) == 1
    bare = fx.Graph().placeholder("x")
    assert (shape(bare), flops(bare)) == (None, 0)


def test_a_factor_inherits_all_but_what_describes_the_output():
    node = node_of(graph(), "0")
    output_moments.record(node, {})
    left = inherited(node)
    assert not {"tensor_meta", "flops", output_moments.key} & set(left)
    assert left[provenance.key] == Provenance("0")


def test_forget_leaves_provenance_without_the_original_module():
    gm = graph()
    assert captured(gm) is not None
    forget(gm)
    assert captured(gm) is None
    assert provenance(node_of(gm, "0")) == Provenance("0")
    assert provenance(node_of(gm, "0")).original is None
