"""Inputs held out of a fit, to judge it by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from fxlrd.calibration.batches import HOLDOUT_PERIOD, examples, first_rows, rows_are_examples
from fxlrd.calibration.metric import logits_among, squared_error
from fxlrd.calibration.padding import all_at_tokens, tokens_of
from fxlrd.errors import Reason
from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.facts import Fact
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import fork


class Outputs(Sequence[list[Tensor]]):
    """The outputs of a graph for inputs, each made when it is first asked for: logits of many tokens are large."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Inputs]) -> None:
        self._gm, self._inputs = fork(gm), inputs
        self._made: dict[int, list[Tensor]] = {}

    def __len__(self) -> int:
        """Return the number of inputs."""
        return len(self._inputs)

    def __getitem__(self, i: Any) -> Any:
        """Return the outputs for the inputs ``i``."""
        if i not in self._made:
            self._made[i] = outputs(self._gm, self._inputs[i])
        return self._made[i]


@dataclass(frozen=True)
class Holdout:
    """Inputs that are in no fit, with the outputs of the original model for them, and which of those are logits."""

    inputs: tuple[Inputs, ...]
    outputs: Sequence[list[Tensor]]
    logits: tuple[bool, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Holdout:
        return self

    def error(self, gm: fx.GraphModule) -> float:
        """Return the root of the squared error (fxlrd/calibration/metric.py) of a graph: the mean over the batches.

        Infinite where outputs are no longer finite.
        """
        errors = [self._squared(gm, *pair) for pair in zip(self.inputs, self.outputs, strict=True)]
        error = math.sqrt(sum(errors) / len(errors))
        return error if math.isfinite(error) else math.inf

    def first(self, rows: int) -> Holdout:
        """Return the first batches, until their outputs have so many rows: a token's logits are one, or an image's."""
        first: list[list[Tensor]] = []
        for batch in self.outputs:
            first.append(batch)
            if sum(t.numel() // max(1, t.shape[-1]) for made in first for t in made if t.dim()) >= rows:
                break
        return replace(self, inputs=self.inputs[: len(first)], outputs=first)

    def _squared(self, gm: fx.GraphModule, inputs: Inputs, original: list[Tensor]) -> float:
        tokens = tokens_of(gm, inputs)
        changed = all_at_tokens(outputs(gm, inputs), tokens)
        return squared_error(changed, all_at_tokens(original, tokens), self.logits)


TOO_FEW = Reason(
    "too-few-inputs",
    "too few calibration inputs to hold some out, to judge it by",
    f"give {HOLDOUT_PERIOD} batches, or {HOLDOUT_PERIOD} inputs in one",
)


@dataclass(frozen=True)
class TooFew:
    """Inputs were to be held out, but there were too few for it, or they say too little."""

    reason: Reason = TOO_FEW


@dataclass(frozen=True)
class Disabled:
    """No inputs were to be held out."""


HeldOut = Holdout | TooFew | Disabled
_held_out: Fact[HeldOut] = Fact("held_out", HeldOut)  # type: ignore[arg-type]
reference = Fact("reference", fx.GraphModule)
"""The graph as it was when it was calibrated, before any pass rewrote it."""


INCOMPARABLE = (
    "on held-out inputs the outputs have other shapes than the original's, as where a detector finds other boxes, or "
    "are not finite: their error is not known; compress the model without what selects boxes (NMS)"
)


@dataclass(frozen=True)
class Verdict:
    """Whether to keep a change, and the errors on held-out inputs, in words."""

    keep: bool
    note: str = ""


def keep_if_better(held_out: HeldOut, before: fx.GraphModule, after: fx.GraphModule) -> Verdict:
    """Judge a change by the inputs held out: it is kept if it lowers the error on them, or where there are none."""
    if not isinstance(held_out, Holdout):
        return Verdict(True)
    was, now = held_out.error(before), held_out.error(after)
    note = in_words(was, now)
    return Verdict(True, note) if now < was else Verdict(False, f"{note}: not kept")


def in_words(was: float, now: float) -> str:
    """Return what became of the error on held-out inputs."""
    return INCOMPARABLE if math.isinf(was) else f"output error on held-out inputs {was:.3g} → {now:.3g}"


def held_out_of(gm: fx.GraphModule, inputs: Iterable[Inputs]) -> Holdout | TooFew:
    """Return inputs held out of a fit with the graph's outputs for them; `TooFew` if there are none."""
    inputs = tuple(inputs)
    if not inputs:
        return TooFew()
    return Holdout(inputs, Outputs(gm, inputs), logits_among(gm) or ())


def first_held_out(gm: fx.GraphModule, held: Holdout, count: int) -> list[Inputs]:
    """Return the first ``count`` inputs held out; a batch whose rows are no examples of their own counts whole."""
    first: list[Inputs] = []
    for inputs in held.inputs:
        rows = first_rows(inputs, count)
        if rows is not inputs and not rows_are_examples(gm, inputs, rows):
            rows = inputs
        first.append(rows)
        count -= examples(rows)
        if count <= 0:
            break
    return first


def outputs(gm: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
    """Return the output tensors in eval mode, without gradients: of the model, also where the graph is of regions."""
    return captured_or_bare(gm).outputs(gm, inputs)


def record_calibrated(gm: fx.GraphModule, held_out: HeldOut) -> None:
    """Record on a graph module what it is now, before any pass rewrites it, and the inputs held out of its fits."""
    reference.record(gm, fork(gm))
    _held_out.record(gm, held_out)


def held_out(gm: fx.GraphModule) -> HeldOut:
    """Return the inputs held out when the graph was calibrated; `Disabled` if it was not."""
    return _held_out(gm) or Disabled()


def let_go(gm: fx.GraphModule) -> None:
    """Forget the inputs held out and the graph that was calibrated."""
    _held_out.drop(gm)
    reference.drop(gm)
