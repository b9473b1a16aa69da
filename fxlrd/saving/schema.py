"""plan.json as dataclasses: what a plan says, and the check of one that was read.

What is in the file follows the fields, but for three things: a module's description is a pair, the plan begins with a
checksum, and its format and version come before the fields.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

from torch import nn

from fxlrd.errors import FxlrdError
from fxlrd.graph.facts import FACTORS
from fxlrd.layers.attention import PROJECTIONS
from fxlrd.layers.kinds import OPTIONS
from fxlrd.saving.fields import Check, Record, at, field_types, invalid, parse, parse_fields

FORMAT = "fxlrd checkpoint"
VERSION = 1
KINDS = {kind.__name__: kind for kind in OPTIONS}
"""The classes of the modules that a plan may put into a model."""

ATTENTION = nn.MultiheadAttention.__name__
"""The class of modules whose projections may take their place: ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``."""

A = TypeVar("A", bound="Architecture")
Json = Any
Digest = Annotated[str, Check("64 hexadecimal digits", re.compile("[0-9a-f]{64}").fullmatch)]
Count = Annotated[int, Check("an integer from 0 to 2**31 - 1", lambda n: 0 <= n < 2**31)]
Stride = Annotated[int, Check("an integer from 0 to 2**62 - 1", lambda n: 0 <= n < 2**62)]
Sizes = Annotated[tuple[Count, ...], Check("a list of one to three integers", lambda sizes: 1 <= len(sizes) <= 3)]
Pad = Annotated[int, Check("an integer", lambda n: abs(n) < 2**31)]
Kind = Annotated[str, Check(f"one of {', '.join(KINDS)}", KINDS.__contains__)]
Role = Annotated[str, Check(f"one of {', '.join(FACTORS)}", FACTORS.__contains__)]
Modes = Annotated[Mapping[str, bool], Check("an object with the model's own mode under ''", lambda modes: "" in modes)]
Shape = tuple[int, ...] | None
"""The shape of a tensor; None where it is not initialised yet."""

_OPTION_TYPES: dict[str, Any] = {
    **dict.fromkeys(("kernel_size", "stride", "dilation", "output_padding"), Sizes),
    **dict.fromkeys(("bias", "affine", "track_running_stats"), bool),
    "padding": Literal["same", "valid"] | Sizes,
    "padding_mode": Literal["zeros", "reflect", "replicate", "circular"],
    "eps": float,
    "momentum": float | None,
}
"""The types of the options in `fxlrd.layers.kinds.OPTIONS`; the others are counts."""


@dataclass(frozen=True)
class Weights(Record):
    """The file of tensors that a plan belongs to."""

    sha256: Digest
    bytes: int


@dataclass(frozen=True)
class ModuleDescription:
    """A module of the original: its class, its options that set what it computes, the shapes of its own tensors."""

    kind: str
    options: Mapping[str, Json]
    shapes: Mapping[str, Shape]

    @classmethod
    def from_json(cls, value: Any, path: str = "") -> ModuleDescription:
        """Return the description that a pair [class, {option: value, "shapes": {tensor: shape}}] is."""
        kind, options = parse(tuple[str, Mapping[str, Json]], value, path)
        shapes = parse(Mapping[str, Shape], options.pop("shapes", None), f"{path}[1].shapes")
        return cls(kind, options, shapes)

    def to_json(self) -> list[Any]:
        """Return the pair for JSON."""
        shapes = {name: None if shape is None else list(shape) for name, shape in self.shapes.items()}
        return [self.kind, {**self.options, "shapes": shapes}]


@dataclass(frozen=True)
class FixedPads(Record):
    """A `fxlrd.layers.padding.FixedPadding`."""

    pads: Annotated[tuple[Pad, ...], Check("an even number of integers", lambda pads: len(pads) in (2, 4, 6))]
    mode: Literal["constant", "reflect", "replicate", "circular"]
    value: float


@dataclass(frozen=True)
class SamePads(Record):
    """A `fxlrd.layers.padding.SamePadding`."""

    extents: Sizes
    strides: Annotated[
        tuple[Count, ...], Check("a list of one to three positive integers", lambda s: 1 <= len(s) <= 3 and all(s))
    ]


_OPTIONAL: dict[str, Any] = {"described": [], "padded": {}}


@dataclass(frozen=True)
class Architecture(Record):
    """The original of a compressed model: what a model must be to load the checkpoint into it."""

    modules: Mapping[str, ModuleDescription]
    gone: tuple[str, ...]
    """Names of modules that were composed away: an Identity takes the place of each."""
    arguments: Mapping[str, bool | int | float | str | None] | None
    """None where the user's own class computes the outputs with the new layers in it. Otherwise only the graph does,
    and these arguments of forward are frozen in it."""
    source: str | None
    """How the command line names the original."""
    described: tuple[str, ...] = ()
    """Names of layers whose weight the model's code asks for its dtype, device or shape. No key where there is none."""
    padded: Mapping[str, FixedPads | SamePads] = field(default_factory=dict)
    """What stands in the graph before layers whose own forward pads, by their names. No key where there is none."""

    @classmethod
    def from_json(cls: type[A], value: Any, path: str = "") -> A:
        """Return the architecture; plans without described or padded layers do not say so."""
        return super().from_json({**_OPTIONAL, **value} if type(value) is dict else value, path)

    def to_json(self) -> dict[str, Any]:
        """Return the architecture for JSON."""
        return {k: v for k, v in super().to_json().items() if k not in _OPTIONAL or v}


