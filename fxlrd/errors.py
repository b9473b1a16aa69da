"""Errors and reasons: one line each, saying where, what was found, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fxlrd.escaping import visible


class FxlrdError(ValueError):
    """A request that cannot be met. The message is one line: the place, what was found, the remedy."""

    def __str__(self) -> str:
        """Return the message, control characters in names escaped."""
        return visible(super().__str__())


class CaptureError(FxlrdError):
    """The model cannot be captured as a graph."""


class VerificationError(FxlrdError):
    """A pass changed what it promised to keep."""


class BudgetError(FxlrdError):
    """A budget that no form of the model's layers meets; the message says what is within reach."""


@dataclass(frozen=True)
class Reason:
    """Why a layer or a group of channels is left alone.

    ``code`` is for programs and tests to compare; ``text`` is for people, and nothing depends on its words.
    ``remedy`` is what a user can do about it, where there is something. ``str()`` is the text with the remedy.

    >>> str(Reason("narrow", "3→8 is too narrow", "use a smaller ratio"))
    '3→8 is too narrow: use a smaller ratio'
    """

    code: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.text}: {self.remedy}" if self.remedy else self.text

    def at(self, name: str) -> Reason:
        """Return the same reason, said of the layer ``name``."""
        return replace(self, text=f"{name}: {self.text}")


def unknown(kind: str, name: str, names: Iterable[str]) -> FxlrdError:
    """Return the error for a name that is not among the valid ``names``, with close matches if there are any.

    >>> str(unknown("preset", "rnaks", ["lrd", "ranks"]))
    "unknown preset 'rnaks': did you mean ranks?"
    """
    valid = sorted(names)
    close = difflib.get_close_matches(name, valid, n=3)
    some = ", ".join(valid[:8]) + (f" and {len(valid) - 8} more" if len(valid) > 8 else "")
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {some}"
    return FxlrdError(f"unknown {kind} {name!r}: {hint}")


def one_line(error: BaseException) -> str:
    """Return an exception's first line that says something, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {visible(lines[0])}" if lines else type(error).__name__
