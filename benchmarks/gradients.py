"""Gradients of the default passes against the untouched model, on every model of the zoo.

Target: every output, gradient and buffer agrees, within 1e-9 in float64 (relative) and within the
reassociation bound below it.
"""

import time

import torch

import gtrans
from benchmarks.table import Table, verdict
from benchmarks.zoo import ZOO, Entry
from gtrans.verification import Verification

_QUICK = ("gpt2", "bert", "vit", "mlp", "unet", "gru-lm", "graph-net", "moe", "graph-breaks")


def main(quick: bool, device: str) -> int:
    """Prints a row per model; 0 if all agree."""
    table = Table(
        ["model", "family", "graphs", "tensors", "float64", "float32", "saved", "seconds", ""],
        [20, 19, 7, 8, 10, 10, 9, 9, 8],
    )
    entries = [e for e in ZOO if not quick or e.name in _QUICK]
    wrong: list[str] = []
    worst = 0.0
    for entry in entries:
        start = time.perf_counter()
        result = _verified(entry, device)
        double = _largest(result, torch.float64)
        worst = max(worst, double or 0.0)
        explained = result.explanation
        saved = explained.saved_bytes / max(1, explained.saved_bytes_before) - 1
        table.row(
            entry.name,
            entry.family,
            len(explained.captured),
            len(result.comparisons),
            "-" if double is None else f"{double:.1e}",
            f"{_largest(result, torch.float32) or 0.0:.1e}",
            f"{saved:+.0%}",
            f"{time.perf_counter() - start:.1f}",
            "" if result.ok else "DIFFERS",
        )
        if not result.ok:
            wrong.append(entry.name)
            print(result)
    return verdict(
        not wrong,
        f"{len(entries) - len(wrong)} of {len(entries)} models agree; largest relative error of a "
        f"gradient in float64 {worst:.1e} (target 1e-9)" + (f"; wrong: {wrong}" if wrong else ""),
    )


def _verified(entry: Entry, device: str) -> Verification:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = entry.build()
    model.to(device)
    return gtrans.verify(model, **{k: v.to(device) for k, v in batch.items()})


def _largest(result: Verification, dtype: torch.dtype) -> float | None:
    errors = [c.relative for c in result.gradients(dtype)]
    return max(errors) if errors else None