@dataclass(frozen=True)
class Origin(Architecture):
    """What a compressed model was made from, as the model itself carries it."""

    refused: str | None = None
    """Why it cannot be saved."""

    @property
    def architecture(self) -> Architecture:
        """What a plan says of it."""
        return Architecture(self.modules, self.gone, self.arguments, self.source, self.described, self.padded)


@dataclass(frozen=True)
class LayerSpec(Record):
    """A module to make: the name of its class in `KINDS`, and its options."""

    kind: Kind
    options: Mapping[str, Json]

    @classmethod
    def from_json(cls, value: Any, path: str = "") -> LayerSpec:
        """Return the spec, whose options are those of its class."""
        spec = super().from_json(value, path)
        types = {name: _OPTION_TYPES.get(name, Count) for name in OPTIONS[KINDS[spec.kind]]}
        return replace(spec, options=parse_fields(types, spec.options, f"{path}.options"))


Channels = Annotated[int, Check("an integer from 1 to 2**31 - 1", lambda n: 1 <= n < 2**31)]


@dataclass(frozen=True)
class Narrowed(Record):
    """A module of the architecture, of any class, with ``channels`` of the ``of`` channels that it treats alone."""

    channels: Channels
    of: Channels


_PARTS = f"a list of parts in the order {', '.join(FACTORS)}, of different roles"


def _in_order(parts: tuple[tuple[str, LayerSpec], ...]) -> bool:
    """Whether each role comes after those that it comes after in a layer: factors do not commute."""
    return all(FACTORS.index(a) < FACTORS.index(b) for (a, _), (b, _) in pairwise(parts))


@dataclass(frozen=True)
class Factors(Record):
    """The factors of a decomposed layer, in order, each by its role."""

    parts: Annotated[tuple[tuple[Role, LayerSpec], ...], Check(_PARTS, _in_order)]


@dataclass(frozen=True)
class TensorTable(Record):
    """What the file of tensors cannot hold."""

    same: Mapping[str, str]
    """Other names of a tensor, with the one that it is stored under."""
    strides: Mapping[str, tuple[Stride, ...]]
    """Those of tensors that are dense, but not contiguous."""
    frozen: tuple[str, ...]
    """Parameters without gradients."""
    attributes: tuple[str, ...]
    """Tensors that the architecture need not have a place for: a graph's constants, and mere attributes of modules."""


@dataclass(frozen=True)
class Plan(Record):
    """plan.json: what takes the place of the architecture's modules, and where the tensors are."""

    made_with: Mapping[str, Json]
    """Versions, for people."""
    architecture: Architecture
    layers: Mapping[str, LayerSpec | Factors | Narrowed]
    """What takes the place of modules of the architecture, by their names."""
    tensors: TensorTable
    training: Modes
    """The mode of the model, and of each module that is in another mode than the one that holds it."""
    weights: Weights

    @classmethod
    def from_json(cls, value: Any, path: str = "") -> Plan:
        """Return the plan. Raises FxlrdError for anything that can be wrong without regard to a model."""
        plan = super().from_json({"made_with": {}} | {k: value[k] for k in field_types(cls) if k in value}, path)
        names = {*plan.architecture.modules, *plan.architecture.gone}
        attentions = [name for name, module in plan.architecture.modules.items() if module.kind == ATTENTION]
        names |= {f"{name}.{role}" for name in attentions for role in PROJECTIONS}
        if (other := next((name for name in plan.layers if name not in names), None)) is not None:
            raise FxlrdError(f"{at('layers', other)}: not in the architecture")
        if value.get("checksum") != checksum(value):
            raise invalid("checksum", "that of this plan", value.get("checksum"))
        return plan

    def to_json(self) -> dict[str, Any]:
        """Return the plan for JSON, with its checksum."""
        plan = {"format": FORMAT, "version": VERSION, **super().to_json()}
        return {"checksum": checksum(plan), **plan}


def checksum(plan: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a plan's JSON without its checksum, independent of the order of keys and of blanks."""
    text = json.dumps({k: v for k, v in plan.items() if k != "checksum"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
