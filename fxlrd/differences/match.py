"""Which node of one graph is which of another.

A graph is read into a list of `Item`, one a node; so is the tree of modules of a model that is no graph. What was one
layer has one *site*: the name that its provenance gives or, without any, the module's own name; a name that the other
graph does not know belongs to the module around it that the other graph does know (``conv.first`` to ``conv``).

Nodes are paired from what is certain to what is likely: arguments and outputs; the very same module, whatever its
name; modules that each graph calls once under the same name; then, by their neighbourhood, nodes that do the same
to the same inputs, or that are read in the same way; then nodes of the same name that do the same. Each step is
linear in the number of nodes: what is looked up is the readers of one node that do one thing, a few at a time.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from fxlrd.graph.facts import FACTORS, Provenance, provenance

_CANDIDATES = 16
"""So many candidates for one node are looked at: of hundreds of equal readers of one node, the first will do."""
_ROUNDS = 3


@dataclass(eq=False)
class Item:
    """A node as a diff sees it.

    ``text`` is what it computes and ``call`` how it is called, both without the names of its inputs. ``owner`` is
    the module that it calls or the value that it reads. ``path`` is its place in the tree of modules.
    """

    index: int
    name: str
    op: str
    target: str
    text: str
    call: str = ""
    site: str | None = None
    path: str = ""
    known: Provenance | None = None
    owner: Any = None
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    flops: int | None = None
    inputs: list[Item] = field(default_factory=list, repr=False)
    users: list[Item] = field(default_factory=list, repr=False)

    @property
    def params(self) -> int:
        """The number of parameters of what it calls or reads; of a module with parts in a tree, its own only."""
        if isinstance(self.owner, nn.Module):
            return sum(p.numel() for p in self.owner.parameters(recurse=self.op != "module"))
        return self.owner.numel() if isinstance(self.owner, nn.Parameter) else 0


class _Slot:
    """Stands for an input in the text of a call."""

    def __repr__(self) -> str:
        return "%"


def graph_items(gm: fx.GraphModule) -> list[Item]:
    """Return the nodes of a graph, in its order."""
    modules = dict(gm.named_modules(remove_duplicate=False))
    texts: dict[int, str] = {}
    made: dict[fx.Node, Item] = {}
    for index, node in enumerate(gm.graph.nodes):
        given: list[Item] = []

        def slot(n: fx.Node, given: list[Item] = given) -> Any:
            given.append(made[n])
            return _Slot()

        args = fx.map_arg((node.args, dict(sorted(node.kwargs.items()))), slot)
        item = Item(index, node.name, node.op, _target(node), "", _call(*args), inputs=given)
        item.known = provenance(node)
        stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        item.path = f"{stack[-1]}.{node.name}" if stack and stack[-1] else node.name
        if node.op == "call_module":
            module = item.owner = modules[str(node.target)]
            if id(module) not in texts:
                texts[id(module)] = _module_text(module)
            item.text = texts[id(module)]
        elif node.op == "get_attr":
            item.owner = _attribute(gm, str(node.target))
            item.text = f"{type(item.owner).__name__}{list(getattr(item.owner, 'shape', ()))}"
        else:
            item.text = f"{item.target}{item.call}" if node.op.startswith("call") else node.op
        if node.op in ("call_module", "get_attr"):
            item.site = item.path = item.known.name if item.known is not None else str(node.target)
        meta = node.meta.get("tensor_meta")
        if isinstance(meta, TensorMetadata):
            item.shape, item.dtype = tuple(meta.shape), meta.dtype
        item.flops = node.meta.get("flops")
        for each in dict.fromkeys(given):
            each.users.append(item)
        made[node] = item
    items = list(made.values())
    _gather_factors(items)
    return items


def tree_items(model: nn.Module, other: nn.Module) -> list[Item]:
    """Return the modules of a model that have weights of their own, or no parts, in its order.

    Those around them count where another class has the name in the ``other`` model: its code does something else.
    """
    there = dict(other.named_modules())
    known: dict[str, Provenance] = {}
    if isinstance(model, fx.GraphModule):
        known = {str(n.target): p for n in model.graph.nodes if (p := provenance(n)) is not None}
    items: list[Item] = []
    for name, module in model.named_modules():
        parts = next(module.children(), None) is not None
        if not name and isinstance(model, fx.GraphModule) and not _own(module):
            continue
        if parts and not _own(module) and not _of_another_class(module, there.get(name)):
            continue
        told = there[name] if _bare(module) and name in there else module
        text = f"{type(told).__name__}({told.extra_repr()})" if told._modules else _module_text(told)
        item = Item(
            len(items), name or type(module).__name__, "module", name, text, owner=module, known=known.get(name)
        )
        item.site = item.known.name if item.known is not None else name  # the same for the two models themselves
        item.path = item.site or item.name
        items.append(item)
    _gather_factors(items)
    return items


def _bare(module: nn.Module | None) -> bool:
    """Whether a module is what a graph has for one around others, or for parameters: it runs no code of its own."""
    return isinstance(module, (fx.GraphModule, type(None))) or type(module) is nn.Module


def _of_another_class(module: nn.Module, other: nn.Module | None) -> bool:
    """Whether two modules with parts run different code."""
    if other is None or _bare(module) or _bare(other):
        return False
    return type(module).__name__ != type(other).__name__ and next(other.children(), None) is not None


def _own(module: nn.Module) -> bool:
    return any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))


def _gather_factors(items: list[Item]) -> None:
    """Give factors that lost their provenance (a result that was traced again) the site of their layer."""
    roles: dict[str, set[str]] = defaultdict(set)
    for item in items:
        around, _, last = item.target.rpartition(".")
        if item.owner is not None and around and last in FACTORS:
            roles[around].add(last)
    for item in items:
        around, _, last = item.target.rpartition(".")
        fresh = item.known is None or (item.known.role == "original" and item.known.name == item.target)
        if item.owner is not None and fresh and len(roles.get(around, ())) > 1 and last in FACTORS:
            item.site = item.path = around
            item.known = Provenance(around, last)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    target: Any = node.target
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or str(target)
    module = getattr(target, "__module__", "") or ""
    module = "torch" if module in ("torch._C._nn", "torch._C", "torch._tensor") else module
    return f"{module}.{name}" if module and module not in ("_operator", "builtins") else str(name)


def _call(args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    return f"({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in kwargs.items())])})"


def _module_text(module: nn.Module) -> str:
    return re.sub(r"\s+", " ", repr(module))


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    found: Any = gm
    for part in target.split("."):
        found = getattr(found, part, None)
    return found


def _settle_sites(found: Matching) -> None:
    """Give what only one side knows by its name the site of the module around it that the other side knows."""
    in_a, in_b = ({item.site for item in items} for items in (found.a, found.b))
    for items, own, other in ((found.a, in_a, in_b), (found.b, in_b, in_a)):
        for item in items:
            if item.site is None or item.site in other or item in found.to_b or item in found.to_a:
                continue
            around = item.site
            while around := around.rpartition(".")[0]:
                if around in other and around not in own:
                    item.site = item.path = around
                    break


@dataclass
class Matching:
    """The pairs of nodes of two graphs, both ways, and the nodes of each side by site."""

    a: list[Item]
    b: list[Item]
    to_b: dict[Item, Item] = field(default_factory=dict)
    to_a: dict[Item, Item] = field(default_factory=dict)
    sites_a: dict[str, list[Item]] = field(default_factory=dict)
    sites_b: dict[str, list[Item]] = field(default_factory=dict)

    def pair(self, x: Item, y: Item) -> None:
        """Take ``x`` of the first graph for ``y`` of the second."""
        self.to_b[x], self.to_a[y] = y, x

    def both(self, item: Item) -> bool:
        """Whether both graphs have nodes of the item's site."""
        return item.site is not None and item.site in self.sites_a and item.site in self.sites_b

    def agree(self, x: Item, y: Item) -> bool:
        """Whether the two are a pair or, where one of them has none, of the same site."""
        other = self.to_b.get(x)
        if other is not None and y in self.to_a:
            return other is y
        return x.site is not None and x.site == y.site


