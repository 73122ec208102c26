"""Memory budgets: is the measured peak under the budget, for every budget that is accepted?

Budgets are shares of the measured peak of the plain step (everything the backward reads is saved),
parameters, buffers and inputs included, on the eager backend and under Inductor, each against its
own plain peak. Targets: the measured peak is under the budget in every accepted case, and peak and
predicted time are monotone in it. A budget that is refused is shown with the smallest peak that
gtrans says it can reach.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch

import gtrans
from benchmarks.networks import BACKENDS, is_chosen, networks, resident_bytes, step_of
from benchmarks.table import Table, verdict
from benchmarks.zoo import Built
from gtrans.analysis.measure import measured_peak
from gtrans.errors import BudgetError
from gtrans.explanation import Explanation

_SHARES = (0.8, 0.6, 0.4, 0.3, 0.2)
_QUICK = ("llama", "unet")
_MIB = 2**20


@dataclass
class Outcome:
    """What came of all budgets so far."""

    accepted: int = 0
    refused: int = 0
    exceeded: list[str] = field(default_factory=list)
    crooked: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kept = self.accepted - len(self.exceeded)
        wrong = "; ".join((*self.exceeded, *self.crooked))
        return (
            f"{self.accepted} budgets accepted, {self.refused} refused a smaller one; kept {kept}; "
            f"{wrong or 'all monotone'}"
        )


def main(quick: bool, device: str) -> int:
    """Prints a row per model, backend and budget; 0 if all targets hold."""
    table = Table(
        ["model", "backend", "share", "budget", "predicted", "measured", "time", "planned in"],
        [8, 10, 7, 12, 12, 12, 8, 12],
    )
    outcome = Outcome()
    for name, build in networks(quick).items():
        if (quick and name not in _QUICK) or not is_chosen(name):
            continue
        for backend in BACKENDS[:1] if quick else BACKENDS:
            if is_chosen(backend):
                _budgets(table, outcome, name, backend, quick, partial(_measured, build, device))
    return verdict(not outcome.exceeded and not outcome.crooked, str(outcome))


def _budgets(
    table: Table,
    outcome: Outcome,
    name: str,
    backend: str,
    quick: bool,
    measured: Callable[..., tuple[int, Explanation]],
) -> None:
    """The rows of one model on one backend."""
    plain, _ = measured(backend, passes="plan{recompute=none}")
    table.row(name, backend, "plain", "", "", f"{plain / _MIB:.2f} MiB", "x1.00", "")
    rows: list[tuple[int, float]] = []
    for share in _SHARES[:2] if quick else _SHARES:
        budget = int(share * plain)
        try:
            peak, explanation = measured(backend, memory=budget)
        except BudgetError as error:
            outcome.refused += 1
            cells = f"{budget / _MIB:.2f} MiB", "refused", _smallest(error)
            table.row(name, backend, share, *cells)
            break  # smaller ones are refused as well
        outcome.accepted += 1
        rows.append((explanation.peak, _slowdown(explanation)))
        if peak > budget:
            outcome.exceeded.append(f"{name} at {share}, {backend}: {peak} > {budget}")
        table.row(
            name, backend, share, f"{budget / _MIB:.2f} MiB", f"{explanation.peak / _MIB:.2f} MiB",
            f"{peak / _MIB:.2f} MiB", f"x{rows[-1][1]:.2f}", f"{explanation.own_seconds:.1f} s",
        )  # fmt: skip
    if any(a[0] < b[0] or a[1] > b[1] for a, b in pairwise(rows)):
        outcome.crooked.append(f"{name} is not monotone, {backend}")


def _measured(
    build: Callable[[], Built],
    device: str,
    backend: str,
    passes: str = "default",
    memory: int | None = None,
) -> tuple[int, Explanation]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = build()
    model.to(device)
    batch = {k: v.to(device) for k, v in batch.items()}
    gtrans.optimize(model, passes=passes, memory=memory, backend=backend)
    peak = measured_peak(step_of(model, batch), device=device).bytes
    return peak + resident_bytes(model, batch), gtrans.report(model)


def _slowdown(explanation: Explanation) -> float:
    notes = " ".join(n for _, s in explanation.steps() for n in s.stats.notes)
    return max(float(x) for x in re.findall(r"predicted time x([\d.]+)", notes))


def _smallest(error: BudgetError) -> str:
    found = re.search(r"can be reached is ([\d.]+ \w+)", str(error))
    return f">= {found[1]}" if found else "?"
