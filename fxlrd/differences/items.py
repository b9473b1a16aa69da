"""What a diff compares: the nodes of a graph, or the modules of a model that has no graph.

Each is an `Item`. What was one layer has one *site*: the name in its provenance or, without provenance, the module's
own name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxlrd.graph.facts import FACTORS, Provenance, counted_flops, provenance, tensor_meta
from fxlrd.layers.readable import is_container


@dataclass(eq=False)
class Item:
    """A node of a graph, or a module of a model that has no graph.

    ``text`` is what it computes and ``call`` how it is called; in both, ``%`` stands for an input. ``owner`` is the
    module that it calls or the value that it reads. ``path`` is its place in the tree of modules.
    """

    index: int
    name: str
    op: str
    target: str
    text: str
    call: str = ""
    site: str | None = None
    path: str = ""
    provenance: Provenance | None = None
    owner: Any = None
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    flops: int | None = None
    inputs: list[Item] = field(default_factory=list, repr=False)
    users: list[Item] = field(default_factory=list, repr=False)

    @property
    def params(self) -> int:
        """The number of parameters of its owner; for a module with children and no graph, only its own."""
        if isinstance(self.owner, nn.Module):
            return sum(p.numel() for p in self.owner.parameters(recurse=self.op != "module"))
        return self.owner.numel() if isinstance(self.owner, nn.Parameter) else 0

    @property
    def is_factor(self) -> bool:
        """Whether it is one factor of a decomposed layer."""
        return self.provenance is not None and self.provenance.role in FACTORS

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, see `Diff.to_dict`."""
        return {
            "index": self.index,
            "name": self.name,
            "op": self.op,
            "target": self.target,
            "text": self.text,
            "role": None if self.provenance is None else self.provenance.role,
            "shape": None if self.shape is None else list(self.shape),
            "params": self.params,
            "flops": self.flops,
            "inputs": [i.name for i in self.inputs],
        }


class _Slot:
    """Stands for an input in the text of a call."""

    def __repr__(self) -> str:
        return "%"


def graph_items(gm: fx.GraphModule) -> list[Item]:
    """Return the nodes of a graph, in its order."""
    module_texts: dict[int, str] = {}  # a module may have thousands of calls
    items: dict[fx.Node, Item] = {}
    for index, node in enumerate(gm.graph.nodes):
        inputs, call = _call(node, items)
        target, owner = _target(node), _owner(gm, node)
        if node.op == "call_module":
            if id(owner) not in module_texts:
                module_texts[id(owner)] = _module_text(owner)
            text = module_texts[id(owner)]
        elif node.op == "get_attr":
            text = f"{type(owner).__name__}{list(getattr(owner, 'shape', ()))}"
        else:
            text = f"{target}{call}" if node.op.startswith("call") else node.op
        item = items[node] = Item(index, node.name, node.op, target, text, call, owner=owner, inputs=inputs)
        item.provenance = provenance(node)
        if node.op in ("call_module", "get_attr"):
            item.site = item.path = target if item.provenance is None else item.provenance.name
        else:
            item.path = _path(node)
        metadata = tensor_meta(node)
        if metadata is not None:
            item.shape, item.dtype = tuple(metadata.shape), metadata.dtype
        item.flops = counted_flops(node)
        for each in dict.fromkeys(inputs):
            each.users.append(item)
    in_order = list(items.values())
    _restore_sites_of_factors(in_order)
    return in_order


def _call(node: fx.Node, items: Mapping[fx.Node, Item]) -> tuple[list[Item], str]:
    """Return the inputs of a node, in the order of its arguments, and these arguments as text."""
    inputs: list[Item] = []

    def slot(source: fx.Node) -> Any:
        inputs.append(items[source])
        return _Slot()

    args, kwargs = fx.map_arg((node.args, dict(sorted(node.kwargs.items()))), slot)
    return inputs, f"({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in kwargs.items())])})"


def _path(node: fx.Node) -> str:
    """Return the place of a function in the tree of modules: its name inside the module that called it."""
    modules = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return f"{modules[-1]}.{node.name}" if modules and modules[-1] else node.name


def _owner(gm: fx.GraphModule, node: fx.Node) -> Any:
    """Return the module that a node calls or the value that it reads."""
    if node.op not in ("call_module", "get_attr"):
        return None
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def tree_items(model: nn.Module, other: nn.Module) -> list[Item]:
    """Return the modules of a model that own tensors or have no children, in the order of `named_modules`.

    A module that only contains others counts if the ``other`` model has another class under its name: then its code
    differs.
    """
    counterparts = dict(other.named_modules())
    origins: dict[str, Provenance] = {}
    if isinstance(model, fx.GraphModule):
        origins = {str(n.target): p for n in model.graph.nodes if (p := provenance(n)) is not None}
    items: list[Item] = []
    for name, module in model.named_modules():
        has_children = next(module.children(), None) is not None
        if not name and isinstance(model, fx.GraphModule) and not _owns_tensors(module):
            continue
        if has_children and not _owns_tensors(module) and not _class_differs(module, counterparts.get(name)):
            continue
        described = counterparts[name] if _is_placeholder(module) and name in counterparts else module
        if described._modules:
            text = f"{type(described).__name__}({described.extra_repr()})"
        else:
            text = _module_text(described)
        item = Item(len(items), name or type(module).__name__, "module", name, text, owner=module)
        item.provenance = origins.get(name)
        item.site = name if item.provenance is None else item.provenance.name  # "" for both models themselves
        item.path = item.site or item.name
        items.append(item)
    _restore_sites_of_factors(items)
    return items


def _is_placeholder(module: nn.Module | None) -> bool:
    """Whether a module runs no code of its own: a graph has such modules where the original had a class."""
    return isinstance(module, (fx.GraphModule, type(None))) or type(module) is nn.Module


def _class_differs(module: nn.Module, other: nn.Module | None) -> bool:
    """Whether two modules with children run different code."""
    if other is None or _is_placeholder(module) or _is_placeholder(other):
        return False
    if is_container(module) and is_container(other):
        return False
    return type(module).__name__ != type(other).__name__ and next(other.children(), None) is not None


def _owns_tensors(module: nn.Module) -> bool:
    return any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))


def _restore_sites_of_factors(items: list[Item]) -> None:
    """Give factors without provenance the site of their layer: a result that was traced again has lost it."""
    roles: dict[str, set[str]] = defaultdict(set)
    for item in items:
        layer, _, role = item.target.rpartition(".")
        if item.owner is not None and layer and role in FACTORS:
            roles[layer].add(role)
    for item in items:
        layer, _, role = item.target.rpartition(".")
        origin = item.provenance
        is_untouched = origin is None or (origin.role == "original" and origin.name == item.target)
        if item.owner is not None and is_untouched and len(roles.get(layer, ())) > 1 and role in FACTORS:
            item.site = item.path = layer
            item.provenance = Provenance(layer, role)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    target: Any = node.target
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or str(target)
    module = getattr(target, "__module__", "") or ""
    module = "torch" if module in ("torch._C._nn", "torch._C", "torch._tensor") else module
    return f"{module}.{name}" if module and module not in ("_operator", "builtins") else str(name)


def _module_text(module: nn.Module) -> str:
    return re.sub(r"\s+", " ", repr(module))
