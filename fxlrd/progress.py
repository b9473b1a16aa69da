"""Progress on long work: a function from an iterable and a label to the same iterable.

Work of many steps has one bar (`one_bar`), which shows the present step and the time left. How much of the work a step
is, is not known beforehand: `TYPICAL` says what share steps usually have, and the time left follows from the time so
far. Steps that turn out not to happen are passed over.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
Progress = Callable[[Iterable[T], str], Iterable[T]]

TYPICAL = {
    "capture": 3.0,
    "calibrate": 30.0,
    "allocate": 15.0,
    "allocate: merges": 10.0,
    "allocate: measuring": 10.0,
    "allocate: timing the model": 8.0,
    "merge": 3.0,
    "decompose": 8.0,
    "snap": 60.0,
    "refit": 20.0,
    "recalibrate": 3.0,
    "timing the models": 5.0,
    "evaluate": 5.0,
}
"""How long steps take, relative to each other, on typical models; others count as 1."""
_UNITS, _FORMAT = 1000, "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def steps_of(name: str) -> list[str]:
    """Return the labels of a pass's steps: its own, and those that begin with it.

    >>> steps_of("allocate")[:2], steps_of("branch")
    (['allocate', 'allocate: merges'], ['branch'])
    """
    return [name, *(step for step in TYPICAL if step.startswith(f"{name}: "))]


def quiet(items: Iterable[T], label: str) -> Iterable[T]:
    """Show nothing."""
    return items


def bar(items: Iterable[T], label: str) -> Iterable[T]:
    """Show a bar on a terminal (standard error) or in a notebook; it clears itself when done."""
    return _tqdm(items, desc=label)


def alone(progress: Progress[None], label: str, work: Callable[[], T]) -> T:
    """Return what ``work`` returns; it is one step, whose progress is not known."""
    (result,) = [work() for _ in progress([None], label)]
    return result


@contextmanager
def one_bar(labels: Sequence[str], shown: bool = True) -> Iterator[Progress[Any]]:
    """Give a progress that shows all steps in one bar, on a terminal or in a notebook; not ``shown``, none.

    ``labels`` are those of the steps in the order in which they are expected.
    """
    drawn = _tqdm(total=_UNITS, smoothing=0, bar_format=_FORMAT) if shown else None
    if drawn is None or drawn.disable:
        yield quiet
        return

    def draw(label: str, share: float) -> None:
        if label != drawn.desc:
            drawn.set_description_str(label)
        drawn.update(round(share * _UNITS) - drawn.n)

    try:
        yield Steps(labels, draw)
    finally:
        drawn.close()


def length_of(items: Iterable[Any]) -> int | None:
    """Return how many items there are; None where they do not say, as a DataLoader of a data set without a length."""
    try:
        return len(items) if isinstance(items, Sized) else None
    except TypeError:
        return None


class Steps:
    """A progress over the steps of one piece of work: it tells ``draw`` the step's label and the share that is done."""

    def __init__(self, labels: Sequence[str], draw: Callable[[str, float], None]) -> None:
        self._labels = list(labels)
        self._weights = [TYPICAL.get(label, 1.0) for label in labels]
        self._draw = draw
        self._at = -1
        self._share = 0.0

    def __call__(self, items: Iterable[T], label: str) -> Iterator[T]:
        """Return an iterator over ``items``, which are the step ``label``."""
        self._enter(label)
        count = length_of(items)
        for done, item in enumerate(items):
            self._show(label, done / count if count else done / (done + 16))
            yield item
        self._show(label, 1.0)

    def _enter(self, label: str) -> None:
        """Go on to the next step of this label; one that was not expected takes no share."""
        if self._at >= 0 and self._labels[self._at] == label:
            return
        self._at = next((i for i in range(self._at + 1, len(self._labels)) if self._labels[i] == label), self._at)

    def _show(self, label: str, share_of_step: float) -> None:
        if self._at >= 0 and self._labels[self._at] == label:
            done = sum(self._weights[: self._at]) + share_of_step * self._weights[self._at]
            self._share = max(self._share, done / sum(self._weights))
        self._draw(label, self._share)


def _tqdm(*arguments: Any, **options: Any) -> Any:
    """Return a bar of tqdm; it draws nothing where neither a terminal nor a notebook shows it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without ipywidgets a notebook gets a bar of text
        from tqdm.autonotebook import tqdm  # not auto: that one calls iter() twice, and loaders draw seeds

        draw: Any = tqdm
        return draw(*arguments, leave=False, disable=False if _in_notebook() else None, **options)


def _in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook, whose standard error is no terminal and yet is seen."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return "IPKernelApp" in getattr(get_ipython(), "config", ())
