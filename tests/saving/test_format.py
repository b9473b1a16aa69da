"""A checkpoint that commit 138591f wrote: what it means, and that the same is written today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fxlrd.saving.load import load
from fxlrd.saving.save import save
from fxlrd.saving.storage import PLAN
from tests.saving.mixed import CHANNELS, Mixed, Switched, compressed_mixed, compressed_switched, images

DATA = Path(__file__).parent / "data"
VECTORS = images().flatten(1)[:, :CHANNELS]
NAMES = pytest.mark.parametrize(
    ("name", "make", "compressed", "inputs"),
    [("mixed", Mixed, compressed_mixed, images()), ("switched", Switched, compressed_switched, VECTORS)],
    ids=["mixed", "switched"],
)


def stored(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def plan_of(folder):
    plan = json.loads((folder / PLAN).read_text())
    del plan["checksum"], plan["made_with"], plan["weights"]
    return list(plan), plan


def slots(model):
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


@NAMES
def test_an_old_checkpoint_gives_the_outputs_that_it_gave(name, make, compressed, inputs):
    loaded = load(DATA / name, make().double())
    with torch.no_grad():
        assert torch.equal(loaded(inputs), load_file(DATA / "outputs.safetensors")[f"{name}.output"])


@NAMES
def test_an_old_checkpoint_gives_every_tensor_bit_for_bit(name, make, compressed, inputs):
    loaded = load(DATA / name, make())
    tensors, plan = stored(DATA / name), plan_of(DATA / name)[1]["tensors"]
    tensors |= {alias: tensors[canonical] for alias, canonical in plan["same"].items()}
    values = slots(loaded)
    assert values.keys() | set(plan["attributes"]) >= tensors.keys()
    assert tensors.keys() >= {key.replace("again.", "shared.") for key in loaded.state_dict()}
    for key, tensor in tensors.items():
        value = values.get(key, getattr(loaded, key, None))
        assert value.dtype == tensor.dtype
        assert torch.equal(value, tensor), key
        assert list(value.stride()) == plan["strides"].get(key, list(tensor.stride()))
        assert value.requires_grad == (isinstance(value, torch.nn.Parameter) and key not in plan["frozen"])


def test_an_old_checkpoint_is_the_model_that_it_was():
    loaded = load(DATA / "mixed", Mixed())
    assert type(loaded) is Mixed
    assert {n for n, m in loaded.named_modules() if isinstance(m, torch.nn.Identity)} == {"norm", "after", "reduce"}
    assert loaded.branched.core.groups == 2
    assert loaded.tucker[0].in_channels == CHANNELS
    assert loaded.cut_norm.num_features == 4
    assert loaded.again is loaded.shared
    assert loaded.other.weight is loaded.tied.weight
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == ["tucker.first.weight"]
    assert [n for n, m in loaded.named_modules() if m.training] == ["act"]
    assert isinstance(load(DATA / "switched", Switched()), torch.fx.GraphModule)


@NAMES
def test_what_was_loaded_is_saved_as_it_was(tmp_path, name, make, compressed, inputs):
    save(load(DATA / name, make()), tmp_path, source="tests.saving.mixed:Mixed" if name == "mixed" else None)
    (keys, plan), (old_keys, old) = plan_of(tmp_path), plan_of(DATA / name)
    assert keys == old_keys
    for key in ("same", "attributes"):  # of shared modules each name is written; a graph has one name of each
        assert set(plan["tensors"].pop(key)) >= set(old["tensors"].pop(key))
    assert plan == old
    old, new = stored(DATA / name), stored(tmp_path)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


@NAMES
def test_the_same_model_is_saved_as_it_was(tmp_path, name, make, compressed, inputs):
    save(compressed(), tmp_path, source="tests.saving.mixed:Mixed" if name == "mixed" else None)
    (keys, plan), (old_keys, old) = plan_of(tmp_path), plan_of(DATA / name)
    assert keys == old_keys
    assert plan == old
    old, new = stored(DATA / name), stored(tmp_path)
    assert all(torch.equal(old[key], new[key]) for key in old | new)
