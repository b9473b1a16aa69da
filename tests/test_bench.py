"""The benchmarks are not run by the tests, but each of them imports what it needs."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import bench

MODULES = sorted(path.stem for path in Path(bench.__file__).parent.glob("*.py") if not path.stem.startswith("__"))


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_imports(name):
    importlib.import_module(f"bench.{name}")


def test_every_section_is_a_module():
    from bench.__main__ import SECTIONS

    assert set(SECTIONS) <= set(MODULES)
