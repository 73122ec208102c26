"""`gtrans report`: one page, and an exit code that says whether the gradients agree."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import Result

Run = Callable[..., Result]
RunJson = Callable[..., Any]


def test_report_writes_a_page(run: Run, model_file: str, tmp_path: Path) -> None:
    text = run("report", f"{model_file}:make", "-p", "relu-mask,plan").stderr

    page = (tmp_path / "report.html").read_text()
    assert "wrote report.html" in text
    assert "gtrans report model.py:make --passes relu-mask,plan" in page
    assert '<b class="good">agree</b>' in page


def test_report_exits_with_1_where_gradients_differ(
    run_json: RunJson, run: Run, model_file: str, wrong_passes: str
) -> None:
    options = ("--plugin", wrong_passes, "-p", "scaled", "-o", "wrong.html")

    value = run_json("report", f"{model_file}:make", *options, code=1)
    unchecked = run_json("report", f"{model_file}:make", *options, "--no-check")

    assert value.keys() == {"model", "file", "bytes", "ok", "seconds"}
    assert (value["file"], value["ok"]) == ("wrong.html", False)
    assert value["bytes"] == len(Path("wrong.html").read_bytes()) or unchecked["ok"]
    assert (
        "gradients differ; find the rewrite: gtrans bisect model.py:make --plugin"
        in run("report", f"{model_file}:make", *options, code=1).stderr
    )
