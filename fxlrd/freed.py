"""Freed memory goes back to the system.

glibc keeps what is freed for later. Between factors, which stay, lie the holes that the algebra of each layer leaves:
together they are a third of what compressing ViT-L takes.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def give_back_freed() -> None:
    """Give freed memory back to the system, where the C library can be asked to."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None
    return function
