"""What is alive when a step's memory peaks, and which line of the model made it."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gtrans.analysis.workspace import is_for_loss
from gtrans.errors import ModelError
from gtrans.ir.sizes import human
from gtrans.ir.source import Location, location
from gtrans.plan.alive import AliveRow, alive_rows

if TYPE_CHECKING:
    from gtrans.explanation import Explanation


@dataclass(frozen=True)
class WhyPeak:
    """The moment of the peak. Printing it gives a table.

    Attributes:
        peak: bytes in memory then, as predicted.
        graph: number of the captured graph that runs then.
        half: "forward" or "backward".
        node: the node that runs then.
        location: line of the user's model that it belongs to.
        held_bytes: by the model's other graphs.
        reserved_bytes: besides the model, as for the optimizer's state.
        workspace_bytes: by the kernel that runs.
        is_for_loss: whether that is for a loss outside of the model instead.
        rows: everything else that is alive, largest first.
    """

    peak: int
    graph: int
    half: str
    node: str
    location: Location
    held_bytes: int
    reserved_bytes: int
    workspace_bytes: int
    is_for_loss: bool
    rows: tuple[AliveRow, ...]

    def __str__(self) -> str:
        lines = [
            f"peak {human(self.peak)} in the {self.half} of graph {self.graph}, "
            f"at {self.node} ({self.location})",
            f"  {'bytes':>12} {'share':>6}  what",
        ]
        for row in self.rows:
            lines.append(f"  {human(row.bytes):>12} {row.bytes / self.peak:6.1%}  {row}")
        for size, what in (
            (
                self.workspace_bytes,
                "allowed for a loss computed outside of the model"
                if self.is_for_loss
                else "workspace of the kernel that runs",
            ),
            (self.held_bytes, "held by the model's other graphs"),
            (self.reserved_bytes, "reserved, as for the optimizer's state"),
        ):
            if size:
                lines.append(f"  {human(size):>12} {size / self.peak:6.1%}  {what}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for `--json`."""
        rows = [{**asdict(r), "location": str(r.location)} for r in self.rows]
        flat = {k: v for k, v in vars(self).items() if k not in ("rows", "location")}
        return {**flat, "location": str(self.location), "rows": rows}


def why_peak(explanation: "Explanation") -> WhyPeak:
    """Finds the peak of an explained step over all its graphs.

    Raises:
        ModelError: nothing that trains was captured.
    """
    graphs = [c for c in explanation.training if c.rewritten is not None]
    if not graphs:
        raise ModelError("no training graph was captured, so there is no peak to explain")
    candidates = []
    for record, liveness in zip(graphs, explanation.liveness, strict=True):
        assert record.rewritten is not None
        around = record.rewritten.surroundings
        candidates.append((liveness.peak + around.held_bytes, around, record, liveness))
    peak, around, record, liveness = max(candidates, key=lambda c: c[0])
    rows = tuple(alive_rows(liveness))
    return WhyPeak(
        peak=peak,
        graph=record.index,
        half="forward" if liveness.peak_task < liveness.schedule.boundary else "backward",
        node=liveness.peak_node.name,
        location=location(liveness.peak_node),
        held_bytes=around.held_bytes - around.reserved_bytes,
        reserved_bytes=around.reserved_bytes,
        workspace_bytes=peak - around.held_bytes - sum(r.bytes for r in rows),
        is_for_loss=is_for_loss(liveness.peak_node),
        rows=rows,
    )
