"""Time and memory of a step, as written and rewritten."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import benchmarks.cli
from gtrans.backends.inductor import Inductor
from gtrans.bench import Bench, Contender, bench
from gtrans.cli.main import app
from gtrans.errors import ModelError, OptionError
from gtrans.pipeline import Pipeline

Build = Callable[[str], tuple[nn.Module, tuple[Any, ...]]]


def test_three_ways_to_run_a_step(build: Build) -> None:
    model, inputs = build("mlp")
    before = [p.detach().clone() for p in model.parameters()]
    told: list[str] = []

    found = bench(
        model, inputs, {}, Pipeline.parse("plan"), backend="eager", rounds=3, told=told.append
    )

    assert [c.name for c in found.contenders] == ["as written", "torch.compile", "gtrans"]
    for c in found.contenders:
        low, high = c.spread_s
        assert 0 < low <= c.median_s <= high
        assert len(c.seconds) == 3
        assert c.peak_bytes > 0
    assert found.contenders[0].ratio == 1.0
    written, _, ours = (c.peak_bytes for c in found.contenders)
    assert ours <= written
    assert [line.split()[0] for line in str(found).splitlines()[1:]] == [
        "as",
        "torch.compile",
        "gtrans",
    ]
    assert told[-1] == "measuring memory"
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_one_call_has_no_spread() -> None:
    assert Contender("gtrans", 1.0, (2.0,), 0, 1.0).spread_s == (2.0, 2.0)


def test_why_a_contender_is_missing_is_printed() -> None:
    found = Bench((Contender("as written", 1.0, (2.0,), 0, 1.0),), "mine", ("it has no lowering",))
    assert str(found).endswith("it has no lowering")


def test_what_cannot_be_measured_says_why(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("mlp")
    plan = Pipeline.parse("plan")
    with pytest.raises(OptionError, match="rounds must be at least 1, got 0"):
        bench(model, inputs, {}, plan, rounds=0)
    monkeypatch.setattr(Inductor, "unavailable", lambda self: "no C++ compiler found")
    with pytest.raises(OptionError, match=r"cannot run here: no C\+\+ compiler found"):
        bench(model, inputs, {}, plan)
    with pytest.raises(ModelError, match="the model does not accept these inputs"):
        bench(model, (torch.randn(3, 7),), {}, plan, backend="eager", rounds=1)


def test_the_command(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    return nn.Linear(4, 4), torch.randn(3, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        app, ["bench", "model.py:make", "--backend", "eager", "--rounds", "2"]
    )
    assert result.exit_code == 0, result.output
    assert "as written" in result.stdout
    assert "gtrans timeline model.py:make" in result.stderr


def test_the_benchmark_of_the_command_line_runs_every_command() -> None:
    commands = benchmarks.cli.commands("hf:gpt2")
    assert [words[0] for words in commands] == [str(c.name) for c in app.registered_commands]
    by_name = {words[0]: words for words in commands}
    assert by_name["saved"] == ["saved", "hf:gpt2"]
    assert by_name["doctor"] == ["doctor"]
    assert by_name["repro"] == ["repro", "reduced.py"]
    assert by_name["diff"] == ["diff", "hf:gpt2", "--pass", "plan"]
