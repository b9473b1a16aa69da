"""Progress on long work: a function from an iterable and a label to the same iterable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[Iterable[T], str], Iterable[T]]


def quiet(items: Iterable[T], label: str) -> Iterable[T]:
    """Show nothing."""
    return items


def bar(items: Iterable[T], label: str) -> Iterable[T]:
    """Show a bar on standard error while it is a terminal; it clears itself when done."""
    from tqdm import tqdm

    return tqdm(items, desc=label, leave=False, disable=None)
