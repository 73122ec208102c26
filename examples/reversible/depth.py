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
    """Prints a row for each depth, and plots the peaks into `name`.png.

    The last column is a yardstick for the one before it: how far two plain runs move apart whose
    first weights differ in the last bit of one number.
    """
    peaks: list[tuple[float, float]] = []
    print("blocks   plain MiB   reversible MiB   last loss   losses apart   if one bit differs")
    for depth in depths:
        runs = []
        for passes, nudged in ((PLAIN, False), (REVERSIBLE, False), (PLAIN, True)):
            torch.manual_seed(0)
            model = make(depth)
            if nudged:
                nudge(model)
            model = gtrans.optimize(model, passes=passes, backend="eager", on_error="raise")
            runs.append(train(model, loss_of, steps))
        (plain, high), (rebuilt, low), (other, _) = runs
        peaks.append((high, low))
        figures = f"{apart(plain, rebuilt):14.1e} {apart(plain, other):20.1e}"
        print(f"{depth:6} {high:11.2f} {low:16.2f} {rebuilt[-1]:11.4f} {figures}", flush=True)
    plot(name, depths, peaks)


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of two runs' losses."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def nudge(model: nn.Module) -> None:
    """Moves one weight to the next number of its type."""
    weight = next(model.parameters()).data.view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))


def plot(name: str, depths: Sequence[int], peaks: Sequence[tuple[float, float]]) -> None:
    """Draws both peaks against the depth, each named at the end of its line."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    kept, rebuilt = ([pair[i] for pair in peaks] for i in range(2))
    lines = ((kept, "everything kept", "tab:gray"), (rebuilt, "reversible", "tab:blue"))
    for values, label, color in lines:
        axes.plot(depths, values, "o-", color=color)
        axes.annotate(
            f"{label}\n{values[-1]:.1f} MiB",
            (depths[-1], values[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=color,
        )
    axes.set(
        xlabel="blocks",
        ylabel="peak of a training step, MiB",
        ylim=(0, None),
        title=f"{name}: memory against depth",
        xticks=depths,
    )
    axes.margins(x=0.05)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(f"{name}.png", dpi=150, bbox_inches="tight")
    pyplot.close(figure)
