"""The tables of benchmarks: ``<!-- results: NAME -->`` on a page becomes the rows of bench/results/NAME.json.

The file holds ``title``, ``date``, ``machine``, ``command`` (strings) and ``rows`` (a list of objects). Where there is
no such file, the page says so.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench" / "results"
_MARKER = re.compile(r"<!-- results: ([\w-]+) -->")


def on_page_markdown(markdown: str, **rest: Any) -> str:
    """Put the tables in the places of their markers."""
    return _MARKER.sub(lambda match: table(RESULTS / f"{match[1]}.json"), markdown)


def table(file: Path) -> str:
    """Return a file of results as Markdown."""
    if not file.exists():
        return f"*Not measured yet:* `python -m bench.{file.stem}` *writes this table.*"
    result = json.loads(file.read_text())
    heads = list(dict.fromkeys(key for row in result["rows"] for key in row))
    lines = [heads, ["---"] * len(heads), *([row.get(head) for head in heads] for row in result["rows"])]
    cells = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    source = f"{result['machine']}, {result['date']}, `{result['command']}`"
    return f"**{result['title']}** ({source})\n\n{cells}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
