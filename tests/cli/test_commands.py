"""Every command, in its readable form and its JSON, with its exit codes."""

import importlib.metadata
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import gtrans
from gtrans.backends.inductor import Inductor
from gtrans.cli import catalog
from gtrans.cli.main import app
from gtrans.registry import backend_table

Run = Callable[..., Result]
RunJson = Callable[..., Any]


COMMANDS = [str(command.name) for command in app.registered_commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run: Run, command: str) -> None:
    text = run(command, "--help").stdout

    assert f"Examples:\n    gtrans {command}" in " ".join(text.split(" "))
    assert "--json" in text
    assert command in run("--help").stdout


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"gtrans {gtrans.__version__}\n"


def test_usage_errors_exit_with_2(run: Run) -> None:
    assert "No such command" in run("shwo", code=2).output
    assert "Missing argument" in run("show", code=2).output


def test_passes_lists_them_all(run: Run, run_json: RunJson) -> None:
    text = run("passes").stdout
    listed = run_json("passes")["passes"]

    assert "relu-mask" in text
    assert {"plan", "relu-mask"} <= {p["name"] for p in listed}
    known = next(p for p in listed if p["name"] == "plan")
    assert known.keys() == {
        "name",
        "summary",
        "knob",
        "knob_name",
        "law",
        "contract",
        "works_on",
        "options",
        "class",
        "documentation",
    }


def test_a_pass_is_described_in_full(run: Run, run_json: RunJson) -> None:
    text = run("passes", "plan").stdout
    described = run_json("passes", "plan")

    for part in ("Saves:", "Contract:", "Source:", "law", "cheap | none", "0.05", "R residual"):
        assert part in text
    assert described["options"][0] == {
        "name": "recompute",
        "type": "cheap | none",
        "default": "cheap",
        "required": False,
        "doc": '"cheap" runs pointwise and row-wise operators again where that saves memory; '
        '"none" keeps what autograd would keep.',
    }


def test_plug_in_passes_are_described(run_json: RunJson, wrong_passes: str) -> None:
    described = run_json("passes", "wrong-scale", "--plugin", wrong_passes)

    assert described["knob"] == "B"
    assert [o["name"] for o in described["options"]] == ["at", "also"]
    assert described["options"][1]["doc"] == "number of another one; -1 for none."


def test_a_pass_that_cannot_be_loaded_does_not_hide_the_others(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("gtrans.passes").passes.PASSES, "gone", "gtrans.no_such:Pass")

    text = run("passes").stdout

    assert "relu-mask" in text
    assert "gtrans.no_such:Pass is registered but cannot be loaded" in " ".join(text.split())


def test_unknown_passes_exit_with_2_and_offer_near_names(run: Run, run_json: RunJson) -> None:
    message = "unknown pass 'relu-mak'; did you mean 'relu-mask'?"

    assert f"error: {message}\n" in run("passes", "relu-mak", code=2).stderr
    assert run_json("passes", "relu-mak", code=2) == {
        "error": {"kind": "OptionError", "message": message, "exit_code": 2}
    }


def test_show_prints_the_joint_graph_with_marks_and_lines(run: Run, model_file: str) -> None:
    text = run("show", f"{model_file}:make").stdout

    assert "| relu = aten.relu.default(addmm)  # f32[128, 64]" in text
    assert "<- relu-mask" in text
    assert "\n< " in text
    assert "# model.py:15, in forward: return torch.relu(self.up(x)) + self.scale" in text
    assert "# kept for the backward: 2 values" in text


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        (["--before", "relu-mask"], "threshold_backward", "masked_fill"),
        (["--after", "relu-mask"], "masked_fill", "threshold_backward"),
        (["--stage", "forward"], "relu(", "masked_fill"),
        (["--stage", "forward-half"], "aten.le.Scalar", "masked_fill"),
        (["--stage", "backward-half"], "masked_fill", "aten.relu.default"),
        (["--skip", "relu-mask"], "threshold_backward", "masked_fill"),
        (["--passes", "plan{recompute=none}"], "threshold_backward", "masked_fill"),
    ],
)
def test_show_at_every_stage(
    run_json: RunJson, model_file: str, options: list[str], present: str, absent: str
) -> None:
    shown = run_json("show", f"{model_file}:make", *options)

    assert shown.keys() == {"model", "stage", "before", "after", "graphs", "files"}
    [graph] = shown["graphs"]
    assert graph.keys() == {"index", "nodes", "code", "kept"}
    assert present in graph["code"]
    assert absent not in graph["code"]


