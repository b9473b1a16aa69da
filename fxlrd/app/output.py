"""Where the command line's output goes: standard output, a JSON file, an HTML page."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

from fxlrd.errors import FxlrdError, one_line
from fxlrd.escaping import visible
from fxlrd.files import write_out
from fxlrd.report.numbers import finite


class HasPage(Protocol):
    """A report, a comparison or a diff."""

    def to_html(self, path: str | Path) -> None:
        """Write the page."""
        ...


def show(text: str) -> None:
    """Print to standard output, if there is one.

    Characters that its encoding lacks are escaped, and a reader that has closed it (head, less) changes nothing, so
    that the exit status depends on the result alone. Raises FxlrdError for any other failure, such as a full disk.
    """
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        # Python would try to write the rest of the buffer again when it exits, and fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise FxlrdError(f"standard output: {one_line(error)}") from error


def warn(text: str) -> None:
    """Print a warning to standard error, on one line."""
    print(f"fxlrd: warning: {visible(text)}", file=sys.stderr)


def colored() -> bool:
    """Whether to colour: on a terminal, unless the environment decides (no-color.org, force-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def check_writable(option: str, path: Path | None) -> None:
    """Raise FxlrdError, before the work instead of after it, where ``path`` cannot be a file."""
    if path is None:
        return
    if path.is_dir():
        raise FxlrdError(f"{option} {path}: that is a folder; name a file")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise FxlrdError(f"{option} {path}: the folder {parent} does not exist")


def write_json(data: Any, path: Path | None) -> None:
    """Write plain data, unless ``path`` is None; a number that is not finite, which JSON cannot hold, as null."""
    if path is None:
        return
    try:
        write_out(path, json.dumps(finite(data), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise FxlrdError(f"--json {path}: {one_line(error)}") from error


def write_page(result: HasPage, path: Path | None) -> None:
    """Write the page of a result, unless ``path`` is None."""
    if path is None:
        return
    try:
        result.to_html(path)
    except OSError as error:
        raise FxlrdError(f"--html {path}: {one_line(error)}") from error
