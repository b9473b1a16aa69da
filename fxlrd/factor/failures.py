"""What may go wrong with the algebra of one layer: no convergence, NaN, not enough memory.

These are exceptions of a layer's weights and size, not of the program: whoever visits layers leaves such a layer alone
and goes on. Any other exception is a mistake, and passes through.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable

import torch
from torch import Tensor

from fxlrd.errors import Reason, one_line


class NotFiniteError(ArithmeticError):
    """A factorisation of finite numbers gave NaN or Inf."""


# Torch has no type of its own for what allocators on the CPU and what libraries of linear algebra raise.
_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory|bad_alloc|STATUS_ALLOC_FAILED")
_ALGEBRA = re.compile(r"linalg[._]|lapack|cusolver|magma", re.IGNORECASE)
_LONGEST = 160
"""Characters of an exception's message that a reason quotes."""


def failure(error: BaseException) -> Reason | None:
    """Return the reason to leave a layer alone whose algebra raised ``error``; None for any other exception."""
    if isinstance(error, NotFiniteError):
        return Reason("not-finite-factors", f"its factorisation gives {error}")
    if (reason := memory_failure(error, "factorisation")) is not None:
        return reason
    if isinstance(error, torch.linalg.LinAlgError) or _says(error, _ALGEBRA):
        return Reason("factorisation-failed", f"its factorisation failed ({_quoted(error)})")
    return None


def memory_failure(error: BaseException, step: str) -> Reason | None:
    """Return the reason to leave a layer alone for want of memory in a ``step``; None for any other exception."""
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not _says(error, _MEMORY):
        return None
    return Reason(
        "no-memory", f"its {step} needs more memory than there is ({_quoted(error)})", "free some, or skip it"
    )


def _quoted(error: BaseException) -> str:
    return textwrap.shorten(one_line(error), _LONGEST, placeholder=" …")


def _says(error: BaseException, words: re.Pattern[str]) -> bool:
    return isinstance(error, RuntimeError) and words.search(str(error)) is not None


def check_finite(*tensors: Tensor) -> None:
    """Raise NotFiniteError unless all numbers are finite."""
    for tensor in tensors:
        if not holds_everywhere(torch.isfinite, tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise NotFiniteError(f"NaN or Inf in {dtype}")


_ENTRIES = 2**22
"""Entries that are looked at together: what torch makes to tell whether they are finite is larger than they are."""


def holds_everywhere(predicate: Callable[[Tensor], Tensor], tensor: Tensor) -> bool:
    """Whether the predicate, which gives a bool for each entry, holds for all entries."""
    if not tensor.numel():
        return True
    rows = max(1, _ENTRIES * len(tensor) // tensor.numel()) if tensor.dim() else 1
    return all(bool(predicate(part).all()) for part in (tensor.split(rows) if tensor.dim() else (tensor,)))
