"""What is in memory at the peak, as rows for reports and messages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gtrans.analysis.liveness import Alive, Liveness
from gtrans.ir.printer import target_name
from gtrans.ir.sizes import human, shape_text
from gtrans.ir.source import Location, location


@dataclass(frozen=True)
class AliveRow:
    """Storages that are alive at the same moment, equal but for the layer they belong to.

    Attributes:
        count: how many.
        bytes: of all of them.
        role: "constant", "output", "tangent", "gradient", "saved", "recomputed" or "temporary".
        shape: type and sizes of one, ``f32[8, 64]``; empty for constants, which are one row.
        operator: what allocated it.
        location: line of the user's model.
        example: name of one of them.
    """

    count: int
    bytes: int
    role: str
    shape: str
    operator: str
    location: Location
    example: str

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        size = f"{times}{human(self.bytes / self.count)}"
        if self.role == "constant":
            return f"{human(self.bytes)} of parameters, buffers and inputs"
        return f"{size} {self.role} {self.shape} {self.operator} ({self.location})"


def alive_rows(liveness: Liveness) -> list[AliveRow]:
    """What is in memory at the peak, largest first; parameters, buffers and inputs are one row."""
    groups: dict[tuple[Any, ...], list[Alive]] = {}
    for alive in liveness.alive():
        groups.setdefault(_kind(alive), []).append(alive)
    rows = [_row(group) for group in groups.values()]
    return sorted(rows, key=lambda r: (-r.bytes, r.example))


def listed(rows: Sequence[AliveRow], most: int = 5) -> str:
    """The largest rows on lines of their own, for messages."""
    lines = [f"    {row}" for row in rows[:most]]
    if len(rows) > most:
        lines.append(f"    and {human(sum(r.bytes for r in rows[most:]))} more")
    return "\n".join(lines)


def _kind(alive: Alive) -> tuple[Any, ...]:
    if alive.role == "constant":
        return ("constant",)
    where = location(alive.node)
    return alive.role, shape_text(alive.value), where.file, where.line, alive.bytes


def _row(group: Sequence[Alive]) -> AliveRow:
    first = group[0]
    constant = first.role == "constant"
    node = first.node
    return AliveRow(
        count=len(group),
        bytes=sum(a.bytes for a in group),
        role=first.role,
        shape="" if constant else shape_text(first.value),
        operator="" if constant else target_name(node) if node.op == "call_function" else node.op,
        location=Location() if constant else location(node),
        example=node.name,
    )
