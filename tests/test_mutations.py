"""Mutants differ from the module in one place, and survive tests that do not see it."""

from __future__ import annotations

import ast
import doctest

import pytest

from tests import mutations

SOURCE = '''def area(width, height):
    """Return it."""
    if width < 0 and not height:
        raise ValueError(f"{width + 1}")
    return width * height
'''


def test_each_mutant_is_another_program_that_parses():
    assert doctest.testmod(mutations).failed == 0
    sources = [mutant.source for mutant in mutations.mutants("fxlrd/area.py", SOURCE)]
    assert len({ast.dump(ast.parse(each)) for each in [*sources, SOURCE]}) == len(sources) + 1
    assert any("width / height" in each for each in sources)
    assert any("pass" in each for each in sources)


@pytest.mark.slow
def test_a_mutant_survives_the_tests_that_do_not_see_it(tmp_path):
    (tmp_path / "fxlrd").mkdir()
    (tmp_path / "fxlrd" / "__init__.py").touch()
    (tmp_path / "fxlrd" / "area.py").write_text(SOURCE)
    (tmp_path / "test_area.py").write_text("from fxlrd.area import area\n\ndef test():\n    assert area(2, 3) == 6\n")
    survivors = [
        str(mutant).rpartition(": ")[2]
        for mutant in mutations.mutants("fxlrd/area.py", SOURCE)
        if mutations.survives(tmp_path, mutant, ["test_area.py"], limit=60)
    ]
    assert "return width * height → return width / height" not in survivors
    assert any(each.startswith("raise ValueError") for each in survivors)
    assert (tmp_path / "fxlrd" / "area.py").read_text() == SOURCE
