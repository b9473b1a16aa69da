"""A module as Inductor serves it in int8 on a CPU: quantised after training by torchao's PT2E.

The quantizer is that of x86 CPUs with its default configuration: activations by tensor, weights by channel. A time does
not depend on the ranges of activations, and an accuracy does: it needs inputs like the real ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.inputs import tensors


def quantized(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], calibrate: Callable[[nn.Module], object]
) -> nn.Module:
    """Return the module in int8, as torchao's PT2E makes it of its export with these arguments.

    ``calibrate`` runs what it gets on inputs like the real ones. Raises FxlrdError where torchao is not installed, for
    a module on another device than the CPU, and for one that cannot be exported or quantised.
    """
    if any(t.device.type != "cpu" for t in tensors((args, kwargs))):
        raise FxlrdError("compile: int8 is timed on CPUs only; use compile=True on this device")
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError as error:
        raise FxlrdError("compile: int8 needs torchao, which is not installed: pip install torchao") from error
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of functions of torch that torchao calls and that will go
            # Without strict, a module that is called twice counts as one, and cannot be prepared.
            exported = torch.export.export(module, args, dict(kwargs), strict=True).module()
            prepared = prepare_pt2e(exported, quantizer)
            calibrate(prepared)
            converted: nn.Module = convert_pt2e(prepared)
    except Exception as error:
        name = type(module).__name__
        raise FxlrdError(f"compile: {name} cannot be exported and quantised to int8: {one_line(error)}") from error
    return converted
