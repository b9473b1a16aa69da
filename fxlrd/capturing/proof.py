"""Proof that a captured model does what the original does.

A trace bakes in whatever did not pass through a proxy: features that hooks stored, state of the last call, tensors that
forward makes. The inputs that it was made with do not show that. So the original and what is to take its place are
called twice, from the same state: on other inputs of the same form, and then on the example inputs. They must give the
same outputs, leave the same in their buffers, and let gradients reach the same parameters.

The user's model is not called, since calls may leave something on it: copies of it are (`fxlrd.graph.copies`).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import BaseTorchFunctionMode

from fxlrd.capturing.multiplied import NotingMultiplied
from fxlrd.capturing.settling import changed_weight, never_settles, settled, weights_of
from fxlrd.capturing.tracing import CONSTANT
from fxlrd.errors import FxlrdError, Reason, VerificationError, one_line
from fxlrd.graph.compare import difference, rounding
from fxlrd.graph.copies import private_copy, structural_copy
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.regions import Call as Recorded
from fxlrd.graph.regions import recorded_calls
from fxlrd.graph.run import bit_equal, called_on, counting, evaluating, isolated
from fxlrd.graph.writes import address, guarding_weights

Call = Callable[[Any, Inputs], Any]


def called_plainly(model: nn.Module, inputs: Inputs) -> Any:
    """`called_on` without fast paths that read weights in the place of calling layers."""
    with BaseTorchFunctionMode():
        return called_on(model, inputs)


def called_counting(model: nn.Module, inputs: Inputs) -> Any:
    """`called_on` while FLOPs are counted, which turns some fused operators off."""
    with counting():
        return called_on(model, inputs)


@dataclass(frozen=True)
class Gradients:
    """Where gradients of a model's outputs go.

    Attributes:
        parameters: the addresses of the parameters that they reach.
        functions: how often each autograd function that is written in Python is called, by its name.
    """

    parameters: frozenset[int]
    functions: Mapping[str, int]


@dataclass(frozen=True)
class Behaviour:
    """What a model did in two calls.

    Attributes:
        outputs: the output tensors for the example inputs, copied.
        other_outputs: those for other inputs, in the call before.
        buffers: what the calls left in the buffers, by name.
        changed: the names of the buffers that hold something else than before.
        gradients: where gradients of the other outputs go; None where the model fails with gradients on.
        mappings: the classes of dicts in the other outputs, in order.
    """

    outputs: list[Tensor]
    other_outputs: list[Tensor]
    buffers: Mapping[str, Tensor]
    changed: frozenset[str]
    gradients: Gradients | None
    mappings: Sequence[type] = ()


class Original:
    """A model to compare others with: what it does when it is called on other inputs, and then on the example inputs.

    If the model fails on other inputs, the first call has the example inputs as well. Raises FxlrdError if it fails on
    the example inputs.

    Attributes:
        users: a copy of the model, with buffers of its own, which is never run.
        model: what is captured of it: the same, or a copy of it with open attentions (`fxlrd.capturing.attentions`).
        closed: why attentions are not open, by name.
        inputs: the example inputs.
        other: other inputs of the same form, or the example inputs where the model fails on those.
        changed_weight: a parameter that the user's model changes when it is called, or None. The copy then has weights
            of its own, see `fxlrd.capturing.settling`.
        behaviour: what another copy did.
        flops: the FLOPs on the example inputs (2 × multiply-adds).
        multiplied: the names of the parameters that products read on the example inputs.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs, self.flops = private_copy(model), inputs, 0
        self.closed: Mapping[str, Reason] = {}
        self.multiplied: frozenset[str] = frozenset()
        self.changed_weight: str | None = None
        behaviour = self._without_writing()
        self.behaviour = self._settled() if behaviour is None else behaviour
        self.users = self.model

    def _without_writing(self) -> Behaviour | None:
        """Return what a copy of the model does; None if it writes into a parameter, which stays as it is."""
        try:
            with guarding_weights(self.model) as guard:
                behaviour = self._observed()
        except Exception:
            if guard.written is None:
                raise
            return None
        return behaviour if guard.written is None else None

    def _settled(self) -> Behaviour:
        """Let a copy with weights of its own stand for the model, see `fxlrd.capturing.settling`."""
        users, self.model = self.model, settled(self.model, self.inputs)
        self.changed_weight = changed_weight(weights_of(users), self.model)
        before = {name: weight.clone() for name, weight in weights_of(self.model).items()}
        behaviour = self._observed()
        if name := changed_weight(before, self.model):
            raise never_settles(self.model, name)
        return behaviour

    def _observed(self) -> Behaviour:
        """Return what a copy of the model does, on other inputs and with gradients as far as it takes these."""
        other = self.inputs.varied(torch.Generator().manual_seed(0))
        trials = [(other, True), (other, False), (self.inputs, True), (self.inputs, False)]
        for self.other, self._gradients in trials:
            try:
                return self.behave(structural_copy(self.model), on_example=self._count)
            except _OtherInputsError as error:
                cause = error.cause
        raise cause

    def _count(self, model: nn.Module, inputs: Inputs) -> Any:
        with counting() as counter, NotingMultiplied(model) as noting:
            outputs = called_on(model, inputs)
            self.multiplied = frozenset(noting.names)
            self.flops = counter.get_total_flops()
        return outputs

    def behave(
        self, model: nn.Module, call: Call = called_plainly, on_example: Call = called_counting, seed: int = 0
    ) -> Behaviour:
        """Return what ``model`` does in the two calls; its buffers are as before afterwards.

        ``call`` and ``on_example`` call it, given the model and the inputs. The latter counts FLOPs, which turns some
        fused operators off. Random numbers depend on ``seed`` alone.
        """
        with evaluating(model), isolated(model, seed):
            before = _buffers(model)
            try:
                other_outputs, gradients, mappings = self._call_on_other(model, call)
            except Exception as error:
                raise _OtherInputsError(error) from error
            with torch.no_grad():
                outputs = _copied(on_example(model, self.inputs))
            after = _buffers(model)
        changed = {name for name, value in after.items() if name not in before or not bit_equal(value, before[name])}
        return Behaviour(outputs, other_outputs, after, frozenset(changed), gradients, mappings)

    def _call_on_other(self, model: nn.Module, call: Call) -> tuple[list[Tensor], Gradients | None, Sequence[type]]:
        if not self._gradients:
            with torch.no_grad():
                made = call(model, self.other)
            return _copied(made), None, [*_mappings(made)]
        # Where gradients go is read off the autograd graph.
        with torch.enable_grad(), not_saving_for_backward():
            made = call(model, self.other)
            outputs = tensors(made)
        return _copied(outputs), _gradients_of(outputs), [*_mappings(made)]

    def difference(
        self, model: nn.Module, call: Call = called_plainly, on_example: Call = called_counting, seed: int = 0
    ) -> Reason | None:
        """Return what ``model`` does otherwise than the original, or None; see `behave` for the arguments."""
        try:
            behaviour = self.behave(model, call, on_example, seed)
        except Exception as error:  # whatever it is, the original does not fail
            cause = error.cause if isinstance(error, _OtherInputsError) else error
            return Reason("fails", f"fails where the model runs: {one_line(cause)}")
        return self._other_values(behaviour) or self._other_gradients(behaviour)

    def difference_in_values(self, model: nn.Module, call: Call, on_example: Call, seed: int) -> Reason | None:
        """`difference`, but for where gradients go: parameters of ``model`` are computed from the original's."""
        try:
            return self._other_values(self.behave(model, call, on_example, seed))
        except Exception as error:
            return Reason("fails", f"fails where the model runs: {one_line(error)}")

    def recorded(self, names: Collection[str]) -> tuple[dict[str, list[Recorded]], dict[str, list[Recorded]]]:
        """Return the calls of modules for the example inputs, and those in two calls of the model after that."""
        model = structural_copy(self.model)

        def calls(*inputs: Inputs) -> dict[str, list[Recorded]]:
            return recorded_calls(model, names, lambda: [called_on(model, each) for each in inputs])

        with evaluating(model), isolated(model), torch.no_grad():
            return calls(self.inputs), calls(self.other, self.inputs)

    def _other_values(self, behaviour: Behaviour) -> Reason | None:
        expected = self.behaviour
        return (
            _other_outputs(behaviour.outputs, expected.outputs)
            or _other_outputs(behaviour.other_outputs, expected.other_outputs)
            or _other_mappings(behaviour.mappings, expected.mappings)
            or self._other_buffers(behaviour)
        )

    def _other_buffers(self, behaviour: Behaviour) -> Reason | None:
        for name in sorted(self.behaviour.changed | behaviour.changed):
            value, expected = behaviour.buffers.get(name), self.behaviour.buffers.get(name)
            if name.startswith(CONSTANT):
                return Reason("hidden-state", "writes into a tensor that forward makes anew in each call")
            if value is None or expected is None or not same([value], [expected]):
                return Reason("buffers", f"leaves something else in the buffer {name} than the model does")
        return None

    def _other_gradients(self, behaviour: Behaviour) -> Reason | None:
        expected, actual = self.behaviour.gradients, behaviour.gradients
        if expected is None or actual is None or expected == actual:
            return None
        if name := self._name_of(actual.parameters - expected.parameters):
            return Reason("gradients", f"lets gradients reach {name} (is a part of its forward under torch.no_grad()?)")
        if name := self._name_of(expected.parameters - actual.parameters):
            return Reason("gradients", f"lets no gradient reach {name}, which the model does")
        if lost := Counter(expected.functions) - Counter(actual.functions):
            return Reason("gradients", f"loses the backward of {next(iter(lost))}")
        return None

    def _name_of(self, addresses: frozenset[int]) -> str | None:
        return next((name for name, p in self.model.named_parameters() if address(p) in addresses), None)


