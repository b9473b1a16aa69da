"""What stands in the way of a trace, in words that a model's author can act on rather than those of torch.fx."""

from __future__ import annotations

import inspect
import os
import re
import traceback

import torch
from torch import nn

from fxlrd.errors import one_line

_INTERNAL = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.abspath(__file__)) + os.sep)
"""Code that is not the user's: torch's, and that of this package."""
_WORDS = [
    (r"cannot be used as inputs to control flow", "it branches on values or sizes of tensors (if, while, assert)"),
    (r"Proxy object cannot be iterated", "it iterates over a tensor or its sizes (for, unpacking, *)"),
    (r"'len' is not supported", "it takes the len() of a tensor or of its sizes"),
    (r"does not support item assignment", "it assigns to an element or a slice of a tensor (x[…] = …)"),
    (r"object cannot be interpreted as an integer", "it counts with a size of a tensor (range, list indices)"),
    (r"(int|float)\(\) argument must be .*(?:Proxy|Attribute)", "it makes a number of a tensor or its size, with {}()"),
    (r"(\w+)\(\).*(?:Proxy|Attribute|takes \d+ positional)", "it calls {}() with a number that depends on its inputs"),
    (r"module is not installed as a submodule", "it calls a module that is no attribute of it"),
]
"""What is in a message of torch.fx, or of torch where it meets a proxy; in the words, {} is its first group."""


def obstacle(error: BaseException, module: nn.Module) -> str:
    """Return what follows "cannot be traced": where the trace of a module failed and why, and what can be done."""
    frames = traceback.extract_tb(error.__traceback__)
    if (decorator := _decorator(module, frames)) is not None:
        reason = f": its forward is wrapped in a decorator ({decorator}) that torch.fx cannot see through"
        return f"{reason}; compress its submodules one by one"
    remedy = "rewrite that line without control flow on tensors, or compress its submodules one by one"
    return f" at {_line(frames)}: {_words(error)}; {remedy}"


def _words(error: BaseException) -> str:
    message = one_line(error)
    for pattern, words in _WORDS:
        if (match := re.search(pattern, message)) is not None:
            return words.format(*match.groups())
    return message.split(". ")[0]


def _decorator(module: nn.Module, frames: traceback.StackSummary) -> str | None:
    """Return the name and the line of the function around a module's forward, if the trace has not passed it."""
    outer = getattr(type(module).forward, "__code__", None)
    inner = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if outer is None or inner is None or outer is inner:
        return None
    own = [f for f in frames if (f.filename, f.name) == (inner.co_filename, inner.co_name)]
    if any((f.lineno or 0) >= inner.co_firstlineno for f in own):
        return None
    name = getattr(outer, "co_qualname", outer.co_name).split(".")[0]
    return f"{name}, {os.path.basename(outer.co_filename)}:{outer.co_firstlineno}"


def _line(frames: traceback.StackSummary) -> str:
    """Return file:line of the last frame in the user's code, or in a module of torch's own, or of any."""
    users = [f for f in frames if not f.filename.startswith(_INTERNAL)]
    modules = [f for f in frames if f"{os.sep}nn{os.sep}modules{os.sep}" in f.filename]
    last = (users or modules or frames)[-1]
    return f"{os.path.basename(last.filename)}:{last.lineno}"
