"""Tables and objects as a terminal, a notebook and IPython show them."""

from collections.abc import Callable
from io import StringIO
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from torch import nn

import gtrans
from gtrans.core import Stats
from gtrans.explanation import Explanation
from gtrans.listing import Listing, Shown
from gtrans.verification import Verification

Build = Callable[[str], tuple[nn.Module, tuple[Any, ...]]]


def printed(value: Any) -> str:
    out = StringIO()
    Console(file=out, width=200, markup=True).print(value)
    return out.getvalue()


class Printer:
    """As much of IPython's pretty printer as is used."""

    def __init__(self) -> None:
        self.written = ""

    def text(self, text: str) -> None:
        self.written += text


def pretty(value: Shown, *, cycle: bool = False) -> str:
    printer = Printer()
    value._repr_pretty_(printer, cycle)
    return printer.written


@pytest.fixture(scope="module")
def checked() -> Verification:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4))
    return gtrans.verify(model, torch.randn(128, 4))


@pytest.fixture(scope="module")
def explained(checked: Verification) -> Explanation:
    return checked.explanation


def test_a_listing_escapes_what_it_shows() -> None:
    listing = Listing(("name", ">bytes"), [("f32[8, 64] <b>", "12")], "a & b")

    assert "f32[8, 64] <b>" in printed(listing)
    root = ElementTree.fromstring(listing.html())
    assert [c.text for c in root.iter("td")] == ["f32[8, 64] <b>", "12"]
    assert [c.get("style") for c in root.iter("th")] == ["text-align: left", "text-align: right"]
    assert next(root.iter("caption")).text == "a & b"


def test_explanations(explained: Explanation) -> None:
    assert repr(explained).startswith("<Explanation: 1 graphs, saved for the backward")
    assert len(repr(explained)) < 120
    assert pretty(explained) == str(explained)
    assert pretty(explained, cycle=True) == repr(explained)
    html = explained._repr_html_()
    assert "kept for the backward" in html
    assert '<svg class="timeline"' in html
    assert "kept for the backward" in printed(explained)


def test_verifications(checked: Verification) -> None:
    assert repr(checked) == f"<Verification: {checked.headline()}>"
    assert checked.headline().startswith("all ")
    assert "0.weight" in checked._repr_html_()
    assert "0.weight" in printed(checked)
    assert str(checked).startswith(checked.headline())


def test_stats() -> None:
    stats = Stats(matched=3, rewritten=1, notes=["a note"])
    stats.skipped["too <small>"] += 2
    assert repr(stats) == "<Stats: matched 3, rewrote 1>"
    assert "too &lt;small&gt;" in stats._repr_html_()
    assert "too <small>" in printed(stats)
    assert "a note" in printed(stats)
