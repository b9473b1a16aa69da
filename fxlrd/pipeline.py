"""Passes in order, each verified before the next, and a ledger of what they did.

The text form names passes and their options, ``decompose{ratio=2,skip=fc|layer1.*},snap``: values are
numbers, words, true/false; ``a|b`` is a tuple of names and ``32x24`` a tuple of ranks.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Protocol

from torch import Tensor, fx

from fxlrd import cost
from fxlrd.errors import FxlrdError, VerificationError, unknown
from fxlrd.graph import Inputs, annotate, captured, difference, fork, propagate, rounding
from fxlrd.latency import Timing
from fxlrd.passes import PASSES, PassResult, Site, Skip
from fxlrd.progress import Progress, quiet

PRESETS = {
    "lrd": "decompose",
    "ranks": "decompose,snap",
    "freeze": "decompose,freeze",
    "merge": "calibrate{outputs=false,effects=256,holdout=true},merge{snap=true},refit,recalibrate",
    "branch": "decompose,branch",
    "auto": "calibrate{outputs=false,patches=1152,effects=256,holdout=true},allocate{latency=0.5},"
    "merge,decompose,refit,recalibrate",
}
"""The presets in text form: the paper's rows, and the best that we know."""


class Pass(Protocol):
    """What a pipeline runs: a dataclass whose fields are the pass's options."""

    def __call__(self, gm: fx.GraphModule, progress: Progress = ...) -> PassResult:
        """Return the rewritten copy of ``gm``."""
        ...


Callback = Callable[[fx.GraphModule, Pass, fx.GraphModule], None]


@dataclass(frozen=True)
class Record:
    """One line of the ledger: what a pass did, and how far outputs moved on the example inputs.

    ``relative_error`` and ``max_abs_error`` are against the pipeline's input, ``step_error`` (relative) against
    the pass's own; None where nothing was verified. ``exact`` says that every site was. ``timings`` holds what
    the pass measured, by layer and ranks.
    """

    name: str
    text: str
    exact: bool
    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...]
    max_abs_error: float | None
    relative_error: float | None
    step_error: float | None
    seconds: float
    params: int
    flops: int
    depth: int
    note: str = ""
    timings: Mapping[str, Mapping[str, Timing]] = field(default_factory=dict)


@dataclass(frozen=True)
class PipelineResult:
    """The rewritten graph module, whether any pass modified it, and the ledger."""

    graph_module: fx.GraphModule
    modified: bool
    ledger: tuple[Record, ...]


@dataclass(frozen=True)
class Pipeline:
    """An ordered tuple of passes. Calling it leaves the graph module that it is given unchanged."""

    passes: tuple[Pass, ...]

    def __init__(self, passes: Iterable[Pass] | Pipeline) -> None:
        if isinstance(passes, Pipeline):
            passes = passes.passes
        if isinstance(passes, str) or not isinstance(passes, Iterable):
            raise FxlrdError(f"a pipeline takes a list of passes, not {passes!r}; for text: Pipeline.parse")
        object.__setattr__(self, "passes", tuple(passes))
        for p in self.passes:
            if not callable(p) or isinstance(p, type):
                raise FxlrdError(f"a pipeline takes passes, such as Decompose(), not {p!r}; for text: Pipeline.parse")

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read the text form. Raises FxlrdError for an unknown pass or option, with close matches."""
        if not isinstance(text, str):
            raise FxlrdError(f"passes in text form are a string such as decompose{{ratio=2}},snap, not {text!r}")
        passes = []
        for name, options in _split(text):
            if name not in PASSES:
                raise unknown("pass", name, PASSES)
            passes.append(_build(name, options))
        return cls(passes)

    @classmethod
    def preset(cls, name: str) -> Pipeline:
        """Return a preset by name. Raises FxlrdError for an unknown one."""
        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        return cls.parse(PRESETS[name])

    def with_options(self, **options: Any) -> Pipeline:
        """Return the pipeline with each option set on the passes that have it. One that none has is an error."""
        for option in options:
            if not any(option in _options(p) for p in self.passes):
                raise FxlrdError(f"{option}: no pass of {self} has this option")
        return Pipeline(
            replace(p, **{k: v for k, v in options.items() if k in _options(p)})  # type: ignore[type-var]
            for p in self.passes
        )

    def __str__(self) -> str:
        return ",".join(_text(p) for p in self.passes)

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Any = None,
        *,
        verify: bool = True,
        callback: Callback | None = None,
        progress: Progress = quiet,
    ) -> PipelineResult:
        """Run the passes on ``gm``.

        ``example_inputs`` default to those that ``gm`` was captured with; without any, nothing is verified.
        ``callback(before, pass, after)`` is called after each pass. Raises VerificationError if an exact pass
        changed the outputs beyond rounding or any pass changed their number, shapes or dtypes.
        """
        gm = fork(gm)
        known = captured(gm)
        inputs = Inputs.of(example_inputs) if example_inputs is not None else known.inputs if known else None
        annotate(gm)
        reference = outputs = propagate(gm, inputs) if inputs is not None else []
        errors: Errors = (0.0, 0.0, 0.0) if verify and inputs is not None else (None, None, None)
        ledger: list[Record] = []
        for step in self.passes:
            start = time.perf_counter()
            result = step(gm, progress)
            after = result.graph_module
            seconds = time.perf_counter() - start
            if result.modified and inputs is not None:
                new = propagate(after, inputs)
                if verify:
                    errors = _verify(step, result, new, outputs, reference)
                outputs = new
            elif errors[2] is not None:
                errors = (*errors[:2], 0.0)
            ledger.append(_record(step, result, errors, seconds))
            if callback is not None:
                callback(gm, step, after)
            gm = after
        return PipelineResult(gm, any(record.sites for record in ledger), tuple(ledger))


Errors = tuple[float | None, float | None, float | None]


def _verify(
    step: Pass,
    result: PassResult,
    outputs: list[Tensor],
    before: list[Tensor],
    reference: list[Tensor],
) -> Errors:
    """Return (largest absolute, relative) error against the reference, and relative against the pass's input."""
    name = type(step).__name__.lower()
    moved = difference(outputs, before, name)
    total = difference(outputs, reference, name)
    if all(site.exact for site in result.sites):
        allowed = rounding(outputs)
        if moved.relative > allowed:
            raise VerificationError(
                f"{name}: said to be exact, but the outputs moved by {moved.relative:.2g} relative "
                f"(allowed: {allowed:.2g}); first site: {result.sites[0].name}. Please report this"
            )
    return total.max_abs, total.relative, moved.relative


