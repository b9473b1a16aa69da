"""What a compression hands back: the rewritten graph itself, or the user's model with the graph's layers in it.

The user's model keeps its own class and forward where only regions of it could be captured, and where it is to be
changed in place. Its outputs must then be those of the graph; where they are not, everything is put back.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, fx, nn

from fxlrd.calibration.holdout import let_go
from fxlrd.errors import FxlrdError, VerificationError, one_line
from fxlrd.graph.captured import Captured, captured_or_bare
from fxlrd.graph.compare import difference, rounding
from fxlrd.graph.copies import independent_copy, structural_copy
from fxlrd.graph.cost import NOTHING, Cost
from fxlrd.graph.facts import forget
from fxlrd.graph.fast_paths import restore, switches
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.regions import undo
from fxlrd.graph.run import counted
from fxlrd.graph.writes import address
from fxlrd.saving.architecture import origin_of, origin_of_graph, remember
from fxlrd.saving.pretrained import save_all_of
from fxlrd.saving.taking_part import register


@dataclass(frozen=True)
class OutputError:
    """The relative error of the whole model's outputs; None if they do not compare: a detector may find more boxes."""

    relative: float | None


@dataclass(frozen=True)
class Installed:
    """A compressed model.

    Attributes:
        model: it shares no tensor with the original unless it is the original, changed in place.
        complete: whether it also holds what no node of the graph stands for, such as layers that eval mode never calls.
        outside: the cost of that, before and after.
        flops: of the model, where counted in a run of its own; None: those of the graph and ``outside``.
        output_error: of a model that runs the user's forward; None for a graph, whose passes were verified.
        warnings: what the user's model has and this one has not.
    """

    model: nn.Module
    complete: bool
    outside: Cost = NOTHING
    flops: int | None = None
    output_error: OutputError | None = None
    warnings: tuple[str, ...] = ()


def install(
    original: fx.GraphModule,
    gm: fx.GraphModule,
    model: nn.Module,
    *,
    inplace: bool,
    reference: Any = None,
    own: bool = False,
) -> Installed:
    """Return what ``gm``, which passes made of ``original``, is as a model for the user of ``model``.

    The error of a model that runs the user's forward is measured against ``reference`` (`users_outputs`). ``own`` says
    that nobody else holds the tensors that passes made: the result then takes them, where a copy would take as much
    memory again. Raises VerificationError, and leaves ``model`` as it was, if the user's forward does not use the
    layers as the graph does.
    """
    capture = captured_or_bare(original)
    made = _made(gm, original, capture.model, model) if own else {}
    if inplace or capture.user_forward:
        return _inside(capture, gm, model, inplace, reference, made)
    gm = capture.as_users(gm)
    result = _independent(gm, model, made)
    remember(result, origin_of_graph(capture.model or model, original, gm))
    return Installed(result, complete=False, warnings=lost_methods(model))


def users_outputs(original: fx.GraphModule) -> Any:
    """Return the outputs of a model whose forward the result will run; None for a graph, which passes verify."""
    capture = captured_or_bare(original)
    if not capture.user_forward or capture.model is None:
        return None
    return tensors(counted(structural_copy(capture.model), capture.inputs)[0])


def lost_methods(model: nn.Module) -> tuple[str, ...]:
    """Return a warning of the public methods that a graph in the place of ``model`` has not, if there are any.

    >>> class Detector(nn.Sequential):
    ...     def boxes(self, image): ...
    >>> lost_methods(nn.Sequential()), lost_methods(Detector())[0].split(";")[0]
    ((), 'the result is a GraphModule and has no boxes() as Detector has')
    """
    own = [kind for kind in type(model).__mro__ if not kind.__module__.startswith(("torch.nn.", "torch.fx."))]
    functions = (classmethod, staticmethod, types.FunctionType)
    methods = {
        name: kind
        for kind in reversed(own)
        for name, value in vars(kind).items()
        if isinstance(value, functions) and not name.startswith("_") and not hasattr(fx.GraphModule, name)
    }
    if not methods or isinstance(model, fx.GraphModule):
        return ()
    names = sorted(methods, key=lambda name: own.index(methods[name]))  # the user's own before those of a framework
    some = ", ".join(f"{name}()" for name in names[:_NAMED]) + (" …" if len(names) > _NAMED else "")
    return (
        f"the result is a GraphModule and has no {some} as {type(model).__name__} has; to keep the class and its "
        "methods, compress(copy.deepcopy(model), …, inplace=True)",
    )


