"""What a model does while it runs: which modules are called, with what, and who reads whose weights."""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.errors import FxlrdError, Reason
from fxlrd.graph.captured import Unreached
from fxlrd.graph.compare import difference, rounding
from fxlrd.graph.guards import MORE_INPUTS, NEVER_CALLED, added, container_reads, hooked, owners, shared_parameter
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.regions import copies, describe, plain, structural_copy
from fxlrd.graph.run import counting, seeded
from fxlrd.layers.kinds import LAYERS, op

_READ = ("weight", "bias", "running_mean", "running_var")


@dataclass
class _Seen:
    """What was seen of a module: its calls, whether all gave tensors for every argument, and one tensor alone."""

    calls: int = 0
    plain: bool = True
    alone: bool = True


class _Watch:
    """What was seen of the model while it ran, as a copy whose layers say when they are read by others."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        outputs, self.flops = counted(structural_copy(model), inputs)
        self.outputs = copies(tensors(outputs))
        self.reasons: dict[str, Reason] = {}
        outputs = self._look(inputs, readers=True)
        if not _same(tensors(outputs), self.outputs):  # it asks for types: those of the layers looked at are not theirs
            self._look(inputs, readers=False)

    def _look(self, inputs: Inputs, readers: bool) -> Any:
        """Run a copy and see what is called and, by ``readers``, who reads parts of a module other than itself."""
        self.copy = structural_copy(self.model)
        self.modules = dict(self.copy.named_modules())
        self.layers = {name: m for name, m in self.modules.items() if is_layer(m)}
        self.seen: dict[str, _Seen] = {}
        self._tied()
        for name, module in self.modules.items():
            if not is_layer(module) and kept_whole(module):
                why = container_reads(name, module)
                if hasattr(module, "_orig_mod"):
                    why = Reason("compiled", f"{name} is compiled", "compress the model first, then compile it")
                self.reasons.update({n: why for n in self.layers if n.startswith(f"{name}.")})
        for name, module in self.modules.items():
            if transposed_linear(module) and (reason := added(module)) is not None:
                self.reasons[name] = reason  # a stand-in for it has nothing of that
            if readers and _has_weights(module) and not hooked(module):
                _watched(name, module, self.reasons)
        handles = [
            m.register_forward_pre_hook(self._hook(n), with_kwargs=True)
            for n, m in self.modules.items()
            if n and not isinstance(m, torch.jit.ScriptModule)
        ]
        try:
            return counted(self.copy, inputs)[0]
        finally:
            for handle in handles:
                handle.remove()

    def _tied(self) -> None:
        names = owners(self.copy)
        for name, module in self.layers.items():
            for part, parameter in module.named_parameters(recurse=False):
                others = [n for n in names[id(parameter)] if not n.startswith(f"{name}.")]
                if others:
                    self.reasons[name] = shared_parameter(part, others[0])

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen = self.seen.setdefault(name, _Seen())
            seen.calls += 1
            seen.plain = seen.plain and plain(module, args, kwargs)
            given = (*args, *kwargs.values())
            seen.alone = seen.alone and len(given) == 1 and isinstance(given[0], Tensor)

        return hook

    def asked(self, inputs: Inputs, names: Sequence[str]) -> set[str]:
        """Return those layers that cannot be inside another module without the model doing something else."""

        def found(some: Sequence[str]) -> set[str]:
            if self._alike(inputs, some):
                return set()
            half = len(some) // 2
            return found(some[:half]) | found(some[half:]) if half else set(some)

        if self._alike(inputs, names) or not self._alike(inputs, ()):  # no two runs of it are alike: it cannot be told
            return set()
        return found(names)

    def _alike(self, inputs: Inputs, names: Sequence[str]) -> bool:
        """Whether the model gives what it gave with each of these layers inside a module like that of factors."""
        model = structural_copy(self.model)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in names:
            old = modules[name]
            new = nn.Sequential(OrderedDict(first=_stand_in(old))).train(old.training)
            describe(new, old)
            for alias in [alias for alias, m in modules.items() if m is old]:
                model.set_submodule(alias, new)
        try:
            return _same(tensors(counted(model, inputs)[0]), self.outputs)
        except FxlrdError:
            return False

    def called(self, name: str) -> int:
        """How often the module was called."""
        return self.seen[name].calls if name in self.seen else 0

    def unreached(self) -> dict[str, Unreached]:
        """Return every layer, with the reason that speaks against it if there is one."""
        found = {}
        for name, module in self.layers.items():
            params = sum(p.numel() for p in module.parameters())
            kind = "Linear" if transposed_linear(module) else op(module)
            reason = self.reasons.get(name, MORE_INPUTS if self.called(name) else NEVER_CALLED)
            found[name] = Unreached(reason, kind, tuple(module.weight.shape), params)
        return found


def counted(model: nn.Module, inputs: Inputs) -> tuple[Any, int]:
    """Return what the model gives, always with the same random numbers, and the FLOPs that it takes."""
    with counting() as counter:
        return seeded(model, inputs), counter.get_total_flops()


def is_layer(module: nn.Module) -> bool:
    """Whether this is a conv or linear, or one in disguise."""
    return isinstance(module, LAYERS) or transposed_linear(module)


def transposed_linear(module: nn.Module) -> bool:
    """Whether this is the Conv1D of transformers (GPT-2), a Linear whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def kept_whole(module: nn.Module) -> bool:
    """Whether this is a module of torch's own with layers inside that its forward does not call as modules."""
    if hasattr(module, "_orig_mod"):  # torch.compile's
        return True
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict, *LAYERS)
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, containers)


def _has_weights(module: nn.Module) -> bool:
    """Whether a pass may put another module in the place of this one: a layer, a norm, an activation with weights."""
    own = module._parameters or module._buffers
    return is_layer(module) or (bool(own) and type(module).__module__.startswith("torch.nn.modules"))


def _watched(name: str, module: nn.Module, reasons: dict[str, Reason]) -> None:
    """Make the layer, which belongs to a copy, note who reads its parts other than its own forward."""
    inside = 0
    cls = type(module)

    class Watched(cls):  # type: ignore[misc, valid-type]
        @functools.wraps(cls.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            inside += 1
            try:
                return super().forward(*args, **kwargs)
            finally:
                inside -= 1

        def __getattribute__(self, attribute: str) -> Any:
            if attribute in _READ and not inside:
                caller = sys._getframe(1).f_code
                who = getattr(caller, "co_qualname", caller.co_name)
                reasons.setdefault(name, Reason("weight-read", f"its {attribute} is read by {who} directly"))
            return super().__getattribute__(attribute)

    Watched.__name__, Watched.__qualname__, Watched.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    module.__class__ = Watched


def _same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    try:
        return difference(found, wanted, "region").relative <= rounding(wanted)
    except FxlrdError:
        return False


def _stand_in(module: nn.Module) -> nn.Module:
    """Return the layer as passes know it: a Conv1D as the Linear that it is, around a view of its weight."""
    if not transposed_linear(module):
        return module
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    assert bias is None or isinstance(bias, nn.Parameter)
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().mT, weight.requires_grad)
    linear.bias = bias
    return linear.train(module.training)
