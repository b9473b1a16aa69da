"""What was captured of a model: the whole of it as one graph, or its regions side by side.

`Whole` and `Regions` answer the same questions: what the graph is fed with, what runs on the model's inputs, how its
layers go back into the user's model, what the model costs beside the graph. Code elsewhere asks these and does not tell
the two apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, _extract_tensor_metadata

from fxlrd.errors import FxlrdError, Reason
from fxlrd.graph import cost
from fxlrd.graph.attentions import close, is_closed, untouched
from fxlrd.graph.compare import Difference, difference
from fxlrd.graph.copies import structural_copy
from fxlrd.graph.cost import NOTHING, Cost
from fxlrd.graph.facts import FACTORS, Fact, times
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.padding import remove_padding
from fxlrd.graph.reached import NOT_REACHED_VALUE
from fxlrd.graph.regions import Slot, call_for, copies, install_layers, names_in, record
from fxlrd.graph.run import counting, evaluating, isolated, run
from fxlrd.graph.surgery import called, fork
from fxlrd.layers.padding import Padding
from fxlrd.layers.readable import is_container

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Unreached:
    """A layer, or a parameter that is multiplied with and that no layer holds, for which no node of the graph stands.

    Attributes:
        reason: why.
        op: the layer's type; of a parameter that of the module that holds it.
        shape: of the weight.
        params: the number of parameters.
    """

    reason: Reason
    op: str
    shape: tuple[int, ...]
    params: int


@dataclass(frozen=True)
class Whole:
    """A model captured as one graph.

    Attributes:
        inputs: the example inputs.
        unreached: the layers that no node of the graph stands for, by name.
        warnings: what capture had to freeze or leave out.
        of_graph: those of them that hold for the graph, and not for the user's forward with its layers inside.
        weight_shapes: for a model that was already compressed, the shapes of weights before that, by module name.
        model: a copy of the user's model with modules and buffers of its own around the user's parameters. It is not
            run: copies of it are.
        modules: the modules that the graph calls, by name, as they were captured.
        alike: those of the user's modules that stock layers in ``modules`` stand in for, by name.
        padded: the paddings that stand in the graph before layers whose own forward pads (`fxlrd.layers.folded`).
        described: the layers whose weight forward asks for its dtype, device or shape.
        outside: parameters and FLOPs that no node of the graph stands for, where the result keeps them.
    """

    inputs: Inputs
    unreached: Mapping[str, Unreached] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    of_graph: tuple[str, ...] = ()
    weight_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    model: nn.Module | None = field(default=None, repr=False)
    modules: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)
    alike: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)
    padded: Mapping[str, Padding] = field(default_factory=dict)
    described: frozenset[str] = frozenset()
    outside: Cost = NOTHING

    not_stems: ClassVar[frozenset[str]] = frozenset()
    user_forward = False
    """Whether the result runs the user's own forward, with the graph's layers inside, rather than the graph."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Whole:
        return self

    def parameters(self, gm: fx.GraphModule) -> list[str]:
        """Return the names of the model's parameters, in order."""
        return [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]

    def feed(self, gm: fx.GraphModule, inputs: Inputs) -> list[Any]:
        """Return what the placeholders of ``gm`` get for the model's ``inputs``; defaults fill what is not given.

        Raises FxlrdError for an argument that is missing.
        """
        inputs = inputs.fresh()
        values: list[Any] = list(inputs.args)
        for node in gm.graph.find_nodes(op="placeholder")[len(values) :]:
            name = str(node.target)
            if name in inputs.kwargs:
                values.append(inputs.kwargs[name])
            elif node.args:
                values.append(node.args[0])
            elif name.startswith("*"):  # *args and **kwargs that nothing was given for
                break
            else:
                raise FxlrdError(f"example inputs: the model's argument {name!r} is missing")
        return values

    def runnable(self, gm: fx.GraphModule) -> nn.Module:
        """Return what runs on the model's inputs: the graph itself."""
        return gm

    def as_users(self, gm: fx.GraphModule) -> fx.GraphModule:
        """Return the graph with the user's own modules in the place of stand-ins that no pass has replaced.

        So it is with attentions that were traced open.
        """
        alike, closed = _still_in(gm, self.modules, self.alike), self._closed(gm)
        if not alike and not closed:
            return gm
        gm = fork(gm)
        for name in alike:
            gm.set_submodule(name, self.alike[name])
            if name in self.padded:
                remove_padding(gm, name)
        if closed:
            close(gm, closed)
        gm.recompile()
        return gm

    def added_params(self, gm: fx.GraphModule) -> int:
        """Return the number of parameters that the user's modules have beyond those of the stand-ins in the graph."""
        return added_params(gm, self.modules, self.alike)

    def _closed(self, gm: fx.GraphModule) -> dict[str, nn.Module]:
        """Return the user's own attentions of which no pass has replaced a projection, by name."""
        if self.model is None:
            return {}
        attentions = {name: self.model.get_submodule(name) for name in untouched(gm, self.modules)}
        return {name: module for name, module in attentions.items() if is_closed(module)}

    def outputs(self, gm: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
        """Return the model's output tensors with the graph's layers, in eval mode, without gradients."""
        with evaluating(gm), isolated(gm), torch.no_grad():
            return tensors(gm(*self.feed(gm, inputs)))

    def depth(self, gm: fx.GraphModule) -> int | None:
        """Return the number of conv and linear layers on the longest path through the model."""
        return cost.depth(gm)

    def install(self, gm: fx.GraphModule, into: nn.Module) -> dict[str, nn.Module]:
        """Put the graph's layers into a model under their names; return the modules that were there, to undo it."""
        return install_layers(into, gm, self.modules, self.described)

    def difference_inside(self, model: nn.Module, gm: fx.GraphModule) -> Difference:
        """Return how far ``model``, with the graph's layers installed, is from the graph on the example inputs."""
        return difference(tensors(run(structural_copy(model), self.inputs)), propagate(gm, self.inputs), "inplace")

    def is_container_of_factors(self, name: str) -> bool:
        """Whether the module ``name`` of the user's model holds the factors of an earlier compression: not known."""
        return False


@dataclass(frozen=True)
class Regions:
    """A model of which only regions could be captured: they stand side by side in one graph.

    Each call of a region has placeholders of its own. What these get is recorded while the user's model runs, its own
    code between the regions included; what a region became goes back into the model layer by layer.

    Attributes:
        model: a copy of the user's model with modules and buffers of its own around the user's parameters. It is not
            run: copies of it are.
        modules: the modules of the regions, by name, as they were captured.
        slots: the calls that the graph's placeholders stand for, in their order.
        example: what the slots get for the example ``inputs``.
        outside: parameters and FLOPs of the model that no region has.
        described: the layers whose weight other code asks for its dtype, device or shape.
        fixed_widths: the layers whose number of outputs the model's code counts on.
        alike: those of the user's modules that stock layers in ``modules`` stand in for, by name.
        not_stems: the convs that read what layers outside of their regions make.
    """

    inputs: Inputs
    unreached: Mapping[str, Unreached]
    model: nn.Module
    modules: Mapping[str, nn.Module] = field(repr=False)
    slots: tuple[Slot, ...]
    example: tuple[Tensor, ...] = field(repr=False)
    outside: Cost = NOTHING
    warnings: tuple[str, ...] = ()
    weight_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    described: frozenset[str] = frozenset()
    fixed_widths: frozenset[str] = frozenset()
    alike: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)
    not_stems: frozenset[str] = frozenset()

    of_graph: ClassVar[tuple[str, ...]] = ()
    padded: ClassVar[Mapping[str, Padding]] = {}
    user_forward = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Regions:
        return self

    def parameters(self, gm: fx.GraphModule) -> list[str]:
        """Return the names of the model's parameters, in order."""
        return list(inspect.signature(self.model.forward).parameters)

    def feed(self, gm: fx.GraphModule, inputs: Inputs) -> list[Any]:
        """Return what the placeholders get while the model runs on ``inputs``.

        If a region runs fewer times than on the example inputs, its recorded calls are reused cyclically. If it does
        not run, or gets an argument that is no tensor, its arguments are `NOT_REACHED_VALUE`.
        """
        if inputs is self.inputs:
            return [t.clone() for t in self.example]
        calls = record(structural_copy(self.model), inputs, names_in(self.slots))
        values: list[Any] = []
        for slot in self.slots:
            call = call_for(slot, calls)
            values += copies(call.arguments) if call is not None else [NOT_REACHED_VALUE] * slot.arguments
        return values

    def runnable(self, gm: fx.GraphModule) -> nn.Module:
        """Return what runs on the model's inputs: the user's model with the graph's layers in it."""
        model = structural_copy(self.model)
        self.install(gm, model)
        return model

    def as_users(self, gm: fx.GraphModule) -> fx.GraphModule:
        """Return the graph: the user's model keeps its own modules where no pass has replaced them."""
        return gm

    def added_params(self, gm: fx.GraphModule) -> int:
        """Return the number of parameters that the user's modules have beyond those of the stand-ins in the graph."""
        return added_params(gm, self.modules, self.alike)

    def outputs(self, gm: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
        """Return the model's output tensors with the graph's layers, in eval mode, without gradients."""
        return tensors(run(self.runnable(gm), inputs))

    def depth(self, gm: fx.GraphModule) -> int | None:
        """Return None: the depth of regions is not that of the model."""
        return None

    def install(self, gm: fx.GraphModule, into: nn.Module) -> dict[str, nn.Module]:
        """Put the graph's layers into a model under their names; return the modules that were there, to undo it."""
        return install_layers(into, gm, self.modules, self.described)

    def difference_inside(self, model: nn.Module, gm: fx.GraphModule) -> Difference:
        """Return how far the regions of ``model``, with the graph's layers installed, are from the graph.

        Both get the arguments that ``model`` gives its regions on the example inputs. A region that ``model`` no longer
        calls, because its values have changed, does not count.
        """
        calls = record(structural_copy(model), self.inputs, names_in(self.slots))
        called = [call_for(slot, calls) for slot in self.slots]
        values: list[Tensor] = []
        for slot, call in zip(self.slots, called, strict=True):
            values += call.arguments if call else self.example[len(values) : len(values) + slot.arguments]
        with evaluating(gm), torch.no_grad():
            outputs = fx.Interpreter(gm).run(*copies(values))
        pairs = [(call.output, output) for call, output in zip(called, outputs, strict=True) if call is not None]
        return difference(tensors([a for a, _ in pairs]), tensors([b for _, b in pairs]), "regions")

    def is_container_of_factors(self, name: str) -> bool:
        """Whether the module ``name`` of the user's model holds the factors of an earlier compression."""
        module = self.model.get_submodule(name)
        return is_container(module) and {part for part, _ in module.named_children()} <= set(FACTORS)


def added_params(gm: fx.GraphModule, modules: Mapping[str, nn.Module], alike: Mapping[str, nn.Module]) -> int:
    """Return how many parameters the modules ``alike`` have beyond those of the stand-ins for them in the graph."""
    names = _still_in(gm, modules, alike)
    return sum(cost.params(alike[name]) - cost.params(modules[name]) for name in names)


def _still_in(gm: fx.GraphModule, modules: Mapping[str, nn.Module], alike: Mapping[str, nn.Module]) -> list[str]:
    now = called(gm)
    return [name for name in alike if now.get(name) is modules[name]]


Captured = Whole | Regions
captured: Fact[Captured] = Fact("captured", Captured)  # type: ignore[arg-type]
"""What was captured: on a graph module that came through capture."""


def captured_or_bare(gm: fx.GraphModule) -> Captured:
    """Return what was captured, or a `Whole` without example inputs for a graph module that was traced by its user."""
    return captured(gm) or Whole(Inputs(()))


def warn(gm: fx.GraphModule, *texts: str) -> None:
    """Put warnings before those that capture left on the graph module."""
    record_of = captured(gm)
    assert record_of is not None
    captured.record(gm, replace(record_of, warnings=(*texts, *record_of.warnings)))


def feed(gm: fx.GraphModule, inputs: Inputs) -> list[Any]:
    """Return what the graph's placeholders get for the model's inputs, in order."""
    return captured_or_bare(gm).feed(gm, inputs)


def runnable(gm: fx.GraphModule) -> nn.Module:
    """Return what runs on the model's inputs: the graph itself, or the user's model with the graph's layers in it."""
    return captured_or_bare(gm).runnable(gm)


def refresh_shapes(gm: fx.GraphModule) -> None:
    """Give every node its shape and dtype for the inputs that the model was captured with.

    Nothing is computed, unless a module of the graph asks for values.
    """
    capture = captured(gm)
    if capture is None:
        return
    with evaluating(gm), isolated(gm), torch.no_grad():
        try:
            _FakePropagation(gm).propagate(*capture.feed(gm, capture.inputs))
        except Exception:  # such as of a scale that is .item() of a tensor
            ShapeProp(gm).propagate(*capture.feed(gm, capture.inputs))


class _FakePropagation(ShapeProp):
    """Leaves tensor_meta on each node, from fake tensors; unlike ShapeProp it prints nothing where that fails."""

    def __init__(self, gm: fx.GraphModule) -> None:
        from torch._subclasses import FakeTensorMode

        super().__init__(gm, FakeTensorMode())
        self.module = self.fake_module

    def run_node(self, n: fx.Node) -> Any:
        assert self.fake_mode is not None
        with self.fake_mode:
            result = fx.Interpreter.run_node(self, n)
        _record_shape(n, result)
        return result


def _record_shape(node: fx.Node, result: Any) -> None:
    metadata = fx.node.map_aggregate(result, lambda o: _extract_tensor_metadata(o) if isinstance(o, Tensor) else o)
    if tensors(result):
        node.meta["tensor_meta"] = metadata


class _Propagation(fx.Interpreter):
    """Runs the graph once and leaves tensor_meta and FLOPs on each node."""

    def __init__(self, gm: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(gm)
        self.counter = counter

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        _record_shape(n, result)
        n.meta["flops"] = (self.counter.get_total_flops() - before) * times(n)
        return result


def propagate(gm: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
    """Run the graph in eval mode, leave shape, dtype and FLOPs on every node, and return the output tensors.

    FLOPs are those for these inputs, see `counting`. Buffers are as before afterwards.
    """
    with isolated(gm):
        return propagate_once(gm, inputs)


def propagate_once(gm: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
    """`propagate` as one call of the graph, which leaves in its buffers what it does."""
    return propagate_values(gm, feed(gm, inputs))


def propagate_values(gm: fx.GraphModule, values: Sequence[Any]) -> list[Tensor]:
    """`propagate_once`, with the values of the placeholders, in order."""
    with evaluating(gm), torch.no_grad(), counting() as counter:
        return tensors(_Propagation(gm, counter).run(*values))
