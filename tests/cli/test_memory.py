"""The commands that show memory: `saved`, `why-peak`, and budgets wherever a plan matters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Run = Callable[..., Result]
RunJson = Callable[..., Any]


def test_saved_lists_bytes_reason_and_line(run: Run, run_json: RunJson, model_file: str) -> None:
    text = run("saved", f"{model_file}:make", "-p", "plan{recompute=none}").stdout
    value = run_json("saved", f"{model_file}:make", "-p", "plan{recompute=none}")

    assert "autograd keeps it" in text
    assert "model.py:15, in forward" in text
    assert "34.0 KiB in all, 34.0 KiB as autograd would (+0%)" in text
    assert value.keys() == {"model", "pipeline", "saved_bytes", "saved_bytes_before", "saved"}
    relu = next(v for v in value["saved"] if v["operator"] == "aten.relu.default")
    assert relu["dtype"] == "float32"
    assert relu["why"] == "autograd keeps it; the plan computes nothing again"


def test_saved_folds_equal_layers_unless_told_not_to(run_json: RunJson, model_file: str) -> None:
    options = ("saved", f"{model_file}:make_gelu", "-p", "plan{recompute=none}")

    folded = run_json(*options)["saved"]
    each = run_json(*options, "--each")["saved"]

    assert sum(v["count"] for v in folded) == len(each)
    assert all(v["count"] == 1 for v in each)


def test_why_peak_adds_up(run: Run, run_json: RunJson, model_file: str) -> None:
    value = run_json("why-peak", f"{model_file}:make")
    assert value["rows"]
    rows = sum(r["bytes"] for r in value["rows"])
    assert rows + value["workspace_bytes"] + value["held_bytes"] == value["peak"]
    assert "of parameters, buffers and inputs" in run("why-peak", f"{model_file}:make").stdout


def test_missed_says_what_was_not_done_and_where(run: Run, model_file: str) -> None:
    options = ("-p", "relu-mask{min_numel=99999},bit-masks,plan", "--missed")

    text = run("explain", f"{model_file}:make", *options).stdout

    assert "fewer elements than min_numel" in text
    assert "model.py:15, in forward" in text
    assert "found nothing to rewrite" in text
    assert "not asked for: " in text
    assert "chunked-loss, " in text


@pytest.mark.parametrize("command", ["explain", "saved", "why-peak", "show", "verify"])
def test_a_budget_is_kept_or_refused(run: Run, model_file: str, command: str) -> None:
    model = f"{model_file}:make_gelu"
    run(command, model, "--memory", "1.0")
    too_small = run(command, model, "--memory", "200B", code=1).stderr
    unreadable = run(command, model, "--memory", "x", code=2).stderr

    assert "no plan keeps this step under 200 B" in too_small
    assert "cannot read the memory budget 'x'" in unreadable


def test_explain_prints_the_budget(run: Run, model_file: str) -> None:
    text = run("explain", f"{model_file}:make", "--memory", "1.0").stdout
    assert "predicted, budget " in text


def test_verify_leaves_float64_out_where_the_budget_does_not_fit(
    run_json: RunJson, model_file: str
) -> None:
    peak = run_json("why-peak", f"{model_file}:make", "--memory", "1.0")["peak"]
    value = run_json("verify", f"{model_file}:make", "--memory", f"{peak}B")
    assert value["ok"]
    assert value["notes"][0].startswith("not compared in float64: pass 'plan' failed")


def test_the_command_to_try_next_repeats_the_options(run: Run, model_file: str) -> None:
    options = ("-p", "relu-mask,plan", "--skip", "relu-mask", "--memory", "1.0", "--seed", "3")
    text = run("explain", f"{model_file}:make", *options).stderr
    assert (
        "gtrans verify model.py:make --passes relu-mask,plan --skip relu-mask --memory 1.0 --seed 3"
        in text
    )


def test_timeline_prints_and_writes_pictures(
    run: Run, run_json: RunJson, model_file: str, tmp_path: Path
) -> None:
    result = run("timeline", f"{model_file}:make", "-o", "a.svg", "-o", "a.txt")
    value = run_json("timeline", f"{model_file}:make", "-o", "a.svg")

    assert "|forward" in result.stdout
    assert "^ peak" in result.stdout
    assert "wrote a.svg\nwrote a.txt" in result.stderr
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    assert value["files"] == ["a.svg"]
    assert value["parts"][0].keys() == {"half", "graph", "before", "after"}
    assert max(max(p["after"]) for p in value["parts"]) == value["peak_bytes"]
    assert (
        "a timeline is drawn as"
        in run("timeline", f"{model_file}:make", "-o", "a.pdf", code=2).stderr
    )


def test_show_draws_the_circuit_of_a_region(
    run: Run, run_json: RunJson, model_file: str, tmp_path: Path
) -> None:
    text = run("show", f"{model_file}:make", "--region", "up", "--svg", "a.svg")
    value = run_json("show", f"{model_file}:make", "--region", "up")

    assert "up: " in text.stdout
    assert "wrote a.svg" in text.stderr
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    assert value.keys() == {"model", "region", "nodes", "residual_bytes", "wires", "files"}
    message = "--region shows a part of the joint graph; leave --stage and --dot out"
    assert (
        message
        in run("show", f"{model_file}:make", "--region", "up", "--dot", "a.dot", code=2).stderr
    )
