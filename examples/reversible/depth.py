"""Trains a model of several depths, with everything kept and with `reversible`."""

from collections.abc import Callable, Sequence

import torch
from matplotlib import pyplot
from torch import nn

import gtrans
from gtrans.analysis.measure import measured_peak

PLAIN, REVERSIBLE = "plan{recompute=none}", "reversible,plan"

Loss = Callable[[nn.Module, int], torch.Tensor]
"""The loss of a model on the batch of a step."""


def train(model: nn.Module, loss_of: Loss, steps: int) -> tuple[list[float], float]:
    """The losses of all steps, and the peak of one more in MiB."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses: list[float] = []

    def step() -> None:
        loss = loss_of(model, len(losses))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    for _ in range(steps):
        step()
    return losses, measured_peak(step, warm_up=0).bytes / 2**20


def against_depth(
    name: str, make: Callable[[int], nn.Module], loss_of: Loss, depths: Sequence[int], steps: int
) -> None:
    """Prints a row for each depth, and plots the peaks into `name`.png."""
    peaks: list[tuple[float, float]] = []
    print("blocks   plain MiB   reversible MiB   last loss   largest difference of the losses")
    for depth in depths:
        runs = []
        for passes in (PLAIN, REVERSIBLE):
            torch.manual_seed(0)
            model = gtrans.optimize(make(depth), passes=passes, backend="eager", on_error="raise")
            runs.append(train(model, loss_of, steps))
        (plain, high), (rebuilt, low) = runs
        peaks.append((high, low))
        apart = max(abs(a - b) for a, b in zip(plain, rebuilt, strict=True))
        print(f"{depth:6} {high:11.2f} {low:16.2f} {rebuilt[-1]:11.4f} {apart:12.1e}", flush=True)
    pyplot.plot(depths, peaks, "o-", label=[PLAIN, REVERSIBLE])
    axes = pyplot.gca()
    axes.set(xlabel="blocks", ylabel="peak of a training step, MiB", ylim=(0, None), title=name)
    pyplot.legend()
    pyplot.savefig(f"{name}.png", dpi=120)
