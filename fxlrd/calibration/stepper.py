"""Running a graph on several inputs, one node at a time for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from fxlrd.calibration.batches import failure
from fxlrd.graph.captured import feed
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.reached import ReachingInterpreter, reached


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
