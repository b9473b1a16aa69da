"""The models that the paper's figures are measured on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision import models

from bench.settings import DTYPES, LAYOUTS, SEED, Setting

CALIBRATION = 24
"""Random images to calibrate with where only speed is measured, which does not depend on them."""
TITLES = {"resnet50": "ResNet-50", "resnet101": "ResNet-101", "resnet152": "ResNet-152"}
"""What the paper calls torchvision's models."""


def resnet50(batch: int = 8, name: str = "resnet50") -> tuple[nn.Module, Tensor]:
    """Return a seeded ResNet in eval mode and a batch, both float32 and channels_last."""
    return image_model(name, Setting("eager", "channels_last", "fp32", batch))


def image_model(name: str, setting: Setting, image: int = 224, device: str = "cpu") -> tuple[nn.Module, Tensor]:
    """Return a seeded model of torchvision's, or ``tiny``, in eval mode and a batch of random images."""
    torch.manual_seed(SEED)
    model = (_tiny() if name == "tiny" else getattr(models, name)()).eval()
    if isinstance(model, models.VisionTransformer):  # it starts with a head of zeros, which hides every error
        nn.init.normal_(model.heads.head.weight, std=0.02)
    x = torch.randn(setting.batch, 3, image, image)
    layout, dtype = LAYOUTS[setting.layout], DTYPES[setting.dtype]
    return model.to(device, dtype, memory_format=layout), x.to(device, dtype, memory_format=layout)


def _tiny() -> nn.Module:
    """Return the first bottlenecks of ResNet-50, to test scripts with."""
    model = models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(512, 10)
    return model


def calibration(x: Tensor) -> list[Tensor]:
    """Return batches of random images like those of ``x``."""
    generator = torch.Generator().manual_seed(SEED + 1)
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    images = torch.randn(CALIBRATION, *x.shape[1:], generator=generator)
    return list(images.to(x.device, x.dtype, memory_format=layout).split(8))
