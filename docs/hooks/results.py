"""The tables of benchmarks: ``<!-- results: NAME -->`` on a page becomes the rows of bench/results/NAME.json.

The file holds ``title``, ``date``, ``machine``, ``command`` (strings) and ``rows`` (a list of objects). Where there is
no such file, the page says so. A figure NAME.svg beside the file is shown below the table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench" / "results"
_MARKER = re.compile(r"<!-- results: ([\w-]+) -->")


def on_files(files: Any, *, config: Any, **rest: Any) -> Any:
    """Add the figures to the files of the site."""
    from mkdocs.structure.files import File  # the tests read tables without mkdocs

    for figure in sorted(RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"benchmarks/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, **rest: Any) -> str:
    """Put the tables in the places of their markers."""
    return _MARKER.sub(lambda match: table(RESULTS / f"{match[1]}.json"), markdown)


def table(file: Path) -> str:
    """Return a file of results as Markdown."""
    if not file.exists():
        command = f"python -m bench.{file.stem} --json bench/results/{file.name}"
        return f"*Not measured yet:* `{command}` *writes this table.*"
    result = json.loads(file.read_text())
    heads = list(dict.fromkeys(key for row in result["rows"] for key in row))
    lines = [heads, ["---"] * len(heads), *([row.get(head) for head in heads] for row in result["rows"])]
    cells = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    source = f"{result['machine']}, {result['date']}, `{result['command']}`"
    figure = f"\n\n![{result['title']}]({file.stem}.svg)" if file.with_suffix(".svg").exists() else ""
    return f"**{result['title']}** ({source})\n\n{cells}{figure}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
