"""What the passes did or would do to a model, to print, to read by program, or to show."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import sympy

from gtrans.analysis.closed_form import ClosedForm, largest
from gtrans.analysis.cost import bytes_of
from gtrans.analysis.liveness import Liveness, simulate
from gtrans.analysis.schedule import schedule_of
from gtrans.contract import Contract, compose_all
from gtrans.errors import OptionError
from gtrans.ir.sizes import human
from gtrans.ir.source import common_path
from gtrans.listing import Listing, Shown
from gtrans.pipeline import Pipeline, Step
from gtrans.plan.budget import plain_liveness
from gtrans.plan.cut import read_directly
from gtrans.plan.planner import Plan
from gtrans.plan.saved import SavedValue, saved_storages
from gtrans.seeing.listings import passes_listing, saved_listing
from gtrans.seeing.missed import MissedRow, missed_rows
from gtrans.seeing.timeline import Timeline, timeline_of

if TYPE_CHECKING:
    from gtrans.captured import Captured


@dataclass(frozen=True)
class SavedRow:
    """Saved values of equal layers, folded into one row.

    Attributes:
        count: how many.
        bytes: of all of them.
        example: the first of them.
        modules: the modules that made them, as one pattern: ``h.*.mlp``.
        members: all of them.
    """

    count: int
    bytes: int
    example: SavedValue
    modules: str = ""
    members: tuple[SavedValue, ...] = ()

    @property
    def in_memory_anyway(self) -> bool:
        """Whether they are parameters or buffers, or on the host: they take nothing more."""
        return self.example.kind in ("parameter", "buffer", "host")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for `--json`."""
        flat = asdict(self.example)
        flat["each_bytes"] = flat.pop("bytes")
        flat["location"] = str(self.example.location)
        flat["readers"] = list(self.example.readers)
        return {"count": self.count, "bytes": self.bytes, "modules": self.modules, **flat}


@dataclass(frozen=True)
class GraphMemory:
    """The memory of one graph, as autograd would run it and as the passes leave it.

    Attributes:
        index: number of the graph.
        before: as autograd would run it.
        after: as the passes leave it.
        held_before: bytes that other graphs hold meanwhile.
        held_after: the same with the passes.
    """

    index: int
    before: Liveness
    after: Liveness
    held_before: int
    held_after: int


