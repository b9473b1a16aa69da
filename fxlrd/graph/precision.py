"""TF32: the products of float32 numbers that GPUs round to 10 bits of mantissa, where PyTorch is told or left to."""

from __future__ import annotations

from typing import Any

import torch

TF32_EPS = 2.0**-10
"""The spacing of numbers at 1 in TF32."""


def uses_tf32(device: torch.device) -> list[str]:
    """Return what computes float32 in TF32 on the device: convs (by default on a GPU), matmuls, both or neither."""
    if device.type != "cuda":
        return []
    backends: Any = torch.backends
    inherited = backends.fp32_precision  # that of an operator is "none" where it is not set by itself
    settings = {"convs": backends.cudnn.conv.fp32_precision, "matmuls": backends.cuda.matmul.fp32_precision}
    return [name for name, own in settings.items() if (inherited if own == "none" else own) == "tf32"]
