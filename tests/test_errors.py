"""Errors: near names, and no class that nothing raises."""

import ast
import inspect
from pathlib import Path

import pytest

import gtrans
from gtrans import errors
from gtrans.errors import GTransError, did_you_mean

CLASSES = [
    c
    for _, c in inspect.getmembers(errors, inspect.isclass)
    if issubclass(c, GTransError) and c is not GTransError
]


def raised() -> set[str]:
    root = Path(str(gtrans.__file__)).parent
    found: set[str] = set()
    for path in [p for d in (root, root / "passes", root / "backends") for p in d.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found.add(node.func.id)
    return found


PYTHON_ERRORS = {"ValueError", "RuntimeError", "AssertionError"}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_error_is_raised_somewhere_and_is_also_a_python_error(cls: type) -> None:
    assert cls.__name__ in raised()
    assert {b.__name__ for b in cls.__mro__} & PYTHON_ERRORS


def test_near_names_come_first() -> None:
    assert did_you_mean("relu-msk", ["plan", "relu-mask"]) == "; did you mean 'relu-mask'?"
    assert did_you_mean("ab", ["abc", "abd"]) == "; did you mean 'abd' or 'abc'?"


def test_without_a_near_name_all_are_listed() -> None:
    assert did_you_mean("zzz", ["plan", "bits"]) == "; known: bits, plan"
    assert did_you_mean("zzz", []) == ""
