"""What a report says of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from fxlrd.compression import Result


def test_repr_is_one_line_with_the_headline(report):
    assert repr(report).startswith("Report(Sequential: ")
    assert "\n" not in repr(report)
    assert "% fewer parameters" in repr(report)
    assert "output error" in repr(report)
    assert repr(Result(nn.Linear(2, 2), report)) == repr(report).replace("Report(", "Result(")


@pytest.mark.parametrize(
    ("speed", "spread", "words"),
    [
        (1.5, 0.1, "1.50× as fast as the original"),
        (1.05, 0.1, "as fast as the original, within the noise of the measurement"),
        (0.5, 0.1, "slower than the original: 0.50× its speed"),
    ],
)
def test_repr_has_the_speed_where_it_was_measured(speed, spread, words, report):
    settings = report.settings | {"speedup": speed, "speedup_spread": spread}
    assert repr(replace(report, settings=settings)).startswith(f"Report(Sequential: {words}, ")


def test_repr_of_a_compression_that_changed_nothing(report):
    unchanged = replace(report, after=report.before, passes=[])
    assert repr(unchanged) == "Report(Sequential: nothing changed)"
