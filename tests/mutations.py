"""Break the code in small ways, list what no test notices: python -m tests.mutations [--part factor …] [--seconds N].

A mutant is one module with one change: an operator, a comparison, a constant, a condition turned round, a statement
left out. The fast tests that mirror the module, and those named in `TESTS`, run on a copy of the repository that has
it; a mutant at which none fails survives. Mutants are drawn at random (``--seed``), as many as the time allows. Some
survivors change nothing that can be seen: a tolerance, a size of blocks, a path that is only faster.
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PARTS = {
    "factor": ["fxlrd/factor/*.py"],
    "ranks": ["fxlrd/ranks.py"],
    "layers": ["fxlrd/layers/compose.py", "fxlrd/layers/fit.py", "fxlrd/layers/channels.py"],
    "passes": ["fxlrd/passes/*.py"],
    "allocation": ["fxlrd/allocation/*.py"],
    "saving": ["fxlrd/saving/*.py"],
}
TESTS = {
    "saving/": ["tests/saving"],
    "fxlrd/allocation/knapsack.py": ["tests/allocation/test_problem.py", "tests/allocation/test_search.py"],
    "fxlrd/passes/_compose.py": ["tests/passes/test_compose.py"],
    "fxlrd/passes/_interpolate.py": ["tests/passes/test_interpolate.py"],
    "fxlrd/passes/_merging.py": ["tests/passes/test_interpolate.py", "tests/passes/test_merge.py"],
    "fxlrd/passes/_relocate.py": ["tests/passes/test_relocate.py"],
    "fxlrd/passes/_patterns.py": ["tests/passes/test_compose.py", "tests/passes/test_relocate.py"],
    "fxlrd/passes/allocate.py": ["tests/allocation/test_measured.py"],
    "fxlrd/passes/_priced.py": ["tests/passes/test_allocate.py"],
    "fxlrd/passes/driver.py": ["tests/passes/test_decompose.py"],
    "fxlrd/passes/contract.py": ["tests/passes/test_driver.py"],
    "fxlrd/factor/basis.py": ["tests/factor/test_svd.py", "tests/factor/test_tucker.py"],
    "fxlrd/factor/svd.py": ["tests/factor/test_basis.py"],
    "fxlrd/factor/ridge.py": ["tests/layers/test_fit.py"],
    "fxlrd/layers/channels.py": ["tests/passes/test_decompose.py"],
}
"""Tests beside those that mirror a module, by its path or its folder."""
torch.set_num_threads(1)  # before any fork

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True, eq=False)
class Mutant:
    """One change of a module: in one statement of its tree, a node and what takes its place."""

    path: str
    tree: ast.Module
    statement: ast.stmt
    before: ast.AST
    after: ast.AST

    @property
    def source(self) -> str:
        """The module's code with the change."""
        return ast.unparse(self._changed())

    def __str__(self) -> str:
        place = next(i for i, (_, _, _, node) in enumerate(_places(self.tree)) if node is self.statement)
        new = next(itertools.islice(_places(self._changed()), place, None))[3]
        return f"{self.path}:{self.statement.lineno}: {_short(self.statement)} → {_short(new)}"

    def _changed(self) -> ast.Module:
        """Return a copy of the tree with the change."""
        place = next(i for i, (_, _, _, node) in enumerate(_places(self.tree)) if node is self.before)
        tree = copy.deepcopy(self.tree)
        parent, field, index, _ = next(itertools.islice(_places(tree), place, None))
        if index is None:
            setattr(parent, field, self.after)
        else:
            getattr(parent, field)[index] = self.after
        return ast.fix_missing_locations(tree)


def mutants(path: str, source: str) -> list[Mutant]:
    """Return every mutant of a module.

    >>> [str(m) for m in mutants("a.py", "def f(x):\\n    return x + 1\\n")]
    ['a.py:2: return x + 1 → return x - 1', 'a.py:2: return x + 1 → return x + 2', 'a.py:2: return x + 1 → return None']
    """
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    statements = {node: None for f in functions for node in ast.walk(f) if isinstance(node, ast.stmt) and node is not f}
    return [Mutant(path, tree, each, before, after) for each in statements for before, after in _changes(each)]


