"""The work of a diff grows with the number of nodes only, also where thousands of nodes are alike.

It is counted in calls of functions, which no other load on the machine changes.
"""

from __future__ import annotations

import cProfile

import torch.nn.functional as F
from torch import fx, nn

from fxlrd.differences.compare import diff
from fxlrd.differences.model import Diff
from tests.support.graphs import chain, graph_module


def counted(before: fx.GraphModule, after: fx.GraphModule) -> tuple[Diff, int]:
    profile = cProfile.Profile()
    difference = profile.runcall(diff, before, after)
    return difference, sum(entry.callcount for entry in profile.getstats())


def test_a_layer_of_many_calls_that_became_several_layers():
    def work(calls: int) -> int:
        before = graph_module(chain("a !relu " * calls), a=nn.Linear(2, 2))
        after = graph_module(chain("a.0 a.1 " * calls), a=nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        difference, count = counted(before, after)
        assert difference.changes[0].kind == "rewritten"
        return count

    assert work(400) < 5 * work(100)


def test_functions_removed_beside_a_layer_of_many_calls():
    layer = nn.Linear(2, 2)

    def work(calls: int) -> int:
        difference, count = counted(
            graph_module(chain("a !relu " * calls), a=layer), graph_module(chain("a " * calls), a=layer)
        )
        assert len(difference.changes) == calls
        return count

    assert work(400) < 5 * work(100)


def test_readers_of_a_long_chain_that_was_removed():
    def readers(count: int, with_chain: bool) -> fx.GraphModule:
        def build(graph, value):
            outputs = []
            for i in range(count):
                value = graph.call_function(F.silu, (value,)) if with_chain else value
                outputs.append(graph.call_module(f"l{i}", (value,)))
            return tuple(outputs)

        return graph_module(build, **{f"l{i}": nn.Identity() for i in range(count)})

    def work(count: int) -> int:
        difference, calls = counted(readers(count, True), readers(count, False))
        assert len(difference.changes) == count
        return calls

    assert work(400) < 5 * work(100)
