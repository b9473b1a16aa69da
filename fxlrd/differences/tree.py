"""The tree of modules that changes belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class Module(Generic[T]):
    """A module, with the entries at its path and the modules inside it that have entries."""

    path: str
    entries: list[T] = field(default_factory=list)
    parts: dict[str, Module[T]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[T]:
        """Iterate over the entries at its path and inside it."""
        yield from self.entries
        for part in self.parts.values():
            yield from part


def module_tree(entries: Iterable[T], path: Callable[[T], str]) -> Module[T]:
    """Return the root of a tree of the ``entries`` by their dotted ``path``; parts are in order of appearance."""
    root: Module[T] = Module("")
    for entry in entries:
        module = root
        for name in path(entry).split("."):
            inner = f"{module.path}.{name}" if module.path else name
            module = module.parts.setdefault(name, Module(inner))
        module.entries.append(entry)
    return root
