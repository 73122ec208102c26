"""The walk-through in `docs/debugging.md`: its commands are run, and must print what it shows.

`GTRANS_UPDATE_DOCS=1` writes what they print into the page.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gtrans.cli.main import app

PAGE = Path(__file__).parents[2] / "docs" / "debugging.md"
FILE = re.compile(r"```python\n# (\S+\.py)\n(.*?)```", re.DOTALL)
SESSION = re.compile(r"```console\n(.*?)```", re.DOTALL)
# What depends on the machine and the day.
VOLATILE = [(re.compile(r"\d+\.\d+ (s|ms)\b"), r"0.0 \1"), (re.compile(r"torch \S+"), "torch")]


def plain(text: str) -> list[str]:
    """Its lines without times and versions; the rows of tables in any order, for they are sorted by
    figures that may differ in their last digit."""
    for pattern, replacement in VOLATILE:
        text = pattern.sub(replacement, text)
    rows = [line for line in text.splitlines() if line.startswith(("gradient", "output"))]
    return [line for line in text.splitlines() if line not in rows] + sorted(rows)


def printed(command: str) -> str:
    """What a command prints."""
    words = shlex.split(command)
    if words[0] != "gtrans":
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    return "\n".join(
        line.rstrip() for line in CliRunner().invoke(app, words[1:]).output.splitlines()
    )


@pytest.mark.slow
def test_the_page_shows_what_its_commands_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text()
    for name, content in FILE.findall(page):
        Path(name).write_text(content)
    update = bool(os.environ.get("GTRANS_UPDATE_DOCS"))

    def checked(session: re.Match[str]) -> str:
        commands = [line[2:] for line in session[1].splitlines() if line.startswith("$ ")]
        real = "".join(f"$ {c}\n{out}\n" if (out := printed(c)) else f"$ {c}\n" for c in commands)
        assert update or plain(real) == plain(session[1])
        return f"```console\n{real}```"

    shown = SESSION.sub(checked, page)
    if update:
        PAGE.write_text(shown)
