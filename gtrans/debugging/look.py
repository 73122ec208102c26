"""Look at a pipeline while it runs: print, check, count, time and write down what each pass does.

The same settings come from the options of `gtrans run`, from Python, or from environment variables
inside a training script (`GTRANS_PRINT_CHANGED=diff python train.py`). They belong to one model:
nothing is configured globally.
"""

import html
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from gtrans.comparison import Comparison
from gtrans.debugging.case import Case, made, stand_ins, write
from gtrans.debugging.numbers import format_numbers, parse_numbers
from gtrans.debugging.running import Results, StepGraph, compare, run
from gtrans.errors import GTransError, OptionError, VerifyError, did_you_mean
from gtrans.ir.check import check_forward, check_joint
from gtrans.ir.forward import ForwardGraph, value
from gtrans.ir.joint import JointGraph
from gtrans.ir.program import Program
from gtrans.ir.sizes import shape_text
from gtrans.ir.source import location
from gtrans.pipeline import Gate, Graph, Observer, Pipeline, Step, Window
from gtrans.plan.planner import Plan
from gtrans.registry import pass_table
from gtrans.seeing.change import difference, graph_lines, kept

PREFIX = "GTRANS_"

_KEEP_ALL = Plan(recompute="none")

PrintChanged = Literal["", "full", "diff", "quiet"]
VerifyEach = Literal["", "structure", "shapes", "grads"]

ValuesOf = Callable[[int, StepGraph], Mapping[str, Any]]
"""Values for the placeholders of a graph, by its number."""


@dataclass(frozen=True)
class Look:
    """What to do after each pass, and which passes and rewrites to perform.

    Attributes:
        print_changed: after a pass that changed something, print the graph ("full", which also says
            where nothing changed, or "quiet") or what changed in it ("diff").
        print_after_all: print the graph after every pass.
        verify_each: after every pass, check the "structure" of the graph, also the "shapes" that
            its nodes claim, or also that it computes the same ("grads").
        time_passes: add the time that each pass took.
        stats: list each rewrite with its source line, and the operators added and removed.
        stop_after: leave out the passes after this one.
        disable: passes to leave out.
        bisect_limit: perform only so many rewrites.
        only_rewrites: perform only these, as "1-16,18"; "none" performs none.
        counter: perform only some rewrites of a pass, as "relu-mask=skip:3,count:1".
        dump_dir: a folder for the graph after every pass, as Python that runs.
    """

    print_changed: PrintChanged = ""
    print_after_all: bool = False
    verify_each: VerifyEach = ""
    time_passes: bool = False
    stats: bool = False
    stop_after: str = ""
    disable: tuple[str, ...] = ()
    bisect_limit: int | None = None
    only_rewrites: str | None = None
    counter: tuple[str, ...] = ()
    dump_dir: Path | None = None

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> "Look":
        """The settings of `GTRANS_PRINT_CHANGED` and its relatives; several values by spaces.

        Raises:
            OptionError: a value cannot be read.
        """
        given: dict[str, Any] = {}
        for f in fields(Look):
            text = environment.get(PREFIX + f.name.upper())
            if text:
                given[f.name] = _read(f.name, text)
        return Look(**given)

    def __post_init__(self) -> None:
        _one_of("print-changed", self.print_changed, get_args(PrintChanged))
        _one_of("verify-each", self.verify_each, get_args(VerifyEach))
        if self.bisect_limit is not None and self.only_rewrites is not None:
            raise OptionError(
                "--only-rewrites and --bisect-limit exclude each other; give one of them"
            )

    @property
    def wanted(self) -> bool:
        """Whether anything at all was asked for."""
        return self != Look()

    def pipeline(self, whole: Pipeline) -> Pipeline:
        """A pipeline less the passes that are disabled or come after the last one asked for.

        Raises:
            OptionError: it has no such pass.
        """
        passes = whole.without(self.disable).passes
        if self.stop_after:
            names = [p.name for p in passes]
            if self.stop_after not in names:
                near = did_you_mean(self.stop_after, names)
                raise OptionError(f"no pass {self.stop_after!r} in the pipeline{near}")
            passes = passes[: names.index(self.stop_after) + 1]
            if not any(isinstance(p, Plan) for p in passes):
                passes = (*passes, _KEEP_ALL)  # there must be a plan; this one changes nothing
        return Pipeline(passes)

    def gate(self) -> Gate:
        """Which rewrites to perform.

        Raises:
            OptionError: a counter or numbers cannot be read.
        """
        allowed: range | frozenset[int] | None = None
        if self.bisect_limit is not None:
            allowed = range(1, self.bisect_limit + 1)
        elif self.only_rewrites is not None:
            none = self.only_rewrites.strip() == "none"
            allowed = frozenset() if none else parse_numbers(self.only_rewrites)
        return Gate(allowed, dict(_window(text) for text in self.counter))

    def observers(
        self, pipeline: Pipeline, say: Callable[[str], None], values_of: ValuesOf | None = None
    ) -> list[Observer]:
        """What the pipeline has to call after each pass.

        Args:
            pipeline: the passes that run, for what is written down.
            say: takes each printed text.
            values_of: values to compute with; by default random ones, and zero for whole numbers.
        """
        found: list[Observer] = [_Printer(self, say)]
        if self.verify_each:
            found.append(_Verifier(self.verify_each, pipeline, values_of or _random_values))
        if self.dump_dir is not None:
            found.append(_Dumper(self.dump_dir))
        return found


