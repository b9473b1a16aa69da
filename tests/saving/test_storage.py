"""Tensors on their way into a file."""

from __future__ import annotations

import torch
from safetensors.torch import load, save

from fxlrd.saving.storage import _separate


def test_tensors_that_share_memory_are_written_each_by_itself():
    weight = torch.arange(12.0).reshape(3, 4)
    tensors = {"weight": weight, "flat": weight.view(-1), "row": weight[1], "transposed": weight.T, "part": weight[2:]}
    separate = _separate(tensors)
    storages = [value.untyped_storage() for value in separate.values()]
    assert len({storage.data_ptr() for storage in storages}) == len(tensors)
    assert [storage.nbytes() for storage in storages] == [value.nbytes for value in tensors.values()]
    assert separate["weight"] is weight, "what has its memory for itself is not copied"
    stored = load(save(separate))
    assert all(torch.equal(stored[name], value) for name, value in tensors.items())
