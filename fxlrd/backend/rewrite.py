"""Run the passes on a graph of Dynamo's."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake

from fxlrd.capturing.dynamo import raise_graph
from fxlrd.capturing.lowering import Lowered, lower_graph
from fxlrd.capturing.whole import check_weights
from fxlrd.errors import FxlrdError, one_line, unknown
from fxlrd.graph.captured import Whole, captured
from fxlrd.graph.guards import matches
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.regions import copies
from fxlrd.graph.run import evaluating, isolated
from fxlrd.graph.surgery import layers
from fxlrd.graph.writes import WritesWeightError, guarding_weights, may_write
from fxlrd.pipeline import Pipeline


def rewrite(
    gm: fx.GraphModule,
    pipeline: Pipeline,
    values: Sequence[Any],
    weights: Mapping[str, Tensor],
    *,
    verify: bool,
    first: bool,
    frozen: bool,
) -> Lowered:
    """Return Dynamo's graph ``gm`` as the passes leave it.

    Args:
        gm: the graph; it is not changed.
        pipeline: the passes.
        values: what the placeholders are called with, real or fake.
        weights: those of them that are weights, by placeholder or attribute.
        verify: compare outputs after each pass.
        first: refuse a graph that writes into its weights, and warn of names to skip that no layer of it has.
        frozen: make factors attributes of the graph instead of arguments.
    """
    with building(weights.values()) as autocast:
        raised = raise_graph(gm, dict(weights))
        check_weights(raised.graph_module)
        inputs = example_inputs(gm, values, weights, autocast)
        if first:
            _check_writes(raised.graph_module, inputs)
        captured.record(raised.graph_module, Whole(Inputs(inputs)))
        applicable = _with_skips_of(raised.graph_module, pipeline, first)
        return lower_graph(_run(applicable, raised.graph_module, verify), raised, gm, frozen)


def _check_writes(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Raise WritesWeightError for a graph that writes into a weight: a run for its shapes would change the model."""
    if any(may_write(node) for node in gm.graph.nodes):
        with guarding_weights(gm) as guard, suppress(Exception), evaluating(gm), isolated(gm), torch.no_grad():
            fx.Interpreter(gm).run(*copies(inputs))
        if guard.written is not None:
            raise WritesWeightError(f"its forward writes into {guard.written}")


def _run(pipeline: Pipeline, gm: fx.GraphModule, verify: bool) -> fx.GraphModule:
    """Return the rewritten graph; one that cannot run outside of its caller is neither verified nor timed."""
    try:
        return pipeline(gm, verify=verify).graph_module
    except FxlrdError:
        raise
    except Exception as error:  # such as a cast to the dtype of an autocast that is off here
        warnings.warn(
            f"backend fxlrd: a graph does not run on its own ({one_line(error)}): nothing is verified or timed",
            stacklevel=2,
        )
        captured.drop(gm)
        return pipeline(gm).graph_module


def _with_skips_of(gm: fx.GraphModule, pipeline: Pipeline, warn: bool) -> Pipeline:
    """Return the passes with those names to skip that a layer of ``gm`` has: one model may be several graphs."""
    names = list(layers(gm))
    passes = []
    for p in pipeline.passes:
        skip = getattr(p, "skip", ())
        applicable = tuple(s for s in skip if any(matches(name, [s]) for name in names))
        for name in sorted({*skip} - {*applicable}) if warn else ():
            warnings.warn(f"backend fxlrd: in this graph, {unknown('layer to skip', name, names)}", stacklevel=2)
        passes.append(replace(p, skip=applicable) if skip else p)  # type: ignore[type-var]
    return Pipeline(passes)


@contextmanager
def building(weights: Iterable[Tensor]) -> Iterator[bool]:
    """Leave the caller's modes while tensors are made: no gradients, no inference mode, no autocast, no tracing.

    Yields whether autocast was on. The global random state is restored.
    """
    kinds = {"cpu", *(w.device.type for w in weights)}
    on = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
    with ExitStack() as stack:
        stack.enter_context(torch._guards.tracing(None))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng())
        for kind in on:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield bool(on)


def example_inputs(
    gm: fx.GraphModule, values: Sequence[Any], weights: Mapping[str, Tensor], autocast: bool
) -> tuple[Any, ...]:
    """Return real inputs for the placeholders that are not weights, in float32 under ``autocast``."""
    placeholders = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    inputs = [example(v) for name, v in zip(placeholders, values, strict=True) if name not in weights]
    if autocast:
        inputs = [v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs]
    return tuple(inputs)


def example(value: Any) -> Any:
    """Return a real input like ``value``, which may be fake or symbolic: random floats, or zeros for integers."""
    if isinstance(value, torch.SymInt):
        return _hint(value)
    if not isinstance(value, Tensor) or not is_fake(value):
        return value
    shape, stride = [_hint(s) for s in value.shape], [_hint(s) for s in value.stride()]
    new = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    return new.normal_() if new.is_floating_point() else new.zero_()


def _hint(size: Any) -> int:
    """Return a size as a number: for a symbolic one, its value in Dynamo's first call."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 2
