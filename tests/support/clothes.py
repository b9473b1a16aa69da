"""Convs and linears in other clothes: what libraries of models write in the place of torch's own."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Fixed(nn.Linear):
    """A Linear that is called in another way where it is scripted, as timm's."""

    def forward(self, x):
        if torch.jit.is_scripting():
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return F.linear(x, self.weight, self.bias)


class WrittenOut(nn.Linear):
    """A Linear as a product and a sum, as Falcon's."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class TransposedLinear(nn.Module):
    """A linear layer whose weight is transposed, as GPT-2's Conv1D."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.nx, self.nf = n_in, n_out
        self.weight = nn.Parameter(torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Kernel(nn.Module):
    """A linear layer under names of its own, without a bias."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(n_out, n_in))

    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.kernel)


CLOTHES = [Fixed, WrittenOut, TransposedLinear, Kernel]


class SamePadded(nn.Conv2d):
    """A conv that pads its input by the input's size so that it gives size / stride, as TensorFlow does."""

    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            more = max((-(size // -stride) - 1) * stride + kernel - size, 0)
            pads += [more // 2, more - more // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride)


class StandardisedConv(nn.Conv2d):
    """A conv whose weight has mean 0 and variance 1 for each output channel, as in BiT and NFNets."""

    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.var((1, 2, 3), keepdim=True).add(1e-6).sqrt()
        return self._conv_forward(x, (self.weight - mean) / std, self.bias)
