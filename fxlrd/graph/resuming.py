"""Running a model again from the first module that has changed on: what comes before gives what it gave.

A model is run once on each batch of inputs, and the outputs of its units are remembered: the largest modules that hold
few of the model's layers each, such as the blocks of a transformer. While a later run has not reached a changed unit,
it repeats the first one, so that the units' calls return what is remembered, in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxlrd.errors import FxlrdError
from fxlrd.graph.compare import difference, rounding
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.regions import copies
from fxlrd.graph.run import run

_PARTS = 4
"""A unit holds at most one in so many of the layers."""
_PLAIN = (Tensor, type(None), bool, int, float, str)


class Resumable:
    """A model, batches of its inputs, and what its units gave for them.

    Args:
        model: a model of its own, in which modules may be replaced between runs.
        batches: the inputs.
        layers: the names of the layers that may be replaced.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Inputs], layers: Collection[str]) -> None:
        self.model, self.batches = model, batches
        self.units = units(model, layers)
        self.outputs: list[list[Any]] = []
        self.original = [self._recorded(batch) for batch in batches]
        if not self._resumes():
            self.outputs = []

    def results(self, changed: Collection[str]) -> Iterator[list[Tensor]]:
        """Yield the output tensors for each batch, where the layers ``changed`` are others now."""
        # The layers too: a model may call them without the unit that they are in.
        first = [*changed, *(unit for unit in self.units if any(_inside(name, unit) for name in changed))]
        for i, batch in enumerate(self.batches):
            with self._repeating(i, first):
                yield tensors(run(self.model, batch))

    def _recorded(self, batch: Inputs) -> list[Tensor]:
        outputs: list[Any] = []
        handles = [
            self.model.get_submodule(unit).register_forward_hook(lambda m, args, output: outputs.append(copies(output)))
            for unit in self.units
        ]
        try:
            result = [t.detach().clone() for t in tensors(run(self.model, batch))]
        finally:
            for handle in handles:
                handle.remove()
        self.outputs.append(outputs)
        return result

    def _resumes(self) -> bool:
        """Whether runs from a unit in the middle and from the last one on give what whole runs give."""
        plain = all(isinstance(leaf, _PLAIN) for outputs in self.outputs for leaf in tree_leaves(outputs))
        if not plain or len(self.units) < 2:
            return False
        try:
            return all(
                difference(a, b, "resumed").relative <= rounding(b)
                for unit in (self.units[len(self.units) // 2], self.units[-1])
                for a, b in zip(self.results([unit]), self.original, strict=True)
            )
        except (FxlrdError, StopIteration):
            return False

    @contextmanager
    def _repeating(self, i: int, changed: Collection[str]) -> Iterator[None]:
        """Let units return what they gave for the batch ``i`` until one that has changed is called."""
        if not self.outputs:
            yield
            return
        remembered = iter(self.outputs[i])
        state = {"repeats": True}

        def stop(module: nn.Module, args: Any) -> None:
            state["repeats"] = False

        def repeated(forward: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                return copies(next(remembered)) if state["repeats"] else forward(*args, **kwargs)

            return call

        handles = [self.model.get_submodule(unit).register_forward_pre_hook(stop) for unit in changed]
        others = [self.model.get_submodule(unit) for unit in self.units if unit not in changed]
        own = [vars(module).get("forward") for module in others]
        try:
            for module in others:
                module.forward = repeated(module.forward)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, forward in zip(others, own, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward


def units(model: nn.Module, layers: Collection[str]) -> list[str]:
    """Return the largest modules that hold at most one in `_PARTS` of the layers, each layer inside one of them."""
    found: list[str] = []

    def descend(name: str) -> None:
        inside = [layer for layer in layers if _inside(layer, name)]
        if not inside:
            return
        module = model.get_submodule(name)
        if name in layers or (len(inside) * _PARTS <= len(layers) and name and _has_forward(module)):
            found.append(name)
            return
        for child, _ in module.named_children():
            descend(f"{name}.{child}" if name else child)

    descend("")
    return found


def _has_forward(module: nn.Module) -> bool:
    return type(module) not in (nn.ModuleList, nn.ModuleDict)


def _inside(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")
