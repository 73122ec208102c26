"""Memory budgets: is the measured peak under the budget, for every budget that is accepted?

Budgets are shares of the measured peak of the plain step (everything the backward reads is saved),
parameters, buffers and inputs included, all on the eager backend. Targets: the measured peak is
under the budget in every accepted case, and peak and predicted time are monotone in it. A budget
that is refused is shown with the smallest peak that gtrans says it can reach.
"""

import re
from collections.abc import Callable
from itertools import pairwise

import torch

import gtrans
from benchmarks.networks import networks, resident_bytes, step_of
from benchmarks.table import Table, verdict
from benchmarks.zoo import Built
from gtrans.analysis.measure import measured_peak
from gtrans.errors import BudgetError
from gtrans.explanation import Explanation

_SHARES = (0.8, 0.6, 0.4, 0.3, 0.2)
_QUICK = ("llama", "unet")
_MIB = 2**20


def main(quick: bool, device: str) -> int:
    """Prints a row per model and budget; 0 if all targets hold."""
    table = Table(
        ["model", "share", "budget", "predicted", "measured", "time", "planned in"],
        [8, 8, 12, 12, 12, 8, 12],
    )
    wrong: list[str] = []
    accepted = refused = 0
    for name, build in networks(quick).items():
        if quick and name not in _QUICK:
            continue
        plain, _ = _measured(build, device, passes="plan{recompute=none}")
        table.row(name, "plain", "", "", f"{plain / _MIB:.2f} MiB", "x1.00", "")
        rows: list[tuple[int, float]] = []
        for share in _SHARES[:2] if quick else _SHARES:
            budget = int(share * plain)
            try:
                peak, explanation = _measured(build, device, memory=budget)
            except BudgetError as error:
                refused += 1
                table.row(name, share, f"{budget / _MIB:.2f} MiB", "refused", _smallest(error))
                break  # smaller ones are refused as well
            accepted += 1
            rows.append((explanation.peak, _slowdown(explanation)))
            if peak > budget:
                wrong.append(f"{name} at {share}: {peak} > {budget}")
            table.row(
                name, share, f"{budget / _MIB:.2f} MiB", f"{explanation.peak / _MIB:.2f} MiB",
                f"{peak / _MIB:.2f} MiB", f"x{rows[-1][1]:.2f}", f"{explanation.own_seconds:.1f} s",
            )  # fmt: skip
        if any(a[0] < b[0] or a[1] > b[1] for a, b in pairwise(rows)):
            wrong.append(f"{name} is not monotone")
    figure = f"{accepted} budgets accepted, {refused} models refused a smaller one"
    kept = accepted - sum(">" in w for w in wrong)
    return verdict(not wrong, f"{figure}; kept {kept}; {'; '.join(wrong) or 'all monotone'}")


def _measured(
    build: Callable[[], Built],
    device: str,
    passes: str = "default",
    memory: int | None = None,
) -> tuple[int, Explanation]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = build()
    model.to(device)
    batch = {k: v.to(device) for k, v in batch.items()}
    gtrans.optimize(model, passes=passes, memory=memory, backend="eager")
    peak = measured_peak(step_of(model, batch), device=device).bytes
    return peak + resident_bytes(model, batch), gtrans.report(model)


def _slowdown(explanation: Explanation) -> float:
    notes = " ".join(n for _, s in explanation.steps() for n in s.stats.notes)
    return max(float(x) for x in re.findall(r"predicted time x([\d.]+)", notes))


def _smallest(error: BudgetError) -> str:
    found = re.search(r"can be reached is ([\d.]+ \w+)", str(error))
    return f">= {found[1]}" if found else "?"
