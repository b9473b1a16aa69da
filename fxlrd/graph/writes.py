"""A run in which no operation writes into a model's parameters.

Copies of a model share its parameters (`fxlrd.graph.copies`). Some forwards write into them, also in eval mode: RWKV
rescales weights, others renormalise theirs. Such an operation must not reach the user's weights, not for a moment:
other threads may read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxlrd.errors import FxlrdError


class WritesWeightError(FxlrdError):
    """A forward was about to write into a parameter."""


class WriteGuard(TorchDispatchMode):
    """Raises WritesWeightError in the place of an operation that would write into a parameter of the model.

    Attributes:
        written: the name of the first such parameter.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.written: str | None = None
        self._names = {address(p): name for name, p in model.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check what the operation writes into, then do it."""
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)  # an operation that takes functions has none
        if schema is not None and schema.is_mutable:
            for argument, value in _with_values(schema.arguments, args, kwargs):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._check(value)
        return func(*args, **kwargs)

    def _check(self, value: Any) -> None:
        for tensor in tree_leaves(value):
            name = self._names.get(address(tensor)) if isinstance(tensor, Tensor) else None
            if name is not None:
                self.note(name)
                raise WritesWeightError(f"its forward writes into {name}")

    def note(self, name: str) -> None:
        """Remember the first parameter that is written into."""
        self.written = self.written or name


@contextmanager
def guarding_weights(model: nn.Module) -> Iterator[WriteGuard]:
    """Return a context in which no operation writes into a parameter of the model; it says which one would have.

    A parameter that was given other data has its own again afterwards.
    """
    before = [(name, p, p.data) for name, p in model.named_parameters()]
    guard = WriteGuard(model)
    try:
        with guard:
            yield guard
    finally:
        for name, parameter, data in before:
            if address(parameter) != address(data):
                guard.note(name)
                parameter.data = data


def may_write(node: fx.Node) -> bool:
    """Whether a node's operation, by its name, may write into what it is given."""
    name = str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]
    named = name.endswith("_") and not name.endswith("__")
    in_place = name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "copy_")
    calls = node.op in ("call_function", "call_method")
    return calls and (named or in_place or "out" in node.kwargs or node.kwargs.get("inplace") is True)


def _with_values(arguments: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for i, argument in enumerate(arguments):
        if i < len(args):
            yield argument, args[i]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def address(tensor: Tensor) -> int:
    """Return what identifies a parameter, also where another one is a view of its values."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):  # a tensor subclass without a storage
        return id(tensor)


def changes_in_place(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place: 0 under torch.inference_mode(), which does not count that."""
    return 0 if tensor.is_inference() else tensor._version
