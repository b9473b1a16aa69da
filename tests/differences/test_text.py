from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from fxlrd import Pipeline
from fxlrd.differences.compare import diff
from fxlrd.differences.text import to_text
from tests.support.graphs import chain, graph_module

GOLDEN = Path(__file__).parent / "golden" / "diff.txt"


def test_the_text_of_a_compression_is_that_of_the_golden_file(graph):
    """To renew it after an intended change: delete the file and run the test twice."""
    done = Pipeline.parse("decompose{ratio=2,skip=head},merge{mode=exact,norms=true}")(graph)
    text = diff(graph, done).to_text(times=False) + "\n"
    text = text.replace("affine=True, bias=True", "affine=True")  # how newer versions of torch write a BatchNorm
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
        pytest.fail("there was no golden file")
    assert text == GOLDEN.read_text()


def test_text_can_be_made_of_a_diff_that_was_read_from_a_file(graph, decomposed):
    d = diff(graph, decomposed)
    assert to_text(json.loads(json.dumps(d.to_dict()))) == d.to_text()


def test_equal_blocks_are_printed_once_with_the_range_of_their_errors(graph, decomposed):
    text = diff(graph, decomposed).to_text()
    assert "\nblocks.1 … blocks.3: the same as blocks.0, error 0." in text
    assert "blocks.2.conv1" not in text
    assert "error" not in diff(graph, decomposed).to_text(times=False)


def test_colour_only_on_request(graph, decomposed):
    d = diff(graph, decomposed)
    assert "\x1b[" not in d.to_text()
    assert "\x1b[32m+ blocks.0.conv1.core" in d.to_text(color=True)


def test_a_long_text_of_a_node_is_cut(parts):
    one = graph_module(chain("a b"), **parts)
    two = graph_module(chain("a long b"), long=nn.PReLU(init=1 / 3), **parts)
    two.long.extra_repr = lambda: "x" * 200
    assert f"PReLU({'x' * 93}…" in diff(one, two).to_text()