def to_stderr(text: str) -> None:
    """Prints to standard error, where a training script's own output is not mixed up with it."""
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------- options


def _read(name: str, text: str) -> Any:
    flags = ("print_after_all", "time_passes", "stats")
    if name in flags:
        return text not in ("0", "false")
    if name in ("disable", "counter"):
        return tuple(text.split())
    if name == "bisect_limit":
        if not text.isdecimal():
            raise OptionError(f"{PREFIX}BISECT_LIMIT must be a whole number, got {text!r}")
        return int(text)
    if name == "dump_dir":
        return Path(text)
    if text == "1":  # a switch without a value
        return {"print_changed": "full", "verify_each": "structure"}.get(name, text)
    return text


def _one_of(name: str, text: str, known: tuple[str, ...]) -> None:
    if text not in known:
        raise OptionError(f"--{name} cannot be {text!r}{did_you_mean(text, filter(None, known))}")


def _window(text: str) -> tuple[str, Window]:
    """Reads ``relu-mask=skip:3,count:1``."""
    name, _, parts = text.partition("=")
    numbers: dict[str, int] = {}
    for part in parts.split(","):
        key, _, number = part.partition(":")
        if key not in ("skip", "count") or not number.isdecimal():
            raise OptionError(
                f"cannot read the counter {text!r}; write PASS=skip:3,count:1, or one of the two"
            )
        numbers[key] = int(number)
    if name not in (table := pass_table()):
        raise OptionError(f"unknown pass {name!r}{did_you_mean(name, table)}")
    return name, Window(**numbers)


# ---------------------------------------------------------------------- observers


@dataclass
class _Printer:
    look: Look
    say: Callable[[str], None]

    def __call__(self, step: Step, before: Graph, after: Graph) -> None:
        self.say(headline(step, timed=self.look.time_passes))
        if self.look.stats:
            self._stats(step, before)
        if self.look.stop_after and step.text == str(_KEEP_ALL):
            return
        wanted = self.look.print_changed
        changed = difference(step.text, before, after) if wanted else ""
        if self.look.print_after_all or (changed and wanted in ("full", "quiet")):
            self.say("\n".join(graph_lines(after)))
        elif changed and wanted == "diff":
            self.say(changed)
        elif not changed and wanted == "full":
            self.say("  nothing changed")

    def _stats(self, step: Step, before: Graph) -> None:
        places = {n.name: location(n) for n in before.nodes}
        for r in step.rewrites:
            place = places.get(r.site)
            where = f" ({place})" if place is not None and place.file else ""
            self.say(f"  #{r.number} at {r.site}{where}{'' if r.performed else ': held back'}")
        if step.op_changes:
            changes = ", ".join(f"{n:+d} {op}" for op, n in step.op_changes.items())
            self.say(f"  operators: {changes}")


def headline(step: Step, *, timed: bool = False) -> str:
    """One line a pass: ``pass 2 relu-mask, graph 0: matched 3, rewrote 3; rewrites #1-#3``."""
    line = f"pass {step.number} {step.text}, graph {step.graph}: {step.stats}"
    if step.rewrites:
        line += f"; rewrites #{format_numbers([r.number for r in step.rewrites])}"
    back = [r.number for r in step.rewrites if not r.performed]
    if back:
        line += f", of which #{format_numbers(back)} held back"
    line += f"; {step.nodes_before} -> {step.nodes_after} nodes"
    return line + (f"; {1000 * step.seconds:.1f} ms" if timed else "")


