"""Matrix multiplies, as workloads to set other times against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxlrd.graph.inputs import Inputs
from fxlrd.timing.workload import Workload

_SIZES = {"cpu": 256}
_SIZE = 2048


class Multiply(nn.Module):
    """The product of two matrices."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a·b."""
        return a @ b


def multiply(size: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """Return the product of two ``size``×``size`` matrices."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(size, size, generator=generator).to(device, dtype) for _ in range(2))
    return Workload([(Multiply(), Inputs((a, b)))])


def reference_kernel(device: torch.device, repeats: int = 1) -> Workload:
    """Return the kernel by which times of different minutes are compared, to run so many times in one call.

    It is always the same multiply on a device, and takes less than a millisecond.
    """
    return Workload(multiply(_SIZES.get(device.type, _SIZE), torch.float32, device).parts * repeats)