def match(a: list[Item], b: list[Item]) -> Matching:
    """Pair the nodes of two graphs, as the module docstring says."""
    found = Matching(a, b)
    _match_ends(found)
    _match_single(found, lambda i: id(i.owner) if isinstance(i.owner, nn.Module) else None)
    _settle_sites(found)
    for items, sites in ((a, found.sites_a), (b, found.sites_b)):
        for item in items:
            if item.site is not None:
                sites.setdefault(item.site, []).append(item)
    _match_single(found, lambda i: (i.site, i.target) if i.site is not None else None)
    _by_neighbours(found)
    _match_in_order(found, lambda i: (i.site, i.target) if i.site is not None else None)
    _match_single(found, lambda i: (i.name, _kind(found, i)))
    _by_neighbours(found)
    return found


def _match_ends(found: Matching) -> None:
    """Pair arguments by name, those that are left in order if as many are, and the outputs."""
    ends = [[i for i in items if i.op == "placeholder"] for items in (found.a, found.b)]
    names = {i.target: i for i in ends[0]}
    for y in ends[1]:
        if y.target in names:
            found.pair(names[y.target], y)
    left = [i for i in ends[0] if i not in found.to_b], [i for i in ends[1] if i not in found.to_a]
    if len(left[0]) == len(left[1]):
        for x, y in zip(*left, strict=True):
            found.pair(x, y)
    for x, y in zip(*([i for i in items if i.op == "output"] for items in (found.a, found.b)), strict=False):
        found.pair(x, y)