def test_show_after_a_forward_pass(run_json: RunJson, model_file: str, wrong_passes: str) -> None:
    options = ("--stage", "forward", "--plugin", wrong_passes, "--passes", "wrong-forward")

    [before] = run_json("show", "model.py:make_gelu", *options, "--before", "wrong-forward")[
        "graphs"
    ]
    [after] = run_json("show", "model.py:make_gelu", *options)["graphs"]

    assert "tanh" not in before["code"]
    assert "approximate='tanh'" in after["code"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--before", "plan", "--after", "plan"], "--before and --after exclude each other"),
        (["--after", "relu-mak"], "no pass 'relu-mak' runs on the joint graph in this pipeline; d"),
        (["--stage", "forward", "--after", "plan"], "no pass 'plan' runs on the forward graph"),
        (["--stage", "forward-half", "--after", "plan"], "the halves come after all passes"),
        (["--stage", "forward", "--svg", "a.svg"], "--dot and --svg draw the joint graph"),
        (["--dot", "none/a.dot"], "cannot write 'none/a.dot': No such file or directory"),
    ],
)
def test_show_refuses_what_it_cannot_show(
    run: Run, model_file: str, options: list[str], message: str
) -> None:
    assert message in run("show", f"{model_file}:make", *options, code=2).stderr


def test_show_writes_pictures(run_json: RunJson, model_file: str) -> None:
    shown = run_json("show", f"{model_file}:make", "--dot", "a.dot", "--svg", "a.svg")

    assert shown["files"] == ["a.dot", "a.svg"]
    assert Path("a.dot").read_text().startswith("digraph joint {")
    assert Path("a.svg").read_text().startswith("<svg ")


def test_diff_prints_what_a_pass_changed(run: Run, run_json: RunJson, model_file: str) -> None:
    result = run("diff", f"{model_file}:make", "--pass", "relu-mask")

    assert "--- before relu-mask" in result.stdout
    assert "-< threshold_backward = " in result.stdout
    assert "+| le_scalar = aten.le.Scalar(relu, 0)  # b8[128, 64]  <- relu-mask" in result.stdout
    assert "matched 1, rewrote 1" in result.stderr
    changed = run_json("diff", f"{model_file}:make", "--pass", "relu-mask")
    assert changed.keys() == {"model", "pass", "graphs"}
    [graph] = changed["graphs"]
    assert graph.keys() == {"index", "matched", "rewritten", "skipped", "diff"}


def test_diff_is_quiet_where_nothing_changed(run: Run, model_file: str) -> None:
    unmatched = run("diff", f"{model_file}:make_gelu", "--pass", "relu-mask")
    skipped = run("diff", f"{model_file}:make", "--pass", "relu-mask{min_numel=99999}")

    assert (unmatched.stdout, unmatched.stderr) == ("", "matched 0, rewrote 0\n")
    assert skipped.stdout == ""
    assert "rewrote 0; skipped 1: fewer elements than min_numel" in skipped.stderr


def test_diff_of_the_plan_shows_what_is_kept(run: Run, model_file: str) -> None:
    assert (
        "+keep le_scalar  # b8[128, 64]"
        in run("diff", f"{model_file}:make", "--passes", "relu-mask,plan", "--pass", "plan").stdout
    )


def test_diff_takes_one_pass(run: Run, model_file: str) -> None:
    message = "--pass takes one pass, got 'relu-mask,plan'"
    assert message in run("diff", f"{model_file}:make", "--pass", "relu-mask,plan", code=2).stderr


def test_explain_prints_tables(run: Run, model_file: str) -> None:
    text = run("explain", f"{model_file}:make", "--passes", "relu-mask,plan").stdout

    assert "saved      34.0 KiB as autograd would -> 10.0 KiB (-71%)" in text
    assert "masked_fill" in text
    assert "b8[128, 64]" in text


def test_explain_says_why_not(run: Run, model_file: str) -> None:
    text = run("explain", f"{model_file}:make", "-p", "relu-mask{min_numel=99999}").stdout
    assert "1 x fewer elements than min_numel" in text


