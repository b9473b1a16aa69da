"""The cells of a table, each measured once and stored in a JSON file with the machine, versions and settings."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fxlrd.files import write_out
from fxlrd.timing.cache import Setting

Cells = dict[str, Any]
Rows = list[dict[str, Any]]


def machine(device: torch.device) -> str:
    """Return the kind of machine, without any name of its own, such as "2 cores of an Intel Xeon, AVX512"."""
    name = Setting.current(device, compiled=False).device
    cpu = re.fullmatch(r"cpu: (.*) \((\d+) cores, (.*)\)", name)
    return name if cpu is None else f"{cpu[2]} cores of {re.sub(r'[(](R|TM)[)]', '', cpu[1])}, {cpu[3]}"


class Results:
    """What was measured, by cell, in a JSON file if there is one. Raises SystemExit for a file of other settings.

    ``settings`` hold whatever all cells depend on. ``about`` says what the table is (title, command); ``rows`` makes
    the table of the cells that there are. The file is written after each cell.
    """

    def __init__(
        self,
        path: Path | None,
        settings: dict[str, Any],
        about: dict[str, str] | None = None,
        rows: Callable[[Cells], Rows] | None = None,
    ) -> None:
        self.path, self.settings, self.about, self._rows = path, settings, about or {}, rows
        self.cells: Cells = {}
        if path is not None and path.exists():
            content = json.loads(path.read_text())
            if content["settings"] != settings:
                raise SystemExit(f"bench: {path} is of other settings: {content['settings']}; name another with --json")
            self.cells = content["cells"]
            self.about |= {"date": content["date"]} if "date" in content else {}

    def cell(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a cell, measured now if it was not before."""
        if key not in self.cells:
            start = time.perf_counter()
            self.cells[key] = measure()
            print(f"{key}: {self.cells[key]} ({time.perf_counter() - start:.0f} s)", flush=True)
            self.about |= {"date": date.today().isoformat()} if self._rows else {}
            self.write()
        return dict(self.cells[key])

    def write(self) -> None:
        """Write the file, if there is one to write."""
        if self.path is None:
            return
        content = {**self.about, "settings": self.settings, "cells": self.cells}
        if self._rows is not None:
            content["rows"] = self.rows()
        write_out(self.path, json.dumps(content, indent=1) + "\n")

    def rows(self) -> Rows:
        """Return the table of the cells that there are."""
        assert self._rows is not None
        return self._rows(self.cells)

    def text(self) -> str:
        """Return the table as text, with its title and what it was measured on."""
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return f"\n{self.about['title']}\n{settings}\n\n{tabulate(self.rows(), headers='keys', disable_numparse=True)}"
