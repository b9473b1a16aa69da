"""A sample of weights tells of writes that raise no version counter."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import nn

from fxlrd.backend import contents
from fxlrd.backend.contents import ENTRIES, FEWEST, TURNS, Contents, _sample, _strided


@pytest.mark.parametrize("shape", [(256, 64), (1024, 1024), (2048, 512, 1, 1), (512, 128, 3, 3)])
def test_one_weight_is_seen_in_every_row_and_column(shape):
    turns = [_sample(shape, ENTRIES, turn) for turn in range(TURNS)]
    assert {*map(len, turns)} == {ENTRIES}
    chosen = numpy.concatenate(turns)
    rows, columns = numpy.divmod(chosen, int(numpy.prod(shape[1:])))
    assert {*rows} == {*range(shape[0])}
    assert {*columns} == {*range(int(numpy.prod(shape[1:])))}
    assert len({*chosen}) == ENTRIES * TURNS


@pytest.mark.parametrize("count", [FEWEST, 40])
def test_the_first_and_the_last_entry_are_seen(count):
    turns = [_sample((300, 70), count, turn) for turn in range(TURNS)]
    assert (turns[0][0], turns[-1][-1]) == (0, 300 * 70 - 1)
    chosen = numpy.concatenate(turns)
    assert len({*chosen}) == count * TURNS
    assert ((chosen >= 0) & (chosen < 300 * 70)).all()


def _unaligned():
    return torch.frombuffer(bytearray(4 * 12 + 1), dtype=torch.float32, offset=1, count=12)


WEIGHTS = {
    "float64": lambda: torch.randn(5, 6, dtype=torch.float64),
    "bfloat16": lambda: torch.randn(5, 6).bfloat16(),
    "int8": lambda: torch.ones(5, dtype=torch.int8),
    "complex128": lambda: torch.randn(3, 2, dtype=torch.complex128),
    "channels_last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(6, 5).mT,
    "slice": lambda: torch.randn(9, 9)[1:5, 2:7],
    "scalar": lambda: torch.tensor(3.0),
    "unaligned": _unaligned,
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_any_entry_of_a_small_weight_is_seen(kind):
    others = [torch.randn(3, 3), torch.zeros(0), torch.ones(7, dtype=torch.float64)]
    weight = WEIGHTS[kind]()
    for index in numpy.ndindex(*weight.shape):
        weights = [others[0], weight, *others[1:]]
        sampled = Contents(weights)
        assert sampled.same(weights)
        weight.data[index] = weight[index] + 1
        assert not sampled.same(weights)


def test_a_sign_and_values_that_are_no_numbers_are_compared_by_their_bits():
    weight = torch.tensor([float("nan"), 0.0])
    sampled = Contents([weight])
    assert sampled.same([weight])
    weight.data[1] = -0.0
    assert not sampled.same([weight])


def test_weights_without_entries_to_read_are_left_out():
    weights = [torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch.zeros(0)]
    assert Contents(weights).same(weights)
    assert Contents(()).same(())


@pytest.mark.parametrize("shape", [(64, 64), (128, 64, 3, 3), ()])
def test_on_other_devices_a_view_of_each_weight_is_compared(shape, monkeypatch):
    monkeypatch.setattr(contents, "_on_cpu", lambda weight: False)
    weights = [nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(3, 5).mT.bfloat16())]
    sampled = Contents(weights)
    assert next(sampled.memories) is None
    assert sampled.same(weights)
    weights[0].data += 1e-3
    assert not sampled.same(weights)
    (same,) = _strided([weights[0]], 8)
    assert same.numel() in (1, 8, 9)


def test_a_row_of_a_large_weight_is_seen_within_the_turns_and_a_whole_weight_at_once():
    weights = [torch.randn(512, 512) for _ in range(40)]
    sampled = Contents(weights)
    weights[3].data[0] += 1  # the first turn has its first entry
    assert not sampled.same(weights)
    assert all(sampled.same(weights) for _ in range(TURNS - 1))
    weights[5].data += 1e-3
    assert not any(sampled.same(weights) for _ in range(TURNS))
