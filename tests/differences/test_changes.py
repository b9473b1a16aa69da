from __future__ import annotations

import json

import torch
from torch import nn

import fxlrd
from fxlrd import Pipeline
from fxlrd.differences.compare import diff
from tests.support.graphs import change_kinds


def test_a_decomposed_layer_is_one_change_with_its_figures(graph, decomposed):
    d = diff(graph, decomposed)
    change = next(c for c in d.to_dict()["changes"] if c["name"] == "blocks.1.conv1")
    assert (change["kind"], change["form"]) == ("rewritten", "tucker2")
    assert [(e["kind"], (e["before"] or e["after"])["target"]) for e in change["edits"]] == [
        ("went", "blocks.1.conv1"),
        ("came", "blocks.1.conv1.first"),
        ("came", "blocks.1.conv1.core"),
        ("came", "blocks.1.conv1.last"),
    ]
    layer = decomposed.graph_module.get_submodule("blocks.1.conv1")
    assert change["params_before"] == 32 * 32 * 9
    assert change["params"] == sum(p.numel() for p in layer.parameters())
    assert 0 < change["flops"] < change["flops_before"]
    assert change["ranks"] == [19, 19]
    assert 0 < change["error"] < 1
    assert change["passes"] == ["decompose"]
    assert change["notes"] == ["tucker2 at rank 19x19"]
    assert "stem" in {skip["name"] for skip in d.to_dict()["skipped"]}
    json.dumps(d.to_dict())


def test_in_the_other_direction_the_original_is_back(graph, decomposed):
    d = diff(decomposed, graph)
    assert set(change_kinds(d).values()) == {"rewritten"}
    assert {c.form for c in d.changes} == {"original"}


def test_a_change_of_channels_includes_what_only_has_another_shape(graph):
    data = [torch.randn(16, 3, 8, 8)]
    done = Pipeline.parse("calibrate,merge{ranks=16}").with_options(calibration=data)(graph)
    d = diff(graph, done)
    assert change_kinds(d)["blocks.0.conv1"] == "changed"
    assert change_kinds(d)["blocks.0.bn1"] == "changed"
    assert change_kinds(d)["blocks.0.relu"] == "reshaped"
    assert "keeps 16 channels out" in d.to_text()


def test_passes_are_in_the_order_of_application(graph):
    done = Pipeline.parse("decompose{ratio=2},branch{groups=2,steps=5}")(graph)
    change = next(c for c in diff(graph, done).changes if c.name == "blocks.0.conv1")
    assert change.passes == ("decompose", "branch{groups=2,steps=5}")
    assert change.form == "branched"


def test_the_order_of_both_graphs_is_recoverable(graph, decomposed):
    d = diff(graph, decomposed).to_dict()
    after = {e["after"]["index"]: e["after"]["name"] for c in d["changes"] for e in c["edits"] if e["after"]}
    names = [n.name for n in decomposed.graph_module.graph.nodes]
    assert all(names[index] == name for index, name in after.items())
    assert [after.get(i, name) for i, name in enumerate(names)] == names
    assert sorted([*after.values(), *d["untouched"]]) == sorted(names)


def test_shared_modules_are_one_change_of_all_calls():
    layer = nn.Linear(16, 16)
    gm = fxlrd.capture(nn.Sequential(layer, nn.ReLU(), layer).eval(), torch.randn(2, 16))
    d = diff(gm, Pipeline.parse("decompose{ratio=2}")(gm))
    assert change_kinds(d) == {"0": "rewritten"}
    assert (len(d.changes[0].went), len(d.changes[0].came)) == (2, 4)
    assert "(2 calls)" in d.to_text()
    assert d.changes[0].figures["params_before"] == 16 * 16 + 16
