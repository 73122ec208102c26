"""One page about a training step: what the passes did, what it costs, and whether it is right.

The page is a single file that needs no network: styles, script and pictures are in it.
"""

import math
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import nn

import gtrans
from gtrans.comparison import Comparison
from gtrans.errors import OptionError
from gtrans.explanation import Explanation, unfolded
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import human
from gtrans.pipeline import Pipeline
from gtrans.plan.planner import Plan
from gtrans.seeing.alternatives import Alternatives, alternatives
from gtrans.seeing.change import Hunk, graph_lines, hunks
from gtrans.seeing.charts import chart_data, plan_svg, timeline_svg
from gtrans.seeing.missed import MissedRow
from gtrans.seeing.watch import Snapshot, Watcher, watched
from gtrans.verification import Verification, compare

_MOST_HUNKS = 60

Told = Callable[[str], None]
"""Called with what is being done, for progress."""


@dataclass(frozen=True)
class PassView:
    """One pass over all graphs of the model.

    Attributes:
        text: the pass with its options.
        knob: letter and name of what it edits.
        law: what must still hold.
        contract: what it promised of these graphs.
        matched: places where its pattern was found.
        rewritten: places it rewrote.
        seconds: time it took.
        nodes: nodes before and after, of all graphs.
        missed: what it left alone.
        notes: its remarks.
        changes: what it changed, with the number of the graph.
        more: changes that are not shown.
    """

    text: str
    knob: str
    law: str
    contract: str
    matched: int
    rewritten: int
    seconds: float
    nodes: tuple[int, int]
    missed: tuple[MissedRow, ...]
    notes: tuple[str, ...]
    changes: tuple[tuple[int, Hunk], ...]
    more: int


@dataclass(frozen=True)
class GradientGroup:
    """Gradients of equal layers: their common name, and the worst comparison in each dtype."""

    pattern: str
    members: tuple[Comparison, ...]

    @property
    def worst(self) -> Comparison:
        """The one that is nearest to its bound, or beyond it."""
        return max(self.members, key=lambda c: (not c.ok, c.relative))

    @property
    def names(self) -> int:
        """How many parameters."""
        return len({c.name for c in self.members})


@dataclass(frozen=True)
class Page:
    """Everything the page shows.

    Attributes:
        title: what the model is called.
        command: how to make the page again; "" if it was not made by a command.
        explanation: what the passes did.
        passes: the same, pass by pass.
        verification: the comparison with the untouched model; None if it was left out.
        plans: for each graph, the plans it could have had.
        seconds: what it took to find all this.
    """

    title: str
    command: str
    explanation: Explanation
    passes: tuple[PassView, ...]
    verification: Verification | None
    plans: tuple[Alternatives, ...]
    seconds: float

    def html(self) -> str:
        """The page as text."""
        environment = Environment(
            loader=PackageLoader("gtrans.seeing", "."),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
        )
        environment.filters.update(human=human, percent=_percent)
        timeline = self.explanation.timeline()
        return environment.get_template("page.html.jinja").render(
            page=self,
            explanation=self.explanation,
            timeline=timeline,
            timeline_svg=timeline_svg(timeline, follows_system=False),
            memory=chart_data(timeline),
            plan_pictures=[plan_svg(p) for p in self.plans],
            gradients=self.gradients(),
            saved=self.saved(),
            versions=f"gtrans {gtrans.__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}",
        )

    def save(self, path: str | Path) -> Path:
        """Writes the page.

        Raises:
            OptionError: the file cannot be written.
        """
        path = Path(path)
        try:
            path.write_text(self.html(), encoding="utf-8")
        except OSError as error:
            raise OptionError(f"cannot write {str(path)!r}: {error.strerror}") from error
        return path

    def gradients(self) -> list[GradientGroup]:
        """The compared gradients, equal layers folded, worst first."""
        if self.verification is None:
            return []
        groups: dict[str, list[Comparison]] = {}
        for c in self.verification.comparisons:
            if c.kind == "gradient":
                groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", c.name, count=1), []).append(c)
        found = [GradientGroup(pattern, tuple(group)) for pattern, group in groups.items()]
        return sorted(found, key=lambda g: (g.worst.ok, -g.worst.relative))

    def saved(self) -> list[tuple[Any, list[Any]]]:
        """The kept values, equal layers folded, each with its members."""
        return [(row, unfolded(row.members)) for row in self.explanation.saved]

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.html())}" width="100%" height="800"></iframe>'


