"""Plans against torch's memory budget and per-block checkpointing: peak, recomputation, step time.

For every budget that torch is given, gtrans gets the peak that torch's step was measured at, as a
budget in bytes. Recomputation is counted in products, convolutions and attention, as a share of the
plain step's; peaks include parameters, buffers and inputs; times of a pair are taken in turns.
Where torch's step raises an error under its budget, as with batch norms below 1, there is no pair.
Targets: gtrans' measured peak is never above the rival's, it never recomputes more, takes at most
as long in the median, and on every model there is a point with a peak at least 20 % lower than a
rival's that takes no longer than it.

A Llama of 6 layers, width 256, batch 8 x 256 is looked at besides: 81 MB above what is there before
the step in at most 1.20 of the plain time, and a plan at 65 MB. Checkpointing per block takes about
as much memory as the first, and longer. With GTRANS_BENCH_BACKENDS=inductor only this one is looked
at, everything compiled by Inductor; of GTRANS_BENCH_MODELS it is the one called "wide".
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._functorch import config as functorch_config

import gtrans
from benchmarks.networks import is_chosen, networks, resident_bytes, step_of, wide_llama
from benchmarks.rivals import TorchBudget, checkpointed, eager_flops, product_flops
from benchmarks.table import Table, verdict
from benchmarks.zoo import Built
from gtrans.analysis.measure import measured_peak
from gtrans.analysis.schedule import schedule_of
from gtrans.errors import BudgetError

_SHARES = (1.0, 0.8, 0.5, 0.2, 0.0)
_QUICK_SHARES = (0.6, 0.1)
_QUICK = ("llama", "unet")
_LOWER = 0.8
_MIB = 2**20
# Of the Llama of width 256: bytes above what is resident, and the time that they may take.
_WIDE_BYTES, _WIDE_TIME, _WIDE_SMALLEST = 81 * 10**6, 1.20, 65 * 10**6

Build = Callable[[], Built]


@dataclass
class Run:
    """A model that is ready to step, and what is known of its step.

    Attributes:
        step: one training step.
        peak: measured bytes, with parameters, buffers and inputs.
        flops: of products in one step.
        seconds: of one step; NaN until it is timed.
    """

    step: Callable[[], None]
    peak: int
    flops: int
    seconds: float = float("nan")


@dataclass(frozen=True)
class Pair:
    """A rival and gtrans at the same peak.

    Attributes:
        label: the rival.
        rival: its run.
        own: the run of gtrans, None if it refuses that peak.
        lower: the run of gtrans at a peak a fifth lower, None if it refuses that, or if another
            pair of the model has one that takes no longer than its rival.
    """

    label: str
    rival: Run
    own: Run | None
    lower: Run | None


class Bench:
    """Builds one model over and over, each time for another way to run it."""

    def __init__(self, build: Build, device: str, backend: str = "eager") -> None:
        self.build, self.device, self.backend = build, device, backend

    def plain(self) -> Run:
        """Everything that the backward reads is saved."""
        return self._gtrans(passes="plan{recompute=none}")

    @property
    def resident(self) -> int:
        """Bytes of parameters, buffers and inputs."""
        model, _ = self._fresh()
        return resident_bytes(model, self._batch)

    def under(self, budget: int) -> Run | None:
        """Gtrans under a budget in bytes; None if it refuses."""
        try:
            return self._gtrans(memory=budget)
        except BudgetError:
            return None

    def torch_budget(self, share: float) -> Run:
        """Torch's plan for a budget of its own kind."""
        torch._dynamo.reset()
        model, step = self._fresh()
        if self.backend == "inductor":
            model.compile()
            with functorch_config.patch(activation_memory_budget=share):
                return Run(step, self._peak(model, step), 0)
        rival = TorchBudget(share)
        rival.compile(model)
        peak = self._peak(model, step)
        return Run(step, peak, rival.flops)

    @contextmanager
    def checkpointing(self, plain: Run) -> Iterator[Run]:
        """Every block is computed again, without a compiler unless that is the backend."""
        torch._dynamo.reset()
        model, step = self._fresh()
        without = eager_flops(step)
        with checkpointed(model):
            if self.backend == "inductor":
                model.compile()
                yield Run(step, self._peak(model, step), 0)
                return
            flops = round(plain.flops * eager_flops(step) / without)
            yield Run(step, self._peak(model, step), flops)

    def _gtrans(self, passes: str = "default", memory: int | None = None) -> Run:
        model, step = self._fresh()
        gtrans.optimize(model, passes=passes, memory=memory, backend=self.backend)
        peak = self._peak(model, step)
        graphs = [c.rewritten for c in gtrans.report(model).training if c.rewritten]
        flops = sum(product_flops(t.node) for g in graphs for t in schedule_of(g).tasks)
        return Run(step, peak, flops)

    def _fresh(self) -> tuple[nn.Module, Callable[[], None]]:
        torch.manual_seed(0)
        model, batch = self.build()
        model.to(self.device)
        self._batch = {k: v.to(self.device) for k, v in batch.items()}
        return model, step_of(model, self._batch)

    def _peak(self, model: nn.Module, step: Callable[[], None]) -> int:
        peak = measured_peak(step, device=self.device).bytes
        return peak + resident_bytes(model, self._batch)


