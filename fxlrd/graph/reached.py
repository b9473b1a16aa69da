"""A graph of regions on inputs for which the model does not call all of them.

A region stands beside the others in the graph, so the run of the others needs nothing of it: what depends on the
arguments of a call that was not made is not run.
"""

from __future__ import annotations

from typing import Any

from torch import fx


class NotReached:
    """The value of a node that is not run: an argument of a region that was not called, or what depends on one."""


NOT_REACHED_VALUE = NotReached()


def reached(value: Any) -> bool:
    """Whether a node with this value was run."""
    return not isinstance(value, NotReached)


class ReachingInterpreter(fx.Interpreter):
    """Runs the nodes of a graph that do not depend on an argument which is `NOT_REACHED_VALUE`.

    >>> graph = fx.symbolic_trace(lambda x, y: (x + 1, y + 1))
    >>> first, second = ReachingInterpreter(graph).run(1, NOT_REACHED_VALUE)
    >>> first, reached(second)
    (2, False)
    """

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of a node."""
        if n.op != "output" and not all(reached(self.env[each]) for each in n.all_input_nodes):
            return NOT_REACHED_VALUE
        return super().run_node(n)
