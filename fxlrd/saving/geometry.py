"""Whether what a plan puts in the place of a layer applies its kernel as the layer does.

Weights cannot be made up by an edit of the plan, but how they are applied could: a stride, a padding, a dilation would
make another function of the same tensors. So kernel size, stride, padding, dilation, padding mode and output padding of
one part are those of the layer in the architecture, which itself is compared with what the plan says it was. All other
parts are plain: they apply a 1×1 kernel at every position. A module without tensors of its own stays what it is.

Where layers were composed, a 1×1 layer may have the kernel of one that is gone, at the product of their strides. A
layer whose own forward pads its input has the same padding before it in the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxlrd.errors import FxlrdError
from fxlrd.layers.folded import fold, padding_before
from fxlrd.layers.kinds import BATCH_NORMS, CONVS, LAYERS, TRANSPOSED, kernel_options, options
from fxlrd.layers.stand_ins import stand_in
from fxlrd.saving.padding import pads_of
from fxlrd.saving.schema import KINDS, Architecture, Factors, LayerSpec, Narrowed

Spec = LayerSpec | Factors | Narrowed


@dataclass(frozen=True)
class Geometry:
    """How a layer applies its kernel: its stock class, and its options but for channels and bias."""

    kind: str
    options: Mapping[str, Any]

    @property
    def dims(self) -> int:
        """The dimensions of the kernel: 0 for a Linear."""
        return len(self.options.get("kernel_size", ()))

    @property
    def plain(self) -> Geometry:
        """The geometry of a 1×1 conv, or of a Linear, with as many dimensions."""
        if not self.dims:
            return self
        one, none = (1,) * self.dims, (0,) * self.dims
        kernel = {"kernel_size": one, "stride": one, "padding": none, "dilation": one, "padding_mode": "zeros"}
        return Geometry(CONVS[self.dims - 1].__name__, kernel)

    def without_stride(self) -> Geometry:
        """Return the geometry without its stride."""
        return Geometry(self.kind, {k: v for k, v in self.options.items() if k != "stride"})

    def with_stride(self, stride: tuple[int, ...]) -> Geometry:
        """Return the geometry at another stride."""
        return Geometry(self.kind, {**self.options, "stride": stride})


def geometry(module: nn.Module) -> Geometry | None:
    """Return how a layer, or a module that computes what one does, applies its kernel; None for another module."""
    layer = _layer(module)
    if isinstance(layer, nn.Linear):
        return Geometry(nn.Linear.__name__, {})
    kind = next((kind for kind in (*CONVS, *TRANSPOSED) if isinstance(layer, kind)), None)
    return None if kind is None or layer is None else Geometry(kind.__name__, kernel_options(layer))  # type: ignore[arg-type]


def _layer(module: nn.Module) -> nn.Module | None:
    if type(module) in LAYERS:
        return module
    try:
        layer = stand_in(module)
        folded = fold(module) if layer is None else None
    except Exception:  # a module of any class, perhaps without weights: nothing can be said of it
        return None
    return folded.layer if folded is not None else layer


def check_geometry(folder: object, specs: Mapping[str, Spec], modules: Mapping[str, nn.Module]) -> None:
    """Raise FxlrdError for a spec that does not apply its kernel as the module of its name among ``modules`` does."""
    gone = [name for name, spec in specs.items() if any(part.kind == "Identity" for part in _parts(spec))]
    composed = [g for name in gone if (g := geometry(modules[name])) is not None]
    for name, spec in specs.items():
        if (why := _difference(spec, modules[name], composed)) is not None:
            raise FxlrdError(f"load: {folder}: {name}: {why}: the plan is damaged; save the model again")


def check_padding(folder: object, architecture: Architecture, names: Iterable[str], model: nn.Module) -> None:
    """Raise FxlrdError where a layer among ``names`` that pads by itself has another padding before it in the graph."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in dict.fromkeys((*names, *architecture.padded)):
        if name not in modules:
            continue
        padding = padding_before(_on_cpu(modules[name]))
        own, pads = None if padding is None else pads_of(padding), architecture.padded.get(name)
        if own != pads:
            why = f"the padding before it is {pads} in the plan and {own} in the layer"
            raise FxlrdError(f"load: {folder}: {name}: {why}: the plan is damaged; save the model again")


def _on_cpu(module: nn.Module) -> nn.Module:
    """Return a layer that can be probed: a copy with values of its own, if it has none."""
    if module._modules or not any(t.is_meta for t in module.parameters()):
        return module
    return copy.deepcopy(module).to_empty(device="cpu")


def _parts(spec: Spec) -> list[LayerSpec]:
    if isinstance(spec, Factors):
        return [part for _, part in spec.parts]
    return [spec] if isinstance(spec, LayerSpec) else []


def _difference(spec: Spec, was: nn.Module, composed: Collection[Geometry]) -> str | None:
    """Return what differs, in words, or None."""
    parts = [part for part in _parts(spec) if part.kind != "Identity"]
    if isinstance(spec, LayerSpec) and not _has_tensors(was) and type(was) is not nn.Identity:
        is_drop = hasattr(was, "p") or hasattr(was, "drop_prob")
        if not (spec.kind == "Identity" and is_drop):
            return f"a {spec.kind} cannot take the place of a {type(was).__name__}"
    if type(was) in BATCH_NORMS:
        own = options(was)
        return next((_other("eps", p.options.get("eps"), own["eps"]) for p in parts if _unlike(p, was)), None)
    own_geometry = geometry(was)
    return None if own_geometry is None else _other_kernel(parts, own_geometry, composed)


def _has_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _unlike(part: LayerSpec, norm: nn.Module) -> bool:
    """Whether a part in the place of a BatchNorm is none, or has another eps."""
    return not isinstance(norm, KINDS[part.kind]) or part.options["eps"] != norm.eps


def _other_kernel(parts: Iterable[LayerSpec], own: Geometry, composed: Collection[Geometry]) -> str | None:
    """Return what differs where not all of the parts but one are plain, and that one applies the kernel otherwise."""
    found = [Geometry(part.kind, _kernel(part.options)) for part in parts]
    others = [each for each in found if each != own.plain]
    if len(others) <= 1 and all(each == own or each in _allowed(own, composed) for each in others):
        return None
    other = next((each for each in others if each != own), own)
    if other.kind != own.kind:
        return f"a {other.kind} cannot take the place of a {own.kind}"
    option = next((k for k in own.options if other.options.get(k) != own.options[k]), "kernel_size")
    return _other(option, other.options.get(option), own.options.get(option))


def _allowed(own: Geometry, composed: Collection[Geometry]) -> list[Geometry]:
    """Return the kernels that a layer may have of those composed with it: only a 1×1 layer takes over another's."""
    if not own.dims or own.without_stride() != own.plain.without_stride():
        return []
    same = [each for each in composed if each.dims == own.dims]
    strides = {own.options["stride"]}
    for each in same:
        strides |= {tuple(a * b for a, b in zip(stride, each.options["stride"], strict=True)) for stride in strides}
    return [each.with_stride(stride) for each in (own, *same) for stride in strides]


def _kernel(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k in ("output_padding", *_KERNEL)}


_KERNEL = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


def _other(option: str, value: Any, was: Any) -> str:
    return f"{option} is {value!r} in the plan and {was!r} in the layer"
