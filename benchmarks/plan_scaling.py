"""How long planning under a budget takes, and how that grows with depth.

The pass `plan` on a Llama with 12, 24, 48 and 96 layers, its front searched anew each time.
Targets: 96 layers in under 20 s on one core, and at most 10x the seconds of 12 layers for 8x the
layers.
"""

import os
import re

import torch

import gtrans
from benchmarks.table import Table, verdict
from benchmarks.zoo import huggingface
from gtrans.memory import Budget
from gtrans.pipeline import Pipeline
from gtrans.plan.planner import Plan

_SECONDS, _GROWTH = 20.0, 10.0
_SHARE = 0.9


def main(quick: bool, device: str) -> int:
    """Prints a row per depth; 0 if both targets hold."""
    os.environ["GTRANS_CACHE"] = "off"
    torch.set_num_threads(1)
    table = Table(["layers", "nodes", "plan s", "s / layer", "peak", "time"], [8] * 6)
    depths = (2, 4, 8, 16) if quick else (12, 24, 48, 96)
    seconds: dict[int, float] = {}
    # The smallest runs twice, first and last: imports and a busy moment must not flatter growth.
    for layers in (*depths, depths[0]):
        nodes, taken, note = _plan(layers, device)
        seconds[layers] = min(taken, seconds.get(layers, taken))
        table.row(layers, nodes, f"{taken:.2f}", f"{taken / layers:.3f}", *note)
    growth = seconds[depths[-1]] / seconds[depths[0]]
    ok = seconds[depths[-1]] <= _SECONDS and growth <= _GROWTH
    return verdict(
        ok,
        f"{depths[-1]} layers in {seconds[depths[-1]]:.1f} s (target {_SECONDS:g} s), "
        f"{growth:.1f}x for {depths[-1] / depths[0]:g}x layers (target {_GROWTH:g}x)",
    )


def _plan(layers: int, device: str) -> tuple[int, float, list[str]]:
    """Nodes of the graph, seconds of the pass, and what it found."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = huggingface(
        "llama", hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, vocab_size=101,
        intermediate_size=86, use_cache=False,
    )  # fmt: skip
    model.to(device)
    inputs = {k: v.to(device) for k, v in batch.items()}
    (plan,) = Plan.under_budget((Plan(),), Budget(fraction=_SHARE))
    explained = gtrans.explain(model, passes=Pipeline((plan,)), **inputs)
    (record,) = explained.training
    (step,) = record.steps
    assert record.original is not None
    found = [f"x{explained.peak / explained.plain_peak:.2f}", _slowdown(step.stats.notes)]
    return len(record.original.nodes), step.seconds, found


def _slowdown(notes: list[str]) -> str:
    found = re.search(r"predicted time (x[\d.]+)", " ".join(notes))
    return found[1] if found else ""
