"""Looking at passes while they run, by settings and by environment variables."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gtrans
from gtrans.capture import Compiler
from gtrans.core import HELD_BACK
from gtrans.debugging.case import Written
from gtrans.debugging.look import Look
from gtrans.debugging.reduce import failing_case
from gtrans.errors import OptionError, VerifyError
from gtrans.pipeline import Gate, Pipeline, Window
from gtrans.registry import registered
from tests import wrong_passes as wrong
from tests.debugging.networks import layers


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered(wrong.WrongScale, wrong.WrongForward, wrong.Raises):
        yield


def python(file: Path) -> subprocess.CompletedProcess[str]:
    """Runs a file in a process of its own, with this gtrans."""
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
    )


def looked(passes: str, look: Look) -> tuple[list[str], Compiler]:
    """What is said while one step runs."""
    model, x = layers()
    said: list[str] = []
    pipeline = look.pipeline(Pipeline.parse(passes))
    compiler = Compiler(
        pipeline,
        "eager",
        skip_failures=False,
        gate=look.gate(),
        observers=look.observers(pipeline, said.append),
    )
    gtrans.api.install(model, compiler)
    model(x).sum().backward()
    return said, compiler


def test_passes_and_rewrites_are_always_numbered() -> None:
    said, _ = looked("relu-mask,wrong-scale,plan", Look())

    assert said[0].startswith("pass 1 relu-mask, graph 0: matched 0, rewrote 0; ")
    assert "pass 2 wrong-scale, graph 0: matched 3, rewrote 3; rewrites #1-3; " in said[1]
    assert "pass 3 plan" in said[2]
    assert "rewrites #4" in said[2]


@pytest.mark.parametrize(
    ("look", "held"),
    [
        (Look(bisect_limit=1), "2-3"),
        (Look(only_rewrites="2-9"), "1"),
        (Look(counter=("wrong-scale=skip:1,count:1",)), "1,3"),
        (Look(counter=("wrong-scale=count:0",)), "1-3"),
    ],
)
def test_rewrites_are_chosen(look: Look, held: str) -> None:
    said, compiler = looked("wrong-scale,plan{recompute=none}", look)

    assert f"of which #{held} held back" in said[0]
    assert compiler.captured[0].steps[0].stats.skipped[HELD_BACK] > 0


def test_passes_are_left_out() -> None:
    said, _ = looked("relu-mask,wrong-scale,plan", Look(stop_after="relu-mask"))
    assert [line.split()[2] for line in said] == ["relu-mask,", "plan{recompute=none},"]
    said, _ = looked("relu-mask,wrong-scale,plan", Look(disable=("wrong-scale",)))
    assert "wrong-scale" not in "".join(said)


def test_what_changed_is_printed() -> None:
    text = "relu-mask,wrong-scale,plan{recompute=none}"
    full = "\n".join(looked(text, Look(print_changed="full"))[0])
    quiet = "\n".join(looked(text, Look(print_changed="quiet"))[0])
    difference = "\n".join(looked(text, Look(print_changed="diff"))[0])

    assert "nothing changed" in full
    assert "nothing changed" not in quiet
    assert "mul_tensor = aten.mul.Tensor(gelu_backward, 1.001)" in quiet
    assert "\n+< mul_tensor = aten.mul.Tensor(gelu_backward, 1.001)" in difference
    assert "return [" in "\n".join(looked("relu-mask", Look(print_after_all=True))[0])


def test_statistics_name_each_rewrite_with_its_line() -> None:
    said, _ = looked("wrong-scale", Look(stats=True, time_passes=True, bisect_limit=2))

    assert " ms" in said[0]
    assert "#1 at gelu_backward (networks.py:" in said[1]
    assert said[3].endswith("held back")
    assert said[4] == "  operators: +2 aten.mul.Tensor"


@pytest.mark.parametrize("level", ["structure", "shapes", "grads"])
def test_right_passes_are_verified(level: Any) -> None:
    looked("relu-mask,norm-output,wrong-scale{at=9},plan", Look(verify_each=level))


def test_the_first_wrong_pass_is_named() -> None:
    message = (
        r"after pass 2 'wrong-scale\{at=1\}' \(rewrites #1-3\) graph 0 computes something else: "
        r"gradient .* differs by 1.0e-03, allowed"
    )
    with pytest.raises(VerifyError, match=message):
        looked("relu-mask,wrong-scale{at=1},plan", Look(verify_each="grads"))
    with pytest.raises(VerifyError, match="after pass 1 'wrong-forward'"):
        looked("wrong-forward,plan", Look(verify_each="grads"))


def test_a_graph_that_cannot_be_run_is_found() -> None:
    model, x = layers()
    with registered(wrong.Unrunnable):
        message = "after pass 1 'unrunnable' graph 0 cannot be run: "
        with pytest.raises(VerifyError, match=message):
            looked("unrunnable,plan", Look(verify_each="grads"))
        with pytest.raises(VerifyError, match="the rewritten step cannot be run: "):
            gtrans.verify(model, x, passes="unrunnable,plan")
        failure = failing_case(model, (x,), {}, Pipeline.parse("unrunnable,plan")).failure
    assert failure is not None
    assert (failure.kind, failure.passes) == ("raises", ("unrunnable",))


def test_false_shapes_are_found() -> None:
    class Lying(wrong.Scaled):
        """Records another shape than the operator makes."""

        def edited(self, graph: Any, gradient: Any) -> Any:
            new = super().edited(graph, gradient)
            new.args = (gradient, torch.float64)
            new.target = torch.ops.prims.convert_element_type.default
            return new

    look = Look(verify_each="shapes")
    pipeline = Pipeline((Lying(),))
    model, x = layers()
    observers = look.observers(pipeline, lambda text: None)
    gtrans.api.install(model, Compiler(pipeline, "eager", False, observers=observers))
    with pytest.raises(VerifyError, match=r"claims f32\[.*\] and makes f64"):
        model(x)


def test_a_graph_that_fits_no_shapes_is_found() -> None:
    class Broken(wrong.Scaled):
        """Views a value as one of another size."""

        def edited(self, graph: Any, gradient: Any) -> Any:
            new = super().edited(graph, gradient)
            new.args = (gradient, [gradient.meta["val"].numel() + 1])
            new.target = torch.ops.aten.view.default
            return new

    pipeline = Pipeline((Broken(),))
    model, x = layers()
    observers = Look(verify_each="shapes").observers(pipeline, lambda text: None)
    gtrans.api.install(model, Compiler(pipeline, "eager", False, observers=observers))
    with pytest.raises(VerifyError, match="after pass 1 'scaled': the graph cannot be run: "):
        model(x)


def test_each_graph_is_written_as_python_that_runs(tmp_path: Path) -> None:
    looked("wrong-forward{at=9},wrong-scale{at=9},plan", Look(dump_dir=tmp_path / "dump"))

    names = sorted(f.name for f in (tmp_path / "dump").iterdir())
    assert [n for n in names if n.endswith(".py")] == [
        "000_graph0_forward.py",
        "001_graph0_wrong-forward.py",
        "002_graph0_joint.py",
        "003_graph0_wrong-scale.py",
        "004_graph0_plan.py",
    ]
    index = (tmp_path / "dump" / "index.html").read_text()
    assert '<a href="004_graph0_plan.py">' in index
    assert '<a href="003_graph0_wrong-scale.diff">diff</a>' in index
    last = tmp_path / "dump" / "004_graph0_plan.py"
    assert Written.read(last).case().graph.nodes
    done = python(last)
    assert done.returncode == 0, done.stderr
    assert "gradient  layers.0.weight" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"print_changed": "dif"}, "--print-changed cannot be 'dif'; did you mean 'diff'"),
        ({"verify_each": "shape"}, "--verify-each cannot be 'shape'; did you mean 'shapes'"),
        ({"bisect_limit": 1, "only_rewrites": "1"}, "exclude each other"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Look(**options)


def test_bad_counters_and_passes_are_refused() -> None:
    with pytest.raises(OptionError, match="cannot read the counter 'relu-mask=skip'"):
        Look(counter=("relu-mask=skip",)).gate()
    with pytest.raises(OptionError, match="unknown pass 'relu-mak'; did you mean 'relu-mask'"):
        Look(counter=("relu-mak=skip:1",)).gate()
    with pytest.raises(OptionError, match="no pass 'plam' in the pipeline; did you mean 'plan'"):
        Look(stop_after="plam").pipeline(Pipeline.parse("plan"))


def test_a_window_counts_from_its_start() -> None:
    gate = Gate(windows={"a": Window(1, 2)})
    ask = gate.permission("a")
    assert [ask(str(i)) for i in range(4)] == [False, True, True, False]
    assert Gate(windows={"a": Window(1)}).permission("b")("x")


# ---------------------------------------------------------------------- environment


def test_the_environment_says_the_same() -> None:
    given = {
        "GTRANS_PRINT_CHANGED": "diff",
        "GTRANS_VERIFY_EACH": "1",
        "GTRANS_TIME_PASSES": "1",
        "GTRANS_STATS": "0",
        "GTRANS_DISABLE": "relu-mask plan",
        "GTRANS_BISECT_LIMIT": "7",
        "GTRANS_COUNTER": "plan=skip:1",
        "GTRANS_DUMP_DIR": "here",
        "GTRANS_STOP_AFTER": "plan",
        "PATH": "x",
    }
    assert Look.from_environment(given) == Look(
        print_changed="diff",
        verify_each="structure",
        time_passes=True,
        disable=("relu-mask", "plan"),
        bisect_limit=7,
        counter=("plan=skip:1",),
        dump_dir=Path("here"),
        stop_after="plan",
    )
    assert not Look.from_environment({}).wanted
    with pytest.raises(OptionError, match="GTRANS_BISECT_LIMIT must be a whole number, got 'x'"):
        Look.from_environment({"GTRANS_BISECT_LIMIT": "x"})


def test_a_training_script_obeys_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, x = layers()
    monkeypatch.setenv("GTRANS_BISECT_LIMIT", "2")
    gtrans.optimize(model, passes="wrong-scale,plan", backend="eager")
    monkeypatch.delenv("GTRANS_BISECT_LIMIT")
    model(x).sum().backward()

    assert "rewrites #1-3, of which #3 held back" in capsys.readouterr().err
    other, _ = layers()
    gtrans.optimize(other, passes="wrong-scale,plan", backend="eager")
    other(x).sum().backward()
    assert capsys.readouterr().err == ""  # nothing of it outlives its model


# ---------------------------------------------------------------------- crashes


def test_a_pass_that_fails_is_written_down_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GTRANS_REPRO_DIR", str(tmp_path / "repros"))
    model, x = layers()
    gtrans.optimize(model, passes="raises,plan", backend="eager")
    model(x).sum().backward()

    [file] = (tmp_path / "repros").iterdir()
    assert f"replay: gtrans repro {file}" in caplog.text
    assert all(p.grad is not None for p in model.parameters())
    case = Written.read(file)
    assert case.facts["failure"]["error"] == "ZeroDivisionError"
    done = python(file)
    assert done.returncode == 1, done.stderr
    assert "still fails: pass 'raises': raises ZeroDivisionError: on purpose" in done.stdout


def test_a_graph_with_constants_is_written_down_while_torch_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)
            return torch.where(y > 0, y, torch.tensor(0.0))

    monkeypatch.setenv("GTRANS_REPRO_DIR", str(tmp_path))
    model = gtrans.optimize(Constant(), passes="raises,plan", backend="eager")
    model(torch.randn(2, 4)).sum().backward()
    [file] = tmp_path.iterdir()
    assert f"replay: gtrans repro {file}" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_training_goes_on_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GTRANS_REPRO_DIR", str(tmp_path / "file" / "folder"))
    model, x = layers()
    gtrans.optimize(model, passes="raises,plan", backend="eager")
    model(x).sum().backward()
    assert "it could not be written down for a replay" in caplog.text
