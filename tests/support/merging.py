"""What tests of the three modes of `merge` share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from fxlrd import capture
from fxlrd.passes import Calibrate, Merge
from fxlrd.passes.contract import PassResult
from tests.support.models import Function, randomise_norms


class Net(Function):
    """A model of the given modules whose forward is ``f(self, x)`` of one tensor."""

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x)


def randomised(model: nn.Module) -> nn.Module:
    """Return the model in float64 and eval mode, with BatchNorms that do something."""
    return randomise_norms(model).double().eval()


def sequence(*modules: nn.Module) -> nn.Module:
    """Return the modules in sequence, `randomised`."""
    return randomised(nn.Sequential(*modules))


def conv(c_in: int = 8, c_out: int = 8, k: int = 1, **options: Any) -> nn.Conv2d:
    """Return a k×k conv that keeps the size."""
    return nn.Conv2d(c_in, c_out, k, padding=k // 2, **options)


def hooked_conv() -> nn.Conv2d:
    """Return a 1×1 conv with a hook."""
    module = conv()
    module.register_forward_hook(lambda *_: None)
    return module


def bottleneck(act: type[nn.Module] = nn.ReLU, c: int = 12) -> list[nn.Module]:
    """Return 1×1, BN, act, k×k, BN, act, 1×1: 8 channels to 16."""
    return [
        *(conv(8, c, bias=False), nn.BatchNorm2d(c), act()),
        *(conv(c, c, 3, stride=2), nn.BatchNorm2d(c), act()),
        conv(c, 16),
    ]


def calibrated(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """Return the captured model with the moments of ``x``."""
    return Calibrate(x)(capture(model, x)).graph_module


def merged(model: nn.Module, x: Tensor, **options: Any) -> PassResult:
    """Return what `Merge` makes of the model, calibrated on ``x``."""
    return Merge(**options)(calibrated(model, x))
