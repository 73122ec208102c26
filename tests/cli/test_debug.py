"""`gtrans run`, `reduce` and `repro` on the command line."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Run = Callable[..., Result]
RunJson = Callable[..., Any]

WRONG = ("--passes", "relu-mask,wrong-scale{at=1},plan")


@pytest.mark.parametrize("command", ["run", "reduce", "repro"])
def test_each_command_has_help_with_an_example(run: Run, command: str) -> None:
    text = run(command, "--help").stdout

    assert f"Examples:\n    gtrans {command}" in " ".join(text.split(" "))
    assert "--json" in text
    assert command in run("--help").stdout


def test_run_prints_numbers_and_differences(run: Run, model_file: str, wrong_passes: str) -> None:
    plugged = ("--plugin", wrong_passes, *WRONG)
    result = run("run", "model.py:make_gelu", *plugged, "--print-changed=diff", "--time-passes")

    assert "pass 1 relu-mask, graph 0: matched 0, rewrote 0" in result.stdout
    assert "pass 2 wrong-scale{at=1}, graph 0: matched 2, rewrote 2; rewrites #1-2" in result.stdout
    assert "\n+< mul_tensor_1 = aten.mul.Tensor(gelu_backward_1, 1.001)" in result.stdout
    assert "passes in all: " in result.stdout
    assert "one step on eager in " in result.stderr


def test_options_go_without_a_value(run: Run, model_file: str) -> None:
    text = run("run", f"{model_file}:make", "--print-changed", "--verify-each").stdout

    assert "| le_scalar = aten.le.Scalar(relu, 0)" in text
    assert "  nothing changed" in text


def test_the_json_of_run(run_json: RunJson, model_file: str) -> None:
    value = run_json("run", f"{model_file}:make", "--counter", "relu-mask=count:0")

    assert value.keys() == {"model", "passes", "seconds", "said"}
    assert value["passes"][0].keys() == {
        "number", "graph", "pass", "matched", "rewritten", "skipped", "rewrites", "nodes_before",
        "nodes_after", "op_changes", "seconds",
    }  # fmt: skip
    assert value["passes"][0]["rewrites"][0]["performed"] is False


def test_a_failing_run_ends_with_the_command_that_replays_it(
    run: Run, model_file: str, wrong_passes: str
) -> None:
    options = ("--plugin", wrong_passes, *WRONG, "--verify-each=grads", "--stats")

    text = run("run", "model.py:make_gelu", *options, code=1).stderr

    assert "after pass 2 'wrong-scale{at=1}' (rewrites #1-2) graph 0 computes something" in text
    assert "\n  find the rewrite: gtrans bisect model.py:make_gelu --plugin" in text
    replay = text.splitlines()[-1].removeprefix("  replay: ")
    again = run(*shlex.split(replay)[1:], code=1).stderr
    assert again.splitlines()[-1] == text.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--print-changed=dif"], "--print-changed cannot be 'dif'; did you mean 'diff'?"),
        (["--counter", "plan"], "cannot read the counter 'plan'; write PASS=skip:3,count:1"),
        (["--stop-after", "plam"], "no pass 'plam' in the pipeline; did you mean 'plan'?"),
        (["--disable", "plam"], "unknown pass 'plam'; did you mean 'plan'?"),
        (["--dump-dir", "model.py/x"], "cannot write 'model.py/x/"),
    ],
)
def test_run_refuses_bad_options(
    run: Run, model_file: str, options: list[str], message: str
) -> None:
    assert message in run("run", f"{model_file}:make", *options, code=2).stderr


def test_a_failure_is_reduced_and_replayed_until_it_is_mended(
    run: Run, run_json: RunJson, model_file: str, wrong_passes: str
) -> None:
    Path("my_passes.py").write_text(Path(wrong_passes).read_text())
    options = ("--plugin", "my_passes.py", *WRONG, "-o", "small.py")

    result = run("reduce", "model.py:make_gelu", *options)
    value = run_json("reduce", "small.py", "-o", "smaller.py")

    assert "pass 'wrong-scale': gradient" in result.stdout
    assert "replay: gtrans repro small.py" in result.stdout
    assert value["nodes"] <= value["nodes_before"] < 10
    assert value["failure"]["passes"] == ["wrong-scale"]
    text = run("repro", "small.py", code=1).stdout
    assert "still fails: pass 'wrong-scale': gradient" in text
    assert text.endswith("replay: gtrans repro small.py\n")
    mended = Path("my_passes.py").read_text().replace("return 1.001", "return 1.0")
    Path("my_passes.py").write_text(mended)
    assert "is right now" in run("repro", "small.py").stdout
    assert run_json("repro", "small.py")["verdict"] == "is right now"


def test_another_failure_is_told_apart(run: Run, model_file: str, wrong_passes: str) -> None:
    run("reduce", "model.py:make_gelu", "--plugin", wrong_passes, *WRONG, "-o", "a.py")
    text = Path("a.py").read_text()
    Path("a.py").write_text(
        text.replace("'kind': 'differs'", "'kind': 'nan'").replace("'torch': '", "'torch': '0.")
    )

    result = run("repro", "a.py", code=1)

    assert "fails in another way" in result.stdout
    assert "it was: " in result.stdout
    assert "written with torch 0." in result.stderr


def test_reduce_says_where_there_is_nothing_to_do(run: Run, model_file: str) -> None:
    assert "nothing to reduce" in run("reduce", f"{model_file}:make", code=2).stderr
    assert "cannot read the case 'no.py'" in run("repro", "no.py", code=2).stderr


def test_bisect_names_a_backend(run: Run, run_json: RunJson, model_file: str) -> None:
    plugin = str(Path(__file__).parents[2] / "benchmarks" / "planted.py")
    options = ("model.py:make_gelu", "--plugin", plugin, "--backend", "planted-backend")

    text = run("bisect", *options, code=1).stdout
    found = run_json("bisect", *options, code=1)

    assert "broken by backend planted-backend\n  backward half of graph 0, without any" in text
    assert (found["backend"], found["culprits"]) == ("planted-backend", [])
    replay = shlex.split(found["replay"])
    assert replay[-4:] == ["--backend", "planted-backend", "--only-rewrites", "none"]
    run(*replay[1:], code=1)
