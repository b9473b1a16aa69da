"""The embedded example: a bottleneck ResNet trained on Fashion-MNIST, and a slice of the images.

``data/fashion.safetensors`` holds the weights (bench/fashion.py trains them), ``data/fashion.npz`` 1,024 images of the
training set for calibration and the first 2,000 of the test set with their labels. Fashion-MNIST is under the MIT
licence, copyright 2017 Zalando SE (data/LICENSE-fashion-mnist).
"""

from __future__ import annotations

from importlib.resources import as_file, files

import torch
from torch import Tensor, nn

MEAN, STD = 0.2860, 0.3530
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def network() -> nn.Module:
    """Return the untrained network: stem 3×3, bottlenecks of 32/64/128 planes, two each; 0.87 M parameters."""
    from torchvision.models.resnet import Bottleneck, ResNet

    model = ResNet(Bottleneck, [2, 2, 2, 2], num_classes=10)
    model.inplanes = 32
    model.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(32)
    model.maxpool = nn.Identity()
    model.layer1 = model._make_layer(Bottleneck, 32, 2)
    model.layer2 = model._make_layer(Bottleneck, 64, 2, stride=2)
    model.layer3 = model._make_layer(Bottleneck, 128, 2, stride=2)
    model.layer4 = nn.Identity()
    model.fc = nn.Linear(512, 10)
    return model


def trained() -> nn.Module:
    """Return the trained network in eval mode. The global random state is left alone."""
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]):
        model = network()
    with as_file(files("fxlrd.app") / "data" / "fashion.safetensors") as path:
        model.load_state_dict(load_file(path))
    return model.eval()


def calibration() -> Tensor:
    """Return 1,024 training images (N×1×28×28), normalised."""
    return _normalised("calibration")


def test() -> tuple[Tensor, Tensor]:
    """Return the first 2,000 test images, normalised, and their labels."""
    return _normalised("test_images"), torch.from_numpy(_array("test_labels")).long()


def normalise(pixels: Tensor) -> Tensor:
    """Return the network's input for grey values 0…255 (N×28×28)."""
    return (pixels[:, None].float() / 255 - MEAN) / STD


def _normalised(name: str) -> Tensor:
    return normalise(torch.from_numpy(_array(name)))


def _array(name: str):  # type: ignore[no-untyped-def]
    import numpy as np

    with as_file(files("fxlrd.app") / "data" / "fashion.npz") as path, np.load(path, allow_pickle=False) as arrays:
        return arrays[name]
