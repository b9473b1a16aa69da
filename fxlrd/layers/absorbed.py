"""What stands in the place of a BatchNorm that a layer took in: it passes its input on, and reads as a norm that does.

Code that folds a BatchNorm into the conv before it (YOLO's fuse) reads the norm's statistics, scale and shift, also
where ``merge{mode=exact,norms=true}`` has done so. Those of

    y = (x - 0) / sqrt(1 + 0) * 1 + 0

leave the conv as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.errors import FxlrdError
from fxlrd.layers.kinds import BATCH_NORMS
from fxlrd.layers.readable import ComposedWeight

_VALUES = {"running_mean": 0.0, "running_var": 1.0, "weight": 1.0, "bias": 0.0}
"""What each entry of a norm that does nothing is; its eps is 0."""
_REFUSAL = (
    "this BatchNorm is folded into the layer before it, and has nothing that could be set; to train it or to set it, "
    "compress without norms=true"
)


class AbsorbedStatistic(ComposedWeight):
    """A tensor of a norm that does nothing. It can be read, and not written."""

    refusal = _REFUSAL


class AbsorbedNorm(nn.Identity):
    """Stands in the place of a BatchNorm ``norm`` whose effect the layer before it has.

    Deep copies are of this class; pickles hold a plain nn.Identity, which needs no fxlrd.

    >>> norm = AbsorbedNorm(nn.BatchNorm2d(2))
    >>> norm.running_var.tolist(), norm.bias.tolist(), norm.eps, list(norm.state_dict())
    ([1.0, 1.0], [0.0, 0.0], 0.0, [])
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        like = next((t for t in (*norm.parameters(), *norm.buffers()) if t.is_floating_point()), torch.empty(0))
        self.num_features = int(vars(norm)["num_features"])
        # An architecture on the meta device gets its tensors on the CPU, one by one.
        self._dtype, self._device = like.dtype, torch.device("cpu") if like.is_meta else like.device

    def __getattr__(self, name: str) -> Any:
        """Return what a norm that does nothing has: tensors of (num_features,), made when they are read."""
        if name == "eps":
            return 0.0
        if name not in _VALUES:
            return super().__getattr__(name)
        tensor = torch.full((self.num_features,), _VALUES[name], dtype=self._dtype, device=self._device)
        return tensor.as_subclass(AbsorbedStatistic) if type(tensor) is Tensor else tensor  # a fake one, for export

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Raises FxlrdError for one of a norm, which would change nothing."""
        if name == "eps" or name in _VALUES:
            raise FxlrdError(_REFUSAL)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AbsorbedNorm:
        """Follow the model to another dtype or device."""
        like = fn(torch.empty(0, dtype=self._dtype, device=self._device))
        self._dtype, self._device = like.dtype, like.device
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> AbsorbedNorm:
        """Return a copy of this class: pickling would make a plain nn.Identity of it."""
        new = memo[id(self)] = object.__new__(type(self))
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what pickles as a plain nn.Identity."""
        own = ("num_features", "_dtype", "_device")
        return nn.Identity, (), {name: value for name, value in vars(self).items() if name not in own}


IDENTITIES = (nn.Identity, AbsorbedNorm)


def in_place_of(module: nn.Module, old: nn.Module) -> nn.Module:
    """Return what takes the place of ``old``: ``module``, or an `AbsorbedNorm` for an Identity in a BatchNorm's.

    >>> type(in_place_of(nn.Identity(), nn.BatchNorm1d(4))).__name__
    'AbsorbedNorm'
    """
    return AbsorbedNorm(old) if type(module) is nn.Identity and isinstance(old, BATCH_NORMS) else module
