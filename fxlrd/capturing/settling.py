"""Models whose forward writes into their own weights, also in eval mode.

RWKV scales weights down in its first call and remembers that it has. Others clip or renormalise theirs in every call,
which changes nothing after the first. A copy of such a model with weights of its own is called once; further calls must
leave the weights as they are by then. The copy stands for the user's model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxlrd.errors import FxlrdError
from fxlrd.graph.compare import difference, rounding
from fxlrd.graph.copies import independent_copy
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.random import OwnGenerators
from fxlrd.graph.run import called_on, evaluating
from fxlrd.graph.settings import settings_restored


def settled(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a copy of the model that shares nothing with it and was called once in eval mode."""
    copied = independent_copy(model)
    with evaluating(copied), settings_restored(), OwnGenerators(), torch.no_grad():
        called_on(copied, inputs)
    return copied


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the values of the parameters by name."""
    return {name: p.detach() for name, p in model.named_parameters()}


def changed_weight(before: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """Return the name of the first parameter that has other values than before, but for rounding."""
    return next((name for name, now in weights_of(model).items() if _moved(now, before[name])), None)


def _moved(now: Tensor, before: Tensor) -> bool:
    return now.shape != before.shape or difference([now], [before], "").relative > rounding([before])


def never_settles(model: nn.Module, parameter: str) -> FxlrdError:
    """Return the error for a model that writes into a parameter whenever it is called."""
    return FxlrdError(
        f"{type(model).__name__}: its forward writes into its weight {parameter} and changes it at every call, also in "
        "eval mode; let it compute a changed weight instead, and leave the parameter alone"
    )
