"""The fuzzers run for a short time; `python -m tests.fuzz` runs them for a long one."""

from __future__ import annotations

import pytest

from tests.fuzz.campaign import NAMES, fuzzers, run

SECONDS = 20


@pytest.fixture(scope="module")
def cases():
    with fuzzers() as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_damage_is_found_or_does_none(cases, name):
    assert run(name, cases[name], SECONDS).cases > 10
