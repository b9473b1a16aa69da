from __future__ import annotations

import json

import torch
from torch import nn

import fxlrd
from fxlrd.differences.compare import diff
from tests.support.graphs import chain, graph_module


def test_str_is_the_text(graph, decomposed):
    d = diff(graph, decomposed)
    assert str(d) == d.to_text()
    assert str(d).startswith("parameters  42,570 → ")
    assert str(diff(graph, graph)) == ""


def test_repr_is_one_line_with_the_counts_of_changes(graph, decomposed):
    assert repr(diff(graph, decomposed)) == "Diff(9 rewritten, 20 nodes untouched)"
    assert repr(diff(graph, graph)) == "Diff(no changes, 29 nodes untouched)"


def test_a_notebook_shows_figures_and_changes(graph, decomposed):
    html = diff(graph, decomposed)._repr_html_()
    assert "<strong>ResidualNet</strong>: 9 rewritten, 20 nodes untouched." in html
    assert '<th scope="row">blocks.0.conv1</th><td>rewritten</td><td>tucker2 19×19</td><td>9,216 → 4,465</td>' in html
    assert '<th scope="row">blocks.1</th><td colspan="4" style="text-align: left">changed as blocks.0 did' in html
    assert '<th scope="row">Parameters</th><td>42.57 k</td>' in html
    assert "<script" not in html
    assert "<link" not in html


def test_a_notebook_shows_that_there_is_no_change(graph):
    html = diff(graph, graph)._repr_html_()
    assert "no changes, 29 nodes untouched." in html
    assert html.count("<table>") == 1


def test_a_notebook_shows_markup_in_names_as_text():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("<script>x", nn.Linear(16, 16))

        def forward(self, x):
            return getattr(self, "<script>x")(x)

    gm = fxlrd.capture(Net(), torch.randn(2, 16))
    html = diff(gm, fxlrd.Pipeline.parse("decompose")(gm))._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;x" in html


def test_a_diff_is_false_where_there_is_no_change(parts):
    one, two = (graph_module(chain(text), **parts) for text in ("a b", "a act b"))
    assert diff(one, two)
    assert diff(one, two).to_dict()["same"] is False
    assert not diff(one, one)
    assert diff(one, one).to_dict()["counts"] == {"untouched": 4}


def test_plain_data_is_fit_for_json(graph, decomposed):
    data = diff(graph, decomposed).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert list(data) == [
        "before", "after", "same", "counts", "changes", "untouched", "skipped", "passes", "blocks", "notes",
    ]  # fmt: skip
