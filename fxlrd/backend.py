"""torch.compile(model, backend="fxlrd", options={"ratio": 2.0}): compression inside torch.compile.

A graph from Dynamo is raised (fxlrd/capturing/dynamo.py), the passes that `fxlrd.compress` would run are run on it, and
the inner compiler, Inductor by default, gets the rewritten graph.

Weights may change under compiled code, and one compiled graph may serve several models of a class; Dynamo guards
neither for weights that are arguments. So what factors were made of is looked at at every call: which tensors they
are, their version counters, which every in-place operation of torch raises (an optimizer's step, load_state_dict,
copy_), and where their data lies (``p.data = …``). Where any of that is new, factors are made anew before the call
goes on; those of the last few models are kept. Weak references tell when a tensor or its storage is gone, so that
neither is kept alive and no newcomer at the same address passes for it.

What torch itself does not count cannot be seen: a write through ``p.data`` (``p.data.copy_``, ``p.data.add_``),
through NumPy or from another process. After it call ``torch.autograd.graph.increment_version(model.parameters())``.

While Inductor freezes weights into its code (torch._inductor.config.freezing, set around the first call), factors are
frozen with them. Then all weights are looked at, and a change compiles the rewritten graph again.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake

from fxlrd.budget import Budget
from fxlrd.capturing.dynamo import Lowered, has_layers, lower_graph, raise_graph, weights_of
from fxlrd.capturing.whole import check_weights
from fxlrd.errors import FxlrdError, one_line, unknown
from fxlrd.graph.captured import Whole, captured
from fxlrd.graph.guards import matches
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import layers
from fxlrd.pipeline import Pipeline
from fxlrd.request import pipeline_for

KEPT = 4
"""Sets of factors that one compiled graph keeps, for models that take turns."""

Compiled = Callable[..., Any]


def fxlrd(gm: fx.GraphModule, example_inputs: Sequence[Any], **given: Any) -> Compiled:
    """Compile a Dynamo graph, compressed: the entry point of ``torch.compile(model, backend="fxlrd")``.

    Raises FxlrdError, which Dynamo shows as the reason why the backend failed.
    """
    options = Options.read(**given)
    steps = options.steps()
    if not has_layers(gm):
        return options.compile(gm, example_inputs)
    weights = weights_of(gm, example_inputs)
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights.values()):
        raise FxlrdError(
            "backend fxlrd is for inference: call the model under torch.no_grad() or torch.inference_mode(); "
            "to train it compressed, fxlrd.compress(model, …), then fxlrd.finetune(result.model, …)"
        )
    compressed = Compressed(gm, steps, options)
    return compressed if compressed.start(example_inputs, weights) else options.compile(gm, example_inputs)


@dataclass(frozen=True)
class Options:
    """The options of the backend; values are plain, since torch compares them.

    ``ratio``, ``preset``, ``passes`` (text form), ``budget`` (text form), ``skip`` and ``verify`` are as in
    `fxlrd.compress`. ``inner`` is the compiler of the rewritten graph, any that torch.compile knows by name, with its
    own ``inner_options`` and ``inner_mode`` (torch.compile's ``mode=``, which torch does not allow beside options).
    """

    ratio: float | None = None
    preset: str | None = None
    passes: str | None = None
    budget: str | None = None
    skip: str | tuple[str, ...] = ()
    verify: bool = True
    inner: str = "inductor"
    inner_options: Mapping[str, Any] = field(default_factory=dict)
    inner_mode: str | None = None

    @classmethod
    def read(cls, options: Mapping[str, Any] | None = None, mode: str | None = None, **others: Any) -> Options:
        """Read what torch.compile hands over. Raises FxlrdError for an option that is not known."""
        known = [f.name for f in fields(cls)]
        for name in (*(options or {}), *others):
            if name not in known:
                raise unknown("option of backend fxlrd", name, known)
        found = cls(**{"inner_mode": mode, **(options or {}), **others})
        if found.inner == "fxlrd":
            raise FxlrdError("inner: backend fxlrd cannot be its own inner compiler; leave it out for inductor")
        return found

    def steps(self) -> Pipeline:
        """Return the passes. Raises FxlrdError for those that read calibration inputs."""
        budget = None if self.budget is None else Budget.parse(self.budget)
        skip = (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)
        steps = pipeline_for(
            ratio=self.ratio,
            preset=self.preset,
            pipeline=self.passes,
            budget=budget,
            skip=skip,
            compile=self.inner == "inductor",
        )
        fitted = [type(p).__name__.lower() for p in steps.passes if hasattr(p, "calibration")]
        if fitted:
            raise FxlrdError(
                f"{steps}: {', '.join(fitted)} read calibration inputs, which torch.compile has no room for: "
                "fxlrd.compress(model, inputs, calibration=…), then torch.compile(result.model)"
            )
        return steps

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        """Return ``gm`` as the inner compiler compiles it."""
        result: Compiled
        if self.inner == "inductor":
            result = torch._TorchCompileInductorWrapper(self.inner_mode, dict(self.inner_options), None)(
                gm, list(inputs)
            )
            return result
        from torch._dynamo import list_backends, lookup_backend

        names = list_backends(exclude_tags=())
        if self.inner not in names:
            raise unknown("inner compiler", str(self.inner), names)
        given = {"mode": self.inner_mode, "options": dict(self.inner_options)}
        result = lookup_backend(self.inner)(gm, list(inputs), **{k: v for k, v in given.items() if v})
        return result


@dataclass(eq=False)
class WeightSet:
    """Factors made of one model's weights as they were ``seen``, and the compiled graph that takes them."""

    seen: Any
    factors: tuple[Tensor, ...]
    run: Compiled
    refs: list[Any]


def see(weights: Sequence[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """Return which tensors these are, their versions, and where their data lies."""
    return tuple(map(id, weights)), tuple(map(_version, weights)), tuple(map(_address, weights))


_version = attrgetter("_version")
_address = Tensor.data_ptr
_NOTHING = WeightSet(None, (), lambda *_: None, [])


class Compressed:
    """A Dynamo graph, compressed, and served with factors that are those of the weights it is called with."""

    def __init__(self, gm: fx.GraphModule, steps: Pipeline, options: Options) -> None:
        self.gm = gm
        self.steps = steps
        self.options = options
        self.latest = _NOTHING
        self.sets: list[WeightSet] = []
        self.lock = threading.Lock()
        self.symbolic = False
        self.code: tuple[Any, ...] = ()
        self.names: tuple[str, ...] = ()
        self.weights: Callable[[tuple[Any, ...]], tuple[Tensor, ...]] = tuple
        self.run: Compiled | None = None

    def start(self, inputs: Sequence[Any], weights: dict[str, Tensor]) -> bool:
        """Compress and compile the graph for these inputs; False if no pass rewrote anything."""
        self.frozen = bool(self.gm.graph.find_nodes(op="get_attr")) and not _weight_placeholders(self.gm, inputs)
        self.symbolic = any(isinstance(v, torch.SymInt) for v in inputs)
        for name, weight in weights.items():
            if weight.is_inference():
                raise FxlrdError(
                    f"{name}: made under torch.inference_mode(), which leaves no trace of changes; "
                    "make or load the model outside of it"
                )
        seen = {name: see([w]) for name, w in weights.items()}
        lowered = self._lowered(inputs, weights, first=True)
        if not lowered.sources:
            return False
        self.names = tuple(weights) if self.frozen else lowered.sources
        self._pick(weights)
        run = self._compile(lowered, [*inputs, *self._placed(lowered)])
        watched = tuple(weights[name] for name in self.names)
        now = tuple(tuple(part[0] for part in parts) for parts in zip(*(seen[n] for n in self.names), strict=True))
        self._keep(now, watched, lowered, run)
        return True

    def __call__(self, *args: Any) -> Any:
        """Run the compressed graph with the factors of the weights in ``args``."""
        weights = self.weights(args)
        seen = see(weights)
        found = self.latest
        if found.seen != seen:
            found = self._find(weights, seen, args)
        return found.run(*args, *found.factors)

    def _pick(self, weights: dict[str, Tensor]) -> None:
        """Set how the weights that are looked at are taken from the arguments of a call."""
        if self.frozen:
            fixed = tuple(weights.values())
            self.weights = lambda args: fixed
            return
        order = [n.name for n in self.gm.graph.find_nodes(op="placeholder")]
        where = [order.index(name) for name in self.names]
        self.weights = itemgetter(*where) if len(where) > 1 else lambda args: tuple(args[i] for i in where)

    def _find(self, weights: tuple[Tensor, ...], seen: Any, args: tuple[Any, ...]) -> WeightSet:
        """Return the factors of these weights: kept ones, or new ones."""
        with self.lock:
            found = next((s for s in self.sets if s.seen == seen), None)
            if found is not None:
                self.latest = found
                return found
            lowered = self._lowered(args, weights_of(self.gm, args), first=False)
            run = self.run
            if run is None or self.frozen or _code(lowered) != self.code:
                run = self._compile_again(lowered, [*args, *self._placed(lowered)])
            return self._keep(seen, weights, lowered, run)

    def _keep(self, seen: Any, weights: tuple[Tensor, ...], lowered: Lowered, run: Compiled) -> WeightSet:
        new = WeightSet(seen, self._placed(lowered), run, [])
        owner = weakref.ref(self)

        def gone(_: Any) -> None:
            if (self := owner()) is not None:
                self._forget(new)

        new.refs = [weakref.ref(thing, gone) for w in weights for thing in (w, w.untyped_storage())]
        same = [s for s in self.sets if s.seen is None or s.seen[0] == seen[0]]
        self.sets = [new, *(s for s in self.sets if s not in same)][:KEPT]
        self.latest = new
        return new

    def _forget(self, old: WeightSet) -> None:
        self.sets = [s for s in self.sets if s is not old]
        if self.latest is old:
            self.latest = _NOTHING

    def _placed(self, lowered: Lowered) -> tuple[Tensor, ...]:
        """Return the factors that are arguments of the lowered graph."""
        return () if self.frozen else tuple(lowered.factors.values())

    def _lowered(self, values: Sequence[Any], weights: dict[str, Tensor], first: bool) -> Lowered:
        """Run the passes on the graph with these weights, and lower the result."""
        placeholders = [n.name for n in self.gm.graph.find_nodes(op="placeholder")]
        with building(weights.values()) as autocast:
            raised = raise_graph(self.gm, weights)
            check_weights(raised.graph_module)
            given = [example(v) for name, v in zip(placeholders, values, strict=True) if name not in weights]
            if autocast:
                given = [v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for v in given]
            captured.record(raised.graph_module, Whole(Inputs(tuple(given))))
            steps = _skipping_here(self.steps, raised.graph_module, warn=first)
            try:
                done = steps(raised.graph_module, verify=self.options.verify and first)
            except FxlrdError:
                raise
            except Exception as error:  # such as a cast to the dtype of an autocast that is off here
                warnings.warn(
                    f"backend fxlrd: a graph does not run on its own ({one_line(error)}): nothing is verified or timed",
                    stacklevel=2,
                )
                captured.drop(raised.graph_module)
                done = steps(raised.graph_module)
            return lower_graph(done.graph_module, raised, self.gm, self.frozen)

    def _compile(self, lowered: Lowered, inputs: Sequence[Any]) -> Compiled:
        context = torch._guards.TracingContext.try_get()
        mode = context.fake_mode if context is not None else None
        # Sizes of factors are no unknowns, whatever is dynamic. The mode finds these again for as long as they live.
        fakes = [mode.from_tensor(f, static_shapes=True) for f in lowered.factors.values()] if mode is not None else []
        self.code = _code(lowered)
        self.run = self.options.compile(lowered.graph_module, inputs)
        del fakes
        return self.run

    def _compile_again(self, lowered: Lowered, inputs: Sequence[Any]) -> Compiled:
        """Compile for other weights, at a call: outside of Dynamo, and with nothing to guard sizes."""
        if self.symbolic:
            warnings.warn(
                "backend fxlrd: new weights, and sizes that are dynamic: this graph runs uncompiled from here on; "
                "torch._dynamo.reset() compiles it again",
                stacklevel=2,
            )
            return lowered.graph_module
        from torch._inductor import config

        with config.patch(freezing=self.frozen):
            return self.options.compile(lowered.graph_module, inputs)


def _code(lowered: Lowered) -> tuple[Any, ...]:
    """Return what compiled code depends on: the graph, and how factors lie in memory."""
    return lowered.graph_module.code, [
        (t.shape, t.stride(), t.dtype, t.device, t.layout) for t in lowered.factors.values()
    ]


def _weight_placeholders(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    names = {n.name for n in gm.graph.find_nodes(op="placeholder")}
    return any(name in names for name in weights_of(gm, inputs))


def _skipping_here(steps: Pipeline, gm: fx.GraphModule, warn: bool) -> Pipeline:
    """Return the passes with those names to skip that a layer of this graph has: a model may be several graphs."""
    known = list(layers(gm))
    passes = []
    for p in steps.passes:
        skip = getattr(p, "skip", ())
        here = tuple(s for s in skip if any(matches(name, [s]) for name in known))
        for name in sorted({*skip} - {*here}) if warn else ():
            warnings.warn(f"backend fxlrd: in this graph, {unknown('layer to skip', name, known)}", stacklevel=2)
        passes.append(replace(p, skip=here) if skip else p)  # type: ignore[type-var]
    return Pipeline(passes)


@contextmanager
def building(weights: Any) -> Iterator[bool]:
    """Make tensors as outside of the caller's modes: no gradients, no inference mode, no autocast, no tracing.

    Yields whether autocast was on. The global random state is left as it was.
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


def example(value: Any) -> Any:
    """Return a real input like ``value``, which may be fake or symbolic: random, or zeros if whole numbers."""
    if isinstance(value, torch.SymInt):
        return _hint(value)
    if not isinstance(value, Tensor) or not is_fake(value):
        return value
    shape, stride = [_hint(s) for s in value.shape], [_hint(s) for s in value.stride()]
    new = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    return new.normal_() if new.is_floating_point() else new.zero_()


def _hint(size: Any) -> int:
    """Return a size as a number: for a symbolic one, what it was when Dynamo met it."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 2