def _changes(statement: ast.stmt) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield nodes of one statement, without those of statements inside it, with what may take their places."""
    for node in (statement, *_inner(statement)):
        if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPERATORS:
            if not _is_text(node):
                yield node, _with(node, op=OPERATORS[type(node.op)]())
        elif isinstance(node, ast.Compare):
            for i, op in enumerate(node.ops):
                if type(op) in OPERATORS:
                    yield node, _with(node, ops=[*node.ops[:i], OPERATORS[type(op)](), *node.ops[i + 1 :]])
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            yield node, ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            yield node, node.operand
    if isinstance(statement, ast.If | ast.While):
        yield statement.test, ast.UnaryOp(ast.Not(), statement.test)
    if isinstance(statement, ast.Return) and statement.value is not None and not _is_none(statement.value):
        yield statement.value, ast.Constant(None)
    if isinstance(statement, ast.AugAssign | ast.Raise) or (
        isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant | ast.Yield)
    ):
        yield statement, ast.Pass()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _inner(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt | ast.JoinedStr | ast.arguments):
            yield child
            yield from _inner(child)


def _is_text(node: ast.AST) -> bool:
    return any(isinstance(n, ast.JoinedStr) or isinstance(getattr(n, "value", 0), str) for n in ast.walk(node))


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if isinstance(value, ast.AST):
                yield parent, field, None, value
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    if isinstance(item, ast.AST):
                        yield parent, field, i, item


def _short(statement: ast.AST) -> str:
    """Return the first line of a statement."""
    line = ast.unparse(statement).splitlines()[0]
    return line if len(line) <= 110 else line[:109] + "…"


def tests_of(path: str) -> list[str]:
    """Return the files with the fast tests of a module."""
    folders = Path(path).relative_to("fxlrd")
    mirror = Path("tests") / folders.parent / f"test_{folders.stem.lstrip('_')}.py"
    files = [str(mirror), *TESTS.get(path, TESTS.get(f"{folders.parts[0]}/", []))]
    return [name for name in dict.fromkeys(files) if (ROOT / name).exists()]


def survives(folder: Path, mutant: Mutant, tests: Sequence[str], limit: float) -> bool:
    """Whether all tests pass, within ``limit`` seconds, with the mutant in the copy of the repository in ``folder``."""
    module = folder / mutant.path
    original = module.read_text()
    module.write_text(mutant.source)
    try:
        return pass_in(folder, tests, limit)
    finally:
        module.write_text(original)


def pass_in(folder: Path, tests: Sequence[str], limit: float) -> bool:
    """Whether the fast ones of the tests pass in a copy of the repository, within ``limit`` seconds.

    They run in a fork, in which torch is imported already.
    """
    child = os.fork()
    if child == 0:
        os._exit(_tested(folder, tests))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _tested(folder: Path, tests: Sequence[str]) -> int:
    """Run the tests in this process, silently, and return pytest's exit code."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.chdir(folder)
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(folder)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("fxlrd", "tests")]:
        del sys.modules[name]
    return int(pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.mutations", description=__doc__)
    parser.add_argument(
        "--part", action="append", help=f"one of {', '.join(PARTS)}, or the path of a module; repeatable"
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    patterns = [pattern for part in options.part or PARTS for pattern in PARTS.get(part, [part])]
    paths = sorted({str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern)})
    all_mutants = [m for path in paths if tests_of(path) for m in mutants(path, (ROOT / path).read_text())]
    if not all_mutants:
        parser.error(f"nothing with tests to mutate in {', '.join(patterns)}")
    random.Random(options.seed).shuffle(all_mutants)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "fxlrd"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*cache"))
        start = time.monotonic()
        if not pass_in(folder, sorted({test for path in paths for test in tests_of(path)}), limit=3600):
            parser.error("the tests fail as it is")
        limit = 20 + 3 * (time.monotonic() - start)
        done, survivors = run_all(folder, all_mutants, start + options.seconds, limit)
    print(f"{done} of {len(all_mutants)} mutants tried, {survivors} survive ({survivors / max(done, 1):.0%})")
    return 0


def run_all(folder: Path, chosen: Sequence[Mutant], end: float, limit: float) -> tuple[int, int]:
    """Try mutants until the time is over, print those that survive, and return how many were tried and survived."""
    survivors = done = 0
    for mutant in chosen:
        if time.monotonic() > end:
            break
        done += 1
        if survives(folder, mutant, tests_of(mutant.path), limit):
            survivors += 1
            print(f"survives: {mutant}", flush=True)
    return done, survivors


if __name__ == "__main__":
    sys.exit(main())
