"""What a compression did: figures before and after, layer by layer, pass by pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxlrd.files import write_out
from fxlrd.graph import cost
from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.cost import Cost
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.installation import Installed
from fxlrd.pipeline import Pipeline, PipelineResult, Record
from fxlrd.report import table
from fxlrd.report.advice import advice
from fxlrd.report.numbers import MODES, finite
from fxlrd.report.rows import PassRow, layer_rows
from fxlrd.timing.cache import Setting
from fxlrd.timing.clock import Timing
from fxlrd.timing.inductor import Compile

_MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, repr=False)
class Report:
    """The figures of one compression.

    Attributes:
        model: the name of the model's class.
        device: the processor that it ran on.
        settings: ``pipeline`` in text form, ``inputs``, ``layout`` (memory format), ``compile``, ``threads``,
            ``torch``, ``mode`` (these in words); ``speedup`` and ``speedup_spread`` if the model was timed;
            ``output_error`` (relative) of a model that could not be captured as one graph.
        before: ``params``, ``flops`` (2 × multiply-adds, for the example inputs), ``depth`` and ``latency_ms`` of the
            original; None for what is not known.
        after: the same of the compressed model.
        layers: a dict for every conv and linear layer of the original, see `fxlrd.report.rows.LayerRow`.
        passes: a dict for each pass, see `fxlrd.report.rows.PassRow`.
        warnings: what capture had to freeze or leave out, and what to try where the result is slow or inaccurate.
        ledger: the records of the passes.
        diff: the graph before against the graph after, as `fxlrd.diff` gives it as plain data.
    """

    model: str
    device: str
    settings: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    layers: list[dict[str, Any]]
    passes: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    ledger: tuple[Record, ...] = field(default=())
    diff: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        original: fx.GraphModule,
        run: PipelineResult,
        installed: Installed,
        *,
        model: str,
        device: torch.device,
        pipeline: Pipeline,
        under_inductor: Compile,
        timings: Mapping[str, Timing],
        diff: dict[str, Any],
    ) -> Report:
        """Return the report on what ``pipeline`` made of the graph ``original``.

        ``timings`` are those of the model ``before`` and ``after``, or empty.
        """
        capture, gm = captured_or_bare(original), run.graph_module
        rows = layer_rows(original, gm, run.ledger, dropped=not installed.complete)
        return cls(
            model=model,
            device=Setting.current(device, under_inductor).device,
            settings=_settings(pipeline, capture.inputs, under_inductor, timings, installed),
            before=_figures(original, installed.outside, timings.get("before")),
            after=_figures(gm, installed.outside, timings.get("after"), installed.flops),
            layers=[asdict(row) for row in rows],
            passes=[asdict(PassRow.of(record)) for record in run.ledger],
            warnings=[
                *(text for text in capture.warnings if not installed.complete or text not in capture.of_graph),
                *installed.warnings,
                *(text for record in run.ledger for text in record.warnings),
                *advice(pipeline, rows, timings.get("after") if run.modified else None),
            ],
            ledger=run.ledger,
            diff=diff,
        )

    def __repr__(self) -> str:
        return f"Report({table.summary(self.to_dict())})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: headline and layers, without a script."""
        from fxlrd.report.html import fragment

        return fragment(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, fit for JSON: a number that is not finite is None."""
        data: dict[str, Any] = finite(self._data())
        return data

    def _data(self) -> dict[str, Any]:
        names = ("model", "device", "settings", "before", "after", "layers", "passes", "warnings")
        return {name: getattr(self, name) for name in names}

    def to_table(self) -> str:
        """Return the report as text: the headline, the passes, the layers."""
        return table.report_text(self._data())

    def to_html(self, path: str | Path) -> None:
        """Write the report as one page that needs nothing else: no server, no network."""
        from fxlrd.report.html import page

        write_out(Path(path), page(self.to_dict(), self.diff))

    def ranks_table(self) -> str:
        """Return the paper's Table 2 of this model: ranks by ratio and as snapped, with the times behind them."""
        return table.ranks_table(self.ledger, self.layers)


def _figures(
    gm: fx.GraphModule, outside: Cost, latency: Timing | None = None, flops: int | None = None
) -> dict[str, Any]:
    """Return the figures of a model: of its propagated graph and of what is ``outside`` of that.

    ``flops`` are those of the model where it was run by itself.
    """
    return {
        "params": cost.params(gm) + captured_or_bare(gm).added_params(gm) + outside.params,
        "flops": cost.flops(gm) + outside.flops if flops is None else flops,
        "depth": captured_or_bare(gm).depth(gm),
        "latency_ms": None if latency is None else latency.seconds * 1e3,
    }


def _settings(
    pipeline: Pipeline,
    inputs: Inputs,
    under_inductor: Compile,
    timings: Mapping[str, Timing],
    installed: Installed,
) -> dict[str, Any]:
    settings = {"pipeline": str(pipeline), **setting(inputs, under_inductor)}
    if timings:
        ratio, spread = timings["after"].ratio, timings["after"].spread
        settings["speedup"] = 1 / ratio
        settings["speedup_spread"] = spread / ratio**2
    if installed.output_error is not None:
        settings["output_error"] = installed.output_error.relative
    return settings


def setting(inputs: Inputs, under_inductor: Compile) -> dict[str, Any]:
    """Return what models are timed with: ``inputs``, ``layout``, ``compile``, ``threads``, ``torch``, ``mode``."""
    layout = "channels_last" if _channels_last(inputs) else "contiguous"
    threads, version = torch.get_num_threads(), torch.__version__
    return {
        "inputs": inputs.describe(),
        "layout": layout,
        "compile": under_inductor,
        "threads": threads,
        "torch": version,
        "mode": f"{layout}, {MODES[under_inductor]}, {threads} threads, torch {version}",
    }


def _channels_last(inputs: Inputs) -> bool:
    """Whether any input is in channels_last memory format and not contiguous as well."""
    for tensor in tensors((inputs.args, inputs.kwargs)):
        memory_format = _MEMORY_FORMATS.get(tensor.dim())
        if memory_format is None or tensor.is_contiguous():
            continue
        if tensor.is_contiguous(memory_format=memory_format):
            return True
    return False
