from __future__ import annotations

import pytest
from torch import nn

from fxlrd.differences.compare import diff
from fxlrd.differences.records import ledger_of, pass_records


@pytest.mark.parametrize("report", [None, nn.ReLU(), "decompose", 3, [], {}, {"passes": []}])
def test_what_has_no_passes_has_no_records(report):
    assert ledger_of(report) == []


def test_a_result_and_its_ledger_say_the_same(decomposed):
    (record,) = pass_records(decomposed)
    assert pass_records(decomposed.ledger) == [record]
    assert record.text == "decompose"
    assert record.notes["blocks.0.conv2"] == "svd at rank 8"
    assert "stem" in record.skipped
    assert record.to_dict() == {"text": "decompose", "sites": 9, "skipped": 1}


def test_a_report_that_was_read_from_a_file_will_do(graph, decomposed):
    report = {
        "passes": [
            {
                "name": "decompose",
                "text": "decompose",
                "sites": [{"name": "blocks.0.conv1", "note": "a note"}],
                "skipped": [{"name": "stem", "reason": "a reason"}],
            }
        ]
    }
    d = diff(graph, decomposed.graph_module, report=report)
    assert {c.name: c.notes for c in d.changes if c.notes} == {"blocks.0.conv1": ("a note",)}
    assert d.skipped == ({"name": "stem", "reason": "a reason"},)
