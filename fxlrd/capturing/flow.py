"""What flows between the layers of a model while it runs, whatever the code around them.

The model itself runs, under a mode that sees every call of a torch function: the tensors that go into it and those that
come out. They make a graph, in which a call of a module with parameters of its own is one node that names the module.
The graph is of one run: sizes and branches are those of its inputs. It tells which layers' channels meet where; as a
whole it is never run.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from fxlrd.graph.copies import structural_copy
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.run import called_on, evaluating, isolated
from fxlrd.graph.surgery import is_reserved
from fxlrd.layers.folded import stock_layer

_OPERATORS = {
    **{"mul": operator.mul, "add": operator.add, "sub": operator.sub, "div": operator.truediv},
    **{"imul": operator.mul, "iadd": operator.add, "isub": operator.sub, "itruediv": operator.truediv},
    **{"rmul": operator.mul, "radd": operator.add, "truediv": operator.truediv, "getitem": operator.getitem},
}
"""What stands for the operators of tensors and functions of the same meaning, by name without underscores."""


_CONSTANTS = (*fx.node.base_types, slice, type(None), type(...))


def flow(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """Return the flow of one run of a copy of the model in eval mode, without gradients; nodes have shapes."""
    copy = structural_copy(model)
    recorder = _Recorder()
    handles = [h for name, m in copy.named_modules() if _is_leaf(name, m) for h in recorder.watch(name, m)]
    try:
        with evaluating(copy), isolated(copy), torch.no_grad(), recorder:
            outputs = called_on(copy, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.graph_module(outputs)


def _is_leaf(name: str, module: nn.Module) -> bool:
    """Whether calls of the module are nodes: it has parameters or buffers, no modules inside, and a usable name."""
    return (
        bool(name) and not is_reserved(name) and not module._modules and bool([*module.parameters(), *module.buffers()])
    )


class _Recorder(TorchFunctionMode):
    """Makes a node of every torch function that takes or makes tensors, and of every call of a watched module."""

    def __init__(self) -> None:
        super().__init__()
        self._graph = fx.Graph()
        self._modules: dict[str, nn.Module] = {}
        self._nodes = WeakIdKeyDictionary()
        self._inside = 0

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Let calls of a module be nodes of that name; return the handles of its hooks."""

        layer = stock_layer(module)

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._inside += 1

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._inside -= 1
            if self._inside == 0:
                self._modules[name] = layer
                self._add("call_module", name, args, kwargs, output)

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._inside == 0 and not _asks_only(func, output):
            self._add(*_target(func, kwargs), args, kwargs or {}, output)
        return output

    def graph_module(self, outputs: Any) -> fx.GraphModule:
        """Return what was recorded; the output node takes the tensors of the model's outputs."""
        self._graph.output([node for t in tensors(outputs) if (node := self._nodes.get(t)) is not None])
        return fx.GraphModule(self._modules, self._graph)

    def _add(self, op: str, target: Any, args: Any, kwargs: Any, output: Any) -> None:
        taken, named = tree_map(self._argument, (tuple(args), dict(kwargs)))
        node = self._graph.create_node(op, target, taken, named)
        made = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        if isinstance(output, Tensor):
            _describe(node, output)
            self._nodes[output] = node
            return
        for i, tensor in enumerate(made):  # in their order, whatever holds them
            part = self._graph.call_function(operator.getitem, (node, i))
            _describe(part, tensor)
            self._nodes[tensor] = part

    def _argument(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value if isinstance(value, _CONSTANTS) else f"a {type(value).__name__}"
        if value not in self._nodes:
            node = self._graph.placeholder(f"tensor_{len(self._graph.nodes)}")
            _describe(node, value)
            self._nodes[value] = node
        return self._nodes[value]


def _describe(node: fx.Node, tensor: Tensor) -> None:
    node.meta["tensor_meta"] = _extract_tensor_metadata(tensor)


_ASKING = {
    *("__get__", "__set__", "__len__", "__hash__", "size", "dim", "ndimension", "numel", "nelement", "stride"),
    *("storage_offset", "element_size", "get_device", "data_ptr"),
}


def _asks_only(func: Any, output: Any) -> bool:
    """Whether the function asks a tensor for its shape, dtype or device, and the like, but for no value."""
    if any(isinstance(t, Tensor) for t in tree_leaves(output)):
        return False
    name = getattr(func, "__name__", "")
    return name in _ASKING or name.startswith(("is_", "has_"))


def opaque(*args: Any, **kwargs: Any) -> Any:
    """Stand for a function that a graph cannot name."""
    raise NotImplementedError


def _target(func: Any, kwargs: Any) -> tuple[str, Any]:
    """Return the operation and target of the node that stands for a function."""
    name = getattr(func, "__name__", "")
    if not kwargs and (function := _OPERATORS.get(name.strip("_"))) is not None:
        return "call_function", function
    if func in (getattr(Tensor, name, None), getattr(torch._C.TensorBase, name, None)):
        return "call_method", name
    return "call_function", func if getattr(func, "__module__", None) and hasattr(func, "__qualname__") else opaque
