"""Chains: backward of recurrences and of deep models in sweeps, forward of recurrences in sweeps.

Everything is compared in one run with the best exact code there is: torch's own layer, torch's
layer compiled by Inductor (unrolled, eight steps a graph), and the hoisted backward. Targets:
- the hoisted backward is at least twice as fast as the best of torch's for a small cell, and at
  least 0.98 times as fast for every size that the pass takes; it takes no LSTM that torch computes
  as one fused operator, which gtrans keeps;
- Highway-BP is faster than the hoisted one at T = 1024, d = 32, with a gradient whose cosine to the
  true one is at least 0.99 on a model that was trained on real data;
- with five sweeps it is at least 1.7 times as fast as autograd's backward for a GRU and an LSTM of
  the published lengths (T = 256, and 1024 with d = 64), at batches of 1, 8 and 64. Five sweeps are
  six times the products of a step's gates, so where a step of autograd is all work, as at batch 64
  on a CPU of few cores, this cannot hold, and the table says so;
- `highway-recurrence` takes no size at which an exact backward is clearly faster;
- the longest row of products in the backward of a deep GPT and of a ResNet of 54 blocks is as short
  as the theory says;
- the forward in sweeps settles within T sweeps by every method. The map of where it pays has no
  target;
- spiking networks and solvers, one step at a time: see `chain_parts/stepwise.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.chain_parts.forward import crossover, sweeps_to_settle
from benchmarks.chain_parts.paths import critical_paths
from benchmarks.chain_parts.recurrent import Recurrent, cosine, fastest
from benchmarks.chain_parts.stepwise import stepwise_peaks
from benchmarks.chain_parts.trained import trained_sweeps
from benchmarks.chain_parts.untied import untied_blocks
from benchmarks.table import Table, verdict
from gtrans.analysis.recurrence_speed import RecurrenceSize, backward_seconds
from gtrans.passes.rule.hoist_recurrence import HoistRecurrence

_HOISTED, _NEVER_SLOWER, _OVER_AUTOGRAD, _GUARD = 2.0, 0.98, 1.7, 1.25
_SWEEPS = (0, 3, 5, 10)
_FIVE = _SWEEPS.index(5)
_TRAINING = Path(__file__).parent / "results" / "chain-training.cpu.txt"

Part = Callable[[bool, str], tuple[bool, str]]


def main(quick: bool, device: str) -> int:
    """Prints the tables; 0 if all targets hold."""
    parts: list[Part] = [
        _backward,
        trained_sweeps,
        critical_paths,
        untied_blocks,
        sweeps_to_settle,
        crossover,
        stepwise_peaks,
    ]
    ok, figures = True, []
    for part in parts:
        good, figure = part(quick, device)
        ok &= good
        figures.append(figure if good else f"MISSED {figure}")
        print(flush=True)
    print(f"training, from {_TRAINING.name} of `python -m benchmarks chain-training`:")
    print(_TRAINING.read_text().splitlines()[-1] if _TRAINING.exists() else "not run yet")
    return verdict(ok, "; ".join(figures))


@dataclass
class _Found:
    """The figures of the table of backwards, over all sizes."""

    small: list[float] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)
    over_autograd: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def verdict(self) -> tuple[bool, str]:
        """Whether the targets hold, and the figures."""
        below = {name: gain for name, gain in self.over_autograd.items() if gain < _OVER_AUTOGRAD}
        ok = min(self.small) >= _HOISTED and min(self.taken) >= _NEVER_SLOWER
        ok &= not below and not self.wrong
        short = "".join(f", {name} {gain:.2f}x" for name, gain in below.items())
        return ok, (
            f"hoisted backward of small cells {min(self.small):.1f}x of torch's best "
            f"(target {_HOISTED:g}x), of any size it takes at least {min(self.taken):.2f}x (target "
            f"{_NEVER_SLOWER}x); five sweeps over autograd's at the published lengths: "
            f"{len(self.over_autograd) - len(below)} of {len(self.over_autograd)} sizes at least "
            f"{_OVER_AUTOGRAD}x{short}; highway-recurrence takes {len(self.wrong)} sizes where "
            f"exact is faster{''.join(f', {name}' for name in self.wrong)}"
        )


def _backward(quick: bool, device: str) -> tuple[bool, str]:
    print(
        "milliseconds of the backward, random weights; cosine of the gradient with five sweeps\n"
        "(autograd: torch's steps; fused: oneDNN's LSTM, which eager torch calls on a CPU;\n"
        "compiled: Inductor; (): hoist-recurrence leaves the layer alone; taken: whether\n"
        "highway-recurrence takes it)"
    )
    sweeps = [f"k={k}" for k in _SWEEPS]
    table = Table(
        [
            "cell", "T", "B", "d", "fused", "autograd", "compiled", "hoisted", *sweeps, "cosine",
            "taken",
        ],
        [6, 6, 5, 5, 8, 10, 10, 10, 8, 8, 8, 8, 9, 7],
    )  # fmt: skip
    sizes = [(256, 1, 32), (256, 1, 64), (256, 8, 64)]
    if not quick:
        sizes += [(1024, 1, 32), (1024, 1, 64), (1024, 8, 64), (256, 32, 128)]
        sizes += [(256, 64, 64), (1024, 64, 64)]
    found = _Found()
    for kind in ("gru", "lstm"):
        for size in sizes:
            _row(table, found, kind, size, device, quick=quick)
    return found.verdict()


def _row(
    table: Table, found: _Found, kind: str, size: tuple[int, int, int], device: str, *, quick: bool
) -> None:
    """Measures one size."""
    steps, batch, width = size
    case = Recurrent(kind, steps, batch, width, device)
    with torch.backends.mkldnn.flags(enabled=False):
        runs = [case.backward(), case.backward(rule="loop")]
        compiled = not quick and batch * width <= 64 and steps == 256
        others = [case.compiled()] if compiled else []
    runs += [case.backward(rule="sweeps", count=k) for k in _SWEEPS]
    fused = kind == "lstm" and device == "cpu"
    others += [case.backward()] if fused else []
    times = fastest(runs + others, 8 if batch * width <= 64 and not quick else 3)
    autograd, hoisted, *swept = times[: len(runs)]
    rest = times[len(runs) :]
    torchs = min(autograd, *rest[: len(others) - fused], float("inf"))
    left_alone = fused or batch * width > (HoistRecurrence().max_state or math.inf)
    taken = _takes(kind, size, device)
    exact = f"({hoisted:.1f})" if left_alone else f"{hoisted:.1f}"
    table.row(
        kind, steps, batch, width, f"{rest[-1]:.1f}" if fused else "-", f"{autograd:.1f}",
        f"{rest[0]:.1f}" if compiled else "-", exact,
        *(f"{t:.1f}" for t in swept), f"{cosine(runs[2 + _FIVE](), runs[1]()):.4f}",
        "yes" if taken else "no",
    )  # fmt: skip
    name = f"{kind} T={steps} B={batch} d={width}"
    if not left_alone:
        found.taken.append(torchs / hoisted)
        if batch * width <= 64:
            found.small.append(torchs / hoisted)
    if width == 64:
        found.over_autograd[name] = autograd / swept[_FIVE]
    if taken and swept[_FIVE] > _GUARD * min(times[:2] + rest):
        found.wrong.append(name)


def _takes(kind: str, size: tuple[int, int, int], device: str) -> bool:
    """Whether `highway-recurrence` with five sweeps takes a size here."""
    own = "fused" if (kind, device) == ("lstm", "cpu") else "autograd"
    rules = (own, 0), ("loop", 0), ("sweeps", 5)
    *exact, swept = backward_seconds(RecurrenceSize(kind, *size, torch.float32, device), rules)
    return swept < min(exact)
