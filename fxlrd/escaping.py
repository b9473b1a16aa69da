"""Text for terminals: what is in names reaches none as a control character.

A name of a module may come from a file of somebody else. Escape sequences in it would change the window's title,
overwrite lines or hide text; bidirectional marks would reorder it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return text with control characters, line breaks and lone surrogates as escapes.

    >>> print(visible("fc\x1b[2J\n"))
    fc\x1b[2J\n
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable(data: Any) -> Any:
    """Return plain data in which every string is `visible`."""
    if isinstance(data, str):
        return visible(data)
    if isinstance(data, Mapping):
        return {printable(key): printable(value) for key, value in data.items()}
    return [printable(value) for value in data] if isinstance(data, (list, tuple)) else data
