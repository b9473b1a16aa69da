"""MODEL of the command line, and inputs for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fxlrd import FxlrdError
from fxlrd.app.inputs import calibration_for, example_for
from fxlrd.app.models import architecture_of, load_model, made_by, source_of


def test_a_model_is_in_eval_mode_and_its_random_weights_are_seeded():
    state = torch.get_rng_state()
    first, second, other = (load_model("torchvision:squeezenet1_1", None, seed) for seed in (0, 0, 1))
    assert not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_factory_may_be_an_attribute_of_an_attribute_or_the_model_itself(tmp_path, monkeypatch):
    (tmp_path / "mine_for_models.py").write_text(
        "from torch import nn\nclass Nets:\n    small = nn.Linear(3, 3)\n    make = staticmethod(lambda: nn.ReLU())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(load_model("mine_for_models:Nets.small", None, 0), nn.Linear)
    assert isinstance(load_model("mine_for_models:Nets.make", None, 0), nn.ReLU)
    with pytest.raises(FxlrdError, match="--weights is for torchvision and timm models; a factory loads its own"):
        load_model("mine_for_models:Nets.make", "DEFAULT", 0)


@pytest.mark.parametrize(
    ("name", "weights", "source"),
    [
        ("torchvision:resnet50", "DEFAULT", "torchvision:resnet50"),
        ("torchvision:googlenet", None, "torchvision:googlenet"),
        ("package.module:factory", None, "package.module:factory"),
    ],
)
def test_the_name_of_the_architecture(name, weights, source):
    assert source_of(name, weights) == source


def test_the_name_of_the_architecture_that_published_weights_bring():
    from torchvision import models
    from torchvision.ops import FrozenBatchNorm2d

    def name(of, model):
        return architecture_of(f"torchvision:{of}", "DEFAULT", model)

    with torch.device("meta"):
        own = {"weights": None, "weights_backbone": None}
        segmented = models.get_model("lraspp_mobilenet_v3_large", **own)
        assert name("lraspp_mobilenet_v3_large", segmented) == "torchvision:lraspp_mobilenet_v3_large"
        with_auxiliary = models.get_model("deeplabv3_mobilenet_v3_large", aux_loss=True, **own)
        assert name("deeplabv3_mobilenet_v3_large", with_auxiliary).endswith("mobilenet_v3_large{aux_loss=1}")
        assert name("vit_b_32", models.vit_b_32(image_size=384)) == "torchvision:vit_b_32{image_size=384}"
        assert name("resnet18", models.resnet18()) == "torchvision:resnet18"
        assert name("resnet18", models.resnet18(norm_layer=FrozenBatchNorm2d)) is None
        assert name("googlenet", models.resnet18()) is None


def test_a_folder_may_be_in_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "out").mkdir()
    assert made_by("package:make@~/out") == ("package:make", str(tmp_path / "out"))
    assert made_by("package:make@~/nowhere") is None


def test_random_tokens_are_those_of_the_same_text():
    like = torch.arange(24).view(2, 12)
    batches = calibration_for("random", 2, like)
    assert all(torch.equal(batch.sort(1).values, like) for batch in batches)
    assert not torch.equal(batches[0], batches[1])


def test_random_calibration_inputs_are_seeded_and_like_the_example():
    like = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    first, second = calibration_for("random", 2, like), calibration_for("random", 2, like)
    assert [b.shape for b in first] == [like.shape] * 4
    assert all(b.dtype == like.dtype for b in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_calibration_inputs_of_a_file_come_in_batches(suffix, tmp_path):
    path = tmp_path / f"inputs.{suffix}"
    data = torch.randn(5, 3, 8, 8)
    if suffix == "npy":
        np.save(path, data.numpy())
    else:
        torch.save(data, path)
    like = torch.zeros(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    batches = calibration_for(str(path), 2, like)
    assert [len(b) for b in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), data)
    assert all(b.is_contiguous(memory_format=torch.channels_last) for b in batches)


def test_a_file_of_anything_else_is_refused(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "dict.pt")
    with pytest.raises(FxlrdError, match=r"holds a dict, the model takes \[N, 3\]$"):
        calibration_for(str(tmp_path / "dict.pt"), 2, torch.ones(2, 3))


def test_an_example_is_seeded_and_has_the_memory_format():
    x = example_for("3x8x8", 2, torch.bfloat16, channels_last=True)
    assert (x.shape, x.dtype) == ((2, 3, 8, 8), torch.bfloat16)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, example_for("3x8x8", 2, torch.bfloat16, channels_last=True))
    with pytest.raises(FxlrdError, match="--channels-last: an input of shape 64 is not an image"):
        example_for("64", 2, torch.float32, channels_last=True)
