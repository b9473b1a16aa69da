from __future__ import annotations

from fxlrd.report.html import frontier_page
from fxlrd.report.points import text
from tests.report.test_html import EVIL, Reader


def point(budget: str, **figures):
    missing = dict.fromkeys(["latency_ms", "speedup", "speedup_spread", "error", "accuracy", "depth"])
    return missing | {"budget": budget, "params": 50, "flops": 2_000_000} | figures


def frontier(**figures):
    return {
        "model": EVIL,
        "device": "cpu",
        "settings": {"inputs": EVIL, "mode": "eager", "pipeline": "calibrate,allocate{params=0.5}"},
        "original": {"params": 100, "flops": 4_000_000, "depth": None, "latency_ms": None, "accuracy": None} | figures,
        "missed": {"params=0.01": EVIL},
        "error_on": "held-out calibration inputs",
        "points": [point("params=0.5", error=0.125), point("params=0.4", error=float("inf"))],
    }


def test_what_was_not_measured_has_no_column():
    lines = text(frontier()).splitlines()
    assert lines[3].split() == ["budget", "error", "parameters", "FLOPs"]
    assert lines[5].split() == ["original", "100", "4.00", "M"]
    assert lines[6].split() == ["params=0.5", "0.125", "50", "2.00", "M"]


def test_accuracy_has_its_loss_beside_it():
    data = frontier(accuracy=0.9)
    data["points"] = [point("params=0.5", error=0.1, accuracy=0.875)]
    lines = text(data).splitlines()
    assert lines[3].split()[:4] == ["budget", "error", "accuracy", "loss"]
    assert lines[6].split()[:4] == ["params=0.5", "0.1", "0.875", "0.025"]


def test_the_page_has_a_chart_for_what_was_measured_and_no_foreign_markup():
    for data, charts in ((frontier(), ["error"]), (frontier(accuracy=0.9), ["accuracy", "error"])):
        page = Reader(frontier_page(data))
        drawn = [attributes for tag, attributes in page.tags if attributes.get("data-chart") == "frontier"]
        assert [attributes["data-y"] for attributes in drawn] == charts
        assert sum(tag == "script" for tag, _ in page.tags) == 2
        assert any(EVIL in part for part in page.text)
