"""A module as Inductor serves it in int8 on a CPU: quantised after training by torchao's PT2E.

The quantizer is that of x86 CPUs with its default configuration: activations by tensor, weights by channel. A time does
not depend on the ranges of activations, and an accuracy does: it needs inputs like the real ones.

A conv in the midst of a model reads int8 and writes int8: what quantises its output, BatchNorm and ReLU included, is
part of it. Timed alone it would read and write four times the bytes, which is most of the time of a 1×1 conv. So
`between_convs` leaves out the conversion of the input and adds that of the output. A Linear stands between norms and
activations in fp32, and is timed with its conversions.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.inputs import tensors

QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"


def check_installed() -> None:
    """Raise FxlrdError where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise FxlrdError("compile: int8 needs torchao, which is not installed: pip install torchao")


def quantized(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], calibrate: Callable[[nn.Module], object]
) -> nn.Module:
    """Return the module in int8, as torchao's PT2E makes it of its export with these arguments.

    ``calibrate`` runs what it gets on inputs like the real ones. Raises FxlrdError where torchao is not installed, for
    a module on another device than the CPU, and for one that cannot be exported or quantised.
    """
    if any(t.device.type != "cpu" for t in tensors((args, kwargs))):
        raise FxlrdError("compile: int8 is timed on CPUs only; use compile=True on this device")
    check_installed()
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of functions of torch that torchao calls and that will go
            # Without strict, a module that is called twice counts as one, and cannot be prepared.
            with _no_fast_paths():
                exported = torch.export.export(module, args, dict(kwargs), strict=True).module()
            _name_linears(exported)
            prepared = prepare_pt2e(exported, quantizer)
            calibrate(prepared)
            converted: nn.Module = convert_pt2e(prepared)
    except Exception as error:
        name = type(module).__name__
        raise FxlrdError(f"compile: {name} cannot be exported and quantised to int8: {one_line(error)}") from error
    return converted


@contextmanager
def _no_fast_paths() -> Iterator[None]:
    """Let a trace go into nn.TransformerEncoderLayer, which else is one operator, that no quantizer knows."""
    mha = torch.backends.mha
    enabled = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(enabled)


def _name_linears(exported: nn.Module) -> None:
    """Let the quantizer find every linear: it goes by what was traced, and misses those within nn.MultiheadAttention.

    They would stay in fp32, which is most of the time of a ViT in int8.
    """
    assert isinstance(exported, fx.GraphModule)
    for node in exported.graph.nodes:
        traced = node.meta.get("source_fn_stack") or [(node.name, None)]
        if node.target is torch.ops.aten.linear.default and traced[-1][1] not in (nn.Linear, nn.functional.linear):
            node.meta["source_fn_stack"] = [(node.name, nn.Linear)]


def between_convs(converted: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Return `quantized` convs with input and output in int8, and their input; ``x`` is that in fp32.

    What reads fp32, since it could not be quantised, is returned as it is.
    """
    assert isinstance(converted, fx.GraphModule)
    gm = fx.GraphModule(converted, converted.graph)
    (read,) = (node for node in gm.graph.nodes if node.op == "placeholder")
    first = next((node for node in read.users if str(node.target) == QUANTIZE), None)
    if first is None:
        return converted, x
    quantize: Any = first.target
    made = converted(x)
    low, high = min(0.0, float(made.min())), max(0.0, float(made.max()))
    scale = max(high - low, 1e-6) / 255
    zero = min(255, round(-low / scale))
    form = first.args[3:]
    x = quantize(x, *first.args[1:])
    first.replace_all_uses_with(read)
    for node in list(read.users):  # the conversion, and guards of an input in fp32
        if node is first or node.op == "call_module":
            gm.graph.erase_node(node)
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    (made_by,) = output.args[0]
    with gm.graph.inserting_before(output):
        output.args = ((gm.graph.call_function(quantize, (made_by, scale, zero, *form)),),)
    gm.recompile()
    return gm, x
