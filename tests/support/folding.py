"""Layers that compute their weight or pad their input, as libraries write them."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class StandardisedConv(nn.Conv2d):
    """Weight standardisation with a gain, as NFNets have it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        deviation = self.weight.std(dim=(1, 2, 3), keepdim=True, unbiased=False)
        weight = self.gain * (self.weight - mean) / (deviation + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def same_pads(size: int, kernel: int, stride: int, dilation: int) -> int:
    return max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)


class SameConv(nn.Conv2d):
    """TensorFlow's "same" padding, by the input's size."""

    def forward(self, x):
        high, wide = (same_pads(x.shape[i], self.kernel_size[i], self.stride[i], self.dilation[i]) for i in (-2, -1))
        x = F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class CausalConv(nn.Conv1d):
    """A conv that reads what came before alone."""

    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class ScaledLinear(nn.Module):
    """A linear layer with a learning rate of its own (StyleGAN), which is no subclass of one."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(c_out, c_in)), nn.Parameter(torch.randn(c_out))
        self.scale = c_in**-0.5

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, bias=self.bias * 0.1)


class MaskedLinear(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", (torch.rand(self.weight.shape) > 0.3).float())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)
