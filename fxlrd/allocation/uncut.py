"""What stands in the way of a budget: the largest weights of a model that have no smaller form, and why.

Weights that are the same part of different blocks count as one: ``layers.*.mlp`` stands for ``layers.0.mlp`` to
``layers.31.mlp``, whose names differ in numbers alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx, nn

from fxlrd.errors import Reason
from fxlrd.graph.attentions import open_for
from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.copies import structural_copy
from fxlrd.graph.guards import NEVER_CALLED
from fxlrd.graph.surgery import layers

_NAMED = 3
_WORTH_NAMING = 0.03
"""A share of the parameters from which weights are named."""


@dataclass
class Part:
    """Weights without a smaller form whose names differ in numbers alone.

    Attributes:
        name: their name, with * for numbers that differ.
        kind: the class of the module that holds them.
        reason: why the first of them is left alone; None for what is no layer and is not multiplied with.
        params: the number of parameters of all of them.
    """

    name: str
    kind: str
    reason: Reason | None
    params: int = 0

    def text(self, total: int) -> str:
        """Return its name, its share of ``total`` parameters, and why it is left alone."""
        why = self.kind if self.reason is None else self.reason.text
        return f"{self.name} ({self.params / total:.0%} of the parameters: {why})"


def what_stands(gm: fx.GraphModule, cuttable: Collection[str], reasons: Mapping[str, Reason], tables: bool) -> str:
    """Return, in words, the largest parts of the model that are not ``cuttable``; nothing if there are none.

    ``reasons`` are those of layers that are left alone, by name. With ``tables``, embeddings and what else is neither a
    layer nor multiplied with count too.
    """
    parts, total = _parts(gm, cuttable, reasons)
    named = [part for part in parts if part.params >= _WORTH_NAMING * total and (tables or part.reason is not None)]
    largest = sorted(named, key=lambda part: -part.params)[:_NAMED]
    return f"; what stays as it is: {', '.join(part.text(total) for part in largest)}" if largest else ""


def _parts(gm: fx.GraphModule, cuttable: Collection[str], reasons: Mapping[str, Reason]) -> tuple[list[Part], int]:
    """Return what is not cuttable, and the number of parameters of the whole model."""
    capture = captured_or_bare(gm)
    model = structural_copy(capture.model or gm)
    open_for(model, layers(gm))
    unreached = {name: entry.reason for name, entry in capture.unreached.items()}
    dropped = [name for name, reason in unreached.items() if reason.code == NEVER_CALLED.code]
    reasons = {**unreached, **reasons}
    reached = {id(p) for name, layer in layers(gm).items() if name in cuttable for p in layer.parameters()}
    parts: dict[tuple[str, str], list[Part]] = {}
    total = 0
    for name, parameter in model.named_parameters():
        if any(_is_at(name, layer) for layer in dropped):
            continue
        total += parameter.numel()
        if id(parameter) not in reached and name.rpartition(".")[0] not in cuttable:
            part = _part(model, name, reasons)
            part.params = parameter.numel()
            code = part.reason.code if part.reason is not None else ""
            parts.setdefault((re.sub(r"\d+", "*", part.name), code), []).append(part)
    return [_together(same) for same in parts.values()], total


def _part(model: nn.Module, parameter: str, reasons: Mapping[str, Reason]) -> Part:
    """Return the layer, the parameter or the module that a parameter belongs to, without its size."""
    holder = parameter.rpartition(".")[0]
    name = next((name for name in _containers(parameter) if name in reasons), holder or parameter)
    return Part(name, type(model.get_submodule(holder)).__name__, reasons.get(name))


def _together(parts: Iterable[Part]) -> Part:
    first, *_ = parts = list(parts)
    names = dict.fromkeys(part.name for part in parts)
    differing = [len(set(pieces)) > 1 for pieces in zip(*map(_pieces, names), strict=True)]
    name = "".join("*" if differs else piece for piece, differs in zip(_pieces(first.name), differing, strict=True))
    return Part(name, first.kind, first.reason, sum(part.params for part in parts))


def _pieces(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def _containers(parameter: str) -> Iterator[str]:
    """Yield a parameter's name and those of the modules around it, the innermost first."""
    while parameter:
        yield parameter
        parameter = parameter.rpartition(".")[0]


def _is_at(parameter: str, name: str) -> bool:
    return parameter == name or parameter.startswith(f"{name}.")
