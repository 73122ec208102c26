"""Time and peak memory of a training step: as written, under torch.compile, and with gtrans."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gtrans.analysis.measure import interleaved_seconds, measured_peak, paired_ratio
from gtrans.api import install, require_trainable
from gtrans.capture import Compiler, capture_always, capture_settings
from gtrans.captured import Resident
from gtrans.comparison import default_loss
from gtrans.errors import GTransError, ModelError, OptionError
from gtrans.ir.sizes import human
from gtrans.pipeline import Pipeline
from gtrans.registry import load_backend
from gtrans.verification import in_dtype, private_copy

# What torch.compile is asked for beside each backend of gtrans: the same lowering.
_PEERS = {"inductor": "inductor", "eager": "aot_eager"}

Told = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """One way to run the step.

    Attributes:
        name: "as written", "torch.compile" or "gtrans".
        first_s: seconds of the first call, compilation included.
        seconds: of every measured call.
        peak_bytes: the largest amount of memory a step allocates.
        ratio: its time over that of the step as written, the median over rounds.
    """

    name: str
    first_s: float
    seconds: tuple[float, ...]
    peak_bytes: int
    ratio: float

    @property
    def median_s(self) -> float:
        """Median time of a call."""
        return statistics.median(self.seconds)

    @property
    def spread_s(self) -> tuple[float, float]:
        """First and third quartile of the time of a call."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Bench:
    """The comparison. Printing it gives a table.

    Attributes:
        contenders: the step as written first.
        backend: what gtrans lowered with.
        left_out: why a contender is missing.
    """

    contenders: tuple[Contender, ...]
    backend: str
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{'':16} {'median':>10} {'quartiles':>21} {'ratio':>7} {'peak':>11} {'first call':>11}"
        ]
        for c in self.contenders:
            low, high = (f"{1000 * s:.2f}" for s in c.spread_s)
            lines.append(
                f"{c.name:16} {1000 * c.median_s:7.2f} ms {low + ' to ' + high:>18} ms "
                f"{c.ratio:6.2f}x {human(c.peak_bytes):>11} {c.first_s:9.2f} s"
            )
        return "\n".join([*lines, *self.left_out])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for `--json`."""
        contenders = [
            {**vars(c), "median_s": c.median_s, "spread_s": list(c.spread_s)}
            for c in self.contenders
        ]
        return {
            "backend": self.backend,
            "contenders": contenders,
            "left_out": list(self.left_out),
        }


def bench(
    model: nn.Module,
    inputs: Sequence[Any],
    keyword_inputs: dict[str, Any],
    pipeline: Pipeline,
    *,
    backend: str = "inductor",
    rounds: int = 10,
    told: Told = lambda what: None,
) -> Bench:
    """Times forward and backward of copies of a model, in turn, so that all see the same machine.

    Args:
        model: it stays as it is.
        inputs: its positional inputs.
        keyword_inputs: its keyword inputs.
        pipeline: the passes of gtrans.
        backend: what gtrans lowers with; torch.compile lowers alike.
        rounds: measured calls of each.
        told: called with what is being done.

    Raises:
        ModelError: the model cannot be trained, or does not accept the inputs.
        OptionError: there is no such backend, it cannot run here, or rounds is below 1.
        GTransError: a pass failed.
    """
    require_trainable(model)
    if rounds < 1:
        raise OptionError(f"rounds must be at least 1, got {rounds}")
    if (reason := load_backend(backend).unavailable()) is not None:
        raise OptionError(f"backend {backend!r} cannot run here: {reason}; try --backend eager")
    device = next(model.parameters()).device
    arguments = in_dtype((tuple(inputs), keyword_inputs), None)
    twins = {name: private_copy(model, None) for name in ("as written", "torch.compile", "gtrans")}
    left_out = []
    if backend in _PEERS:
        twins["torch.compile"].compile(backend=_PEERS[backend])
    else:
        del twins["torch.compile"]
        left_out.append(f"torch.compile was left out: it has no lowering like {backend!r}")
    compiler = Compiler(pipeline, backend, skip_failures=False)
    compiler.resident = Resident.of(twins["gtrans"])
    install(twins["gtrans"], compiler)
    steps = {name: _step(twin, arguments) for name, twin in twins.items()}
    first = {}
    with capture_always(), capture_settings():
        for name, step in steps.items():
            told(f"first call: {name}")
            start = time.perf_counter()
            _tried(step)
            first[name] = time.perf_counter() - start
        told(f"timing {rounds} rounds")
        seconds = interleaved_seconds(steps, rounds=rounds, device=device)
        told("measuring memory")
        peaks = {
            name: measured_peak(step, device=device, warm_up=0).bytes
            for name, step in steps.items()
        }
    written = seconds["as written"]
    found = [
        Contender(n, first[n], tuple(s), peaks[n], paired_ratio(s, written))
        for n, s in seconds.items()
    ]
    return Bench(tuple(found), backend, tuple(left_out))


def _step(model: nn.Module, arguments: Any) -> Callable[[], None]:
    """Forward, loss, backward; gradients are cleared at the end."""
    positional, keywords = arguments

    def step() -> None:
        default_loss(model(*positional, **keywords)).backward()
        model.zero_grad(set_to_none=True)

    return step


def _tried(step: Callable[[], None]) -> None:
    try:
        with torch.enable_grad():
            step()
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, GTransError):
            raise
        raise ModelError(f"the model does not accept these inputs: {error}") from error
