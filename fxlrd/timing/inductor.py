"""A module as Inductor serves it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import fx, nn

from fxlrd.errors import FxlrdError
from fxlrd.graph.inputs import Inputs
from fxlrd.layers.kinds import LAYERS
from fxlrd.timing.int8 import between_convs, quantized

Compile = bool | Literal["int8"]
"""How modules are timed: eagerly, under Inductor with frozen weights, or under Inductor in int8."""


def check(compile: Compile) -> None:
    """Raise FxlrdError for what does not say how to compile."""
    if not isinstance(compile, bool) and compile != "int8":
        raise FxlrdError(f'compile={compile!r}: give True, False or "int8"')


def served(module: nn.Module, inputs: Inputs, under_inductor: Compile, inside: bool = False) -> Callable[..., Any]:
    """Return what is called to run the module: itself, or the module `compiled`, also quantised.

    ``inside`` says that the module is a layer, or its factors, inside a model.
    """
    if under_inductor == "int8":
        return compiled_in_int8(module, inputs, inside)
    return compiled(module) if under_inductor else module


def compiled_in_int8(module: nn.Module, inputs: Inputs, inside: bool = False) -> Callable[..., Any]:
    """Return the module `quantized`, under Inductor; ranges of activations are those for ``inputs``.

    Convs ``inside`` a model read and write int8.
    """
    args, kwargs = inputs.args, inputs.kwargs
    converted = quantized(module, args, kwargs, lambda prepared: prepared(*args, **kwargs))
    if not inside or any(isinstance(m, nn.Linear) for m in module.modules()):
        return compiled(converted)
    between, x = between_convs(converted, *args)
    run = compiled(between)
    return lambda *_: run(x)


def compiled(module: nn.Module) -> Callable[..., Any]:
    """Return the module under Inductor with frozen weights, as in deployment; compiled at its first call.

    Each result traces a graph module of its own: one code object each, so that torch's limit of recompilations per
    code object is never met. Dynamo's caches are not reset. The first call must be made with gradients off: only then
    do weights freeze into constants.
    """
    optimized = torch.compile(_graph(module))
    frozen = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal frozen
        if frozen:
            return optimized(*args, **kwargs)
        from torch._dynamo import config as dynamo
        from torch._inductor import config

        # As an option of torch.compile, freezing would reach Inductor alone, and Dynamo hands weights over as inputs.
        # Copies of one untraceable model have one code object: past the limit Dynamo would run it eagerly.
        limits = dynamo.patch(recompile_limit=256, accumulated_recompile_limit=4096)
        with config.patch(freezing=True), limits, _let_go():
            result = optimized(*args, **kwargs)
        frozen = True
        return result

    return call


@contextmanager
def _let_go() -> Iterator[None]:
    """Hold nothing of what Inductor compiles within, beyond the compiled function's own life.

    Inductor retains each module that it loads, to find its file, and with it the frozen weights: as much as the model,
    each time that one is timed.
    """
    from torch._inductor.codecache import PyCodeCache

    loaded = PyCodeCache.modules
    before = len(loaded)
    try:
        yield
    finally:
        for module in loaded[before:]:
            sys.modules.pop(module.__name__, None)
        del loaded[before:]


def _graph(module: nn.Module) -> nn.Module:
    """Return a graph module of its own that computes the same; the module itself where it cannot be traced."""
    root = nn.Sequential(module) if isinstance(module, LAYERS) else module  # a trace goes into the root's forward
    try:
        gm = root if isinstance(root, fx.GraphModule) else fx.symbolic_trace(root)
        return fx.GraphModule(gm, gm.graph)
    except Exception:  # whatever stops a trace: compiled as its user would compile it
        return module
