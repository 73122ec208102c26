"""Training with Highway-BP: losses over time for k sweeps against the exact gradient.

A GRU that reads digits pixel by pixel, a GRU language model over characters of Python's own
source, a transformer with pre-norm blocks over the same text, a pre-activation ResNet on digits,
and residual layers that begin by undoing a part of their residual, as trained ones come to do; each
with the same weights and batches for every setting, and all of that for three seeds. `g=0` is the
sum over paths without damping, as published: the default damps each block by what it undoes.

Target: with five sweeps every model's loss at the end, the mean over seeds, is at most 5 % above
that of the exact gradient. Of the layers that undo their residual the figure says where three
sweeps end with and without damping. The curves go to `benchmarks/results/chain-training.cpu.png`
in a full run.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import gtrans
from benchmarks.chain_parts.paths import PreActivation
from benchmarks.chain_parts.readers import Batches, Language, Reader, batches, digits, text, windows
from benchmarks.table import Table, verdict
from gtrans.testing.streams import Stream

_SWEEPS = (0, 1, 3, 5, 10)
_SEEDS = (1, 2, 3)
_TARGET, _AT = 1.05, 5
_UNDAMPED = "k=3 g=0"
Curve = list[float]
Loss = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A model, and data to train it on.

    Attributes:
        model: makes one, from the random state as it is.
        given: batches of a seed.
        learners: for each setting, how it prepares a model, and the loss it trains on.
        steps: of a full run.
        rate: of Adam.
        quick: steps of a quick run; 0 leaves the task out.
    """

    model: Callable[[], nn.Module]
    given: Callable[[int], Batches]
    learners: Mapping[str, tuple[Callable[[nn.Module], nn.Module], Loss]]
    steps: int
    rate: float
    quick: int = 0

    def trained(self, steps: int, seeds: Sequence[int]) -> dict[str, list[Curve]]:
        """The losses of every setting, for each seed."""
        firsts = []
        for seed in seeds:
            torch.manual_seed(seed)
            firsts.append(self.model())
        curves: dict[str, list[Curve]] = {}
        for name, (prepare, loss) in self.learners.items():
            torch._dynamo.reset()
            learner = prepare(copy.deepcopy(firsts[0]))  # captured once, for all seeds
            for seed, first in zip(seeds, firsts, strict=True):
                learner.load_state_dict(first.state_dict())
                curve = list(_losses(learner, loss, self.given(seed), steps, self.rate))
                curves.setdefault(name, []).append(curve)
        return curves


def main(quick: bool, device: str) -> int:
    """Trains everything; 0 if the target holds."""
    table = Table(["model", "steps", "exact", *_columns()], [18, 7, 9, *[10] * 6])
    curves: dict[str, dict[str, list[Curve]]] = {}
    worst = 0.0
    for name, task in _tasks(device).items():
        steps = task.quick if quick else task.steps
        if not steps:
            continue
        found = curves[name] = task.trained(steps, _SEEDS[: 1 if quick else None])
        ends = {setting: mean(map(_end, runs)) for setting, runs in found.items()}
        cells = [f"{ends[c]:.3f}" if c in ends else "-" for c in ("exact", *_columns())]
        table.row(name, steps, *cells)
        worst = max(worst, ends[f"k={_AT}"] / ends["exact"])
    if not quick:
        print(f"curves: {_plot(curves)}")
    undoing = curves["undoing layers"]
    plain, damped = (mean(map(_end, undoing[s])) for s in (_UNDAMPED, "k=3"))
    return verdict(
        worst <= _TARGET or quick,
        f"with {_AT} sweeps the loss ends at most {worst:.2f}x that of the exact gradient (target "
        f"{_TARGET}x, {'not judged in a quick run' if quick else f'mean of {len(_SEEDS)} seeds'}); "
        f"where layers undo their residual, three sweeps end at {damped:.2f}, without damping at "
        f"{plain:.2f}",
    )


def _columns() -> list[str]:
    return [*(f"k={k}" for k in _SWEEPS), _UNDAMPED]