@dataclass
class _Verifier:
    """Checks the graph after every pass; the first wrong one is to blame."""

    level: VerifyEach
    pipeline: Pipeline
    values_of: ValuesOf
    untouched: dict[tuple[int, type[StepGraph]], tuple[Mapping[str, Any], Results]] = field(
        default_factory=dict
    )

    def __call__(self, step: Step, before: Graph, after: Graph) -> None:
        if isinstance(before, Program) or isinstance(after, Program):
            return  # the pipeline has checked it, and it is no graph of a training step
        try:
            if isinstance(after, JointGraph) and isinstance(before, JointGraph):
                check_joint(after, before)
            elif isinstance(after, ForwardGraph) and isinstance(before, ForwardGraph):
                check_forward(after, before)
            if self.level in ("shapes", "grads"):
                _check_shapes(after)
        except GTransError as error:
            raise VerifyError(f"after pass {step.number} {step.text!r}: {error}") from error
        if self.level == "grads":
            with _disable_current_modes():  # torch is tracing, and values are to be computed
                self._compare(step, before, after)

    def _compare(self, step: Step, before: StepGraph, after: StepGraph) -> None:
        key = (step.graph, type(before))
        if key not in self.untouched:
            values = self.values_of(step.graph, before)
            self.untouched[key] = (values, run(before, values, 0))
        values, expected = self.untouched[key]
        terms = max((v.numel() for v in values.values() if isinstance(v, torch.Tensor)), default=1)
        try:
            results = run(after, values, 0)
        except Exception as error:  # whatever the operators of a wrong graph raise
            raise VerifyError(
                f"after pass {step.number} {step.text!r} graph {step.graph} cannot be run: "
                f"{type(error).__name__}: {error}"
            ) from error
        found = compare(expected, results, self.pipeline.contract, terms)
        wrong = [c for c in found if not c.ok]
        if wrong:
            worst: Comparison = max(wrong, key=lambda c: c.relative)
            numbers = format_numbers([r.number for r in step.rewrites if r.performed])
            raise VerifyError(
                f"after pass {step.number} {step.text!r} (rewrites #{numbers}) graph {step.graph} "
                f"computes something else: {worst.kind} {worst.name} differs by "
                f"{worst.relative:.1e}, allowed {worst.bound:.1e}; {len(wrong)} of {len(found)} "
                "tensors are wrong"
            )


def _check_shapes(graph: StepGraph) -> None:
    """Runs the graph on fake values and compares them with what its nodes claim.

    Raises:
        VerifyError: a node makes a value of another shape or dtype.
    """
    fakes = (v for n in graph.nodes if isinstance(v := value(n), FakeTensor))
    mode = next((v.fake_mode for v in fakes), FakeTensorMode())

    class Claims(fx.Interpreter):
        """Compares as it goes."""

        def run_node(self, n: fx.Node) -> Any:
            made_here, claimed = super().run_node(n), value(n)
            if n.op.startswith("call") and _shape(made_here) != _shape(claimed):
                raise VerifyError(
                    f"node {n.name} ({location(n)}) claims {shape_text(claimed)} and makes "
                    f"{shape_text(made_here)}"
                )
            return made_here

    inputs = [value(n) for n in graph.graph.find_nodes(op="placeholder")]
    try:
        with mode, torch.no_grad():
            Claims(graph.module).run(*inputs, enable_io_processing=False)
    except VerifyError:
        raise
    except Exception as error:  # whatever the operators of a wrong graph raise
        reason = str(error).partition("\n")[0]
        raise VerifyError(f"the graph cannot be run: {type(error).__name__}: {reason}") from error


def _shape(val: Any) -> str:
    return shape_text(val) if isinstance(val, torch.Tensor) else ""


def _random_values(index: int, graph: StepGraph) -> dict[str, Any]:
    return {name: made(name, d, index) for name, d in stand_ins(graph).items()}


@dataclass
class _Dumper:
    """Writes the graph after every pass into a folder, as numbered Python files, and an index."""

    folder: Path
    rows: list[tuple[str, str]] = field(default_factory=list)
    seen: set[tuple[int, str]] = field(default_factory=set)

    def __call__(self, step: Step, before: Graph, after: Graph) -> None:
        if isinstance(before, Program) or isinstance(after, Program):
            return  # no graph of a training step
        kind = "joint" if isinstance(before, JointGraph) else "forward"
        if (step.graph, kind) not in self.seen:
            self.seen.add((step.graph, kind))
            self._write(f"graph{step.graph}_{kind}", "before any pass", before)
        name = self._write(f"graph{step.graph}_{step.name}", headline(step, timed=True), after)
        if change := difference(step.text, before, after):
            self._file(f"{name}.diff", change + "\n")
        self._file("index.html", self._index())

    def _write(self, name: str, title: str, graph: StepGraph) -> str:
        name = f"{len(self.rows):03}_{name}"
        case = Case(graph, {}, Pipeline(), descriptions=stand_ins(graph))
        notes = [f"keep {line}" for line in kept(graph)]
        try:
            text = write(case, "\n".join([title, *notes]))
        except GTransError as error:
            text = f"# {error}\n" + "\n".join(f"# {line}" for line in graph_lines(graph)) + "\n"
        self._file(f"{name}.py", text)
        self.rows.append((name, title))
        return name

    def _file(self, name: str, text: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OptionError(
                f"cannot write {str(self.folder / name)!r}: {error.strerror}"
            ) from error

    def _index(self) -> str:
        rows = "\n".join(
            f'<tr><td><a href="{name}.py">{name}.py</a><td>'
            + (f'<a href="{name}.diff">diff</a>' if (self.folder / f"{name}.diff").exists() else "")
            + f"<td>{html.escape(title)}"
            for name, title in self.rows
        )
        return (
            '<!doctype html><meta charset="utf-8"><title>gtrans passes</title>\n'
            "<style>:root{color-scheme:light dark}body{font:15px system-ui;margin:2em}"
            "td{padding:.2em 1em .2em 0;vertical-align:top}</style>\n"
            f"<h1>Passes</h1><p>Each file runs: python FILE</p>\n<table>\n{rows}\n</table>\n"
        )
