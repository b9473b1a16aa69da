"""What a compression did: figures before and after, layer by layer, pass by pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from fxlrd.files import write_out
from fxlrd.graph import cost
from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.cost import NOTHING, Cost
from fxlrd.pipeline import Record
from fxlrd.report import table
from fxlrd.timing.clock import Timing


@dataclass(frozen=True, repr=False)
class Report:
    """The figures of one compression.

    ``before`` and ``after`` have params, flops (for the example inputs, 2 × multiply-adds), depth and
    latency_ms (None if not measured). ``layers`` has a dict for every conv and linear layer of the original,
    ``passes`` one for each pass, as `to_dict` gives them. ``diff`` is the graph before against that after, as plain
    data (`fxlrd.diff`).
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

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, fit for JSON."""
        names = ("model", "device", "settings", "before", "after", "layers", "passes", "warnings")
        return {name: getattr(self, name) for name in names}

    def to_table(self) -> str:
        """Return the report as text: the headline, the passes, the layers."""
        return table.report_text(self.to_dict())

    def __repr__(self) -> str:
        return f"Report({table.summary(self.to_dict())})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: headline and layers, without a script."""
        from fxlrd.report.html import fragment

        return fragment(self.to_dict())

    def to_html(self, path: str | Path) -> None:
        """Write the report as one page that needs nothing else: no server, no network."""
        from fxlrd.report.html import page

        write_out(Path(path), page(self.to_dict(), self.diff))

    def ranks_table(self) -> str:
        """Return the paper's Table 2 of this model: ranks by ratio and as snapped, with the times behind them."""
        return table.ranks_table(self.ledger, self.layers)


def figures(gm: fx.GraphModule, latency: Timing | None = None, outside: Cost = NOTHING) -> dict[str, Any]:
    """Return params, flops, depth and latency_ms of a propagated graph module, and of what is outside of it.

    The depth of regions alone is not that of the model: None.
    """
    return {
        "params": cost.params(gm) + outside.params,
        "flops": cost.flops(gm) + outside.flops,
        "depth": captured_or_bare(gm).depth(gm),
        "latency_ms": None if latency is None else latency.seconds * 1e3,
    }
