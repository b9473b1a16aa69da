"""Running a graph on several inputs, one node at a time for all of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxlrd.calibration.batches import failure
from fxlrd.graph.captured import feed
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.reached import ReachingInterpreter, reached
from fxlrd.graph.regions import copies


class Stepper:
    """A run of a graph on several inputs that stops at any node; a value is dropped after its last use.

    The graph's modules may be replaced between steps.
    """

    def __init__(self, gm: fx.GraphModule, batches: Sequence[Inputs]) -> None:
        self.pending = list(gm.graph.nodes)
        self.runs: list[tuple[fx.Interpreter, Inputs]] = []
        for inputs in batches:
            run = ReachingInterpreter(gm)
            run.args_iter = iter(feed(gm, inputs))
            self.runs.append((run, inputs))

    def before(self, node: fx.Node) -> None:
        """Run the remaining nodes before ``node``."""
        while self.pending and self.pending[0] is not node:
            self._step()

    def through(self, node: fx.Node) -> None:
        """Run the remaining nodes up to and including ``node``."""
        self.before(node)
        if self.pending:
            self._step()

    def values(self, node: fx.Node) -> list[Tensor]:
        """Return the value of a node for each input that reaches it; some node that reads it has still to run."""
        return [value for run, _ in self.runs if reached(value := run.env[node])]

    def rest(self, modules: Mapping[str, nn.Module]) -> list[Any]:
        """Return the graph's output for each input with other modules in the place of some; the run stays where it is.

        The calls of these modules have still to run.
        """
        results = []
        for run, _ in self.runs:
            branch = _Branch(run.module, modules, copies(dict(run.env)))
            branch.args_iter = copy.copy(run.args_iter)
            results.append(branch.finish(self.pending))
        return results

    def _step(self) -> None:
        """Run one node. Raises FxlrdError for inputs that it fails on."""
        node = self.pending.pop(0)
        for i, (run, inputs) in enumerate(self.runs):
            try:
                run.env[node] = run.run_node(node)
            except Exception as error:
                raise failure(i, inputs, error) from error
            for unused in run.user_to_last_uses.get(node, ()):
                del run.env[unused]


class _Branch(ReachingInterpreter):
    """The remainder of a run, on copies of its values, with other modules in the place of some."""

    def __init__(self, gm: nn.Module, modules: Mapping[str, nn.Module], env: dict[fx.Node, Any]) -> None:
        super().__init__(gm)
        self.modules = modules
        self.env = env

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if str(target) in self.modules:
            return self.modules[str(target)](*args, **kwargs)
        return super().call_module(target, args, kwargs)

    def finish(self, nodes: Sequence[fx.Node]) -> Any:
        """Run the nodes and return the value of the last, the graph's output."""
        for node in nodes:
            self.env[node] = value = self.run_node(node)
            for unused in self.user_to_last_uses.get(node, ()):
                del self.env[unused]
        return value
