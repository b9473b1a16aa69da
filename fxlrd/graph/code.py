"""Names in the code of a graph: torch.fx writes them as they are, which breaks it for some.

A module ``proj.in`` is called by ``self.proj.in(x)``, one with a line break in its name by a string that does not end.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable

from torch import fx

_UNQUOTABLE = re.compile(r'["\\\n\r\0]')


def unwritable(target: str) -> str | None:
    """Return the first part of a name that torch.fx cannot write into code, or None.

    >>> unwritable("proj.in"), unwritable("proj.in_proj"), unwritable("a b.c")
    ('in', None, None)
    """
    return next((part for part in target.split(".") if keyword.iskeyword(part) or _UNQUOTABLE.search(part)), None)


def let_write(graph: fx.Graph, targets: Iterable[str]) -> None:
    """Let the code of a graph, and of its copies, be valid in spite of names among ``targets`` that break it."""
    unquoted = sorted({part for target in targets for part in target.split(".") if _UNQUOTABLE.search(part)})

    def corrected(body: list[str]) -> list[str]:
        return [_with_keywords(_with_strings(line, unquoted)) for line in body]

    if any(unwritable(target) is not None for target in targets):
        graph.on_generate_code(lambda _: corrected)


def _with_strings(line: str, names: Iterable[str]) -> str:
    for name in names:
        line = line.replace(f', "{name}")', f", {name!r})")
    return line


def _with_keywords(line: str) -> str:
    return re.sub(r"\bself((?:\.\w+)+)", lambda match: _path("self", match[1][1:].split(".")), line)


def _path(base: str, parts: Iterable[str]) -> str:
    for part in parts:
        base = f'getattr({base}, "{part}")' if keyword.iskeyword(part) else f"{base}.{part}"
    return base
