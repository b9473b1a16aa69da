"""What modules gave for several inputs: a run that repeats a part of its model takes it from here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxlrd.graph.inputs import tensors
from fxlrd.graph.regions import copies

LIMIT = 256 * 2**20
"""Bytes that answers take in all, at most: what there is no room for is computed again."""


class Answers:
    """Remembers what modules gave in runs of a model on several inputs, until it is told to `forget`."""

    def __init__(self, model: nn.Module, limit: int = LIMIT) -> None:
        self.model, self.limit = model, limit
        self.known: dict[int, dict[str, Any]] = {}
        self.bytes = 0

    def forget(self, i: int) -> None:
        """Forget what was given for input ``i``."""
        self.bytes -= sum(map(_bytes, self.known.pop(i, {}).values()))

    @contextmanager
    def given(self, i: int, names: Collection[str]) -> Iterator[Callable[[], None]]:
        """While the model runs on input ``i``, let the modules ``names`` answer, and remember what the others give.

        These are modules that are called once in a run. Yields what ends the remembering: call it as soon as the run
        comes to something that will change.
        """
        known = self.known.setdefault(i, {})
        remembering = True

        def end() -> None:
            nonlocal remembering
            remembering = False

        def answering(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(forward)
            def call(*args: Any, **kwargs: Any) -> Any:
                if name in known:
                    return copies(known[name])
                output = forward(*args, **kwargs)
                size = _bytes(output) if remembering else 0
                if remembering and self.bytes + size <= self.limit:
                    known[name] = copies(output)
                    self.bytes += size
                return output

            return call

        modules = {name: self.model.get_submodule(name) for name in names}
        own = [(module, vars(module).get("forward")) for module in modules.values()]
        try:
            for name, module in modules.items():
                module.forward = answering(name, module.forward)
            yield end
        finally:
            for module, forward in own:
                vars(module).pop("forward", None)
                if forward is not None:
                    module.forward = forward


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors(value))
