"""Models to save, and what the tests of checkpoints do with them."""

from __future__ import annotations

import torch
from torch import nn

import fxlrd
from fxlrd.graph.inputs import tensors

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce = nn.Conv2d(32, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv = nn.Conv2d(24, 24, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.expand = nn.Conv2d(24, 32, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.act = nn.ReLU()

    def forward(self, x):
        y = self.act(self.bn1(self.reduce(x)))
        y = self.act(self.bn2(self.conv(y)))
        return self.act(self.bn3(self.expand(y)) + x)


class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.block = Block()
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(32, 32)
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        x = self.block(self.stem(x)).mean((2, 3))
        return self.head(self.drop(self.fc(x)))


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 32), nn.Dropout(), nn.Linear(32, 32))
        self.fc = nn.Linear(32, 32)

    def forward(self, x, times=2):
        for _ in range(int(x.shape[0] * times)):
            x = self.body(x)
        return self.fc(x) if x.abs().max() < 100 else x


def trained(model):
    """Give running statistics, which a fresh model has none of."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return model.eval()


def compressed(model, x=X, **options):
    if not options.keys() & {"pipeline", "preset"}:
        options["ratio"] = 2
    return fxlrd.compress(model, x, measure=False, **options)


def empty(make):
    with torch.device("meta"):
        return make()


def equal(a, b, *inputs):
    with torch.no_grad():
        a, b = tensors(a(*inputs)), tensors(b(*inputs))
    return len(a) == len(b) > 0 and all(u.dtype == v.dtype and torch.equal(u, v) for u, v in zip(a, b, strict=True))
