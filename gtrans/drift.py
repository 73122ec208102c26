"""How far rebuilt streams are from those of the forward, coupling by coupling, on real inputs."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from gtrans.api import install, planned, require_captured, require_trainable, unchanged
from gtrans.capture import Compiler, capture_always
from gtrans.comparison import default_loss
from gtrans.errors import ModelError
from gtrans.ir.half import Half, Runnable, boxed
from gtrans.ir.joint import TAG, tag
from gtrans.ir.source import location
from gtrans.pipeline import Pipeline


@dataclass(frozen=True)
class Drift:
    """One rebuilt stream.

    Attributes:
        coupling: its number, counted from the last.
        site: the line of the model.
        dtype: of the stream.
        relative: norm of the difference over the norm of the forward's value.
        differing: share of the elements that are not the same to the bit.
        largest: size of the largest element; a fixed-point stream must stay below 2^(53 - bits).
    """

    coupling: int
    site: str
    dtype: torch.dtype
    relative: float
    differing: float
    largest: float


@dataclass(frozen=True)
class DriftReport:
    """The drift of every rebuilt stream, last coupling first. Printing it gives a table."""

    rows: Sequence[Drift]

    @property
    def worst(self) -> float:
        """The largest relative difference; 0 if every bit came back."""
        return max((r.relative for r in self.rows), default=0.0)

    def __str__(self) -> str:
        lines = ["coupling     dtype  relative differing   largest  line"]
        for r in self.rows:
            lines.append(
                f"{r.coupling:8} {str(r.dtype)[6:]:>9} {r.relative:9.1e} {r.differing:9.1%} "
                f"{r.largest:9.1e}  {r.site}"
            )
        return "\n".join(lines)


def measured_drift(
    model: nn.Module, *inputs: Any, passes: str | Pipeline = "reversible,plan", **keywords: Any
) -> DriftReport:
    """Runs one training step on a copy of a model and compares rebuilt streams with the forward's.

    Args:
        model: it stays as it is.
        inputs: its positional inputs.
        passes: a pipeline with `reversible` in it.
        keywords: its keyword inputs.

    Raises:
        ModelError: the pipeline rebuilds no stream of this model.
        OptionError: a pass or option is unknown.
    """
    require_trainable(model)
    twin, meter = copy.deepcopy(model), _Meter()
    compiler = Compiler(planned(passes, (), None), meter, skip_failures=False)
    install(twin, compiler)
    with unchanged(twin), torch.enable_grad(), capture_always():
        default_loss(twin(*inputs, **keywords)).backward()
    require_captured(twin, compiler)
    rows = [meter.compared(n) for n in sorted(meter.rebuilt.keys() & meter.kept.keys())]
    if not rows:
        reasons = {r for c in compiler.captured for s in c.steps for r in s.stats.skipped}
        raise ModelError(
            f"no stream of {type(model).__name__} is rebuilt by {compiler.pipeline}: "
            + ("; ".join(sorted(reasons)) or "it has no couplings, see gtrans.to_reversible")
        )
    return DriftReport(rows)


@dataclass
class _Meter:
    """A lowering that runs node by node and notes the streams on their way there and back."""

    name: str = "drift"
    overwrites_saved: bool = False
    slack: float = 0.0
    kept: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    rebuilt: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    sites: dict[tuple[int, int], str] = field(default_factory=dict)

    def unavailable(self) -> str | None:
        return None

    def prepare(self, half: Half) -> Half:
        return half

    def compile(self, half: Half) -> Runnable:
        found = self.rebuilt if half.role == "backward" else self.kept
        run = _Noting(half.with_tolerant_views(), half.graph, found, self.sites)

        @boxed
        def run_half(arguments: list[Any]) -> Any:
            given = list(arguments)
            arguments.clear()
            with torch.no_grad():
                return run.run(*given)

        return run_half

    def compared(self, number: tuple[int, int]) -> Drift:
        """The drift of one stream."""
        there, back = self.kept[number], self.rebuilt[number]
        difference = (back - there).double()
        size = float(there.double().norm())
        error = float(difference.norm())
        return Drift(
            number[1],
            self.sites[number],
            there.dtype,
            error / size if size else error,
            float((difference != 0).double().mean()) if there.numel() else 0.0,
            float(there.abs().max()) if there.numel() else 0.0,
        )


class _Noting(fx.Interpreter):
    def __init__(
        self,
        module: fx.GraphModule,
        graph: int,
        found: dict[tuple[int, int], torch.Tensor],
        sites: dict[tuple[int, int], str],
    ) -> None:
        super().__init__(module)
        self.number, self.found, self.sites = graph, found, sites

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        recovers = tag(n).recovers if n.op == "call_function" and TAG in n.meta else None
        if recovers is not None:
            self.found[self.number, recovers] = value.detach().clone()
            self.sites[self.number, recovers] = str(location(n))
        return value
