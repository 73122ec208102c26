"""How fast the command line answers: `gtrans --help`, and every command on a 12-layer GPT-2.

Targets: help in at most 150 ms, the fastest of several runs, and every command within 20 s
without Inductor. The commands are those of the program itself, so that a new one is measured too;
each runs as a process of its own, as a person would run it. `--quick` takes five commands and two
layers.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import typer

from benchmarks.table import Table, verdict
from gtrans.cli.main import app

_HELP_S, _COMMAND_S = 0.150, 20.0

# What a command needs besides MODEL; one that needs nothing else is not listed. `reduce` needs a
# failure, so it is given a pass that is wrong on purpose, and `repro` the script that it writes.
_PLUGIN = str(Path(__file__).parents[1] / "tests" / "wrong_passes.py")
_WRONG = ["--plugin", _PLUGIN]
_NEEDS: dict[str, list[str]] = {
    "diff": ["--pass", "plan"],
    "bench": ["--backend", "eager", "--rounds", "3"],
    "reduce": [*_WRONG, "--passes", "scaled,plan", "--output", "reduced.py"],
}
_MODEL = """from benchmarks.zoo import huggingface

def make():
    return huggingface("gpt2", n_layer={layers}, n_embd=64, n_head=4, vocab_size=200)
"""
_QUICK = ("passes", "explain", "verify", "report", "doctor")
_ARGUMENTS = {"file": "reduced.py"}
_ANSWERS = (0, 1)  # 1 where a check failed, as `repro` of a failure does


def main(quick: bool, device: str) -> int:
    """Prints the times; 0 if all targets hold."""
    layers = 2 if quick else 12
    model = "model.py:make"
    table = Table(["command", "seconds", "exit"], [52, 10, 6])
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "model.py").write_text(_MODEL.format(layers=layers))
        helped = min(_run(["--help"], here)[0] for _ in range(3 if quick else 10))
        table.row("gtrans --help", f"{helped:.3f}", 0)
        slowest, failed = ("", 0.0), []
        for words in commands(model):
            if quick and words[0] not in _QUICK:
                continue
            seconds, code = _run(words, here)
            label = " ".join({model: "MODEL", _PLUGIN: "FILE"}.get(word, word) for word in words)
            table.row(f"gtrans {label}"[:51], f"{seconds:.1f}", code)
            slowest = max(slowest, (words[0], seconds), key=lambda pair: pair[1])
            if code not in _ANSWERS:
                failed.append(words[0])
    ok = helped <= _HELP_S and slowest[1] <= _COMMAND_S and not failed
    figure = (
        f"help in {1000 * helped:.0f} ms (target 150 ms); slowest command on {layers} layers: "
        f"{slowest[0]} in {slowest[1]:.1f} s (target 20 s)"
    )
    return verdict(ok, figure + (f"; failed: {', '.join(failed)}" if failed else ""))


def commands(model: str) -> list[list[str]]:
    """Every command of the program with the arguments it cannot do without."""
    program = typer.main.get_command(app)
    found = []
    for name, command in getattr(program, "commands", {}).items():
        words = [name]
        for parameter in command.params:
            if parameter.param_type_name == "argument" and parameter.required:
                words.append(_ARGUMENTS.get(parameter.name, model))
        found.append(words + _NEEDS.get(name, []))
    return found


def _run(words: list[str], folder: Path) -> tuple[float, int]:
    """Seconds and exit code of one run of the program."""
    code = "import sys; sys.argv[0] = 'gtrans'; from gtrans.cli.main import main; main()"
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *words]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.stderr.write(done.stderr.decode()[-400:] + "\n")
    return seconds, done.returncode
