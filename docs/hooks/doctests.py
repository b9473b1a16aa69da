"""Examples in docstrings become code blocks: Markdown would read their ``>>>`` as quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!>>> )\S.*\n?|^\.\.\. .*\n?)*)+", re.MULTILINE)


class Doctests(griffe.Extension):
    """Fence the examples of every docstring."""

    def on_instance(self, *, obj: griffe.Object, **rest: Any) -> None:
        """Fence those of one docstring, once: an alias shares the docstring of its target."""
        if isinstance(obj, griffe.Alias) or obj.docstring is None:
            return
        obj.docstring.value = _EXAMPLE.sub(lambda m: f"```pycon\n{m[0].rstrip()}\n```\n", obj.docstring.value)