def _end(curve: Curve) -> float:
    return mean(curve[-max(1, len(curve) // 5) :])


def _losses(
    model: nn.Module, loss: Loss, given: Batches, steps: int, rate: float
) -> Iterator[float]:
    """Trains a model, and says its loss before each step."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _, (x, y) in zip(range(steps), given, strict=False):
        found = loss(model, x, y)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        yield float(found.detach())


def _tasks(device: str) -> dict[str, Task]:
    pixels, labels = digits(8, device)
    passages, letters = text(device)
    images = pixels.view(-1, 1, 8, 8).expand(-1, 3, 8, 8)

    def shown(x: torch.Tensor, size: int) -> Callable[[int], Batches]:
        return lambda seed: batches(x, labels, size, seed)

    def read(length: int, size: int) -> Callable[[int], Batches]:
        return lambda seed: windows(passages, length, size, seed)

    # fmt: off
    return {
        "digits GRU": Task(
            lambda: Reader(32).to(device), shown(pixels, 64), _by_rules(), 250, 5e-3, quick=40
        ),
        "characters GRU": Task(
            lambda: Language(letters, 64).to(device), read(64, 16), _by_rules(), 120, 5e-3
        ),
        "transformer": Task(
            lambda: _Transformer(letters, 24, 32, 8).to(device), read(24, 32),
            _by_passes(_next_character), 100, 3e-3,
        ),
        "ResNet": Task(
            lambda: PreActivation(36, 4).to(device), shown(images, 32),
            _by_passes(_classes), 60, 3e-3,
        ),
        "undoing layers": Task(
            lambda: _Undoing(64, 32, 8).to(device), shown(pixels, 64),
            _by_passes(_classes), 150, 3e-3, quick=30,
        ),
    }
    # fmt: on


def _classes(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def _next_character(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y[:, -1])


def _by_rules() -> dict[str, tuple[Callable[[nn.Module], nn.Module], Loss]]:
    """Settings of a recurrent layer."""
    rules: dict[str, dict[str, Any]] = {"exact": {"rule": "loop"}}
    rules |= {f"k={k}": {"rule": "sweeps", "count": k} for k in _SWEEPS}

    def loss_by(options: dict[str, Any]) -> Loss:
        return lambda model, x, y: model.loss(x, y, **options)

    return {name: (lambda model: model, loss_by(options)) for name, options in rules.items()}


def _by_passes(loss: Loss) -> dict[str, tuple[Callable[[nn.Module], nn.Module], Loss]]:
    """Settings of a stream of blocks."""
    passes = {"exact": "none"} | {f"k={k}": f"highway-bp{{iterations={k}}}" for k in _SWEEPS}
    passes[_UNDAMPED] = "highway-bp{iterations=3,gamma=0.0}"

    def prepare_by(text: str) -> Callable[[nn.Module], nn.Module]:
        return lambda model: gtrans.optimize(model, passes=text, backend="eager")

    return {name: (prepare_by(text), loss) for name, text in passes.items()}


class _Transformer(nn.Module):
    """Pre-norm blocks of attention and MLP; attention is causal by shifting the text instead."""

    def __init__(self, letters: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.place = nn.Parameter(torch.randn(length, width) / 10)
        self.stream, self.head = Stream("transformer", depth, width), nn.Linear(width, letters)
        self.stream.add_module("last", nn.LayerNorm(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.stream(self.embed(x) + self.place)[0]
        out: torch.Tensor = self.head(hidden[:, -1])
        return out


class _Undoing(nn.Module):
    """Residual layers whose derivative begins at minus 0.4 times the identity and some noise."""

    def __init__(self, inputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, 10)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        with torch.no_grad():
            for layer in self.layers:
                noise = 0.1 * torch.randn(width, width) / width**0.5
                layer.get_parameter("weight").copy_(noise - 0.4 * torch.eye(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        out: torch.Tensor = self.last(torch.tanh(x))
        return out


def _plot(curves: dict[str, dict[str, list[Curve]]]) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4), squeeze=False)
    for axis, (title, found) in zip(axes[0], curves.items(), strict=True):
        for name, runs in found.items():
            curve = [mean(values) for values in zip(*runs, strict=True)]
            size = max(1, len(curve) // 30)
            smooth = [sum(curve[i : i + size]) / size for i in range(0, len(curve) - size, size)]
            shown = [min(v, 2 * curve[0]) if math.isfinite(v) else math.nan for v in smooth]
            style = {"exact": "k-", _UNDAMPED: ":"}.get(name, "-")
            axis.plot(range(0, size * len(shown), size), shown, style, label=name, linewidth=1.2)
        axis.set(title=f"{title}, mean of {len(runs)} seeds", xlabel="step", ylabel="loss")
        axis.legend(fontsize=8)
    figure.tight_layout()
    path = Path(__file__).parent / "results" / "chain-training.cpu.png"
    figure.savefig(path, dpi=90)
    return path
