"""Small models for tests. Each has one thing that tests need more than once; models of one test stay in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """A 3x3 and a 1x1 conv with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))) + x)


class ResidualNet(nn.Module):
    """Images → class scores: a stem, residual blocks, the mean over positions, a head."""

    def __init__(self, width: int = 32, blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convs with a residual connection; with a stride also one in the shortcut, and a grouped conv."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(32, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv = nn.Conv2d(24, 24, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.mix = nn.Conv2d(24, 24, 3, padding=1, groups=4) if stride > 1 else nn.Identity()
        self.expand = nn.Conv2d(24, 32, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.down = nn.Conv2d(32, 32, 1, stride=stride) if stride > 1 else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.reduce(x)))
        y = self.act(self.bn2(self.conv(y)))
        return self.act(self.bn3(self.expand(self.mix(y))) + self.down(x))


class BottleneckNet(nn.Module):
    """Images → class scores: a stem, a bottleneck, and two linear layers behind a dropout."""

    def __init__(self, stride: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.block = BottleneckBlock(stride)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(32, 32)
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x)).mean((2, 3))
        return self.head(self.drop(self.fc(x)))


def classifier(width: int = 32) -> nn.Sequential:
    """Return images → 20 scores: two convs, a BatchNorm, the mean over positions, a dropout, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(width, 20),
    )


class CalledTwice(nn.Module):
    """One layer with two calls: layer(relu(layer(x)))."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(x).relu())


class StemCalledTwice(nn.Module):
    """Images → two outputs: a conv called twice, the first time with several users of its output, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(self.stem(x))
        z = self.stem(y)
        return self.head(z + y) + self.head(z), z


class Function(nn.Module):
    """A model of the given modules whose forward is ``f(self, *args)``."""

    def __init__(self, f: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.f = f
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.f(self, *args, **kwargs)


def randomise_norms(model: nn.Module) -> nn.Module:
    """Draw statistics and affine parameters of all BatchNorms, which are the identity in a fresh model."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for tensor, low in ((m.running_mean, -0.5), (m.running_var, 0.5), (m.weight, 0.5), (m.bias, -0.5)):
                    if tensor is not None:
                        tensor.uniform_(low, low + 1)
    return model


class Stage(nn.Module):
    """Two blocks that add to a stream: relu(bn(conv(x)) + x)."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)) + x)
        return self.out(x)