def test_the_json_of_explain(run_json: RunJson, model_file: str) -> None:
    value = run_json("explain", f"{model_file}:make", "-p", "relu-mask,plan", "--skip", "relu-mask")

    assert value.keys() == {
        "model",
        "pipeline",
        "contract",
        "graphs",
        "training_graphs",
        "saved_bytes",
        "saved_bytes_before",
        "peak_bytes",
        "plain_peak_bytes",
        "budget_bytes",
        "reserved_bytes",
        "own_seconds",
        "passes",
        "saved",
        "missed",
    }
    assert value["pipeline"] == "plan"
    assert value["passes"][0].keys() >= {"graph", "pass", "matched", "rewritten", "skipped"}


def test_verify_agrees(run: Run, run_json: RunJson, model_file: str) -> None:
    text = run("verify", f"{model_file}:make").stdout
    value = run_json("verify", f"{model_file}:make_keywords", "--passes", "relu-mask,plan")

    assert "all 8 tensors agree within the contract (exact)" in text
    assert value.keys() == {
        "model",
        "rewrites",
        "seconds",
        "ok",
        "contract",
        "notes",
        "comparisons",
    }
    assert value["ok"]
    assert [r["pass"] for r in value["rewrites"]] == ["relu-mask", "plan"]


def test_verify_exits_with_1_where_gradients_differ(
    run: Run, run_json: RunJson, model_file: str, wrong_passes: str
) -> None:
    options = ("verify", f"{model_file}:make", "--plugin", wrong_passes, "-p", "wrong-scale")

    result = run(*options, code=1)
    value = run_json(*options, code=1)

    assert "tensors differ by more than the contract admits (exact)" in result.stdout
    assert "gtrans bisect model.py:make --plugin" in result.stderr
    assert not value["ok"]
    wrong = {c["name"] for c in value["comparisons"] if not c["ok"]}
    assert wrong == {"up.weight", "up.bias"}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--only-rewrites", "2"], 0),
        (["--only-rewrites", "1,2"], 1),
        (["--only-rewrites", "none"], 0),
        (["--bisect-limit", "0"], 0),
        (["--bisect-limit", "1"], 1),
    ],
)
def test_verify_performs_only_the_chosen_rewrites(
    run_json: RunJson, model_file: str, wrong_passes: str, options: list[str], code: int
) -> None:
    model = ("verify", f"{model_file}:make", "--plugin", wrong_passes, "-p", "wrong-scale,plan")

    value = run_json(*model, *options, code=code)

    assert value["ok"] is (code == 0)
    performed = [r["number"] for r in value["rewrites"]]
    assert (1 in performed) is (code == 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only-rewrites", "1", "--bisect-limit", "1"], "exclude each other; give one"),
        (["--only-rewrites", "a"], "cannot read rewrite numbers 'a'"),
        (["--backend", "inductr"], "unknown backend 'inductr'; did you mean 'inductor'?"),
        (["--skip", "plam"], "unknown pass 'plam'; did you mean 'plan'?"),
        (["-p", "plan{price=x}"], "plan{price} must be a number, got 'x'"),
    ],
)
def test_verify_refuses_bad_options(
    run: Run, model_file: str, options: list[str], message: str
) -> None:
    assert message in run("verify", f"{model_file}:make", *options, code=2).stderr


