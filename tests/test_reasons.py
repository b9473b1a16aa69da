"""The words of every reason, in one file: other tests compare codes.

After a change of words: python tests/test_reasons.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fxlrd
from fxlrd.errors import Reason

GOLDEN = Path(__file__).parent / "golden" / "reasons.txt"


def template(node: ast.expr, names: dict[str, ast.expr]) -> str:
    """Return the words of an expression, with {} for each value in them."""
    if isinstance(node, ast.Name):
        node = names[node.id]
    if isinstance(node, ast.JoinedStr):
        return "".join("{}" if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
    assert isinstance(node, ast.Constant), f"line {node.lineno}: the words of a reason stand where it is made"
    return node.value


def reasons(function: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Yield code, text and remedy of the reasons that are made in a module or function."""
    names: dict[str, ast.expr] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = node.value
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Reason":
            code, text, *remedy = node.args
            if isinstance(code, ast.Constant):  # else it hands on another reason
                yield code.value, template(text, names), template(remedy[0], names) if remedy else ""


def words() -> str:
    found = set()
    for path in Path(fxlrd.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        inner = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for function in inner:
            found |= set(reasons(function))
            function.body = []
        found |= set(reasons(tree))
    return "".join(f"{code} | {Reason(code, text, remedy)}\n" for code, text, remedy in sorted(found))


def test_the_words_of_reasons_are_those_of_the_golden_file():
    assert words() == GOLDEN.read_text()


def test_a_reason_is_one_line_with_its_remedy_last():
    reason = Reason("narrow", "3→8 is too narrow", "use a smaller ratio")
    assert str(reason) == "3→8 is too narrow: use a smaller ratio"
    assert reason.at("fc") == Reason("narrow", "fc: 3→8 is too narrow", "use a smaller ratio")
    assert str(Reason("stem", "the stem")) == "the stem"
    assert all(len(line.split(" | ")) == 2 for line in words().splitlines())


if __name__ == "__main__":
    GOLDEN.write_text(words())
