"""A run of a model in which it is seen what its layers read, and what they make may be replaced.

Of a graph the nodes run one by one. A model whose regions are the graph runs itself, with hooks on the layers: all
calls of a layer are then told as that of its first node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, fx, nn

from fxlrd.graph.attentions import open_for
from fxlrd.graph.captured import captured_or_bare, feed
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.reached import ReachingInterpreter, reached
from fxlrd.graph.regions import rewritten
from fxlrd.graph.surgery import calls, layers, source
from fxlrd.graph.writes import changes_in_place


class Watcher(Protocol):
    """Sees what layers read and make."""

    def reads(self, call: fx.Node, value: Tensor, changes: int) -> None:
        """See the tensor that a call reads. An operation in place has changed it ``changes`` times since it was made.

        Where the model itself runs, these are changes since a layer first read it.
        """
        ...

    def makes(self, call: fx.Node, value: Any) -> Any:
        """See what a call makes, and return what goes on in its place."""
        ...

    def ran(self) -> None:
        """Hear that the run is over: it went well."""
        ...


def tells_calls_apart(gm: fx.GraphModule) -> bool:
    """Whether a watched run tells each call's node: a graph does, a model where every layer has one call."""
    capture = captured_or_bare(gm)
    if not capture.user_forward:
        return True
    return all(len(calls(gm, name)) == 1 for name in layers(gm)) and not rewritten(gm, capture.modules)


def run_watched(gm: fx.GraphModule, model: nn.Module, inputs: Inputs, watchers: Sequence[Watcher]) -> Any:
    """Run ``model``, the `runnable` of a graph, and return its outputs. Modes and gradients are the caller's."""
    if model is gm:
        run = _GraphRun(gm, watchers)
        value = run.run(*feed(gm, inputs))
        run.env.clear()  # with an output among them, the values would hold themselves alive through hooks
    else:
        value = _ModelRun(gm, model, watchers).run(inputs)
    for watcher in watchers:
        watcher.ran()
    return value


class _GraphRun(ReachingInterpreter):
    """Runs a graph node by node."""

    def __init__(self, gm: fx.GraphModule, watchers: Sequence[Watcher]) -> None:
        super().__init__(gm)
        self.watchers = watchers
        self.calls = {node: source(node) for name in layers(gm) for node in calls(gm, name)}
        self._versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        read = self.calls.get(n)
        if read is not None and isinstance(value := self.env[read], Tensor):
            for watcher in self.watchers:
                watcher.reads(n, value, changes_in_place(value) - self._versions[read])
        value = super().run_node(n)
        if n in self.calls and reached(value):
            for watcher in self.watchers:
                value = watcher.makes(n, value)
        if isinstance(value, Tensor):
            self._versions[n] = changes_in_place(value)
        return value


class _ModelRun:
    """Runs a model with hooks on its layers."""

    def __init__(self, gm: fx.GraphModule, model: nn.Module, watchers: Sequence[Watcher]) -> None:
        self.model, self.watchers = model, watchers
        self.calls = {name: calls(gm, name)[0] for name in layers(gm)}
        self._first_read: dict[fx.Node, tuple[int, int]] = {}

    def run(self, inputs: Inputs) -> Any:
        open_for(self.model, self.calls)
        handles = []
        for name, call in self.calls.items():
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._before(call)))
            handles.append(module.register_forward_hook(self._after(call)))
        try:
            own = inputs.fresh()
            return self.model(*own.args, **own.kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, call: fx.Node) -> Callable[..., None]:
        read = source(call)

        def hook(_: nn.Module, args: Any) -> None:
            value = args[0] if args else None
            if read is None or not isinstance(value, Tensor):
                return
            tensor, version = self._first_read.setdefault(read, (value.data_ptr(), changes_in_place(value)))
            for watcher in self.watchers:
                watcher.reads(call, value, changes_in_place(value) - version if tensor == value.data_ptr() else 0)

        return hook

    def _after(self, call: fx.Node) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, value: Any) -> Any:
            for watcher in self.watchers:
                value = watcher.makes(call, value)
            return value

        return hook