def page_of(
    model: nn.Module,
    inputs: Sequence[Any],
    keyword_inputs: dict[str, Any],
    pipeline: Pipeline,
    *,
    title: str = "",
    command: str = "",
    seed: int = 0,
    check: bool = True,
    float64: bool = False,
    told: Told = lambda what: None,
) -> Page:
    """Finds everything for the page: captures the model, compares gradients, searches plans.

    Args:
        model: it stays as it is.
        inputs: its positional inputs.
        keyword_inputs: its keyword inputs.
        pipeline: the passes.
        title: what to call the model; its class by default.
        command: how to make the page again.
        seed: of the compared steps.
        check: compare the gradients with the untouched model's, which runs it twice.
        float64: compare them in float64, too, where errors do not hide behind rounding; that runs
            the model twice again, and captures it once more.
        told: called with what is being done.

    Raises:
        ModelError: the model cannot be trained, or does not accept the inputs.
        GTransError: a pass failed.
    """
    start = time.perf_counter()
    verification = None
    if check:
        told("comparing gradients with the untouched model")
        dtypes = (torch.float64, None) if float64 else (None,)
        verification, watcher = _compared(model, inputs, keyword_inputs, pipeline, seed, dtypes)
    else:
        told("capturing the model")
        watcher = watched(model, inputs, keyword_inputs, pipeline)
    explanation = Explanation(watcher.pipeline, watcher.captured)
    told("looking for other plans")
    plans = tuple(_plans(watcher))
    told("comparing graphs before and after each pass")
    passes = tuple(_passes(watcher, explanation))
    name = title or type(model).__name__
    seconds = time.perf_counter() - start
    return Page(name, command, explanation, passes, verification, plans, seconds)


def _compared(
    model: nn.Module,
    inputs: Sequence[Any],
    keyword_inputs: dict[str, Any],
    pipeline: Pipeline,
    seed: int,
    dtypes: Sequence[torch.dtype | None],
) -> tuple[Verification, Watcher]:
    """The comparison, and what was captured for its last part, in the model's own dtype."""
    watchers: list[Watcher] = []

    def make(*arguments: Any, **options: Any) -> Watcher:
        watchers.append(Watcher(*arguments, **options))
        return watchers[-1]

    verification = compare(
        model, inputs, keyword_inputs, pipeline, seed=seed, dtypes=dtypes, make=make
    )
    return verification, watchers[-1]


def _passes(watcher: Watcher, explanation: Explanation) -> list[PassView]:
    views = []
    missed = explanation.missed
    for p in watcher.pipeline.passes:
        snapshots = [s for s in watcher.snapshots if s.step.text == str(p)]
        changes = [(s.index, hunk) for s in snapshots for hunk in _hunks(s)]
        stats = [s.step.stats for s in snapshots]
        views.append(
            PassView(
                text=str(p),
                knob=f"{p.knob.value} {p.knob.name.lower()}",
                law=p.knob.law,
                contract=", ".join(dict.fromkeys(str(s.step.contract) for s in snapshots)),
                matched=sum(s.matched for s in stats),
                rewritten=sum(s.rewritten for s in stats),
                seconds=sum(s.step.seconds for s in snapshots),
                nodes=(
                    sum(s.step.nodes_before for s in snapshots),
                    sum(s.step.nodes_after for s in snapshots),
                ),
                missed=tuple(row for row in missed if row.text == str(p)),
                notes=tuple(note for s in stats for note in s.notes),
                changes=tuple(changes[:_MOST_HUNKS]),
                more=max(0, len(changes) - _MOST_HUNKS),
            )
        )
    return views


def _hunks(snapshot: Snapshot) -> list[Hunk]:
    if snapshot.before is snapshot.after:
        return []
    return hunks(graph_lines(snapshot.before), graph_lines(snapshot.after))


def _plans(watcher: Watcher) -> list[Alternatives]:
    found = []
    for snapshot in watcher.snapshots:
        before, after = snapshot.before, snapshot.after
        if snapshot.step.name == Plan.name and isinstance(before, JointGraph):
            assert isinstance(after, JointGraph)
            found.append(alternatives(snapshot.index, before, after))
    return found


def _percent(error: float) -> float:
    """A relative error as the length of a bar: 1e-16 and less is nothing, 1 and more is full."""
    if not error < 1:  # NaN, too
        return 100.0
    return max(0.0, 100 * (1 + math.log10(max(error, 1e-16)) / 16))
