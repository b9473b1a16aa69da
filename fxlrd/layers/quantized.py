"""Which weights of a model are quantized: they have no values that could be decomposed or written as they are."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxlrd.layers.kinds import LAYERS

_PACKED = ("qweight", "weight_packed")
"""Names of the tensors that hold several quantized weights in one integer: of GPTQ and AWQ, of compressed-tensors."""
_SHARDED = ("DTensor",)
"""Subclasses that hold tensors and are not quantized."""


def quantized_weight(model: nn.Module) -> str | None:
    """Return the name and the class of the first quantized weight of a model, as text; None if it has none.

    Quantized are tensors of torch's quantized dtypes, subclasses that hold other tensors (torchao's), weights of conv
    and linear layers that are integers (bitsandbytes), and the packed weights of modules
    such as those of torch.ao.nn.quantized and of GPTQ.

    >>> quantized_weight(nn.Linear(4, 4)) is None
    True
    >>> layer = nn.Linear(4, 4)
    >>> layer.weight = nn.Parameter(layer.weight.detach().char(), requires_grad=False)
    >>> quantized_weight(nn.Sequential(layer))
    '0.weight (int8)'
    """
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and (kind := _kind(module, key, tensor)) is not None:
                return f"{prefix}{key} ({kind})"
        if ".quantized" in type(module).__module__ and hasattr(module, "_packed_params"):
            return f"{name or 'the model'} ({type(module).__module__}.{type(module).__name__})"
    return None


def _kind(module: nn.Module, key: str, tensor: Tensor) -> str | None:
    if is_lazy(tensor):
        return None
    data = tensor.data if type(tensor) is nn.Parameter else tensor
    if is_traceable_wrapper_subclass(data) and type(data).__name__ not in _SHARDED:
        return type(data).__name__
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_quantized or key in _PACKED:
        return dtype
    whole = isinstance(module, LAYERS) and key == "weight"
    return dtype if whole and not (tensor.is_floating_point() or tensor.is_complex()) else None
