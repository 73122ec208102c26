"""Planted defects in the training step of a 4-layer GPT: does `bisect` name each, and `reduce` it?

Each defect is one wrong rewrite among right ones (`benchmarks.planted`). It counts as found if
`gtrans.debugging.bisect` names exactly that rewrite (or the backend) in less than 30 s, and as
reduced if `reduce` leaves less than 25 nodes, inputs and output included, whose script shows the
same failure in a process of its own. All on the eager path, on two cores.

For comparison torch's accuracy minifier is asked about a defect in a joint pass, and about the same
one in a lowering as a control (`benchmarks.minifier`). `--quick` takes four defects and leaves that
out.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.planted import DEFECTS, Planted, PlantedBackend
from benchmarks.table import Table, verdict
from gtrans.api import explain
from gtrans.debugging.bisect import Bisection, bisect
from gtrans.debugging.case import write
from gtrans.debugging.reduce import Reduction, failing_case, reduce
from gtrans.pipeline import Pipeline
from gtrans.registry import registered

_SECONDS, _NODES = 30.0, 25
_QUICK = ("stale-input", "nan-rule", "odd-size", "backend")


@dataclass(frozen=True)
class Planting:
    """One defect in the model: the pipeline that has it, and the backend."""

    name: str
    passes: str
    backend: str = "eager"


def plantings() -> list[Planting]:
    """Every defect, two that do harm only together, and one in the backend."""
    found = [Planting(name, f"planted{{defect={name}}},plan") for name in DEFECTS]
    found.append(Planting("pair", "planted{defect=scaled-by-1.001,at=3,second=1},plan"))
    found.append(Planting("backend", "relu-mask,plan", PlantedBackend.name))
    return found


class Block(nn.Module):
    """A pre-norm block with dropout; GELU in even layers and ReLU in odd ones."""

    def __init__(self, width: int, layer: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.drop = nn.Linear(width, width), nn.Dropout(0.1)
        self.norm2, self.up = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.activation = F.relu if layer % 2 else F.gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, length, width]."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(b, t, d)))
        return x + self.drop(self.down(self.activation(self.up(self.norm2(x)))))


class Gpt(nn.Module):
    """Embedding, four blocks, tied head, loss. The vocabulary is odd, all other sizes are even."""

    def __init__(self, layers: int = 4, width: int = 32, vocabulary: int = 61) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, i) for i in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Args: ids: [batch, length]. Returns: the loss."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def main(quick: bool, device: str) -> int:
    """Prints a row per defect; 0 if all are found and reduced."""
    columns = ["defect", "bisect says", "s", "checks", "nodes", "after", "tries", "s", "script"]
    table = Table(columns, [18, 40, 7, 8, 7, 7, 7, 7, 12])
    chosen = [p for p in plantings() if not quick or p.name in _QUICK]
    found = reduced = 0
    slowest, largest = 0.0, 0
    with registered(Planted, PlantedBackend), tempfile.TemporaryDirectory() as folder:
        for planting in chosen:
            model, ids = _model(planting.name, device)
            truth = _truth(model, ids, planting)
            pipeline = Pipeline.parse(planting.passes)
            result = bisect(model, (ids,), {}, pipeline, backend=planting.backend)
            named = _named(result)
            seconds, small = _reduced(model, ids, planting)
            script = _replayed(Path(folder) / f"{planting.name}.py", small)
            table.row(
                planting.name, " ".join(named) or "nothing", f"{result.seconds:.1f}", result.checks,
                small.nodes_before, small.case.size, small.tries, f"{seconds:.1f}", script,
            )  # fmt: skip
            found += named == truth and result.seconds < _SECONDS
            reduced += small.case.size < _NODES and script == "shows it"
            slowest, largest = max(slowest, result.seconds), max(largest, small.case.size)
        if not quick:
            for place in ("pass", "lowering"):
                said = _minifier(place, Path(folder))
                print(f"torch's accuracy minifier, a defect in a {place}: {said}", flush=True)
    count = len(chosen)
    return verdict(
        found == reduced == count,
        f"{found} of {count} defects named exactly, the slowest in {slowest:.1f} s; {reduced} of "
        f"{count} reduced to a script that shows them, the largest has {largest} nodes",
    )


def _model(defect: str, device: str) -> tuple[nn.Module, torch.Tensor]:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Gpt().to(device)
    ids = torch.randint(1, 61, (2, 16), device=device)
    ids[0, 0] = 0
    if defect == "nan-rule":  # a value that only the right mask lets through
        with torch.no_grad():
            model.get_parameter("blocks.1.up.bias")[3] = torch.nan
    return model, ids


def _truth(model: nn.Module, ids: torch.Tensor, planting: Planting) -> list[str]:
    """What was planted, as the pass noted it."""
    if planting.backend != "eager":
        return [planting.backend]
    explanation = explain(model, ids, passes=planting.passes)
    notes = [note for _, step in explanation.steps() for note in step.stats.notes]
    sites = [note.removeprefix("wrong at ") for note in notes if note.startswith("wrong at ")]
    if planting.name == "pair":
        [planted] = [s for _, s in explanation.steps() if s.name == "planted"]
        sites.append(planted.rewrites[1].site)
    return sorted(sites)


def _named(result: Bisection) -> list[str]:
    if result.backend:
        return [result.backend] if not result.culprits else []
    return sorted(r.site for c in result.culprits for r in c.rewrites)


def _reduced(model: nn.Module, ids: torch.Tensor, planting: Planting) -> tuple[float, Reduction]:
    start = time.perf_counter()
    pipeline = Pipeline.parse(planting.passes)
    case = failing_case(model, (ids,), {}, pipeline, backend=planting.backend)
    small = reduce(case)
    return time.perf_counter() - start, small


def _replayed(file: Path, small: Reduction) -> str:
    """Runs the script in a process of its own."""
    file.write_text(write(small.case, f"{small.case.failure}."))
    done = _python([str(file)], Path.cwd())
    shows = done.returncode == 1 and "still fails" in done.stdout
    return "shows it" if shows else f"exit {done.returncode}"


def _minifier(place: str, folder: Path) -> str:
    """What torch's accuracy minifier says, run in a folder that it may fill."""
    done = _python(["-m", "benchmarks.minifier", place], folder)
    return (done.stdout.strip().splitlines() or [f"exit {done.returncode}"])[-1]


def _python(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python with the gtrans and the benchmarks of the working directory."""
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
    )
