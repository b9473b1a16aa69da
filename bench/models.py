"""The model that the paper's figures are measured on, in the setting that the targets name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision import models


def resnet50(batch: int = 8, name: str = "resnet50") -> tuple[nn.Module, Tensor]:
    """Return a seeded ResNet in eval mode and a batch, both channels_last."""
    torch.manual_seed(0)
    model = getattr(models, name)().eval().to(memory_format=torch.channels_last)
    return model, torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
