"""Spiking networks and solvers step by step: peak memory and time against the unrolled loop.

The same model, as it is written, through the same backend, which runs the operators one by one:

    plain          gtrans without passes: the gradient through all steps
    cut            cut-carry{every=1}: no gradient in time, all steps kept
    sltt, 1 of 4   sltt; and sltt{steps=T/4}, where a quarter of the steps gets a gradient
    ode-adjoint    states between steps kept (exact), or none of them (backsolve)

Peaks are those of the step, above parameters and inputs. Targets: from 8 steps to 32, the peak of
`sltt` and of backsolve grows by at most 15 %; `ode-adjoint` gives the plain gradient; and at 32
steps no way peaks at more than a third of plain or takes more than 1.6 times its time (backsolve,
which runs f four times more, 3).
"""

import copy
from collections.abc import Callable

import torch
from torch import nn

import gtrans
from benchmarks.table import Table, verdict
from gtrans.analysis.measure import interleaved_seconds, measured_peak, paired_ratio

_SPIKING = {
    "plain": "plan", "cut": "cut-carry{every=1},plan", "sltt": "sltt,plan",
    "sltt, 1 of 4": "sltt{{steps={few}}},plan",
}  # fmt: skip
_SOLVER = {
    "plain": "plan", "ode-adjoint": "ode-adjoint,plan",
    "backsolve": "ode-adjoint{{method=backsolve}},plan",
}  # fmt: skip
_FLAT, _SHARE, _TIME, _BACKSOLVE_TIME = 1.15, 1 / 3, 1.6, 3.0
_MIB = 2**20


def main(quick: bool, device: str) -> int:
    """Prints a row per model, number of steps and way; 0 if all targets hold."""
    table = Table(
        ["model", "steps", "way", "peak", "of plain", "time", "cosine"],
        [10, 7, 15, 11, 10, 8, 9],
    )
    missed, figures = list[str](), list[str]()
    for name, build, ways in (("spiking", Spiking, _SPIKING), ("solver", Solver, _SOLVER)):
        rows = {
            steps: _compare(table, name, build(steps), ways, steps, device, 2 if quick else 5)
            for steps in (8, 32)
        }
        for way in ways:
            (before, *_), (peak, share, time, cosine) = rows[8][way], rows[32][way]
            flat = peak / before
            held = way in ("plain", "cut") or (
                share <= _SHARE
                and time <= (_BACKSOLVE_TIME if way == "backsolve" else _TIME)
                and (flat <= _FLAT or way == "ode-adjoint")
                and (cosine > 0.9999 or way != "ode-adjoint")
            )
            if not held:
                missed.append(way)
            if way not in ("plain", "cut"):
                figures.append(f"{way} {share:.2f} of the peak at {time:.2f}x")
    tail = f"; missed: {', '.join(missed)}" if missed else ""
    return verdict(not missed, f"32 steps: {', '.join(figures)}{tail}")


def _compare(
    table: Table, name: str, model: nn.Module, ways: dict[str, str], steps: int, device: str,
    rounds: int,
) -> dict[str, tuple[float, float, float, float]]:  # fmt: skip
    """For each way its peak, the share of plain's, the relative time, the gradient's cosine."""
    torch.manual_seed(0)
    x = torch.rand(16, 3, 16, 16, device=device)
    runs, gradients = dict[str, Callable[[], None]](), dict[str, torch.Tensor]()
    for way, passes in ways.items():
        torch._dynamo.reset()
        own = copy.deepcopy(model).to(device)
        text = passes.format(few=steps // 4) if "{{" in passes else passes
        gtrans.optimize(own, passes=text, backend="eager", on_error="raise")
        own(x).sin().sum().backward()
        gradients[way] = torch.cat(
            [g.flatten() for p in own.parameters() if (g := p.grad) is not None]
        )
        runs[way] = _step(own, x)
    peaks = {way: measured_peak(run, device=device).bytes for way, run in runs.items()}
    seconds = interleaved_seconds(runs, rounds=rounds, warm_up=0, device=device)
    found = {}
    for way in ways:
        share, time = peaks[way] / peaks["plain"], paired_ratio(seconds[way], seconds["plain"])
        cosine = float(torch.cosine_similarity(gradients[way], gradients["plain"], 0))
        table.row(
            name, steps, way, f"{peaks[way] / _MIB:.1f} MiB", f"{share:.2f}", f"x{time:.2f}",
            f"{cosine:.4f}",
        )  # fmt: skip
        found[way] = (peaks[way], share, time, cosine)
    return found


def _step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model(x).sin().sum().backward()
        model.zero_grad(set_to_none=True)

    return step


class Spiking(nn.Module):
    """Three layers of leaky neurons over convolutions; the mean of what they say at T steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16))
        self.last = nn.Linear(16, 10)
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [B, 3, H, W]. Returns: [B, 10]."""
        states = [x.new_zeros(len(x), 16, *x.shape[2:]) for _ in self.layers]
        total = x.new_zeros(len(x), 10)
        for _ in range(self.steps):
            spikes = x
            for i, layer in enumerate(self.layers):
                v = 0.5 * states[i] + layer(spikes)
                soft = torch.sigmoid(4 * (v - 0.2))
                spikes = ((v > 0.2).to(v.dtype) - soft).detach() + soft
                states[i] = v - 0.2 * spikes.detach()
            total = total + self.last(spikes.mean((2, 3)))
        return total / self.steps


class Solver(nn.Module):
    """A field of two convolutions, integrated over one unit of time by Heun's rule."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.field = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 3, 3, padding=1)
        )
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [B, 3, H, W]. Returns: the same shape, at time one."""
        h = 1 / self.steps
        for _ in range(self.steps):
            slope = self.field(x)
            x = x + h / 2 * (slope + self.field(x + h * slope))
        return x
