"""Memory over a training step: bytes alive while each operator runs, before and after the passes.

    forward of graph 0 | forward of graph 1 | backward of graph 1 | backward of graph 0

A model with graph breaks runs its graphs in this order, and while one runs, the others hold what
they saved. Both versions of the step have the same parts, so they are drawn part over part.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtrans.analysis.liveness import Liveness
from gtrans.errors import ModelError, OptionError
from gtrans.ir.sizes import human
from gtrans.seeing.charts import terminal_chart, timeline_png, timeline_svg
from gtrans.why_peak import WhyPeak, why_peak

if TYPE_CHECKING:
    from gtrans.explanation import Explanation


@dataclass(frozen=True)
class Part:
    """The forward or the backward half of one graph.

    Attributes:
        half: "forward" or "backward".
        graph: number of the captured graph.
        before: bytes in memory while each operator runs, as autograd would run it.
        after: the same as the passes leave it; what is computed again makes it longer.
    """

    half: str
    graph: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def width(self) -> int:
        """How much of the step it takes, in operators of the longer version."""
        return max(len(self.before), len(self.after), 1)


@dataclass(frozen=True)
class Timeline:
    """The memory of one step. Printing it gives a chart and what is alive at the peak.

    Attributes:
        parts: in the order in which they run.
        why: the moment of the peak, after the passes.
        budget: in bytes, if there is one.
    """

    parts: tuple[Part, ...]
    why: WhyPeak
    budget: int | None = None

    @property
    def peak_before(self) -> int:
        """The largest number of bytes in memory as autograd would run the step."""
        return max((b for p in self.parts for b in p.before), default=0)

    @property
    def peak_after(self) -> int:
        """The same as the passes leave it."""
        return max((b for p in self.parts for b in p.after), default=0)

    @property
    def summary(self) -> str:
        """One line: both peaks, and the budget if there is one."""
        before, after = self.peak_before, self.peak_after
        change = f" ({after / before - 1:+.0%})" if before else ""
        within = "" if self.budget is None else f", budget {human(self.budget)}"
        return f"peak {human(before)} as autograd would -> {human(after)}{change} predicted{within}"

    def text(self, *, width: int = 100, height: int = 12) -> str:
        """The chart for a terminal, of so many columns and rows."""
        return terminal_chart(self, width, height)

    def svg(self) -> str:
        """The chart as an SVG picture, with a table of what is alive at the peak."""
        return timeline_svg(self)

    def save(self, path: str | Path) -> Path:
        """Writes the chart to a file; its ending says how: .svg, .png or .txt.

        Raises:
            OptionError: the ending is none of these, the file cannot be written, or matplotlib is
                missing, which draws .png.
        """
        path = Path(path)
        try:
            if path.suffix == ".svg":
                path.write_text(self.svg(), encoding="utf-8")
            elif path.suffix == ".png":
                timeline_png(self, path)
            elif path.suffix == ".txt":
                path.write_text(f"{self}\n", encoding="utf-8")
            else:
                raise OptionError(
                    f"cannot write {str(path)!r}: a timeline is drawn as .svg, .png or .txt"
                )
        except OSError as error:
            raise OptionError(f"cannot write {str(path)!r}: {error.strerror}") from error
        return path

    def __str__(self) -> str:
        return "\n".join([self.summary, "", self.text(), "", str(self.why)])

    def _repr_svg_(self) -> str:
        return self.svg()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for `--json`."""
        return {
            "peak_bytes": self.peak_after,
            "plain_peak_bytes": self.peak_before,
            "budget_bytes": self.budget,
            "parts": [vars(p) for p in self.parts],
            "why": self.why.to_dict(),
        }


def timeline_of(explanation: "Explanation") -> Timeline:
    """The memory of an explained step.

    Raises:
        ModelError: nothing that trains was captured.
    """
    graphs = explanation.one_step()
    if not graphs:
        raise ModelError("no training graph was captured, so there is no memory to draw")
    forward, backward = [], []
    for moment in graphs:
        before = _halves(moment.before, moment.held_before)
        after = _halves(moment.after, moment.held_after)
        forward.append(Part("forward", moment.index, before[0], after[0]))
        backward.append(Part("backward", moment.index, before[1], after[1]))
    parts = (*forward, *reversed(backward))
    return Timeline(parts, why_peak(explanation), explanation.budget)


def _halves(liveness: Liveness, held: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes while each operator of the forward and of the backward runs, held ones included."""
    schedule = liveness.schedule
    bytes_at = [size + held for size in liveness.timeline]
    # Nothing runs for a parameter or an input: it is there from the start.
    forward = [bytes_at[i] for i in range(schedule.boundary) if i not in schedule.constants]
    return tuple(forward), tuple(bytes_at[schedule.boundary :])
