"""One conv of each kind but Conv2d, which the tests of single passes use throughout, and the shape of its inputs."""

from __future__ import annotations

from torch import nn

KINDS = {
    "Conv1d": (lambda: nn.Conv1d(24, 32, 3, padding=1, stride=2), (24, 12)),
    "Conv3d": (lambda: nn.Conv3d(24, 32, (1, 3, 2), padding=(0, 1, 0)), (24, 3, 5, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(24, 32, 4, stride=2, padding=1), (24, 7)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(24, 32, 2, stride=2), (24, 4, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(24, 32, 3, stride=2, output_padding=1), (24, 2, 3, 4)),
}
