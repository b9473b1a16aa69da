"""Figures as SVG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Sequence[tuple[float, float, float]]
"""Points: x, y and the half-width of y's interval."""


def draw(path: Path, lines: Mapping[str, Line], x: str, y: str, axis: Mapping[str, Any] | None = None) -> None:
    """Draw lines with their intervals; ``axis`` sets properties of the axes, as matplotlib calls them."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path} is not drawn: it needs matplotlib (pip install -e '.[bench]')")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    # Without these two, a figure that is drawn again differs in its date and in the names of its parts.
    with pyplot.rc_context({"svg.hashsalt": path.stem}):
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for name, line in lines.items():
            xs, ys, spreads = zip(*line, strict=True)
            axes.errorbar(xs, ys, yerr=spreads, marker="o", markersize=3, linewidth=1, elinewidth=0.7, label=name)
        axes.set(xlabel=x, ylabel=y, **(axis or {}))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if lines:
            axes.legend(fontsize=8, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
    print(f"{path} written")
