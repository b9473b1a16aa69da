"""In which order the forward of a model that cannot be traced calls layers, on several inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxlrd.calibration.batches import failure
from fxlrd.calibration.course import UnitCall, run_units
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.resuming import units
from fxlrd.graph.writes import changes_in_place


@dataclass(frozen=True)
class Stage:
    """Layers of one unit that are called one after the other with the very same tensor."""

    unit: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Observed:
    """What a model does on some inputs.

    Attributes:
        units: the modules that its layers are in, each called as a module.
        sequences: for each input, the units that are called, in order.
        stages: the layers, in the order of their first calls.
        calls: the most calls of a layer for one input; none of layers that are not called.
    """

    units: tuple[str, ...]
    sequences: tuple[tuple[str, ...], ...]
    stages: tuple[Stage, ...]
    calls: Counter[str]


@dataclass(frozen=True)
class _LayerCall:
    layer: str
    unit: str
    same_input: bool
    """Whether it is called with the tensor that the layer before was called with, which has not changed since."""


def observe(
    model: nn.Module, batches: Sequence[Inputs], layers: Collection[str], all_layers: Collection[str]
) -> Observed:
    """Run a model once on each batch. Returns what it does with ``layers``, and with units of ``all_layers``.

    Raises FxlrdError for a batch that it fails on.
    """
    names = _called_as_units(model, batches[0], all_layers)
    runs = []
    for i, inputs in enumerate(batches):
        try:
            runs.append(_run(model, inputs, names, layers))
        except Exception as error:
            raise failure(i, inputs, error) from error
    most: Counter[str] = Counter()
    for _, calls in runs:
        most |= Counter(call.layer for call in calls)
    return Observed(tuple(names), tuple(tuple(sequence) for sequence, _ in runs), _stages([c for _, c in runs]), most)


@dataclass(frozen=True)
class _Read:
    """A tensor that a layer was called with, and how often it had been written to."""

    tensor: Tensor | None = None
    version: int = 0


def _called_as_units(model: nn.Module, inputs: Inputs, layers: Collection[str]) -> list[str]:
    """Return the units, with the layers themselves in the place of one whose forward is not what calls its layers."""
    names = units(model, layers)
    _, calls = _run(model, inputs, names, layers)
    outside = {call.layer for call in calls if not call.unit}
    bypassed = {unit for unit in names if any(_is_in(layer, unit) for layer in outside)}
    alone = [layer for layer in layers if any(_is_in(layer, unit) for unit in bypassed)]
    return [unit for unit in names if unit not in bypassed] + alone


def _is_in(layer: str, unit: str) -> bool:
    return layer == unit or layer.startswith(f"{unit}.")


def _run(
    model: nn.Module, inputs: Inputs, names: Sequence[str], layers: Collection[str]
) -> tuple[list[str], list[_LayerCall]]:
    """Return the units that a run of the model calls, and its calls of the layers."""
    sequence: list[str] = []
    calls: list[_LayerCall] = []
    unit, last = "", _Read()

    def around(call: UnitCall, forward: Callable[[], Any]) -> Any:
        nonlocal unit
        sequence.append(call.unit)
        unit = call.unit
        output = forward()
        unit = ""
        return output

    def noting(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal last
            tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            read = _Read(tensor, 0 if tensor is None else changes_in_place(tensor))
            same = tensor is not None and tensor is last.tensor and read.version == last.version
            calls.append(_LayerCall(layer, unit or (layer if layer in names else ""), same))
            last = read

        return hook

    handles = [
        model.get_submodule(layer).register_forward_pre_hook(noting(layer), with_kwargs=True) for layer in layers
    ]
    try:
        run_units(model, inputs, names, around)
    finally:
        for handle in handles:
            handle.remove()
    return sequence, calls


def _stages(runs: Sequence[Sequence[_LayerCall]]) -> tuple[Stage, ...]:
    """Return the layers in the order of their first calls: one that a run alone calls stands after what precedes it."""
    order: list[Stage] = []
    placed: set[str] = set()
    for calls in runs:
        at = 0
        for call in calls:
            if call.layer in placed:
                at = 1 + next(i for i, stage in enumerate(order) if call.layer in stage.layers)
            elif call.same_input and at and order[at - 1].unit == call.unit:
                order[at - 1] = Stage(call.unit, (*order[at - 1].layers, call.layer))
            else:
                order.insert(at, Stage(call.unit, (call.layer,)))
                at += 1
            placed.add(call.layer)
    return tuple(order)
