"""The rows of a report: what the ledger says of a layer, and what took its place in the graph."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd import Pipeline
from fxlrd.errors import Reason
from fxlrd.passes.contract import Site, Skip
from fxlrd.pipeline import Record
from fxlrd.report.rows import FOLDED, UNVISITED, LayerHistory, LayerRow, PassRow, TimingRow, histories, layer_rows
from fxlrd.timing.clock import Timing

LAYER_KEYS = [
    "name", "op", "shape", "decision", "ranks", "params", "flops", "latency_ms", "error", "channel_error", "reason",
    "params_before", "flops_before", "latency_ms_before", "timings",
]  # fmt: skip
PASS_KEYS = [
    "name", "text", "exact", "sites", "skipped", "max_abs_error", "relative_error", "step_error", "seconds",
    "params", "flops", "depth", "note",
]  # fmt: skip


def record(name: str, sites=(), skipped=(), timings=None) -> Record:
    sites = tuple(Site(layer, False, note) for layer, note in sites)
    skipped = tuple(Skip(layer, Reason("test", text)) for layer, text in skipped)
    return Record(name, name, False, sites, skipped, None, None, None, 0.5, 10, 20, 2, "", timings or {})


def test_the_keys_of_the_json_are_the_fields_in_order(report):
    data = report.to_dict()
    assert [f.name for f in fields(LayerRow)] == LAYER_KEYS
    assert [f.name for f in fields(PassRow)] == PASS_KEYS
    assert [f.name for f in fields(TimingRow)] == ["ms", "ratio", "spread"]
    assert all(list(row) == LAYER_KEYS for row in data["layers"])
    assert all(list(row) == PASS_KEYS for row in data["passes"])
    assert all(list(site) == ["name", "note"] for row in data["passes"] for site in row["sites"])
    assert all(list(skip) == ["name", "reason"] for row in data["passes"] for skip in row["skipped"])


def test_rows_are_plain_dicts_with_item_access(report):
    assert all(type(row) is dict for row in (*report.layers, *report.passes))
    assert report.layers[1]["name"] == "stage.0.0"


@pytest.mark.parametrize(
    ("ledger", "note"),
    [
        ([record("decompose", [("a", "svd at rank 4")]), record("snap", [("a", "4 → 2")])], "4 → 2"),
        (
            [record("decompose", [("a", "svd at rank 4")]), record("refit", [("a", "refitted")])],
            "svd at rank 4, refitted",
        ),
        ([record("recalibrate", [("a", "re-estimated")])], "re-estimated"),
    ],
    ids=["the last form", "an adjustment of it", "an adjustment alone"],
)
def test_the_note_of_a_layer(ledger, note):
    history = histories(ledger)["a"]
    assert history.note == note
    assert history.rewritten


def test_the_last_reason_to_leave_a_layer_alone_counts():
    history = histories([record("decompose", skipped=[("a", "narrow")]), record("snap", skipped=[("a", "no form")])])
    assert history["a"] == LayerHistory(skip_reason="no form")
    assert LayerHistory().skip_reason == UNVISITED


def test_timings_of_all_passes_are_collected():
    first, second = {"original": Timing(2.0), "8": Timing(1.5, 0.75)}, {"4": Timing(1.0, 0.5)}
    ledger = [record("snap", timings={"a": first}), record("snap", timings={"a": second})]
    assert histories(ledger) == {"a": LayerHistory(timings=first | second)}


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)).eval()


@pytest.mark.parametrize(
    ("pipeline", "decisions"),
    [
        ("decompose{skip=3}", ["skipped", "tucker2", "svd", "skipped"]),
        ("decompose,branch{groups=2}", ["skipped", "branched", "svd", "svd"]),
        ("merge{mode=exact}", ["skipped", "merged", "merged", "merged"]),
        ("freeze", ["skipped"] * 4),
    ],
)
def test_decisions(pipeline, decisions):
    before = fxlrd.capture(net(), torch.randn(1, 3, 9, 9))
    run = Pipeline.parse(pipeline)(before)
    rows = layer_rows(before, run.graph_module, run.ledger, dropped=True)
    assert [row.decision for row in rows] == decisions
    assert sum(row.flops for row in rows) == run.ledger[-1].flops
    if "merged" not in decisions:
        assert [row.ranks is not None for row in rows] == [d != "skipped" for d in decisions]
        assert sum(row.params for row in rows) == run.ledger[-1].params


def test_a_layer_that_was_folded_into_its_neighbours_says_so():
    before = fxlrd.capture(net(), torch.randn(1, 3, 9, 9))
    after = Pipeline.parse("merge{mode=exact}")(before)
    rows = layer_rows(before, after.graph_module, (), dropped=True)
    assert {row.reason for row in rows if row.decision == "merged"} == {FOLDED}


class WithAuxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main, self.auxiliary = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x):
        return (self.main(x), self.auxiliary(x)) if self.training else self.main(x)


@pytest.mark.parametrize(("dropped", "params"), [(True, 0), (False, 32 * 8 + 8)])
def test_a_layer_that_eval_mode_never_calls(dropped, params):
    before = fxlrd.capture(WithAuxiliary().eval(), torch.randn(1, 32))
    row = layer_rows(before, before, (), dropped)[-1]
    assert (row.name, row.decision, row.params, row.params_before) == ("auxiliary", "skipped", params, 32 * 8 + 8)
    assert (row.flops, row.flops_before) == (None, None)
