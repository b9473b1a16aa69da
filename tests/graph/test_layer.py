from __future__ import annotations

import torch
from torch import nn

from fxlrd import capture
from fxlrd.graph.facts import provenance, statistics
from fxlrd.graph.layer import decomposed_layers, layers_of, origin, statistics_of
from fxlrd.graph.surgery import annotate, calls, fork
from fxlrd.passes import Branch, Calibrate, Decompose
from tests.support.tensors import images


class Net(nn.Module):
    """A stem, two layers of one weight, one that is called twice, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.tied, self.other, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 12)
        self.other.weight = self.tied.weight

    def forward(self, x):
        h = self.twice(self.twice(self.stem(x).relu()).relu()).mean((2, 3))
        return self.head(self.other(self.tied(h)))


def codes(layers, skip=()) -> dict[str, str]:
    reasons = {layer.name: layer.why_left_alone(skip) for layer in layers}
    return {name: reason.code for name, reason in reasons.items() if reason is not None}


def test_layers_have_their_calls_and_the_first_reason_to_leave_them_alone():
    gm = capture(Net(), images(6, size=7, dtype=torch.float32))
    found = {layer.name: layer for layer in layers_of(gm)}
    assert [(name, len(layer.calls)) for name, layer in found.items()] == [
        ("stem", 1), ("twice", 2), ("tied", 1), ("other", 1), ("head", 1)
    ]  # fmt: skip
    for name, layer in found.items():
        assert (layer.module, layer.origin, layer.role) == (gm.get_submodule(name), name, "original")
        assert layer.calls == tuple(calls(gm, name))
        assert layer.provenance is provenance(layer.calls[0])
        assert layer.statistics is None
    assert [name for name, layer in found.items() if layer.is_stem] == ["stem"]
    assert codes(found.values()) == {"stem": "stem", "tied": "shared-parameter", "other": "shared-parameter"}
    assert codes(found.values(), ("t*", "stem")) == {
        "stem": "skip", "twice": "skip", "tied": "shared-parameter", "other": "shared-parameter"
    }  # fmt: skip


def test_factors_are_layers_to_be_left_alone_and_together_a_decomposed_layer():
    gm = Decompose(ranks={"twice": 4, "head": 5})(capture(Net(), images(6, size=7, dtype=torch.float32))).graph_module
    assert decomposed_layers(capture(Net(), images(6, size=7, dtype=torch.float32))) == []
    found = {layer.name: layer for layer in layers_of(gm)}
    factors = ["twice.first", "twice.core", "twice.last", "head.first", "head.last"]
    assert {name for name, layer in found.items() if layer.left_alone and layer.left_alone.code == "factor"} == {
        *factors
    }
    assert {(found[name].origin, found[name].role) for name in factors[:3]} == {
        ("twice", "first"), ("twice", "core"), ("twice", "last")
    }  # fmt: skip
    twice, head = decomposed_layers(gm)
    assert (twice.name, twice.origin, len(twice.calls), twice.module) == (
        "twice",
        "twice",
        6,
        gm.get_submodule("twice"),
    )
    assert (head.name, [str(n.target) for n in head.calls]) == ("head", ["head.first", "head.last"])
    branched = Branch(groups=2)(gm).graph_module
    assert [layer.name for layer in decomposed_layers(branched)] == ["twice", "head"]


def test_layers_of_a_model_that_was_already_compressed():
    model = Decompose(ranks={"head": 5})(capture(Net(), images(6, size=7, dtype=torch.float32))).graph_module
    gm = capture(model, images(6, size=7, dtype=torch.float32))
    assert codes(layers_of(gm)) == {
        "stem": "stem", "tied": "shared-parameter", "other": "shared-parameter",
        "head.first": "factor", "head.last": "factor",
    }  # fmt: skip
    (head,) = decomposed_layers(gm)
    assert (head.name, head.origin, len(head.calls), head.role) == ("head", "head", 2, "original")


def test_statistics_are_those_of_all_calls():
    gm = Calibrate(images(6, size=7, dtype=torch.float32))(
        capture(Net(), images(6, size=7, dtype=torch.float32))
    ).graph_module
    found = {layer.name: layer for layer in layers_of(gm)}
    assert found["twice"].statistics.input_moments.count == 2 * found["stem"].statistics.input_moments.count
    assert found["head"].statistics is statistics(found["head"].calls[0])
    gm = Decompose(ranks={"head": 5})(gm).graph_module
    (head,) = decomposed_layers(gm)
    assert head.statistics is found["head"].statistics, "its factors share one"
    assert statistics_of(gm.graph.find_nodes(op="placeholder")) is None


def test_the_origin_of_a_call():
    gm = fork(capture(Net(), images(6, size=7, dtype=torch.float32)))
    (node,) = calls(gm, "head")
    provenance.drop(node)
    assert origin(node) == "head"
    annotate(gm)
    assert origin(node) == "head"
    gm = Decompose(ranks={"head": 5})(gm).graph_module
    assert {origin(n) for role in ("first", "last") for n in calls(gm, f"head.{role}")} == {"head"}
