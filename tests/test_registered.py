"""Passes registered for the duration of a block."""

from typing import ClassVar

import pytest

from gtrans.errors import OptionError, PassError
from gtrans.pipeline import Pipeline
from gtrans.plan.planner import Plan
from gtrans.registry import load_pass, pass_table, registered


class Renamed(Plan):
    """The plan under another name."""

    name: ClassVar[str] = "renamed-plan"


class Taken(Plan):
    """A pass whose name is taken."""

    name: ClassVar[str] = "relu-mask"


def test_a_registered_pass_is_known_within_the_block_only() -> None:
    with registered(Renamed):
        assert load_pass("renamed-plan") is Renamed
        assert str(Pipeline.parse("renamed-plan{price=2.0}")) == "renamed-plan{price=2.0}"
    with pytest.raises(OptionError, match="unknown pass 'renamed-plan'"):
        load_pass("renamed-plan")


def test_nothing_is_left_behind_by_an_error() -> None:
    before = pass_table()
    with pytest.raises(ZeroDivisionError), registered(Renamed):
        raise ZeroDivisionError
    assert pass_table() == before


def test_a_taken_name_is_refused_with_both_owners_and_leaves_nothing() -> None:
    before = pass_table()
    message = r"two owners of pass 'relu-mask': .*:ReluMask and .*Taken"
    with pytest.raises(PassError, match=message), registered(Renamed, Taken):
        pass
    assert pass_table() == before


def test_a_pass_that_cannot_be_loaded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("gtrans.passes").passes.PASSES, "gone", "gtrans.no_such:Pass")
    with pytest.raises(PassError, match=r"gtrans\.no_such:Pass is registered but cannot be loaded"):
        load_pass("gone")
