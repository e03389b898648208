"""The structure of the tests: helpers are in tests/support, and clocks are marked."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

TESTS: Final = Path(__file__).resolve().parent
SUPPORT: Final = TESTS / "support"
#: Packages that are commands of their own: ``python -m fuzz`` and so on.
COMMANDS: Final = {"fuzz", "hostile", "outages", "soak"}
_CLOCKS: Final = {"monotonic", "perf_counter", "process_time", "thread_time", "time"}


def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(path.read_text(encoding="utf-8"))


def folders() -> set[str]:
    """Return the names of the test packages, and of the modules at the top."""
    return {path.relative_to(TESTS).parts[0].removesuffix(".py") for path in TESTS.rglob("*.py")}


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the full name of every imported module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.name)
def test_structure_test_module_imports_no_other_test_package(path: Path) -> None:
    """Tests import helpers from tests/support only, and no test imports another."""
    own = path.relative_to(TESTS).parts[0]
    allowed = {"support", own} if own in COMMANDS else {"support"}
    if path.is_relative_to(SUPPORT):
        # The seeds of the corpus are written by the targets.
        allowed |= {"fuzz"}

    parts = {name.partition(".")[0] for name in imported(tree_of(path))}

    assert parts & folders() - allowed - {"benchmarks"} == set()


def definitions(path: Path) -> Iterator[str]:
    """Yield the public functions and classes of a helper module.

    A module that is a program of its own is not imported by tests.
    """
    tree = tree_of(path)
    if any(isinstance(node, ast.If) and "__main__" in ast.dump(node.test) for node in tree.body):
        return
    for node in tree.body:
        if (
            isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and not node.name.startswith("_")
            and node.name != "main"
        ):
            yield node.name


def test_structure_helper_name_is_defined_once() -> None:
    """No two helpers have one name."""
    counts = Counter(name for path in SUPPORT.rglob("*.py") for name in definitions(path))

    assert {name for name, count in counts.items() if count > 1} == set()


def reads_clock(node: ast.AST) -> bool:
    """Return whether an expression is a difference of clock readings."""
    for part in ast.walk(node):
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Sub):
            for call in ast.walk(part):
                if isinstance(call, ast.Call):
                    function = call.func
                    name = function.attr if isinstance(function, ast.Attribute) else ""
                    if (function.id if isinstance(function, ast.Name) else name) in _CLOCKS:
                        return True
    return False


def asserts_on_clock(function: ast.AST) -> bool:
    """Return whether a test asserts an upper bound of a difference of clocks."""
    timed = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and reads_clock(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare):
            operands = [node.test.left, *node.test.comparators]
            for operand, operator in zip(operands, node.test.ops, strict=False):
                timed_here = reads_clock(operand) or (
                    isinstance(operand, ast.Name) and operand.id in timed
                )
                if timed_here and isinstance(operator, ast.Lt | ast.LtE):
                    return True
    return False


def unmarked(path: Path) -> Iterator[str]:
    """Yield the tests of a module that assert on a clock without the marker."""
    tree = tree_of(path)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.name.startswith("test_")
            and asserts_on_clock(node)
            and not any("timing" in ast.unparse(each) for each in node.decorator_list)
        ):
            yield node.name


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.name)
def test_structure_test_asserting_on_clock_has_timing_marker(path: Path) -> None:
    """A test that may fail on a busy machine is marked ``timing``."""
    assert list(unmarked(path)) == []


def test_structure_planted_clock_assertion_is_found(tmp_path: Path) -> None:
    """The check finds a direct difference of clocks, and a difference with a name."""
    planted = tmp_path / "test_planted.py"
    planted.write_text(
        "def test_a():\n    assert monotonic() - began < 5\n"
        "def test_b():\n    took = time.monotonic() - began\n    assert took < 5\n"
        "def test_c():\n    assert time.monotonic() < deadline\n"
        "@pytest.mark.timing\ndef test_d():\n    assert monotonic() - began < 5\n"
    )

    assert list(unmarked(planted)) == ["test_a", "test_b"]
