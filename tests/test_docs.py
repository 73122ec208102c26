"""What the documentation says is in the code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = "\n".join(
    path.read_text()
    for folder in ("gtrans", "passes", "backends")
    for path in (ROOT / folder).rglob("*.py")
)
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^\| `([^`]+)`", PAGE, re.MULTILINE)


def test_there_are_messages_to_check() -> None:
    assert len(MESSAGES) >= 10


@pytest.mark.parametrize("message", MESSAGES)
def test_each_message_of_the_troubleshooting_page_exists(message: str) -> None:
    """Compares the longest stretch without a placeholder ('x', ..., a name in quotes)."""
    stretches = re.split(r"'[^']*'|\.\.\.|;|,", message)
    longest = max((s.strip() for s in stretches), key=len)
    assert longest in SOURCE


def test_each_contract_is_explained() -> None:
    from gtrans.contract import LEVELS

    page = (ROOT / "docs" / "how-it-works.md").read_text()
    for name in LEVELS:
        assert f"| {name} |" in page


def test_each_knob_is_explained() -> None:
    from gtrans.core import Knob

    page = (ROOT / "docs" / "how-it-works.md").read_text()
    for knob in Knob:
        assert f"| {knob.value} " in page
