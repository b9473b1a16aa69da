"""The fast paths of nn.TransformerEncoder and its layers, which read the weights of the layers inside themselves.

In eval mode, without gradients, a TransformerEncoderLayer calls none of its layers, and a TransformerEncoder packs
padded sequences into nested tensors that only fast paths take. Where a layer inside was replaced, neither may run. Both
have attributes that turn them off; the rest of their forward then calls the layers, as in training mode.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

Switches = dict[tuple[str, str], object]
"""Values of attributes, by the names of the module and of the attribute."""
TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
"""Modules of torch that hold layers and call them, fast paths aside."""
_OFF = {nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0), nn.TransformerEncoder: ("use_nested_tensor", False)}


def switches(model: nn.Module) -> Switches:
    """Return what turns fast paths in the model on and off, as it is."""
    return {
        (name, attribute): getattr(module, attribute)
        for name, module in model.named_modules()
        for kind, (attribute, _) in _OFF.items()
        if isinstance(module, kind) and hasattr(module, attribute)
    }


def restore(model: nn.Module, saved: Switches) -> None:
    """Set the attributes of a model's modules to values that were saved."""
    for (name, attribute), value in saved.items():
        setattr(model.get_submodule(name), attribute, value)


def turn_off_around(model: nn.Module, names: Iterable[str]) -> None:
    """Turn the fast paths off of the modules that hold a module in ``names``."""
    parts = [name.split(".") for name in names]
    holders = {".".join(path[:length]) for path in parts for length in range(len(path))}
    for name, module in model.named_modules(remove_duplicate=False):
        for kind, (attribute, off) in _OFF.items():
            if name in holders and isinstance(module, kind) and getattr(module, attribute, off) != off:
                setattr(module, attribute, off)
