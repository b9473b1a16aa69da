"""A compressed graph that is called with the factors of whatever weights the caller has."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx

from fxlrd.backend.contents import Contents
from fxlrd.backend.factor_sets import FactorSet, FactorSets, Fingerprint, fingerprint
from fxlrd.backend.fixed_weights import FixedWeights
from fxlrd.backend.options import Options
from fxlrd.backend.rewrite import rewrite
from fxlrd.capturing.dynamo import weights_of
from fxlrd.capturing.lowering import Lowered
from fxlrd.errors import FxlrdError
from fxlrd.pipeline import Pipeline


class Compressed:
    """A Dynamo graph, compressed: a callable with the arguments of Dynamo's graph.

    While Inductor freezes weights into its code (torch._inductor.config.freezing, set during the first call), factors
    are frozen with them (``frozen``). Then all weights are watched, and a change compiles the rewritten graph again.
    Otherwise factors are arguments, and only the weights that they are computed from are watched.
    """

    def __init__(self, gm: fx.GraphModule, pipeline: Pipeline, options: Options) -> None:
        self.gm = gm
        self.pipeline = pipeline
        self.options = options
        self.sets = FactorSets()
        self.lock = threading.Lock()
        self.frozen = False
        self.symbolic = False
        self.code: tuple[Any, ...] = ()
        self.watched: Callable[[tuple[Any, ...]], Sequence[Tensor]] = tuple
        self.fingerprint: Callable[[Sequence[Tensor]], Fingerprint] = fingerprint
        self.run: Callable[..., Any] | None = None

    def start(self, inputs: Sequence[Any], weights: Mapping[str, Tensor]) -> bool:
        """Compress and compile the graph for these inputs; False if no pass rewrote anything."""
        self.frozen = bool(self.gm.graph.find_nodes(op="get_attr")) and not _has_weight_arguments(self.gm, inputs)
        self.symbolic = any(isinstance(v, torch.SymInt) for v in inputs)
        _refuse_inference_tensors(weights)
        # Before the passes run: a weight that changes meanwhile is then noticed by the next call.
        fixed = FixedWeights([*weights.values()]) if self.frozen else None
        before = fixed.fingerprint() if fixed is not None else fingerprint([*weights.values()])
        contents = Contents([*weights.values()])
        lowered = self._lowered(inputs, weights, first=True)
        if not lowered.sources:
            return False
        names = tuple(weights) if self.frozen else lowered.sources
        if fixed is not None:
            self.watched, self.fingerprint = lambda args: fixed.weights, lambda weights: fixed.fingerprint()
        else:
            self.watched = _from_arguments(self.gm, names)
        self.run = self._compile_in_dynamo(lowered, inputs)
        mark = before if self.frozen else _of(names, weights, before)
        watched = [weights[name] for name in names]
        now = Contents(watched)
        if contents.same([*weights.values()]):
            self.sets.add(FactorSet(mark, now, self._arguments(lowered), self.run), watched)
        return True

    def __call__(self, *args: Any) -> Any:
        """Run the compressed graph with the factors of the weights in ``args``."""
        weights = self.watched(args)
        mark = self.fingerprint(weights)
        current = self.sets.latest
        if current.fingerprint != mark or not current.contents.same(weights):
            current = self._factors_of(weights, mark, args)
        return current.run(*args, *current.factors)

    def _factors_of(self, weights: Sequence[Tensor], mark: Fingerprint, args: tuple[Any, ...]) -> FactorSet:
        """Return the retained factors of these weights, or compute them."""
        with self.lock:
            retained = self.sets.find(mark, weights)
            if retained is not None:
                return retained
            contents = Contents(weights)
            lowered = self._lowered(args, weights_of(self.gm, args), first=False)
            run = self.run
            if run is None or self.frozen or _compiled_for(lowered) != self.code:
                run = self._compile_again(lowered, args)
            return self.sets.add(FactorSet(mark, contents, self._arguments(lowered), run), weights)

    def _lowered(self, values: Sequence[Any], weights: Mapping[str, Tensor], first: bool) -> Lowered:
        verify = self.options.verify and first
        return rewrite(self.gm, self.pipeline, values, weights, verify=verify, first=first, frozen=self.frozen)

    def _arguments(self, lowered: Lowered) -> tuple[Tensor, ...]:
        """Return the factors that are arguments of the lowered graph."""
        return () if self.frozen else tuple(lowered.factors.values())

    def _compile_in_dynamo(self, lowered: Lowered, inputs: Sequence[Any]) -> Callable[..., Any]:
        context = torch._guards.TracingContext.try_get()
        mode = context.fake_mode if context is not None else None
        # The sizes of factors are static even where others are dynamic. The mode reuses these fakes while they live.
        fakes = [mode.from_tensor(f, static_shapes=True) for f in lowered.factors.values()] if mode is not None else []
        self.code = _compiled_for(lowered)
        run = self.options.compile(lowered.graph_module, [*inputs, *self._arguments(lowered)])
        del fakes
        for node in lowered.graph_module.graph.nodes:
            node.meta.pop("grapharg", None)  # a weak reference to a weight, which Dynamo removes from its own graph
        return run

    def _compile_again(self, lowered: Lowered, args: Sequence[Any]) -> Callable[..., Any]:
        """Compile for other weights, during a call: outside of Dynamo, without guards on sizes."""
        if self.symbolic:
            warnings.warn(
                "backend fxlrd: new weights, and sizes that are dynamic: this graph runs uncompiled from here on; "
                "torch._dynamo.reset() compiles it again",
                stacklevel=2,
            )
            return lowered.graph_module
        from torch._inductor import config

        with config.patch(freezing=self.frozen):
            return self.options.compile(lowered.graph_module, [*args, *self._arguments(lowered)])


def _compiled_for(lowered: Lowered) -> tuple[Any, ...]:
    """Return what compiled code depends on: the graph, and the memory layout of factors."""
    return lowered.graph_module.code, [
        (t.shape, t.stride(), t.dtype, t.device, t.layout) for t in lowered.factors.values()
    ]


def _from_arguments(gm: fx.GraphModule, names: Sequence[str]) -> Callable[[tuple[Any, ...]], Sequence[Tensor]]:
    """Return a function from a call's arguments to the weights of these names."""
    order = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    positions = [order.index(name) for name in names]
    return itemgetter(*positions) if len(positions) > 1 else lambda args: tuple(args[i] for i in positions)


def _of(names: Sequence[str], weights: Mapping[str, Tensor], mark: Fingerprint) -> Fingerprint:
    """Return the part of the fingerprint of all ``weights`` that is about ``names``."""
    positions = [list(weights).index(name) for name in names]
    return tuple(tuple(part[i] for i in positions) for part in mark)


def _refuse_inference_tensors(weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if weight.is_inference():
            raise FxlrdError(
                f"{name}: made under torch.inference_mode(), which does not count changes; "
                "make or load the model outside of it"
            )


def _has_weight_arguments(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    names = {n.name for n in gm.graph.find_nodes(op="placeholder")}
    return any(name in names for name in weights_of(gm, inputs))
