"""Reports and diffs as HTML: a page with its style, script and data inside, and a fragment for notebooks.

A page fetches nothing. Its tables are complete without the script, which sorts and filters them and draws the charts
from the data that the page carries. The policy in the page's head allows this one style and this one script, by their
hashes, and forbids everything else, including the network. A fragment has no script and no style sheet.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fxlrd.report import points
from fxlrd.report.cells import chart_row, facts, layer_row, moved, step, variant
from fxlrd.report.numbers import count, finite, giga
from fxlrd.report.sides import arranged
from fxlrd.report.table import outcome

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_JOINT = re.compile(r"([._:])(?=[^\s])")
_FOLDER = "report/page"


def page(
    report: Mapping[str, Any],
    diff: Mapping[str, Any] | None = None,
    variants: Sequence[Mapping[str, Any]] = (),
    lead: str = "",
) -> str:
    """Return the page of a report.

    Args:
        report: what `Report.to_dict` returns.
        diff: what `Diff.to_dict` returns for the graphs before and after; None leaves the section out.
        variants: models to compare, the original first: name, accuracy and recalibrated (0…1), params, flops,
            latency_ms, speed and speed_spread of each. The report is that of one of them.
        lead: the sentence under the title; by default the outcome of the compression.
    """
    rows = report["layers"]
    data = {"layers": [chart_row(row) for row in rows], "variants": list(variants)}
    return _render_page(
        "report.html",
        data,
        report=report,
        lead=lead or _sentence(outcome(report)),
        facts=facts(report),
        steps=[step(row) for row in report["passes"]],
        notes=[row for row in report["passes"] if row["note"]],
        layers=[layer_row(number, row) for number, row in enumerate(rows, 1)],
        has_flops=any(row["flops_before"] for row in rows),
        has_times=any(row["latency_ms_before"] is not None for row in rows),
        has_curves=any(len(row["timings"]) > 1 for row in rows),
        has_errors=any(row["ranks"] and row["error"] is not None for row in rows),
        decisions=sorted(Counter(row["decision"] for row in rows).items()),
        variants=[variant(row, variants[0]) for row in variants],
        graph=None if diff is None else arranged(diff),
    )


def fragment(report: Mapping[str, Any]) -> str:
    """Return headline, notes and layers of a report (`Report.to_dict`) as HTML to be placed in another page."""
    layers = [layer_row(number, row) for number, row in enumerate(report["layers"], 1)]
    template = _environment().get_template("fragment.html")
    return template.render(report=report, lead=outcome(report), facts=facts(report), layers=layers)


def frontier_page(frontier: Mapping[str, Any]) -> str:
    """Return the page of a frontier (`Frontier.to_dict`): a chart of errors, one of accuracies if any, and a table."""
    headings, rows = points.cells(frontier)
    return _render_page(
        "frontier.html",
        {"variants": points.chart_points(frontier)},
        frontier=frontier,
        headings=headings,
        rows=rows,
        axes=points.axes(frontier),
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def diff_page(diff: Mapping[str, Any]) -> str:
    """Return a page of a graph diff (`Diff.to_dict`) alone."""
    return _render_page("diff.html", {}, **_diff_context(diff))


def diff_fragment(diff: Mapping[str, Any]) -> str:
    """Return the figures and the changes of a graph diff (`Diff.to_dict`) as HTML to be placed in another page."""
    return _environment().get_template("diff_fragment.html").render(**_diff_context(diff))


def _diff_context(diff: Mapping[str, Any]) -> dict[str, Any]:
    before, after = diff["before"], diff["after"]
    figures = [
        moved(label, before[key], after[key], text)
        for key, label, text in (("params", "Parameters", count), ("flops", "FLOPs", giga), ("nodes", "Nodes", str))
        if before[key] is not None and after[key] is not None
    ]
    title = " and ".join(dict.fromkeys([before["model"], after["model"]]))
    return {"title": title, "facts": figures, "graph": arranged(diff)}


def _render_page(name: str, data: Any, **context: Any) -> str:
    from markupsafe import Markup

    environment = _environment()
    loader = environment.loader
    assert loader is not None
    style, script = (loader.get_source(environment, file)[0] for file in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(name).render(
        style=Markup(style), script=Markup(script), policy=policy, data=finite(data), **context
    )


@lru_cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fxlrd", _FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(text: str) -> Markup:
    """Return a dotted name that a narrow column may break between its parts."""
    from markupsafe import Markup, escape

    return Markup(_JOINT.sub(r"\1<wbr>", str(escape(text))))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
