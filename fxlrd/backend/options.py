"""The options of the backend, and what follows from them: a pipeline, and the inner compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import fx

from fxlrd.budget import Budget
from fxlrd.errors import FxlrdError, unknown
from fxlrd.pipeline import Pipeline
from fxlrd.request import pipeline_for


@dataclass(frozen=True)
class Options:
    """The options of the backend. Their values are plain, since torch compares them.

    Attributes:
        ratio, preset, budget, skip, verify: as in `fxlrd.compress`; the budget in text form, such as "params=0.5".
        passes: a pipeline in text form.
        inner: the compiler of the rewritten graph, by its name in torch.compile.
        inner_options: options of the inner compiler.
        inner_mode: ``mode=`` of the inner compiler (torch.compile takes ``mode=`` only without options).
    """

    ratio: float | None = None
    preset: str | None = None
    passes: str | None = None
    budget: str | None = None
    skip: str | tuple[str, ...] = ()
    verify: bool = True
    inner: str = "inductor"
    inner_options: Mapping[str, Any] = field(default_factory=dict)
    inner_mode: str | None = None

    @classmethod
    def read(cls, options: Mapping[str, Any] | None = None, mode: str | None = None, **others: Any) -> Options:
        """Return the options that torch.compile passes on. Raises FxlrdError for an unknown one."""
        names = [f.name for f in fields(cls)]
        for name in (*(options or {}), *others):
            if name not in names:
                raise unknown("option of backend fxlrd", name, names)
        result = cls(**{"inner_mode": mode, **(options or {}), **others})
        if result.inner == "fxlrd":
            raise FxlrdError("inner: backend fxlrd cannot be its own inner compiler; leave it out for inductor")
        return result

    def pipeline(self) -> Pipeline:
        """Return the passes. Raises FxlrdError for those that read calibration inputs."""
        pipeline = pipeline_for(
            ratio=self.ratio,
            preset=self.preset,
            pipeline=self.passes,
            budget=None if self.budget is None else Budget.parse(self.budget),
            skip=(self.skip,) if isinstance(self.skip, str) else tuple(self.skip),
            compile=self.inner == "inductor",
        )
        fitted = [type(p).__name__.lower() for p in pipeline.passes if hasattr(p, "calibration")]
        if fitted:
            raise FxlrdError(
                f"{pipeline}: {', '.join(fitted)} read calibration inputs, which torch.compile cannot pass on: "
                "fxlrd.compress(model, inputs, calibration=…), then torch.compile(result.model)"
            )
        return pipeline

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Return ``gm``, compiled by the inner compiler."""
        result: Callable[..., Any]
        if self.inner == "inductor":
            inductor = torch._TorchCompileInductorWrapper(self.inner_mode, dict(self.inner_options), None)
            result = inductor(gm, list(inputs))
            return result
        from torch._dynamo import list_backends, lookup_backend

        names = list_backends(exclude_tags=())
        if self.inner not in names:
            raise unknown("inner compiler", str(self.inner), names)
        arguments = {"mode": self.inner_mode, "options": dict(self.inner_options)}
        result = lookup_backend(self.inner)(gm, list(inputs), **{k: v for k, v in arguments.items() if v})
        return result