@pytest.mark.parametrize("command", ["show", "explain", "verify", "bisect", "time"])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("frozen", "error: Net has no trainable parameters"),
        ("wrong_shape", "error: the model does not accept these inputs"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_bad_models_exit_with_2(
    run: Run, model_file: str, command: str, function: str, message: str
) -> None:
    assert message in run(command, f"{model_file}:{function}", code=2).stderr


def test_bisect_names_the_rewrite_and_the_command_that_replays_it(
    run: Run, run_json: RunJson, model_file: str, wrong_passes: str
) -> None:
    options = ("--plugin", wrong_passes, "--passes", "relu-mask,wrong-scale{at=1},plan")

    result = run("bisect", f"{model_file}:make_gelu", *options, code=1)
    found = run_json("bisect", f"{model_file}:make_gelu", *options, code=1)

    assert "broken by pass wrong-scale\n  #2 wrong-scale at gelu_backward" in result.stdout
    assert "without these rewrites the gradient is right" in result.stdout
    assert f"replay: {found['replay']}\n" in result.stdout
    assert found["replay"].endswith("--only-rewrites 2-3")
    assert found["culprits"] == [[{**found["culprits"][0][0], "number": 2}]]
    again = run(*shlex.split(found["replay"])[1:], code=1)
    assert "2 of 3 rewrites performed" in again.stdout


def test_bisect_finds_nothing_where_nothing_is_wrong(
    run: Run, run_json: RunJson, model_file: str
) -> None:
    passes = ("--passes", "relu-mask,plan")
    text = run("bisect", f"{model_file}:make", *passes).stdout
    assert text == "nothing to find: the gradient is right with all 2 rewrites\n"
    found = run_json("bisect", f"{model_file}:make", *passes)
    assert (found["ok"], found["culprits"], found["replay"]) == (True, [], "")


def test_time_prints_passes_and_their_share(run: Run, run_json: RunJson, model_file: str) -> None:
    text = run("time", f"{model_file}:make").stdout
    value = run_json("time", f"{model_file}:make")

    assert "+1 aten.le.Scalar" in text
    assert "gtrans' share" in text
    assert value.keys() == {
        "model",
        "pipeline",
        "passes",
        "pass_seconds",
        "own_seconds",
        "lower_seconds",
        "tracing_seconds",
        "seconds",
        "own_share",
    }
    first = value["passes"][0]
    assert first["op_changes"]["aten.threshold_backward.default"] == -1
    assert first["nodes_after"] == first["nodes_before"] + 1
    assert 0 < value["pass_seconds"] <= value["own_seconds"] < value["seconds"]


def test_doctor_is_content_with_this_machine(run: Run, run_json: RunJson) -> None:
    assert "backend eager" in run("doctor").stdout
    value = run_json("doctor")
    assert value.keys() == {"ok", "gtrans", "checks"}
    backends = {f"backend {name}" for name in backend_table()}
    assert {"python", "torch", "cuda", "transformers"} | backends == {
        c["name"] for c in value["checks"]
    }


def test_doctor_says_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inductor, "unavailable", lambda self: "no C++ compiler found")
    assert "no C++ compiler found; 'eager' is used instead" in run("doctor").stdout

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.10.1")
    text = run("doctor", code=1).stdout
    assert "2.10.1, older than 2.11: upgrade torch" in text


def test_what_fails_inside_exits_with_3(run: Run, model_file: str, wrong_passes: str) -> None:
    options = ("--plugin", wrong_passes, "--passes", "raises")

    text = run("explain", f"{model_file}:make_gelu", *options, code=3).stderr

    assert "error: pass 'raises' failed with ZeroDivisionError: on purpose" in text


def test_a_bug_of_ours_exits_with_3_and_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, Any]:
        raise LookupError("oops")

    monkeypatch.setattr(catalog, "_python", broken)

    text = run("doctor", code=3).stderr
    assert "error: LookupError: oops" in text
    assert "GTRANS_TRACEBACK=1 shows the traceback" in text
    monkeypatch.setenv("GTRANS_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in run("doctor", code=3).stderr


PRUNABLE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.c(y + self.b(torch.tanh(self.norm(y))))


def make():
    return Net(), torch.randn(3, 4)


def gate():
    return nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2)), torch.randn(3, 4)
"""


def test_prune_lists_classes_trades_formulas_and_draws(
    run: Run, run_json: RunJson, tmp_path: Path
) -> None:
    file, svg = tmp_path / "prunable.py", tmp_path / "classes.svg"
    file.write_text(PRUNABLE)
    found = run("prune", f"{file}:make", "--formulas", "--svg", str(svg))
    assert "a.weight[0]" in found.stdout
    assert "(4): input" in found.stdout
    assert "parameters = n1*" in found.stdout
    assert "analysed in" in found.stderr
    drawn = svg.read_text()
    for text in ("input x", ">norm<", ">add<", "a.weight[0]  exact", "b.weight[1] (cut only)"):
        assert text in drawn
    value = run_json("prune", f"{file}:make", "--formulas")
    assert [t["sparsity"] for t in value["pareto"]] == [i / 10 for i in range(10)]
    assert value["pareto"][0]["parameters"] == value["parameters"]
    assert value["formulas"]["symbols"]["n1"] == "a.weight[0]"
    nothing = run("prune", f"{file}:gate")
    assert "approximate: linear" in nothing.stdout
    assert "nothing of Sequential can be erased" in nothing.stderr
    assert run_json("prune", f"{file}:gate", "--contract", "approximate")["classes"][0]["reason"]