_NAMED = 4
"""How many methods a warning names."""


def _made(gm: fx.GraphModule, *others: nn.Module | None) -> dict[int, Tensor]:
    """Return by identity the tensors of ``gm`` that share no memory with any of the others'."""
    taken = {address(t) for other in others if other is not None for t in _tensors(other)}
    return {id(t): t for t in _tensors(gm) if address(t) not in taken}


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _independent(gm: fx.GraphModule, model: nn.Module, made: Mapping[int, Tensor]) -> fx.GraphModule:
    """Return a copy that shares no tensor with ``model``, has the ones ``made``, and does not keep ``model`` alive."""
    let_go(gm)
    result = independent_copy(gm, made)
    assert isinstance(result, fx.GraphModule)
    forget(result)  # neither the example inputs nor an executed plan belong in a saved model
    _restore_modes(result, model)
    return result


def _restore_modes(result: nn.Module, model: nn.Module) -> None:
    """Give each module the mode of the module of this name in ``model``, or of the nearest one that contains it."""
    modes = {name: m.training for name, m in model.named_modules(remove_duplicate=False)}
    for name, module in result.named_modules(remove_duplicate=False):
        container = name
        while container not in modes:
            container = container.rpartition(".")[0]
        module.training = modes[container]


def _inside(
    capture: Captured, gm: fx.GraphModule, model: nn.Module, inplace: bool, reference: Any, made: Mapping[int, Tensor]
) -> Installed:
    captured_model = capture.model or model
    target = model if inplace else structural_copy(captured_model)
    fast_paths = switches(target)
    replaced = capture.install(gm, target)
    try:
        outputs, flops = _checked(capture, gm, target)
    except BaseException as error:
        undo(target, replaced)
        restore(target, fast_paths)
        if not isinstance(error, FxlrdError):
            raise
        remedy = "name what reads them in skip=" if capture.user_forward else "use inplace=False"
        raise VerificationError(f"the model does not use its layers as its graph does ({error}); {remedy}") from error
    result = target if inplace else independent_copy(target, made)
    remember(result, origin_of(target, model, replaced))
    save_all_of(result)
    register()
    output_error = None if reference is None else _output_error(outputs, reference)
    return Installed(result, True, capture.outside, flops, output_error)


def _checked(capture: Captured, gm: fx.GraphModule, target: nn.Module) -> tuple[Any, int | None]:
    """Check ``target``, with the layers of ``gm`` in it, against ``gm``. Return outputs and FLOPs of a user's forward.

    A graph has one call of a region for each shape of its inputs. The model may make more: its FLOPs are counted.
    """
    moved = capture.difference_inside(target, gm)
    outputs, flops = _run_counted(structural_copy(target), capture.inputs) if capture.user_forward else (None, None)
    if moved.relative > rounding(list(target.parameters())):
        raise VerificationError(f"the outputs differ by {moved.relative:.2g}")
    return outputs, flops


def _run_counted(model: nn.Module, inputs: Inputs) -> tuple[Any, int]:
    try:
        return counted(model, inputs)
    except FxlrdError as error:
        cause = one_line(error.__cause__ or error)
        raise VerificationError(f"the compressed model fails on the example inputs: {cause}") from error


def _output_error(outputs: Any, reference: Any) -> OutputError:
    if not any(t.numel() for t in tensors(reference)):  # a detector that finds nothing
        return OutputError(None)
    try:
        return OutputError(difference(tensors(outputs), tensors(reference), "output").relative)
    except VerificationError:
        return OutputError(None)