@dataclass(frozen=True, repr=False)
class Explanation(Shown):
    """What a pipeline does to the captured graphs of one model. Printing it gives a page."""

    pipeline: Pipeline
    captured: "Sequence[Captured]"

    @property
    def training(self) -> "list[Captured]":
        """The graphs that have a backward."""
        return [c for c in self.captured if c.training]

    @property
    def saved_bytes(self) -> int:
        """Bytes kept for the backward, over all graphs, without parameters and buffers."""
        return sum(c.saved_bytes for c in self.training)

    @property
    def saved_bytes_before(self) -> int:
        """The same as autograd would keep without any pass."""
        return sum(c.saved_bytes_before for c in self.training)

    @cached_property
    def liveness(self) -> list[Liveness]:
        """The simulated memory of each training graph, as planned."""
        return [simulate(schedule_of(c.rewritten)) for c in self.training if c.rewritten]

    @property
    def peak(self) -> int:
        """Predicted peak of a step in bytes: parameters, buffers, inputs, gradients and values.

        Of the eager backend; one that fuses operators differs a little. The optimizer's state
        is part of it if the optimizer was given, or its bytes reserved.
        """
        held = [c.rewritten.surroundings.held_bytes for c in self.training if c.rewritten]
        return max((v.peak + h for v, h in zip(self.liveness, held, strict=True)), default=0)

    @cached_property
    def plain_peak(self) -> int:
        """The same if nothing had been rewritten, as autograd would."""
        return max((v.peak + held for v, held in self._plain), default=0)

    @cached_property
    def _plain(self) -> list[tuple[Liveness, int]]:
        """The memory of each training graph as autograd would run it, and what others hold then."""
        found = []
        for c in self.training:
            if c.original is not None:
                earlier = {o.frame: o for o in self.training if o.frame < c.frame}.values()
                held = c.original.surroundings.held_bytes
                held += sum(o.saved_bytes_before - o.saved_bytes for o in earlier)
                found.append((plain_liveness(c.original), held))
        return found

    def one_step(self) -> list[GraphMemory]:
        """The memory of the graphs that one step runs; of code captured several times, the last."""
        found: dict[int, GraphMemory] = {}
        graphs = [c for c in self.training if c.rewritten is not None]
        for c, after, (before, held) in zip(graphs, self.liveness, self._plain, strict=True):
            assert c.rewritten is not None
            around = c.rewritten.surroundings
            found[c.frame] = GraphMemory(c.index, before, after, held, around.held_bytes)
        return list(found.values())

    def timeline(self) -> Timeline:
        """Memory over the step, before and after, and what is alive at the peak.

        Raises:
            ModelError: nothing that trains was captured.
        """
        return timeline_of(self)

    @property
    def budget(self) -> int | None:
        """The memory budget in bytes, if there is one."""
        plans = [p for p in self.pipeline.passes if isinstance(p, Plan) and p.memory is not None]
        return plans[-1].memory.in_bytes(self.plain_peak) if plans and plans[-1].memory else None

    @property
    def reserved_bytes(self) -> int:
        """What of the peak is no part of the model, such as the optimizer's state."""
        return max(
            (p.reserved_bytes for p in self.pipeline.passes if isinstance(p, Plan)), default=0
        )

    @cached_property
    def closed_forms(self) -> list[ClosedForm]:
        """The step of every training graph as a function of its dynamic dimensions."""
        graphs = [c.rewritten for c in self.training if c.rewritten]
        return [ClosedForm(g, v) for g, v in zip(graphs, self.liveness, strict=True)]

    @property
    def dimensions(self) -> dict[str, int]:
        """The dynamic dimensions by name, and the sizes that were captured."""
        return {k: v for form in self.closed_forms for k, v in form.dimensions.items()}

    @property
    def formulas(self) -> dict[str, sympy.Expr]:
        """Bytes and operations in terms of the dynamic dimensions (`explain(..., dynamic=True)`).

        "saved" is what is kept for the backward, "saved_before" what autograd would keep, "peak"
        what is in memory where the step peaks at the captured sizes, without kernels' workspace
        and what other graphs hold, and "flops" the operations of a step.
        """
        forms, records = self.closed_forms, [c for c in self.training if c.rewritten]
        zero = sympy.S.Zero
        saved, before = zero, zero
        for form, c in zip(forms, records, strict=True):
            assert c.rewritten is not None
            assert c.original is not None
            saved += form.saved(saved_storages(c.rewritten, c.rewritten.cut or ()))
            before += form.saved(saved_storages(c.original, read_directly(c.original)))
        highest = max(range(len(forms)), key=lambda i: self.liveness[i].peak)
        return {
            "saved": sympy.expand(saved),
            "saved_before": sympy.expand(before),
            "peak": forms[highest].at_peak(),
            "flops": sympy.expand(sum((f.flops() for f in forms), zero)),
        }

    def largest(self, dimension: str, memory: str | int) -> int:
        """The largest size of a dynamic dimension whose step fits, the others as captured.

        Args:
            dimension: one of `dimensions`.
            memory: bytes ("80GiB"), or the name of a device whose memory is known ("h100").

        Raises:
            OptionError: there is no such dimension, the memory cannot be read, or nothing fits.
        """
        if dimension not in self.dimensions:
            known = f"; it has {', '.join(self.dimensions)}" if self.dimensions else ""
            raise OptionError(
                f"the captured step has no dynamic dimension {dimension!r}{known}. "
                "gtrans.explain(model, *inputs, dynamic=True) leaves the sizes of inputs open"
            )
        return largest(lambda size: self.peak_at({dimension: size}), bytes_of(memory), dimension)

    def peak_at(self, sizes: Mapping[str, int]) -> int:
        """The predicted peak of the same plan at other sizes of the dynamic dimensions."""
        held = [c.rewritten.surroundings.held_bytes for c in self.training if c.rewritten]
        return max(f.peak(sizes) + h for f, h in zip(self.closed_forms, held, strict=True))

    def fits(self, memory: str | int) -> bool:
        """Whether the predicted peak stays within some bytes, or the memory of a named device.

        Raises:
            OptionError: it is neither.
        """
        return self.peak <= bytes_of(memory)

    @property
    def contract(self) -> Contract:
        """What the passes that rewrote something promise together."""
        return compose_all([c.contract for c in self.captured])

    @property
    def own_seconds(self) -> float:
        """Seconds spent in passes, planning and splitting."""
        return sum(c.own_seconds for c in self.captured)

    @property
    def saved(self) -> list[SavedRow]:
        """What is kept, largest first; values that differ only in their layer are one row."""
        return fold(self.values)

    @property
    def values(self) -> list[SavedValue]:
        """Every single value that is kept, parameters and buffers included."""
        return [s for c in self.training for s in c.saved]

    @property
    def missed(self) -> list[MissedRow]:
        """What was not done and why, by pass; what the plan keeps is in `saved`."""
        return missed_rows(self.steps())

    def steps(self) -> list[tuple[int, Step]]:
        """Every pass that ran, with the number of its graph."""
        return [(c.index, s) for c in self.captured for s in (*c.forward_steps, *c.steps)]

    def __str__(self) -> str:
        return "\n".join([*self._summary(), "", *self._passes(), "", *self._table()])

    def headline(self) -> str:
        """Graphs, and what is kept before and after."""
        before, after = human(self.saved_bytes_before), human(self.saved_bytes)
        return f"{len(self.captured)} graphs, saved for the backward {before} -> {after}"

    def shown(self) -> list[str | Listing]:
        """A summary, the passes, and what is kept."""
        summary = "\n".join(self._summary()) + "\n"
        return [summary, passes_listing(self.steps()), "", saved_listing(self.saved)]

    def _repr_html_(self) -> str:
        picture = self.timeline().svg() if self.one_step() else ""
        return super()._repr_html_() + picture

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for `--json`."""
        return {
            "pipeline": str(self.pipeline),
            "contract": str(self.contract),
            "graphs": len(self.captured),
            "training_graphs": len(self.training),
            "saved_bytes": self.saved_bytes,
            "saved_bytes_before": self.saved_bytes_before,
            "peak_bytes": self.peak,
            "plain_peak_bytes": self.plain_peak,
            "budget_bytes": self.budget,
            "reserved_bytes": self.reserved_bytes,
            "own_seconds": self.own_seconds,
            "passes": [
                {
                    "graph": index,
                    "pass": step.text,
                    "contract": str(step.contract),
                    "matched": step.stats.matched,
                    "rewritten": step.stats.rewritten,
                    "skipped": dict(step.stats.skipped),
                    "notes": step.stats.notes,
                    "seconds": step.seconds,
                    "error": step.error,
                }
                for index, step in self.steps()
            ],
            "saved": [row.to_dict() for row in self.saved],
            "missed": [row.to_dict() for row in self.missed],
        }

    def _summary(self) -> list[str]:
        breaks = f" (graph breaks: {len(self.captured) - 1})" if len(self.captured) > 1 else ""
        before, after = self.saved_bytes_before, self.saved_bytes
        share = f" ({after / before - 1:+.0%})" if before else ""
        reserved = self.reserved_bytes
        return [
            f"pipeline   {self.pipeline}",
            f"contract   {self.contract}",
            f"graphs     {len(self.captured)}, {len(self.training)} with a backward{breaks}",
            f"saved      {human(before)} as autograd would -> {human(after)}{share}",
            f"peak       {human(self.plain_peak)} as autograd would -> {human(self.peak)} predicted"
            + ("" if self.budget is None else f", budget {human(self.budget)}"),
            *(
                [f"reserved   {human(reserved)} of these, as for the optimizer's state"]
                if reserved
                else []
            ),
            f"own time   {self.own_seconds:.2f} s",
        ]

    def _passes(self) -> list[str]:
        lines = ["pass"]
        for index, step in self.steps():
            where = f" [graph {index}]" if len(self.captured) > 1 else ""
            lines.append(f"  {step.text}{where}: {step.stats}")
            lines += [f"    {note}" for note in step.stats.notes]
            if step.error:
                lines.append(f"    failed and was left out: {step.error}")
        return lines

    def _table(self) -> list[str]:
        lines = ["kept for the backward        bytes  type, operator, source"]
        for row in self.saved:
            if row.in_memory_anyway:
                continue
            times = f"{row.count} x " if row.count > 1 else ""
            lines.append(
                f"  {times + human(row.bytes // row.count):>20} {human(row.bytes):>12}  "
                f"{row.example.shape} {row.example.operator} ({row.example.location})"
            )
        return lines


def fold(values: Sequence[SavedValue]) -> list[SavedRow]:
    """Folds values that differ only in the layer they belong to."""
    groups: dict[tuple[Any, ...], list[SavedValue]] = {}
    for v in values:
        key = (v.operator, v.shape, v.kind, v.location.file, v.location.line, v.readers, v.why)
        groups.setdefault(key, []).append(v)
    return sorted(map(_row, groups.values()), key=lambda r: -r.bytes)


def _row(group: Sequence[SavedValue]) -> SavedRow:
    modules = common_path(v.location.module for v in group)
    return SavedRow(len(group), sum(v.bytes for v in group), group[0], modules, tuple(group))


def unfolded(values: Sequence[SavedValue]) -> list[SavedRow]:
    """A row for every value, largest first."""
    return sorted((_row([v]) for v in values), key=lambda r: -r.bytes)