def main(quick: bool, device: str) -> int:
    """Prints a row per rival and model; 0 if all targets hold."""
    table = Table(
        [
            "model",
            "rival",
            "peak",
            "own peak",
            "again",
            "own again",
            "time",
            "ratio",
            "at 0.8 peak",
        ],
        [8, 12, 12, 12, 8, 10, 10, 8, 12],
    )
    missed: list[str] = []
    ratios: list[float] = []
    plotted: dict[str, tuple[Run, list[Pair]]] = {}
    if not is_chosen("eager"):
        missed = [*_wide(Bench(wide_llama, device, "inductor"), table, "inductor")]
        return verdict(not missed, f"under Inductor; {'; '.join(missed) or 'none missed'}")
    for name, build in networks(quick).items():
        if (quick and name not in _QUICK) or not is_chosen(name):
            continue
        plain, pairs = _compare(name, Bench(build, device), quick, table)
        ratios += [p.own.seconds / p.rival.seconds for p in pairs if p.own]
        missed += [f"{name}: {m}" for m in _missed(pairs)]
        plotted[name] = plain, pairs
    if not quick and is_chosen("wide"):
        missed += _wide(Bench(wide_llama, device), table)
    if not quick and len(plotted) == len(networks(quick)):
        path = plot(plotted, Path(__file__).parent / "results" / f"pareto.{device}.png")
        print(f"plot: benchmarks/results/{path.name}")
    median = statistics.median(ratios) if ratios else float("nan")
    if median > 1.0:
        missed.append(f"median time ratio {median:.3f}")
    figure = f"{len(ratios)} pairs, step time x{median:.3f} of the rival's in the median"
    return verdict(not missed, f"{figure}; {'; '.join(missed) or 'no more recomputation anywhere'}")


def _wide(bench: Bench, table: Table, name: str = "wide") -> Iterator[str]:
    """Rows and misses of the Llama of width 256."""
    plain = bench.torch_budget(1.0) if bench.backend == "inductor" else bench.plain()
    resident = bench.resident
    with bench.checkpointing(plain) as rival:
        own = bench.under(_WIDE_BYTES + resident)
        smallest = bench.under(_WIDE_SMALLEST + resident)
        runs = {"plain": plain, "checkpoint": rival, "81 MB": own, "65 MB": smallest}
        if bench.backend == "inductor":
            runs["torch 0.1"] = bench.torch_budget(0.1)
        _time(*(run for run in runs.values() if run))
    for label, run in runs.items():
        cells = ("refused",) if run is None else (
            f"{(run.peak - resident) / 1e6:.1f} MB", "",
            f"{run.flops / plain.flops - 1:.1%}" if plain.flops else "", "",
            f"{run.seconds:.4f} s", f"x{run.seconds / plain.seconds:.3f}",
        )  # fmt: skip
        table.row(name, label, *cells)
    if own is None:
        yield f"{name}: no plan at 81 MB"
    elif own.seconds > _WIDE_TIME * plain.seconds:
        yield f"{name}: 81 MB takes x{own.seconds / plain.seconds:.2f}"
    if smallest is None:
        yield f"{name}: no plan at 65 MB"
    for label, limit in (("81 MB", _WIDE_BYTES), ("65 MB", _WIDE_SMALLEST)):
        run = runs[label]
        if run is not None and run.peak - resident > limit:
            yield f"{name}: {label} takes {(run.peak - resident) / 1e6:.1f} MB"


