"""Moments that readers of one tensor share, and what becomes of those that read something else."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fxlrd.calibration.common_reads import CommonReads
from fxlrd.layers.fit import Moments

GRAPH = fx.Graph()
READERS = [(GRAPH.placeholder(name), 0, (1, 1)) for name in "abc"]
WIDTH = 3


def rows_of(reader, value):
    return value


def direct(tensors):
    moments = Moments.empty(WIDTH, torch.device("cpu"))
    for tensor in tensors:
        moments.add(tensor)
    return moments


def swept(runs):
    """Return the moments of runs, each a list of (reader, tensor)."""
    common = CommonReads(rows_of)
    for run in runs:
        for reader, tensor in run:
            common.add(reader, tensor, WIDTH)
        common.finish_run()
    return common.moments


def check(runs):
    moments = swept(runs)
    for reader in READERS:
        expected = direct([tensor for run in runs for r, tensor in run if r == reader])
        if expected.count:
            actual = moments[reader]
            assert actual.count == expected.count
            assert actual.held_out.count == expected.held_out.count
            torch.testing.assert_close(actual.products, expected.products, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(actual.total, expected.total, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(actual.held_out.rows, expected.held_out.rows)
    return moments


def tensors(count):
    return [torch.randn(5, WIDTH) for _ in range(count)]


def test_readers_of_one_tensor_share_their_moments():
    a, b, c = READERS
    moments = check([[(a, x), (b, x), (c, x.clone())] for x in tensors(3)])
    assert moments[a] is moments[b] is not moments[c]


A, B, C = range(3)


@pytest.mark.parametrize(
    "runs",
    [
        [[(A, 0), (B, 0), (C, 0)], [(A, 1), (B, 2), (C, 1)], [(A, 3), (B, 3), (C, 3)]],
        [[(A, 0), (B, 0), (C, 0)], [(B, 2), (A, 1), (C, 1)], [(A, 3), (B, 4), (C, 3)]],
        [[(A, 0), (B, 0), (C, 0)], [(A, 1), (C, 1)], [(C, 2)], [(A, 3), (B, 3), (C, 3)]],
        [[(A, 0), (B, 0), (C, 0)], [(B, 1), (C, 1)], [(A, 2), (B, 2), (C, 2)]],
        [[(A, 0)], [(A, 1), (B, 1), (C, 1)], [(A, 2), (B, 2), (C, 2)]],
    ],
    ids=["another", "another-first", "nothing", "without-the-first", "later"],
)
def test_who_reads_something_else_has_its_own(runs):
    values = tensors(5)
    moments = check([[(READERS[r], values[t]) for r, t in run] for run in runs])
    assert len({id(each) for each in moments.values()}) > 1


def test_a_tensor_that_was_changed_in_place_is_another():
    a, b, _ = READERS
    common, x = CommonReads(rows_of), torch.ones(2, WIDTH)
    common.add(a, x, WIDTH)
    x.mul_(2)
    common.add(b, x, WIDTH)
    assert [common.moments[reader].products[0, 0].item() for reader in (a, b)] == [2, 8]
