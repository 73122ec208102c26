"""The tables of explanations and verifications."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gtrans.ir.printer import short_operator
from gtrans.ir.sizes import human
from gtrans.listing import Listing
from gtrans.pipeline import Step
from gtrans.seeing.missed import MissedRow

if TYPE_CHECKING:
    from gtrans.explanation import SavedRow


def passes_listing(steps: Iterable[tuple[int, Step]]) -> Listing:
    """What each pass matched and rewrote, and why not the rest."""
    rows = []
    for index, step in steps:
        reasons = [f"{n} x {reason}" for reason, n in step.stats.skipped.items()]
        failure = [f"failed and was left out: {step.error}"] if step.error else []
        remarks = "\n".join([*failure, *reasons, *step.stats.notes])
        counts = (str(step.stats.matched), str(step.stats.rewritten))
        rows.append((str(index), step.text, *counts, remarks))
    return Listing(("graph", "pass", ">matched", ">rewrote", "why not, and what else"), rows)


def saved_listing(saved: "Sequence[SavedRow]") -> Listing:
    """What is kept for the backward, parameters and buffers left out."""
    rows = []
    for row in saved:
        e = row.example
        if not row.in_memory_anyway:
            made = (short_operator(e.operator), row.modules, str(e.location))
            if e.kind == "input":
                made = ("input", e.name, "")
            readers = ", ".join(map(short_operator, e.readers))
            rows.append((human(row.bytes), str(row.count), e.shape, *made, e.why, readers))
    columns = (">bytes", ">values", "type", "operator", "modules", "made at", "why", "read by")
    return Listing(columns, rows, "kept for the backward")


def missed_listing(missed: Iterable[MissedRow]) -> Listing:
    """What was not done, and why."""
    rows = [
        (
            row.text,
            str(row.count or ""),
            row.reason,
            row.modules,
            str(row.location) if row.location.file else "",
        )
        for row in missed
    ]
    return Listing(("pass", ">sites", "why not", "modules", "at"), rows)
