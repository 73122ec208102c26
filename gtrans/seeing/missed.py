"""What passes did not do, and why: the sites they refused, folded by reason and source line."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from gtrans.core import Refusal
from gtrans.ir.source import Location, common_path
from gtrans.pipeline import Step

NO_SITE = "found nothing to rewrite"


@dataclass(frozen=True)
class MissedRow:
    """Sites that a pass left alone for one reason, in equal layers.

    Attributes:
        text: the pass with its options.
        count: how many sites; 0 where the pass found none, or failed.
        reason: why.
        location: line of the user's model, of the first one; unknown where the pass names no site.
        modules: their modules as one pattern: ``h.*.mlp``.
        sites: their nodes.
    """

    text: str
    count: int
    reason: str
    location: Location = field(default_factory=Location)
    modules: str = ""
    sites: tuple[str, ...] = ()

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count else ""
        known = self.location.file or self.location.module
        where = f" ({self.place})" if known else ""
        return f"{self.text}: {times}{self.reason}{where}"

    @property
    def place(self) -> str:
        """Modules and source line, as far as they are known."""
        line = str(self.location) if self.location.file else ""
        return ", ".join(filter(None, (self.modules, line)))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for `--json`."""
        flat = asdict(self)
        flat["pass"] = flat.pop("text")
        return {**flat, "location": str(self.location), "sites": list(self.sites)}


def missed_rows(steps: Iterable[tuple[int, Step]]) -> list[MissedRow]:
    """Folds the refusals of steps, most frequent first within each pass.

    Args:
        steps: every pass that ran, with the number of its graph.
    """
    by_pass: dict[str, list[Step]] = {}
    for _, step in steps:
        by_pass.setdefault(step.text, []).append(step)
    return [row for text, same in by_pass.items() for row in _of_pass(text, same)]


def _of_pass(text: str, steps: list[Step]) -> list[MissedRow]:
    failures = [MissedRow(text, 0, f"failed and was left out: {s.error}") for s in steps if s.error]
    if not failures and not any(s.stats.matched for s in steps):
        return [MissedRow(text, 0, NO_SITE)]
    groups: dict[tuple[str, str, int], list[Refusal]] = {}
    for refusal in (r for s in steps for r in s.stats.refused):
        where = refusal.location
        groups.setdefault((refusal.reason, where.file, where.line), []).append(refusal)
    rows = [
        MissedRow(
            text,
            len(group),
            reason,
            group[0].location,
            common_path(r.location.module for r in group),
            tuple(r.site for r in group),
        )
        for (reason, _, _), group in groups.items()
    ]
    unplaced = sum((s.stats.skipped for s in steps), Counter[str]())
    unplaced.subtract(r.reason for s in steps for r in s.stats.refused)
    rows += [MissedRow(text, n, reason) for reason, n in unplaced.items() if n > 0]
    return failures + sorted(rows, key=lambda r: -r.count)
