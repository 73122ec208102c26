"""Measure a training step: peak memory, memory held for the backward, and time.

Everything here looks at the allocator from outside, so that a plain eager model, `torch.compile`
and gtrans are measured by the same rule. Hooks on saved tensors agree with it where every value
goes through `save_for_backward` (a test checks that), but AOTAutograd may keep values that need no
version check beside it, out of the hooks' sight.

    CPU     memory events of the profiler; every block that the step allocates, by address
    CUDA    the counters of the caching allocator, which round blocks up to 512 bytes
"""

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gtrans.errors import OptionError

_MARK = "gtrans phase: "


@dataclass(frozen=True)
class Moment:
    """How much memory is allocated at one moment of a step.

    Attributes:
        seconds: since the step began.
        bytes: allocated since then and not freed yet.
    """

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Phase:
    """A part of a step that was marked with `phase`, in seconds since the step began."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Peak:
    """The memory of one step, above what was allocated when it began.

    Attributes:
        bytes: the largest amount allocated at any moment.
        timeline: every change of that amount, in order; empty on CUDA.
        phases: the parts marked with `phase`, in order; empty on CUDA.
    """

    bytes: int
    timeline: tuple[Moment, ...] = ()
    phases: tuple[Phase, ...] = ()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Marks a part of a step ("forward", "backward"), to be found again in `Peak.phases`."""
    with record_function(_MARK + name):
        yield


def measured_peak(
    step: Callable[[], object], *, device: str | torch.device = "cpu", warm_up: int = 1
) -> Peak:
    """The largest amount of memory a step holds, above what was allocated before it.

    Clear the gradients at the end of the step (`model.zero_grad(set_to_none=True)`), not at its
    start: what a step frees of an earlier one is not part of it.

    Args:
        step: runs one training step. What it returns is dropped.
        device: where its tensors are.
        warm_up: calls before the measured one, for compilation and caches.

    Raises:
        OptionError: the device is neither "cpu" nor "cuda".
    """
    kind = _supported(device)
    for _ in range(warm_up):
        step()
    gc.collect()
    if kind == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before)
    with _recording() as record:
        step()
    return record.peak()


def saved_for_backward(
    forward: Callable[[], object], *, device: str | torch.device = "cpu", warm_up: int = 1
) -> int:
    """Bytes that a forward leaves allocated for its backward.

    These are the storages that the forward made and that are alive while its result is: each counts
    once, however many tensors share it; parameters, buffers and inputs were there before and do not
    count.

    Args:
        forward: runs the forward and returns the loss. It must return nothing else, because what it
            returns stays alive and is counted as well (of a loss, 4 bytes).
        device: where its tensors are.
        warm_up: calls before the measured one, for compilation and caches.

    Raises:
        OptionError: the device is neither "cpu" nor "cuda".
    """
    kind = _supported(device)
    for _ in range(warm_up):
        forward()
    gc.collect()
    if kind == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        result = forward()
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device) - before
    else:
        with _recording() as record:
            result = forward()
        held = record.held
    del result
    return held


def interleaved_seconds(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 1,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """Times several steps in turn, so that a machine that slows down slows all of them down.

    Args:
        steps: what to time, by name.
        rounds: measured calls of each; every other round runs in reverse order.
        warm_up: calls of each before that.
        device: where their tensors are.

    Returns:
        The seconds of every call, by name; compare medians (`statistics.median`), or the ratios of
        one round (`paired_ratio`).

    Raises:
        OptionError: the device is neither "cpu" nor "cuda".
    """
    kind = _supported(device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-warm_up, rounds):
        order = list(steps)[:: 1 if number % 2 == 0 else -1]
        for name in order:
            start = time.perf_counter()
            steps[name]()
            if kind == "cuda":
                torch.cuda.synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def paired_ratio(seconds: list[float], reference_seconds: list[float]) -> float:
    """The median over rounds of the time of one step divided by that of another.

    Raises:
        OptionError: the two lists differ in length, or are empty.
    """
    if not seconds or len(seconds) != len(reference_seconds):
        raise OptionError(
            f"cannot pair {len(seconds)} times with {len(reference_seconds)}: "
            "take both from one call of interleaved_seconds with at least one round"
        )
    return statistics.median(a / b for a, b in zip(seconds, reference_seconds, strict=True))


@dataclass
class _Record:
    """The memory events and marks of a stretch of work on the CPU; filled when it ends."""

    moments: list[Moment] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)

    @property
    def held(self) -> int:
        return self.moments[-1].bytes if self.moments else 0

    def peak(self) -> Peak:
        largest = max((m.bytes for m in self.moments), default=0)
        return Peak(max(0, largest), tuple(self.moments), tuple(self.phases))


@contextmanager
def _recording() -> Iterator[_Record]:
    record = _Record()
    trace = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with _without_kineto_chatter():
        trace.start()
    try:
        with record_function(_MARK):
            yield record
    finally:
        with _without_kineto_chatter():
            trace.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    _read(events, record)


@contextmanager
def _without_kineto_chatter() -> Iterator[None]:
    """Drops the "USDT:" lines that the profiler's C++ writes to the error stream at any log level.

    Whatever else is written meanwhile is written after all.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written:
                if not line.startswith(b"USDT:"):
                    os.write(2, line)


def _read(events: list[dict[str, Any]], record: _Record) -> None:
    """Reads times (microseconds in the trace) and amounts; blocks of other devices do not count."""
    marks = [e for e in events if str(e.get("name", "")).startswith(_MARK)]
    start = next(float(e["ts"]) for e in marks if e["name"] == _MARK)
    changes = sorted(
        (float(e["ts"]), int(e["args"]["Bytes"]))
        for e in events
        if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0
    )
    totals = accumulate(size for _, size in changes)
    record.moments += [
        Moment((ts - start) / 1e6, total)
        for (ts, _), total in zip(changes, totals, strict=True)
        if ts >= start
    ]
    record.phases += sorted(
        (
            Phase(
                str(e["name"]).removeprefix(_MARK),
                (float(e["ts"]) - start) / 1e6,
                (float(e["ts"]) - start + float(e["dur"])) / 1e6,
            )
            for e in marks
            if e["name"] != _MARK
        ),
        key=lambda p: p.start_s,
    )


def _supported(device: str | torch.device) -> str:
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise OptionError(f"memory can be measured on 'cpu' and 'cuda', not on {kind!r}")
    return kind
