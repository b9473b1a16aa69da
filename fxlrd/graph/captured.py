"""What was captured of a model: the whole of it, or regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, _extract_tensor_metadata

from fxlrd.errors import FxlrdError, Reason
from fxlrd.graph.facts import KEY, times
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.regions import Around, put, structure
from fxlrd.graph.run import counting, evaluating

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

    from fxlrd.graph.regions import Around


@dataclass(frozen=True)
class Unreached:
    """A layer that no node of the graph stands for, and why."""

    reason: Reason
    op: str
    shape: tuple[int, ...]
    params: int


@dataclass(frozen=True)
class Captured:
    """What capture knows of the whole model: its example inputs, the layers that no node of the graph stands
    for, by name, what had to be frozen or left out and, where the graph is of regions only, what is ``around`` them.
    Where the model came compressed, the ``shapes`` that weights of its modules had before, by the modules' names.
    """

    inputs: Inputs
    unreached: dict[str, Unreached]
    warnings: tuple[str, ...] = ()
    around: Around | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def captured(gm: fx.GraphModule) -> Captured | None:
    """Return what capture left on the graph module, if it came through capture."""
    found = gm.meta.get(KEY)
    return found if isinstance(found, Captured) else None


def refresh_shapes(gm: fx.GraphModule) -> None:
    """Give every node its shape and dtype for the inputs that the model was captured with, without computing."""
    from torch._subclasses import FakeTensorMode

    known = captured(gm)
    if known is not None:
        with evaluating(gm), torch.no_grad():
            ShapeProp(gm, FakeTensorMode()).propagate(*positional(gm, known.inputs))


class _Propagation(fx.Interpreter):
    """Runs the graph once and leaves tensor_meta and FLOPs on each node."""

    def __init__(self, gm: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(gm)
        self.counter = counter

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        metadata = fx.node.map_aggregate(result, lambda o: _extract_tensor_metadata(o) if isinstance(o, Tensor) else o)
        if tensors(result):
            n.meta["tensor_meta"] = metadata
        n.meta["flops"] = (self.counter.get_total_flops() - before) * times(n)
        return result


def propagate(gm: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
    """Run the graph in eval mode, leave shape, dtype and FLOPs on every node, and return the output tensors.

    FLOPs are those for these inputs, see `counting`.
    """
    with evaluating(gm), torch.no_grad(), counting() as counter:
        return tensors(_Propagation(gm, counter).run(*positional(gm, inputs)))


def positional(gm: fx.GraphModule, inputs: Inputs) -> list[Any]:
    """Return the model's inputs in the order of the graph's placeholders; defaults fill what was not given.

    Where the graph is of regions, what those get while the model runs on the inputs.
    """
    known = captured(gm)
    if known is not None and known.around is not None:
        return list(known.around.feed(inputs))
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = inputs.fresh()
    values: list[Any] = list(inputs.args)
    for node in placeholders[len(values) :]:
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


def runnable(gm: fx.GraphModule) -> nn.Module:
    """Return what runs on the model's inputs: the graph itself, or the model with the graph's layers in it."""
    known = captured(gm)
    if known is None or known.around is None:
        return gm
    model = structure(known.around.model)
    put(model, gm, known.around.modules)
    return model
