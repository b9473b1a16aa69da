"""Parameters of tests."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(values: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """Return ``values`` for pytest.mark.parametrize, with those in ``slow`` marked slow."""
    return [pytest.param(value, marks=pytest.mark.slow) if value in slow else value for value in values]
