"""Which modules count as layers, and what configures one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

Conv = nn.modules.conv._ConvNd
"""The common class of all convs."""
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVS, *TRANSPOSED)
ConvOrLinear = nn.Linear | Conv
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONV = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "bias",
)  # fmt: skip
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats", "bias")
OPTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", "bias"),
    **dict.fromkeys(CONVS, _CONV),
    **dict.fromkeys(TRANSPOSED, (*_CONV, "output_padding")),
    **dict.fromkeys(BATCH_NORMS, _BATCH_NORM),
    nn.PReLU: ("num_parameters",),
    nn.Identity: (),
}
"""What configures a module of each class that passes put into models: constructor arguments, and attributes too."""
_CHANNELS = ("in_channels", "out_channels", "groups", "bias")
"""What of a conv's options its weight and bias set."""


def as_layer(module: nn.Module) -> ConvOrLinear:
    """Return the module, which the caller knows to be a conv or Linear, typed so."""
    assert isinstance(module, LAYERS)
    return module


def stock_type(module: nn.Module) -> type[Any]:
    """Return the stock class of a layer, also for a subclass."""
    return next(kind for kind in LAYERS if isinstance(module, kind))


def op(module: nn.Module) -> str:
    """Return the layer's stock type name, such as Conv2d or Linear, also for a subclass."""
    return stock_type(module).__name__


_CONSTRUCTION = {"__init__", "reset_parameters", "__annotate_func__"}
"""Methods that a subclass may redefine and compute the same (the last is what annotations are, in Python 3.14)."""


def is_stock(module: nn.Module) -> bool:
    """Whether the layer computes what its stock type does: of that type, or a subclass with another construction."""
    stock, classes = stock_type(module), type(module).__mro__
    overridden = {
        name
        for kind in classes[: classes.index(stock)]
        for name, value in vars(kind).items()
        if hasattr(stock, name) and (callable(value) or isinstance(value, (property, classmethod, staticmethod)))
    }
    return overridden <= _CONSTRUCTION


def spatial_dims(module: nn.Module) -> int:
    """Return how many dimensions the kernel has: 2 for a Conv2d, 0 for a Linear."""
    return as_layer(module).weight.dim() - 2


def channel_axis(module: nn.Module, dims: int) -> int:
    """Return the axis of a layer's channels in an input or output with ``dims`` dimensions."""
    return dims - 1 - spatial_dims(module)


def channels_per_group(module: nn.Module) -> tuple[int, int, int]:
    """Return (input channels per group, output channels per group, groups)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, 1
    assert isinstance(module, Conv)
    return module.in_channels // module.groups, module.out_channels // module.groups, module.groups


def kernel_area(module: nn.Module) -> int:
    """Return the number of positions of the kernel: 9 for 3×3, 1 for a Linear."""
    return math.prod(as_layer(module).weight.shape[2:])


def kernel_share(module: nn.Module) -> float:
    """Return the share of the kernel that an output meets, on average: all, but in a transposed conv with a stride."""
    return 1 / math.prod(module.stride) if isinstance(module, TRANSPOSED) else 1.0


def kernel_text(module: nn.Module) -> str:
    """Return the kernel size as text, such as 3×3; 1×1 for a Linear."""
    return "×".join(str(k) for k in as_layer(module).weight.shape[2:]) or "1×1"


def options(module: nn.Module) -> dict[str, Any]:
    """Return the constructor arguments that make a module like this one, which is of a class in `OPTIONS`.

    >>> options(nn.Linear(3, 5, bias=False))
    {'in_features': 3, 'out_features': 5, 'bias': False}
    """
    names = next(OPTIONS[kind] for kind in OPTIONS if isinstance(module, kind))
    return {name: getattr(module, name) if name != "bias" else module.bias is not None for name in names}


def kernel_options(conv: Conv) -> dict[str, Any]:
    """Return how the kernel is applied, as constructor arguments of such a conv."""
    return {name: value for name, value in options(conv).items() if name not in _CHANNELS}


def make(kind: type[nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """Return a new module of a class in `OPTIONS`, its tensors on the meta device; the random state stays as it was."""
    if kind is nn.Identity:
        return nn.Identity()
    if not issubclass(kind, BATCH_NORMS):
        return kind(**options, device="meta")
    # Older versions of torch do not know the option bias of a BatchNorm.
    norm = kind(**{name: value for name, value in options.items() if name != "bias"}, device="meta")
    if not options["bias"]:
        norm.register_parameter("bias", None)
    return norm


def depthwise(module: nn.Module) -> bool:
    """Whether the module is a conv of one input channel a group."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def written_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that somebody wrote: under the one that torch makes for a parametrized module."""
    cls = type(module)
    return cls.__mro__[1] if is_parametrized(module) else cls
