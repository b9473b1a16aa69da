"""torch.compile(model, backend="fxlrd", options={"ratio": 2.0}): compression inside torch.compile.

    Dynamo's graph → raised (fxlrd/capturing/dynamo.py) → the passes of `fxlrd.compress` → lowered → inner compiler

The inner compiler is Inductor by default. The options are those of `fxlrd.backend.options.Options`.

Weights may change under compiled code, and one compiled graph may serve several models of a class. Dynamo has no guards
for either where weights are arguments. So every call compares the weights with those that the factors were computed
from, and changed weights get new factors (`fxlrd.backend.factor_sets`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxlrd.backend.compressed import Compressed
from fxlrd.backend.options import Options
from fxlrd.capturing.dynamo import has_layers, weights_of
from fxlrd.errors import FxlrdError
from fxlrd.graph.writes import WritesWeightError


def fxlrd(gm: fx.GraphModule, example_inputs: Sequence[Any], **compile_arguments: Any) -> Callable[..., Any]:
    """Compile a Dynamo graph, compressed: the entry point of ``torch.compile(model, backend="fxlrd")``.

    ``compile_arguments`` are the ``options`` and ``mode`` of torch.compile. Raises FxlrdError, which Dynamo reports as
    the reason of the backend's failure.
    """
    options = Options.read(**compile_arguments)
    pipeline = options.pipeline()
    weights = weights_of(gm, example_inputs)
    if not has_layers(gm, weights):
        return options.compile(gm, example_inputs)
    if torch.is_grad_enabled() and _trains(gm) and any(w.requires_grad for w in weights.values()):
        raise FxlrdError(
            "backend fxlrd is for inference: call the model under torch.no_grad() or torch.inference_mode(); "
            "to train it compressed, fxlrd.compress(model, …), then fxlrd.finetune(result.model, …)"
        )
    compressed = Compressed(gm, pipeline, options)
    try:
        started = compressed.start(example_inputs, weights)
    except WritesWeightError as error:
        warnings.warn(f"backend fxlrd: {error}: this graph is compiled as it is", stacklevel=2)
        started = False
    return compressed if started else options.compile(gm, example_inputs)


def _trains(gm: fx.GraphModule) -> bool:
    """Whether gradients may flow from an output: a ``with torch.no_grad()`` may be in the graph itself."""
    (output,) = gm.graph.find_nodes(op="output")
    values = [node.meta.get("example_value", output) for node in output.all_input_nodes]
    return any(value is output or (isinstance(value, Tensor) and value.requires_grad) for value in values)
