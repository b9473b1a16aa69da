"""Imports run one way: from the command line down to tensors, with no circle inside a package either."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import fxlrd

ROOT = Path(fxlrd.__file__).parent

FLOORS = (
    ("__main__",),
    ("cli",),
    ("app", "backend"),
    ("tradeoffs",),
    ("branching", "compression"),
    ("request",),
    ("differences",),
    ("report",),
    ("pipeline",),
    ("spec", "verification"),
    ("finetuning", "installation"),
    ("passes",),
    ("allocation", "saving"),
    ("calibration", "timing", "capturing"),
    ("graph",),
    ("layers",),
    ("factor", "ranks", "budget"),
    ("sharing", "training"),
    ("errors", "files", "freed", "progress"),
    ("escaping",),
)
"""From the top down; what stands on one floor may import from its own package and from any floor below."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(name: str) -> set[str]:
    """Return the project's modules that a module imports: at its top, inside functions and for types only."""
    targets = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "fxlrd":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                targets.add(inner if inner in MODULES else str(node.module))
        elif isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names if alias.name.split(".")[0] == "fxlrd"}
    return targets - {name}


def floor(name: str) -> int:
    room = name.split(".")[1]
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("name", [n for n in MODULES if n != "fxlrd"])
def test_a_module_imports_from_its_own_package_or_from_below(name):
    room = name.split(".")[1]
    up = [t for t in imported(name) - {"fxlrd"} if t.split(".")[1] != room and floor(t) <= floor(name)]
    assert "fxlrd" not in imported(name) or name == "fxlrd.cli", f"{name} imports the package itself"
    assert not up, f"{name} imports {', '.join(sorted(up))}"


def test_no_circle():
    remaining = {name: imported(name) for name in MODULES if name != "fxlrd"}
    while remaining:
        done = [name for name, targets in remaining.items() if not targets & remaining.keys()]
        assert done, f"a circle among {sorted(remaining)}"
        for name in done:
            del remaining[name]


def test_a_pass_imports_no_other_pass():
    shared = {"fxlrd.passes", "fxlrd.passes.contract", "fxlrd.passes.driver"}
    for name in MODULES:
        if name.startswith("fxlrd.passes.") and not name.rpartition(".")[2].startswith("_"):
            others = {t for t in imported(name) if t.startswith("fxlrd.passes.") and "._" not in t} - shared
            assert not others, f"{name} imports {', '.join(others)}"


def test_no_module_has_the_name_of_a_standard_one():
    """``python fxlrd/x.py`` puts fxlrd/ first on the path, where torch would then find ours."""
    assert not {path.stem for path in ROOT.glob("*.py")} & sys.stdlib_module_names - {"__main__"}


def test_public_functions_hide_no_module():
    for name in fxlrd.__all__:
        if callable(getattr(fxlrd, name)):
            assert f"fxlrd.{name}" not in MODULES, f"fxlrd.{name} is a function and a module"