def _record(step: Pass, result: PassResult, errors: Errors, seconds: float) -> Record:
    gm = result.graph_module
    return Record(
        type(step).__name__.lower(),
        _text(step),
        all(site.exact for site in result.sites),
        result.sites,
        result.skipped,
        *errors,
        seconds,
        cost.params(gm),
        cost.flops(gm),
        cost.depth(gm),
        result.note,
        result.timings,
    )


def _options(p: Pass) -> dict[str, Any]:
    return {f.name: getattr(p, f.name) for f in fields(p)}  # type: ignore[arg-type]


def _text(p: Pass) -> str:
    """Return a pass in text form, with the options that are not at their defaults."""
    name = next((n for n, cls in PASSES.items() if type(p) is cls), type(p).__name__)
    given = {
        f.name: getattr(p, f.name)
        for f in fields(p)  # type: ignore[arg-type]
        if f.repr and (f.default is MISSING or getattr(p, f.name) != f.default)
    }
    options = ",".join(f"{k}={_value_text(v)}" for k, v in given.items())
    return f"{name}{{{options}}}" if options else name


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        ranks = all(v is None or isinstance(v, int) for v in value)
        return "x".join("-" if v is None else str(v) for v in value) if ranks else "|".join(map(str, value))
    return str(value).removesuffix(".0")


def _split(text: str) -> Sequence[tuple[str, str]]:
    """Split ``a{x=1},b`` into names and the text of their options."""
    found: list[tuple[str, str]] = []
    position = 0
    pattern = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\{([^{}]*)\})?\s*(,|$)")
    while position < len(text) or not found:
        match = pattern.match(text, position)
        if match is None or (match[3] == "," and match.end() == len(text)):
            raise FxlrdError(
                f"cannot read the passes at {text[position:] or text!r}: write them as decompose{{ratio=2}},snap"
            )
        found.append((match[1], match[2] or ""))
        position = match.end()
    return found


def _build(name: str, text: str) -> Pass:
    cls = PASSES[name]
    known = {f.name: f for f in fields(cls) if f.repr}  # data, such as calibration inputs, has no text form
    options = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in known:
            raise unknown(f"option of {name}", key, known)
        if not equals or not value:
            raise FxlrdError(f"{name}: option {key} has no value: write {key}=…")
        if key in options:
            raise FxlrdError(f"{name}: option {key} is given twice")
        options[key] = _value(name, key, value, known[key].default)
    result: Pass = cls(**options)
    return result


def _value(name: str, key: str, text: str, default: Any) -> Any:
    """Read an option's value in the type of its default; None stands for ranks."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, (int, float)):
            return type(default)(text)
        if isinstance(default, tuple):
            return tuple(part.strip() for part in text.split("|"))
        if default is None:
            parts = [None if part == "-" else int(part) for part in text.split("x")]
            if parts == [None]:
                raise ValueError
            return parts[0] if len(parts) == 1 else tuple(parts)
    except (ValueError, KeyError):
        raise FxlrdError(f"{name}: {key}={text} is not a value for this option (default: {default})") from None
    return text
