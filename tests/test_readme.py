"""What the README says to type is what runs elsewhere, and what the pages promise is tested."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def code_blocks(language: str) -> list[str]:
    """Return the README's code blocks in that language."""
    readme = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)


def test_the_command_for_the_tests_is_the_one_that_ci_runs():
    (command,) = (block for block in code_blocks("bash") if "pytest" in block)
    assert command == (ROOT / ".ci" / "test-commands").read_text()


def test_the_tests_that_hold_the_promises_exist():
    page = (ROOT / "docs" / "explanation" / "promises.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    assert len(named) > 10
    assert not [(path, name) for path, name in named if f"def {name}(" not in (ROOT / "tests" / path).read_text()]


def test_the_readme_is_short_and_its_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) <= 6144
    links = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert len(links) > 20
    assert not [link for link in links if not (ROOT / link).exists()]
