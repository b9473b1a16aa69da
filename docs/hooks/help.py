"""The options of commands: ``<!-- help: compress -->`` on a page becomes what ``fxlrd compress --help`` prints."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

_MARKER = re.compile(r"<!-- help: (\w*) ?-->")


def on_page_markdown(markdown: str, **rest: Any) -> str:
    """Put the help in the places of its markers."""
    return _MARKER.sub(lambda match: f"```text\n{printed([match[1]] if match[1] else [])}```", markdown)


def printed(command: list[str]) -> str:
    """Return what a command's ``--help`` prints, 84 characters wide. It needs no torch."""
    with mock.patch.object(sys, "path", [str(Path(__file__).parents[2]), *sys.path]):
        from fxlrd import __version__
        from fxlrd.app.arguments import parser_of
    text = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="84"), contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        parser_of(__version__).parse_args([*command, "--help"])
    return text.getvalue()
