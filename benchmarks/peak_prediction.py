"""The predicted peak of a step against the measured one, on the eager backend and under Inductor.

Three pipelines per model: plain, the default, and a budget of 0.7 of the plain peak where that
can be reached. Both sides include parameters, buffers and inputs. Targets: within 5 % on the eager
backend, within 15 % under Inductor, and a budget is kept under both.
"""

from collections.abc import Callable

import torch

import gtrans
from benchmarks.networks import is_chosen, networks, resident_bytes, step_of
from benchmarks.table import Table, verdict
from benchmarks.zoo import Built
from gtrans.analysis.measure import measured_peak
from gtrans.errors import BudgetError

_TARGETS = {"eager": 0.05, "inductor": 0.15}
_QUICK = ("gpt2", "unet")
_PIPELINES = ("plan{recompute=none}", "default", "plan{memory=0.7}")
# Compiling takes most of the time.
_QUICK_UNDER_INDUCTOR = {("gpt2", _PIPELINES[0]), ("gpt2", _PIPELINES[2])}
_MIB = 2**20


def main(quick: bool, device: str) -> int:
    """Prints a row per model and pipeline; 0 if every prediction is within the target."""
    table = Table(
        ["model", "pipeline", "predicted", "eager", "error", "inductor", "error"],
        [8, 24, 14, 14, 10, 14, 10],
    )
    errors: dict[str, list[float]] = {backend: [] for backend in _TARGETS}
    exceeded = 0
    for name, build in networks(quick).items():
        if (quick and name not in _QUICK) or not is_chosen(name):
            continue
        for passes in _PIPELINES:
            cells: list[str] = []
            for backend in _TARGETS:
                if backend == "inductor" and quick and (name, passes) not in _QUICK_UNDER_INDUCTOR:
                    continue
                try:
                    predicted, measured, limit = _both(build, device, passes, backend)
                except BudgetError:
                    cells = ["refused"]
                    break
                errors[backend].append(predicted / measured - 1)
                exceeded += measured > limit
                cells = cells or [f"{predicted / _MIB:.2f} MiB"]
                cells += [f"{measured / _MIB:.2f} MiB", f"{errors[backend][-1]:+.2%}"]
            table.row(name, passes, *cells)
    worst = {backend: max(found, key=abs) for backend, found in errors.items()}
    off = ", ".join(f"{b}: {len(errors[b])}, off by {w:+.2%} at most" for b, w in worst.items())
    within = all(abs(w) <= _TARGETS[b] for b, w in worst.items())
    return verdict(within and not exceeded, f"predictions of {off}; {exceeded} budgets exceeded")


def _both(
    build: Callable[[], Built], device: str, passes: str, backend: str
) -> tuple[int, int, float]:
    """Predicted and measured peak, and the budget."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = build()
    model.to(device)
    batch = {k: v.to(device) for k, v in batch.items()}
    gtrans.optimize(model, passes=passes, backend=backend)
    peak = measured_peak(step_of(model, batch), device=device).bytes
    report = gtrans.report(model)
    return report.peak, peak + resident_bytes(model, batch), report.budget or float("inf")