class _OtherInputsError(Exception):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def not_saving_for_backward() -> saved_tensors_hooks:
    """Return a context in which nothing is saved for a backward pass, which is never made."""
    return saved_tensors_hooks(lambda _: None, _no_backward)


def same(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether the tensors agree in number, shape and dtype, and in value but for rounding."""
    try:
        return difference(outputs, expected, "outputs").relative <= rounding(expected)
    except FxlrdError:
        return False


def _other_outputs(outputs: list[Tensor], expected: list[Tensor]) -> Reason | None:
    try:
        relative = difference(outputs, expected, "").relative
    except VerificationError as error:
        autocast = " (is a part of its forward under autocast?)" if _other_dtype(outputs, expected) else ""
        return Reason("outputs", f"differs from the model in its outputs{error}{autocast}")
    if relative <= rounding(expected):
        return None
    return Reason(
        "outputs",
        f"differs from the model by {relative:.2g} relative (is its forward random in eval mode, does it depend on "
        "values, or does it read what a hook or an earlier call stored?)",
    )


def _mappings(value: Any) -> Iterator[type]:
    if isinstance(value, dict):
        yield type(value)
        for part in value.values():
            yield from _mappings(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _mappings(part)


def _other_mappings(classes: Sequence[type], expected: Sequence[type]) -> Reason | None:
    """Return that a dict of the user's own class, whose attributes callers may read, came out as another one."""
    for cls, own in zip(classes, expected, strict=False):
        if cls is not own and own not in (dict, OrderedDict):
            return Reason("outputs", f"returns a {cls.__name__} in the place of a {own.__name__}")
    return None


def _other_dtype(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    return [t.dtype for t in outputs] != [t.dtype for t in expected]


def _copied(value: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors(value)]


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers() if not buffer.is_meta}


def _no_backward(_: Any) -> Any:
    raise AssertionError("no backward pass is made")


def _gradients_of(outputs: list[Tensor]) -> Gradients:
    parameters = {address(t) for t in outputs if t.is_leaf and t.requires_grad}
    functions: Counter[str] = Counter()
    pending = [t.grad_fn for t in outputs if t.grad_fn is not None]
    visited = set(pending)
    while pending:
        node = pending.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            functions[type(node).__name__.removesuffix("Backward")] += 1
        if (variable := getattr(node, "variable", None)) is not None:
            parameters.add(address(variable))
        following = {n for n, _ in node.next_functions if n is not None} - visited
        visited |= following
        pending += following
    del functions["BackwardHookFunction"]  # of modules with backward hooks, which are torch's own
    return Gradients(frozenset(parameters), functions)