def _unmatched(found: Matching, key: Any) -> tuple[dict[Hashable, list[Item]], dict[Hashable, list[Item]]]:
    groups: tuple[dict[Hashable, list[Item]], ...] = ({}, {})
    for items, done, group in ((found.a, found.to_b, groups[0]), (found.b, found.to_a, groups[1])):
        for item in items:
            if item not in done and item.op not in ("placeholder", "output") and (k := key(item)) is not None:
                group.setdefault(k, []).append(item)
    return groups[0], groups[1]


def _match_single(found: Matching, key: Any) -> None:
    """Pair what has a key that one node of each side has."""
    left, right = _unmatched(found, key)
    for k, here in left.items():
        there = right.get(k, [])
        if len(here) == len(there) == 1:
            found.pair(here[0], there[0])


def _match_in_order(found: Matching, key: Any) -> None:
    left, right = _unmatched(found, key)
    for k, here in left.items():
        for x, y in zip(here, right.get(k, []), strict=False):
            found.pair(x, y)


def _kind(found: Matching, item: Item) -> Hashable:
    """Return what two nodes that can be a pair have in common."""
    if item.site is None:
        return (item.op, item.target)
    return (item.op, item.site, item.target) if found.both(item) else (item.op, item.text)


def _by_neighbours(found: Matching) -> None:
    """Pair by inputs, in order, and by readers, backward: first where all agree, then where half of them do."""
    for least in (1.0, 0.5):
        for _ in range(_ROUNDS):
            before = len(found.to_b)
            _sweep(found, least, forward=True)
            _sweep(found, least, forward=False)
            if len(found.to_b) == before:
                break


def _sweep(found: Matching, least: float, forward: bool) -> None:
    """Pair the nodes of b that are left: in order by what they read, or in reverse by what reads them."""
    index: dict[Item, dict[Hashable, deque[Item]]] = {}

    def candidates(y: Item) -> Iterator[Item]:
        kind = _kind(found, y)
        for near in y.inputs if forward else y.users:
            for x in _counterparts(found, near):
                if x not in index:
                    index[x] = {}
                    for item in x.users if forward else reversed(x.inputs):
                        index[x].setdefault(_kind(found, item), deque()).append(item)
                queue = index[x].get(kind, deque())
                while queue and queue[0] in found.to_b:
                    queue.popleft()
                yield from [x for x in islice(queue, _CANDIDATES) if x not in found.to_b]

    for y in found.b if forward else reversed(found.b):
        if y in found.to_a or y.op in ("placeholder", "output"):
            continue
        share = _inputs_agree if forward else _users_agree
        scored = [
            ((share(found, x, y), (x.call, x.text) == (y.call, y.text), x.name == y.name), x)
            for x in dict.fromkeys(candidates(y))
        ]
        if scored:
            score, best = max(scored, key=lambda pair: pair[0])
            if score[0] >= least:
                found.pair(best, y)


def _inputs_agree(found: Matching, x: Item, y: Item) -> float:
    same = sum(found.agree(p, q) for p, q in zip(x.inputs, y.inputs, strict=False))
    return same / max(len(x.inputs), len(y.inputs))


def _users_agree(found: Matching, x: Item, y: Item) -> float:
    there, sites = set(y.users), {q.site for q in y.users if q.site is not None}
    same = sum(found.to_b[p] in there if p in found.to_b else p.site in sites for p in x.users)
    return same / max(len(x.users), len(y.users))


def _counterparts(found: Matching, item: Item) -> list[Item]:
    """Return the nodes of a that stand where ``item`` stands in b; of a site with many, those as far along in order."""
    if item in found.to_a:
        return [found.to_a[item]]
    if item.site is None or item.site not in found.sites_a:
        return []
    here, there = found.sites_a[item.site], found.sites_b[item.site]
    if len(here) <= _CANDIDATES:
        return here
    middle = bisect_left(there, item.index, key=lambda i: i.index) * len(here) // len(there)
    start = min(max(0, middle - _CANDIDATES // 2), len(here) - _CANDIDATES)
    return here[start : start + _CANDIDATES]
