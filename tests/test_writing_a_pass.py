"""The page that teaches to write a pass: its code runs, and its one-line test passes."""

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "writing-a-pass.md"


def blocks() -> list[str]:
    """The Python code of the page, block by block."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


def test_the_page_runs_and_its_test_passes(capsys: Any) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks():
        exec(compile(block, str(PAGE), "exec"), names)
    assert "leaky-mask: matched 1, rewrote 1" in capsys.readouterr().out
    names["test_leaky_mask"]()


def test_the_pass_is_as_short_as_promised() -> None:
    assert len(blocks()[0].splitlines()) < 60
