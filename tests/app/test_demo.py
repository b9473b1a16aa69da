"""The demo on few images and with timings made up: it takes two minutes otherwise."""

from __future__ import annotations

import pytest

from fxlrd.app import demo, fashion
from tests.support.timers import FakeTimer

pytestmark = pytest.mark.slow


def test_the_presets_side_by_side(monkeypatch):
    images, (test, labels) = fashion.calibration(), fashion.test()
    monkeypatch.setattr(fashion, "calibration", lambda: images[:96])
    monkeypatch.setattr(fashion, "test", lambda: (test[:200], labels[:200]))
    monkeypatch.setattr(demo, "BATCH", 32)
    timer = FakeTimer(lambda name, _: 0.2 if name == "original" else 0.1, spread=0.01)
    found = demo.run(progress=False, timer=timer)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["original", "lrd", "ranks", "merge", "auto"]
    for name in ("lrd", "merge", "auto"):
        assert rows[name].params == pytest.approx(rows["original"].params / 2, rel=0.02)
    assert rows["original"].accuracy > 0.9
    assert rows["auto"].accuracy > rows["lrd"].accuracy + 0.2
    assert rows["auto"].accuracy > rows["original"].accuracy - 0.03
    assert (rows["auto"].speed, rows["auto"].latency_ms) == pytest.approx((2, 100))
    assert all(name in found.to_table() for name in rows)
    assert found.report.after["accuracy"] == rows["auto"].accuracy
