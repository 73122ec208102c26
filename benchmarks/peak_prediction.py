"""The predicted peak of a step against the measured one, on the eager backend.

Three pipelines per model: plain, the default, and a budget of 0.7 of the plain peak where that
can be reached. Both sides include parameters, buffers and inputs. Target: within 5 %.
"""

from collections.abc import Callable

import torch

import gtrans
from benchmarks.networks import networks, resident_bytes, step_of
from benchmarks.table import Table, verdict
from benchmarks.zoo import Built
from gtrans.analysis.measure import measured_peak
from gtrans.errors import BudgetError

_TARGET = 0.05
_QUICK = ("gpt2", "unet")
_MIB = 2**20


def main(quick: bool, device: str) -> int:
    """Prints a row per model and pipeline; 0 if every prediction is within the target."""
    table = Table(["model", "pipeline", "predicted", "measured", "error"], [8, 24, 14, 14, 10])
    errors: list[float] = []
    for name, build in networks(quick).items():
        if quick and name not in _QUICK:
            continue
        for passes in ("plan{recompute=none}", "default", "plan{memory=0.7}"):
            try:
                predicted, measured = _both(build, device, passes)
            except BudgetError:
                table.row(name, passes, "refused", "", "")
                continue
            errors.append(predicted / measured - 1)
            table.row(
                name, passes, f"{predicted / _MIB:.2f} MiB", f"{measured / _MIB:.2f} MiB",
                f"{errors[-1]:+.2%}",
            )  # fmt: skip
    worst = max(errors, key=abs)
    return verdict(
        abs(worst) <= _TARGET, f"{len(errors)} predictions, the worst is off by {worst:+.2%}"
    )


def _both(build: Callable[[], Built], device: str, passes: str) -> tuple[int, int]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = build()
    model.to(device)
    batch = {k: v.to(device) for k, v in batch.items()}
    gtrans.optimize(model, passes=passes, backend="eager")
    measured = measured_peak(step_of(model, batch), device=device).bytes
    return gtrans.report(model).peak, measured + resident_bytes(model, batch)