def _compare(name: str, bench: Bench, quick: bool, table: Table) -> tuple[Run, list[Pair]]:
    plain = bench.plain()
    _time(plain)
    table.row(name, "plain", f"{plain.peak / _MIB:.2f} MiB", "", "", "", f"{plain.seconds:.4f} s")
    pairs: list[Pair] = []
    seen: set[tuple[int, int]] = set()
    for share in _QUICK_SHARES if quick else _SHARES:
        try:
            rival = bench.torch_budget(share)
        except RuntimeError as error:  # it runs batch norms again whose statistics were updated
            table.row(name, f"torch {share:g}", "fails")
            print(f"  {str(error).partition('.')[0]}")
            continue
        if (rival.peak, rival.flops) not in seen:
            seen.add((rival.peak, rival.flops))
            pairs.append(_pair(f"torch {share:g}", bench, rival, _has_lower(pairs)))
            _show(name, table, plain, pairs[-1])
    with bench.checkpointing(plain) as rival:
        pairs.append(_pair("checkpoint", bench, rival, _has_lower(pairs)))
        _show(name, table, plain, pairs[-1])
    return plain, pairs


def _pair(label: str, bench: Bench, rival: Run, has_lower: bool) -> Pair:
    own = bench.under(rival.peak)
    lower = None if has_lower else bench.under(int(_LOWER * rival.peak))
    _time(*(run for run in (rival, own, lower) if run))
    return Pair(label, rival, own, lower)


def _has_lower(pairs: list[Pair]) -> bool:
    """Whether one of them has a point with a lower peak that takes no longer than its rival."""
    return any(p.lower and p.lower.seconds <= p.rival.seconds for p in pairs)


def _time(*runs: Run, rounds: int = 6) -> None:
    """Times steps in turns; the median of each counts."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, times in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run.step()
            times.append(time.perf_counter() - start)
    for run, times in zip(runs, taken, strict=True):
        run.seconds = statistics.median(times)


def _show(name: str, table: Table, plain: Run, pair: Pair) -> None:
    rival, own = pair.rival, pair.own
    table.row(
        name, pair.label, f"{rival.peak / _MIB:.2f} MiB",
        "refused" if own is None else f"{own.peak / _MIB:.2f} MiB",
        f"{rival.flops / plain.flops - 1:.1%}",
        "" if own is None else f"{own.flops / plain.flops - 1:.1%}",
        f"{rival.seconds:.4f} s",
        *("" if r is None else f"x{r.seconds / rival.seconds:.3f}" for r in (own, pair.lower)),
    )  # fmt: skip


def _missed(pairs: list[Pair]) -> Iterator[str]:
    """Which targets one model misses."""
    for p in pairs:
        if p.own is None:
            yield f"{p.label}'s peak is refused"
        elif p.own.peak > p.rival.peak:
            yield f"above {p.label}'s peak"
        elif p.own.flops > p.rival.flops:
            yield f"more recomputation than {p.label}"
    if not _has_lower(pairs):
        yield f"no peak {1 - _LOWER:.0%} lower at equal time"


def plot(results: dict[str, tuple[Run, list[Pair]]], path: Path) -> Path:
    """Draws peak against time of all runs, a panel per model; returns the path."""
    from matplotlib.figure import Figure

    columns = 3
    figure = Figure(figsize=(4 * columns, 3.2 * -(-len(results) // columns)), layout="constrained")
    for number, (name, (plain, pairs)) in enumerate(results.items(), 1):
        axes = figure.add_subplot(-(-len(results) // columns), columns, number, title=name)
        rows = {
            "torch budget": ("s", [p.rival for p in pairs if p.label.startswith("torch")]),
            "checkpoint": ("^", [p.rival for p in pairs if p.label == "checkpoint"]),
            "gtrans": ("o", [r for p in pairs for r in (p.own, p.lower) if r]),
        }
        for label, (marker, runs) in rows.items():
            ordered = sorted(runs, key=lambda r: r.peak)
            axes.plot(
                [r.peak / plain.peak for r in ordered],
                [r.seconds / plain.seconds for r in ordered],
                marker, label=label, linestyle="none",
            )  # fmt: skip
        axes.plot([1], [1], "k+", label="plain")
        axes.set_xlabel("measured peak / plain")
        axes.set_ylabel("step time / plain")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path
