"""How a timeline looks: in a terminal, as SVG, and as PNG.

All three show the same: the parts of the step side by side, each as wide as its operators; the
memory as autograd would run it in grey, and in colour as the passes leave it; the budget; the peak.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtrans.errors import OptionError
from gtrans.ir.sizes import human

if TYPE_CHECKING:
    from gtrans.seeing.alternatives import Alternative, Alternatives
    from gtrans.seeing.timeline import Part, Timeline

_BLOCKS = " ▁▂▃▄▅▆▇█"
_WITH, _WITHOUT = "with the passes", "as autograd would"
_ROWS = 10  # of what is alive at the peak

_WIDTH, _HEIGHT, _LEFT, _TOP, _LINE = 1000, 300, 84, 64, 17
_MOST_POINTS = 900
_STYLE = """
.timeline text { font: 12px ui-monospace, Menlo, Consolas, monospace; fill: var(--ink, #1f2937) }
.timeline .dim { fill: var(--dim, #6b7280) } .timeline .head { font-weight: bold }
.timeline .page { fill: var(--page, #ffffff) } .timeline .forward { fill: #60a5fa; opacity: .10 }
.timeline .backward { fill: #f87171; opacity: .10 }
.timeline .before { fill: #9ca3af; fill-opacity: .35; stroke: #9ca3af }
.timeline .after { fill: #2563eb; fill-opacity: .35; stroke: #2563eb }
.timeline .grid { stroke: #9ca3af; stroke-opacity: .35 } .timeline .budget { stroke: #d97706;
stroke-dasharray: 6 4 } .timeline .front { fill: none; stroke: #2563eb; stroke-opacity: .5 }
.timeline .plan { fill: var(--page, #ffffff); stroke: #2563eb; stroke-width: 2 }
.timeline .chosen { fill: #dc2626; stroke: #dc2626 }
.timeline .peak { fill: none; stroke: #dc2626; stroke-width: 2 }
"""
_DARK = (
    "@media (prefers-color-scheme: dark) { .timeline "
    "{ --ink: #e5e7eb; --dim: #9ca3af; --page: #111827 } }"
)


def resampled(values: Sequence[int], columns: int) -> list[int]:
    """Values as so many columns, each the largest of its stretch; short lists are stretched."""
    if not values:
        return [0] * columns
    edges = [i * len(values) / columns for i in range(columns + 1)]
    return [max(values[int(a) : max(int(a) + 1, -int(-b // 1))]) for a, b in pairwise(edges)]


def spread(parts: "Sequence[Part]", width: float) -> list[tuple[float, float]]:
    """Where each part begins and ends, if together they are so wide."""
    total = sum(p.width for p in parts)
    ends = [0.0, *accumulate(width * p.width / total for p in parts)]
    return list(pairwise(ends))


# ---------------------------------------------------------------------------- terminal


def _columns(parts: "Sequence[Part]", width: int) -> list[tuple[int, int]]:
    """`spread` over whole columns, at least one for each part: the peak may be in a short one."""
    spare = max(0, width - len(parts))
    return [(round(a) + i, round(b) + i + 1) for i, (a, b) in enumerate(spread(parts, spare))]


def terminal_chart(timeline: "Timeline", width: int, height: int) -> str:
    """Blocks for the memory with the passes, shade above them for what autograd would hold."""
    spans = _columns(timeline.parts, width)
    width = spans[-1][1]
    before, after = [], []
    for part, (start, end) in zip(timeline.parts, spans, strict=True):
        before += resampled(part.before, end - start)
        after += resampled(part.after, end - start)
    top = max([*before, *after, timeline.budget or 0, 1])
    lines = []
    for row in range(height, 0, -1):
        low, high = top * (row - 1) / height, top * row / height
        budget = timeline.budget is not None and low < timeline.budget <= high
        cells = [_cell(a, b, low, high, budget) for a, b in zip(after, before, strict=True)]
        label = human(high) if row % 3 == height % 3 else ""
        lines.append(f"{label:>10} |{''.join(cells)}")
    peak = after.index(max(after, default=0)) if after else 0
    lines.append(f"{'':>10} +{'-' * peak}^{'-' * max(0, width - peak - 1)}")
    names = [_named(part, span) for part, span in zip(timeline.parts, spans, strict=True)]
    lines.append(f"{'':>10}  {''.join(names)}")
    budget_text = "" if timeline.budget is None else f"   ┄ budget {human(timeline.budget)}"
    lines.append(f"{'':>10}  █ {_WITH}   ░ {_WITHOUT}   ^ peak{budget_text}")
    return "\n".join(line.rstrip() for line in lines)


def _cell(after: int, before: int, low: float, high: float, budget: bool) -> str:
    filled = (after - low) / (high - low)
    if filled >= 1 / 8:
        return _BLOCKS[min(8, int(filled * 8))]
    if before >= (low + high) / 2:
        return "░"
    return "┄" if budget else " "


def _named(part: "Part", span: tuple[int, int]) -> str:
    width = span[1] - span[0]
    graph = f" {part.graph}" if part.graph else ""
    for name in (f"{part.half}{graph}", part.half[:1]):
        if len(name) + 2 <= width:
            return f"|{name}".ljust(width)
    return "|".ljust(width)


# ---------------------------------------------------------------------------- svg


@dataclass(frozen=True)
class _Scale:
    """From operators and bytes to the page."""

    timeline: "Timeline"
    top: float

    def x(self, span: tuple[float, float], number: float, count: int) -> float:
        return _LEFT + span[0] + (span[1] - span[0]) * number / max(1, count)

    def y(self, size: float) -> float:
        return _TOP + _HEIGHT * (1 - size / self.top)

    @property
    def spans(self) -> list[tuple[float, float]]:
        return spread(self.timeline.parts, _WIDTH - _LEFT - 16)


def timeline_svg(timeline: "Timeline", *, follows_system: bool = True) -> str:
    """The chart and what is alive at the peak.

    Args:
        timeline: what to draw.
        follows_system: use dark colours where the reader's system does; a page that has its own
            colours sets --ink, --dim and --page instead.
    """
    scale = _Scale(timeline, 1.08 * max(timeline.peak_before, timeline.peak_after, 1))
    rows = timeline.why.rows[:_ROWS]
    bottom = _TOP + _HEIGHT + 34 + _LINE * (len(rows) + 1)
    out = [
        f'<svg class="timeline" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom}" '
        'role="img" aria-label="memory over the step">',
        f"<style>{_STYLE}{_DARK if follows_system else ''}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{bottom}"/>',
        _text(_LEFT, 22, timeline.summary, "head"),
        *_background(scale),
        *_areas(scale),
        *_peak(scale),
        *_table(timeline, rows),
    ]
    return "\n".join([*out, "</svg>"]) + "\n"


def _background(scale: _Scale) -> Iterator[str]:
    for part, span in zip(scale.timeline.parts, scale.spans, strict=True):
        x, width = _LEFT + span[0], span[1] - span[0]
        yield (
            f'<rect class="{part.half}" x="{x:.1f}" y="{_TOP}" width="{width:.1f}" '
            f'height="{_HEIGHT}"/>'
        )
        name = f"{part.half} of graph {part.graph}" if len(scale.timeline.parts) > 2 else part.half
        if width > 7.5 * len(name):
            yield _text(x + 4, _TOP + 14, name, "dim")
    for quarter in range(5):
        size = scale.top / 1.08 * quarter / 4
        y = scale.y(size)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f} H{_WIDTH - 16}"/>'
        yield _text(4, y + 4, human(size), "dim")


def _areas(scale: _Scale) -> Iterator[str]:
    for name, title in (("before", _WITHOUT), ("after", _WITH)):
        points = [f"M{_LEFT} {scale.y(0):.1f}"]
        for part, span in zip(scale.timeline.parts, scale.spans, strict=True):
            values: Sequence[int] = getattr(part, name)
            if len(values) > _MOST_POINTS:
                values = resampled(values, _MOST_POINTS)
            for number, size in enumerate(values):
                points.append(f"L{scale.x(span, number, len(values)):.1f} {scale.y(size):.1f}")
                points.append(f"H{scale.x(span, number + 1, len(values)):.1f}")
        points.append(f"V{scale.y(0):.1f} Z")
        yield f'<path class="{name}" d="{"".join(points)}"><title>{title}</title></path>'
    place = _LEFT
    for name, title in (("after", _WITH), ("before", _WITHOUT)):
        yield f'<rect class="{name}" x="{place}" y="{_TOP - 28}" width="14" height="12"/>'
        yield _text(place + 20, _TOP - 18, title, "")
        place += 160
    if (budget := scale.timeline.budget) is not None and budget < scale.top:
        y = scale.y(budget)
        yield f'<path class="budget" d="M{_LEFT} {y:.1f} H{_WIDTH - 16}"/>'
        yield _text(_LEFT + 4, y - 4, f"budget {human(budget)}", "")


def _peak(scale: _Scale) -> Iterator[str]:
    x, peak = peak_place(scale.timeline, scale.spans)
    x, y = _LEFT + x, scale.y(peak)
    yield f'<circle class="peak" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    label = f"peak, {scale.timeline.why.location}"
    left = x > _WIDTH / 2
    yield (
        f'<text x="{x - 10 if left else x + 10:.1f}" y="{y - 8:.1f}" '
        f'text-anchor="{"end" if left else "start"}">{escape(label)}</text>'
    )


def peak_place(timeline: "Timeline", spans: Sequence[tuple[float, float]]) -> tuple[float, int]:
    """Where the peak with the passes stands among the spans of the parts, and its bytes."""
    best = (0.0, -1)
    for part, span in zip(timeline.parts, spans, strict=True):
        for number, size in enumerate(part.after):
            if size > best[1]:
                middle = (number + 0.5) / len(part.after)
                best = (span[0] + (span[1] - span[0]) * middle, size)
    return best


def _table(timeline: "Timeline", rows: Sequence[Any]) -> Iterator[str]:
    y = _TOP + _HEIGHT + 28
    why = timeline.why
    yield _text(_LEFT, y, f"alive at the peak, at {why.node} in the {why.half}", "head")
    for number, row in enumerate(rows, start=1):
        at = y + _LINE * number
        yield f'<text x="{_LEFT + 74}" y="{at}" text-anchor="end">{human(row.bytes)}</text>'
        yield f'<text x="{_LEFT + 124}" y="{at}" text-anchor="end" class="dim">'
        yield f"{row.bytes / max(1, why.peak):.1%}</text>"
        yield _text(_LEFT + 136, at, _short(str(row), 106), "")


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(text)}</text>'


def chart_data(timeline: "Timeline") -> dict[str, Any]:
    """What a script needs to read values off `timeline_svg`: places and bytes of each part."""
    spans = spread(timeline.parts, _WIDTH - _LEFT - 16)
    parts = []
    for part, (start, end) in zip(timeline.parts, spans, strict=True):
        columns = min(_MOST_POINTS // 3, part.width)
        before, after = resampled(part.before, columns), resampled(part.after, columns)
        parts.append(
            {
                "half": part.half,
                "graph": part.graph,
                "start": round(_LEFT + start, 1),
                "end": round(_LEFT + end, 1),
                "before": before,
                "after": after,
            }
        )
    return {"top": _TOP, "bottom": _TOP + _HEIGHT, "width": _WIDTH, "parts": parts}


def plan_svg(plans: "Alternatives") -> str:
    """Peak memory over predicted time of the plans of a graph; the chosen one is filled."""
    every = [*plans.others, plans.chosen]
    fastest = min(p.seconds for p in every) or 1e-9
    slowest = max(p.seconds for p in every) / fastest
    top = 1.1 * max(p.peak for p in every)
    width, height, left = 640, 260, 84

    def place(plan: "Alternative") -> tuple[float, float]:
        along = (plan.seconds / fastest - 1) / max(slowest - 1, 1e-9)
        return left + 20 + (width - left - 60) * along, 20 + height * (1 - plan.peak / top)

    out = [
        f'<svg class="timeline" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} '
        f'{height + 60}" role="img" aria-label="peak memory over predicted time">'
    ]
    for quarter in range(5):
        y = 20 + height * (1 - quarter / 4 / 1.1)
        out.append(f'<path class="grid" d="M{left} {y:.1f} H{width - 16}"/>')
        out.append(_text(4, y + 4, human(top / 1.1 * quarter / 4), "dim"))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(map(place, plans.others)))
    out.append(f'<polyline class="front" points="{line}"/>')
    for plan in every:
        x, y = place(plan)
        style = "chosen" if plan is plans.chosen else "plan"
        about = f"{plan.label}: {human(plan.peak)}, time x{plan.seconds / fastest:.3f}"
        out.append(
            f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
            f"<title>{escape(about)}</title></circle>"
        )
    out.append(_text(left + 20, height + 44, "time x1", "dim"))
    out.append(_text(width - 96, height + 44, f"x{slowest:.2f}", "dim"))
    return "\n".join([*out, "</svg>"])


# ---------------------------------------------------------------------------- png


def timeline_png(timeline: "Timeline", path: Path) -> None:
    """Draws the chart with matplotlib.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            f"cannot write {str(path)!r}: matplotlib draws .png and is not installed; "
            "pip install 'gtrans[plot]', or write a .svg"
        ) from error
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes, below = figure.subplots(2, 1, height_ratios=(3, 1.4))
    spans = spread(timeline.parts, 1.0)
    mib = 2**20
    for part, (start, end) in zip(timeline.parts, spans, strict=True):
        axes.axvspan(
            start, end, color="tab:blue" if part.half == "forward" else "tab:red", alpha=0.06
        )
        axes.text(start + 0.004, 0.97, part.half, transform=axes.get_xaxis_transform(), va="top")
    for name, title, color in (("before", _WITHOUT, "0.6"), ("after", _WITH, "tab:blue")):
        x: list[float] = []
        y: list[float] = []
        for part, (start, end) in zip(timeline.parts, spans, strict=True):
            values: Sequence[int] = getattr(part, name)
            for number, size in enumerate(values):
                x += [start + (end - start) * (number + i) / len(values) for i in (0, 1)]
                y += [size / mib] * 2
        axes.fill_between(x, y, color=color, alpha=0.35, label=title)
        axes.plot(x, y, color=color, linewidth=1)
    at, peak = peak_place(timeline, spans)
    axes.plot([at], [peak / mib], "o", markerfacecolor="none", color="tab:red", label="peak")
    if timeline.budget is not None:
        axes.axhline(timeline.budget / mib, color="tab:orange", linestyle="--", label="budget")
    axes.set(xlim=(0, 1), ylabel="MiB in memory", xticks=[], title=timeline.summary)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left")
    lines = [f"{human(r.bytes):>12} {r.bytes / max(1, peak):6.1%}  {r}" for r in timeline.why.rows]
    text = "\n".join(["alive at the peak", *lines[:_ROWS]])
    below.text(0, 1, text, family="monospace", fontsize=8, va="top", transform=below.transAxes)
    below.axis("off")
    figure.savefig(path, dpi=120)
