from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd import Pipeline
from fxlrd.differences.blocks import blocks_alike
from fxlrd.differences.compare import diff
from fxlrd.differences.model import Block


@pytest.fixture(scope="module")
def difference(graph, decomposed):
    return diff(graph, decomposed)


def test_equal_blocks_are_a_run(difference):
    assert difference.blocks == (Block("blocks.0", ("blocks.1", "blocks.2", "blocks.3")),)
    assert difference.to_dict()["blocks"] == [{"name": "blocks.0", "same": ["blocks.1", "blocks.2", "blocks.3"]}]


def test_a_measurement_does_not_end_a_run(difference):
    measured = [
        replace(c, figures=c.figures | {"error": i / 100, "latency_ms": float(i)})
        for i, c in enumerate(difference.changes)
    ]
    assert blocks_alike(measured) == difference.blocks


@pytest.mark.parametrize("field", ["kind", "form"])
def test_another_change_inside_ends_a_run(difference, field):
    changed = [replace(c, **{field: "other"}) if c.name == "blocks.2.conv2" else c for c in difference.changes]
    assert blocks_alike(changed) == (Block("blocks.0", ("blocks.1",)),)


def test_other_ranks_end_a_run(difference):
    changed = [
        replace(c, figures=c.figures | {"ranks": [5, 5]}) if c.name == "blocks.0.conv1" else c
        for c in difference.changes
    ]
    assert blocks_alike(changed) == (Block("blocks.1", ("blocks.2", "blocks.3")),)


def test_runs_inside_the_first_block_of_a_run_follow_it():
    def block():
        return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))

    gm = fxlrd.capture(nn.Sequential(block(), block()), torch.randn(2, 16))
    d = diff(gm, Pipeline.parse("decompose{ratio=2}")(gm))
    assert d.blocks == (Block("0", ("1",)), Block("0.0", ("0.1",)))
    same = [line.partition(",")[0] for line in d.to_text().splitlines() if "the same as" in line]
    assert same == ["0.1: the same as 0.0", "1: the same as 0"]


def test_modules_without_a_number_are_no_run():
    model = nn.Sequential()
    model.add_module("first", nn.Linear(16, 16))
    model.add_module("second", nn.Linear(16, 16))
    gm = fxlrd.capture(model, torch.randn(2, 16))
    assert diff(gm, Pipeline.parse("decompose{ratio=2}")(gm)).blocks == ()
