"""What a timer times: modules, each with the inputs that it is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.passes.shape_prop import TensorMetadata

from fxlrd.graph.inputs import Inputs
from fxlrd.graph.run import evaluating, unmoved
from fxlrd.timing.clock import Timer, Timing, compare
from fxlrd.timing.inductor import Compile, served


class Workload:
    """Modules with their inputs; a call runs each once and returns their outputs.

    ``modules`` holds them as they are in eager mode: a timer whose times are a formula, as in tests, can read their
    weights. ``inside`` says that they are layers inside a model, which is a difference in int8.
    """

    def __init__(
        self, parts: Sequence[tuple[nn.Module, Inputs]], under_inductor: Compile = False, inside: bool = False
    ) -> None:
        self.modules = [module for module, _ in parts]
        self.parts = list(parts)
        self.under_inductor, self.inside = under_inductor, inside
        self._runs: list[tuple[Callable[..., Any], Inputs]] = []

    def prepare(self) -> None:
        """Make what a call runs, once: in eval mode, since a trace for Inductor bakes the mode in.

        What is compared is prepared before any of it is called. Making one for int8 exports it, and an export makes
        torch forget what was compiled before.
        """
        if not self._runs:
            forms = {module: served(module, inputs, self.under_inductor, self.inside) for module, inputs in self.parts}
            self._runs = [(forms[module], inputs) for module, inputs in self.parts]

    def __call__(self) -> list[Any]:
        """Run each module once and return their outputs."""
        self.prepare()
        return [run(*inputs.args, **inputs.kwargs) for run, inputs in self._runs]


def prepare(workloads: Iterable[Workload]) -> None:
    """Prepare workloads that will be compared, or be the first of such, before any of them is called."""
    workloads = list(workloads)
    with torch.no_grad(), _evaluating(workloads):
        for workload in workloads:
            workload.prepare()


def time_workloads(
    workloads: Mapping[str, Workload], device: torch.device, seconds: float, timer: Timer = compare
) -> dict[str, Timing]:
    """Time workloads side by side, in eval mode without gradients; ratios are to the first.

    Afterwards each module has its mode and its buffers' values again: a forward may count its calls or fill a cache.
    """
    prepare(workloads.values())
    with torch.no_grad(), _evaluating(workloads.values()):
        return timer(workloads, device, seconds=seconds)


@contextmanager
def _evaluating(workloads: Iterable[Workload]) -> Iterator[None]:
    modules = nn.ModuleList(module for workload in workloads for module in workload.modules)
    with unmoved(modules), evaluating(modules):
        yield


_LAYOUTS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}


def example(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    """Return a tensor to time with; the global random state is not touched."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator).to(device=device, dtype=dtype)
    return x.contiguous(memory_format=_LAYOUTS.get(layout, torch.contiguous_format))


def layout(meta: TensorMetadata) -> str:
    """Return a tensor's memory format as text."""
    return next((name for name, memory_format in _LAYOUTS.items() if meta.memory_format == memory_format), "contiguous")
