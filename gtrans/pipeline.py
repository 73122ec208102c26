"""Runs passes over a graph: private copy, run, verify, commit.

A pipeline has a text form that is the same in Python, on the command line and in reports:

    relu-mask,few-bit{bits=2},plan{memory=6GiB}
"""

import contextlib
import re
import time
import types
import typing
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from typing import Any, TypeVar, cast

from gtrans.contract import Changed, Contract, compose_all, level
from gtrans.core import Knob, Pass, SitePass, Stats
from gtrans.errors import (
    BudgetError,
    ContractError,
    GTransError,
    OptionError,
    PassError,
    did_you_mean,
)
from gtrans.ir.check import check_forward, check_joint, check_program
from gtrans.ir.forward import RECURRENT_LAYERS, ForwardGraph
from gtrans.ir.joint import JointGraph
from gtrans.ir.printer import target_name
from gtrans.ir.program import Program
from gtrans.plan.worth import PayingPass, planned_bytes
from gtrans.registry import load_pass, pass_table

Graph = JointGraph | ForwardGraph | Program
AnyGraph = TypeVar("AnyGraph", bound=Graph)

DEFAULT = "relu-mask,norm-output,dropout-output,bit-masks,plan"
"""The pipeline of `optimize(model)`: exact passes only."""

ADMITTED = {
    "close": "memory-share,compress{bits=8,rounding=nearest}",
    "unbiased": "compress",
}
"""What `allow=` puts in front of the default passes."""

UNDER_BUDGET = ("chunked-loss",)
"""Forward passes that a plan under a memory budget may call in, where that makes the step faster or
is the only way to fit."""

WHOLE_LAYERS: dict[str, dict[str, str]] = {
    "fused-lstm": {},
    "hoist-recurrence": {"min_steps": "16", "max_state": "None"},
}
"""Forward passes, and their options, that keep recurrent layers whole: unrolled, one of a hundred
steps takes minutes to compile. They run behind all others, asked for or not, unless a pass of the
pipeline reads the steps of layers."""

SAVED_ANYWAY = "the passes behind it keep no more bytes without it"

ALIASES = {"default": DEFAULT, "none": ""}


@dataclass(frozen=True)
class Rewrite:
    """One rewrite, numbered across all passes and graphs of a model in the order they happen.

    Attributes:
        number: from 1.
        pass_name: the pass.
        site: the node, or whatever else the pass calls the place.
        performed: whether the gate let it through.
    """

    number: int
    pass_name: str
    site: str
    performed: bool = field(default=True, compare=False)

    def __str__(self) -> str:
        return f"#{self.number} {self.pass_name} at {self.site}"


@dataclass(frozen=True)
class Window:
    """Which rewrites of one pass to perform: after the first `skip`, so many as `count` says."""

    skip: int = 0
    count: int | None = None

    def __contains__(self, index: int) -> bool:
        end = None if self.count is None else self.skip + self.count
        return index >= self.skip and (end is None or index < end)


class Gate:
    """Numbers passes and rewrites, and lets through the rewrites that are allowed.

    Args:
        allowed: numbers of the rewrites to perform; None performs all. Numbers start at 1.
        windows: by name of a pass, which of its own rewrites to perform.
    """

    def __init__(
        self,
        allowed: Collection[int] | None = None,
        windows: Mapping[str, Window] | None = None,
    ) -> None:
        self.allowed = allowed
        self.windows = dict(windows or {})
        self.seen: list[Rewrite] = []
        self.passes = 0
        self._asked: Counter[str] = Counter()

    def next_pass(self) -> int:
        """The number of the pass that is about to run, counted over all graphs from 1."""
        self.passes += 1
        return self.passes

    @property
    def holds_back(self) -> bool:
        """Whether there may be rewrites that it does not let through."""
        return self.allowed is not None or bool(self.windows)

    def permission(self, pass_name: str) -> Callable[[str], bool]:
        """What a pass asks before each of its rewrites."""
        window = self.windows.get(pass_name, Window())

        def permitted(site: str) -> bool:
            number = len(self.seen) + 1
            performed = (self.allowed is None or number in self.allowed) and (
                self._asked[pass_name] in window
            )
            self._asked[pass_name] += 1
            self.seen.append(Rewrite(number, pass_name, site, performed))
            return performed

        return permitted


@dataclass
class Step:
    """What one pass did to one graph.

    Attributes:
        text: the pass with its options.
        contract: what it promises, of this graph if the pass said so.
        number: of the pass, counted over all graphs from 1.
        graph: number of the captured graph.
        rewrites: what it asked permission for.
        error: why it failed; empty if it did not.
    """

    text: str
    contract: Contract
    stats: Stats = field(default_factory=Stats)
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    op_changes: dict[str, int] = field(default_factory=dict)
    error: str = ""
    number: int = 0
    graph: int = 0
    rewrites: tuple[Rewrite, ...] = ()

    @property
    def name(self) -> str:
        """The pass without its options."""
        return self.text.partition("{")[0]


Observer = Callable[[Step, Graph, Graph], None]
"""Called after each pass that succeeded, with the graph before and after it."""

OnFailure = Callable[[Step, Graph, "Pipeline"], str]
"""Called when a pass fails, with the graph that the pipeline started from and the passes up to it.
What it returns is added to the message."""


@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes.

    Args:
        passes: in order.
        unrolls: show joint passes the steps of recurrent layers, whether or not one reads them.
    """

    passes: tuple[Pass[Any], ...] = ()
    unrolls: bool = field(default=False, repr=False)

    @staticmethod
    def parse(text: "str | Pipeline") -> "Pipeline":
        """Reads the text form; a pipeline made of pass objects is returned as it is.

        Raises:
            OptionError: a name, option or value is unknown or malformed.
        """
        if isinstance(text, Pipeline):
            return text
        made: list[Pass[Any]] = []
        for name, options in _split(text):
            if name in ALIASES and not options:
                made += Pipeline.parse(ALIASES[name]).passes
            else:
                made.append(make_pass(name, options))
        return Pipeline(tuple(made))

    def __str__(self) -> str:
        return ",".join(str(p) for p in self.passes)

    @property
    def contract(self) -> Contract:
        """What all passes together promise about the gradient."""
        return compose_all([p.contract for p in self.passes])

    def without(self, names: Collection[str]) -> "Pipeline":
        """The same pipeline less the named passes.

        Raises:
            OptionError: a name is not known at all.
        """
        for name in names:
            if name not in (table := pass_table()):
                raise OptionError(f"unknown pass {name!r}{did_you_mean(name, table)}")
        return replace(self, passes=tuple(p for p in self.passes if p.name not in names))

    def on(self, kind: type[Graph]) -> "Pipeline":
        """The passes that work on this kind of graph."""
        return Pipeline(tuple(p for p in self.passes if p.works_on is kind))

    @property
    def reads_steps(self) -> bool:
        """Whether recurrent layers have to be unrolled, even where one operator computes them."""
        return self.unrolls or any(p.reads_steps for p in self.passes)

    def on_forward(self, graph: ForwardGraph) -> "Pipeline":
        """The passes that work on forward graphs, and those that keep its layers whole."""
        passes = self.on(ForwardGraph).passes
        if graph.calls(*RECURRENT_LAYERS) and not self.reads_steps:
            names = {p.name for p in passes}
            passes += tuple(make_pass(n, WHOLE_LAYERS[n]) for n in WHOLE_LAYERS if n not in names)
        return Pipeline(passes)

    @property
    def changing(self) -> "Pipeline":
        """The passes that change the function; gradients of the others are compared with these."""
        return Pipeline(tuple(p for p in self.passes if isinstance(p.contract, Changed)))

    def planned(self, plan: Pass[Any]) -> "Pipeline":
        """With a plan at the end, or before the schedule passes that the pipeline ends with."""
        passes = list(self.passes)
        end = len(passes)
        while end and passes[end - 1].knob is Knob.SCHEDULE:
            end -= 1
        return replace(self, passes=(*passes[:end], plan, *passes[end:]))

    def marked(self, graph: ForwardGraph) -> ForwardGraph:
        """The forward graph with the taps of all joint passes; itself if none asks for any."""
        asking = [p for p in self.on(JointGraph).passes if type(p).mark is not Pass.mark]
        if not asking:
            return graph
        private = graph.copy()
        for p in asking:
            p.mark(private)
        return private

    def require(self, weakest: str) -> None:
        """Checks that no pass promises less than the named contract.

        Raises:
            ContractError: one does; the message names it.
        """
        limit = level(weakest).rank
        for p in self.passes:
            if p.contract.rank > limit:
                raise ContractError(
                    f"pass {p.name!r} is {p.contract}, weaker than the admitted {weakest!r}; "
                    f"leave it out, or admit it with allow={p.contract.name!r}"
                )

    def run(
        self,
        graph: AnyGraph,
        *,
        gate: Gate | None = None,
        observers: Sequence[Observer] = (),
        skip_failures: bool = False,
        on_failure: OnFailure | None = None,
        index: int = 0,
    ) -> tuple[AnyGraph, list[Step]]:
        """Runs the passes in order, each on a private copy that is committed only if it is sound.

        Args:
            graph: the graph to start from; it is never modified.
            gate: which rewrites to perform; all by default.
            observers: called after every pass.
            skip_failures: go on without a pass that fails, and record its error in the step, unless
                it is indispensable.
            on_failure: called when one fails.
            index: number of the graph, for the steps.

        Raises:
            GTransError: a pass failed and `skip_failures` is off. The message names the pass.
        """
        gate = gate or Gate()
        steps: list[Step] = []
        first = graph
        for p in self.passes:
            step = Step(str(p), p.contract, nodes_before=len(graph.nodes), graph=index)
            step.number = gate.next_pass()
            steps.append(step)
            asked = len(gate.seen)
            start = time.perf_counter()
            try:
                rewritten: Graph = self._run_if_it_pays(len(steps) - 1, graph, gate, step)
            except Exception as error:
                step.error = f"{type(error).__name__}: {error}"
                note = ""
                if on_failure is not None and not isinstance(error, BudgetError):
                    note = on_failure(step, first, Pipeline(self.passes[: len(steps)]))
                    step.error += note
                if not skip_failures or p.indispensable:
                    raise _blame(p, error, note) from error
                rewritten = graph
            step.rewrites = tuple(gate.seen[asked:])
            step.seconds = time.perf_counter() - start
            step.nodes_after = len(rewritten.nodes)
            step.op_changes = _op_changes(graph, rewritten)
            for observer in observers:
                observer(step, graph, rewritten)
            graph = cast(AnyGraph, rewritten)  # a pass edits a copy of the graph it is given
        return graph, steps

    def _run_if_it_pays(self, position: int, graph: Graph, gate: Gate, step: Step) -> Graph:
        """Runs one pass, unless it gives up exactness for bytes that the passes behind it save.

        It is judged with all its rewrites whatever the gate lets through, so that the numbers of
        rewrites, which bisection goes by, do not depend on the gate.
        """
        p = self.passes[position]
        behind = [q for q in self.passes[position + 1 :] if _saves_bytes(q)]
        if not (isinstance(p, PayingPass) and p.contract.rank and behind):
            return _run_one(p, graph, gate, step)
        unhindered = Gate()
        rewritten = _run_one(p, graph, unhindered, step)
        if not unhindered.seen:
            return rewritten
        if _kept(behind, rewritten) >= _kept(behind, graph):
            stats = step.stats
            step.stats = Stats(stats.matched, skipped=stats.skipped, refused=stats.refused)
            step.stats.skipped[SAVED_ANYWAY] += stats.rewritten
            return graph
        if gate.holds_back:
            return _run_one(p, graph, gate, step)
        permitted = gate.permission(p.name)
        for rewrite in unhindered.seen:
            permitted(rewrite.site)
        return rewritten


def make_pass(name: str, options: dict[str, str]) -> Pass[Any]:
    """Makes a pass from its name and options given as text.

    Raises:
        OptionError: the pass or an option is unknown, or a value does not fit its type.
    """
    cls = load_pass(name)
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls)}  # type: ignore[arg-type]  # every pass is a dataclass
    values = {}
    for key, text in options.items():
        field_name = key.replace("-", "_")
        if field_name not in known:
            raise OptionError(f"pass {name!r} has no option {key!r}{did_you_mean(key, known)}")
        values[field_name] = parse_option(text, known[field_name], f"{name}{{{key}}}")
    missing = [
        f.name
        for f in fields(cls)  # type: ignore[arg-type]  # as above
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    if missing:
        raise OptionError(f"pass {name!r} needs the option {missing[0]!r}")
    return cls(**values)


def parse_option(text: str, kind: Any, where: str) -> Any:
    """Reads an option value of the given type; the inverse of `gtrans.core.format_option`.

    Raises:
        OptionError: the text is no such value.
    """
    if isinstance(kind, types.UnionType):
        choices = [k for k in typing.get_args(kind) if k is not types.NoneType]
        if text in ("None", "auto"):
            return None
        kind = choices[0]
    if hasattr(kind, "parse"):
        return kind.parse(text)
    if kind is bool:
        if text not in ("true", "false"):
            raise OptionError(f"{where} must be true or false, got {text!r}")
        return text == "true"
    if typing.get_origin(kind) is typing.Literal:
        if text not in typing.get_args(kind):
            raise OptionError(f"{where}: {text!r}{did_you_mean(text, typing.get_args(kind))}")
        return text
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(text)
    try:
        return kind(text)
    except ValueError:
        raise OptionError(f"{where} must be {_article(kind.__name__)}, got {text!r}") from None


def _article(kind: str) -> str:
    return {"int": "a whole number", "float": "a number"}.get(kind, kind)


_ITEM = re.compile(r"\s*(?P<name>[a-z][a-z0-9-]*)\s*(?:\{(?P<options>[^{}]*)\})?\s*(?P<end>,|$)")


def _split(text: str) -> Iterable[tuple[str, dict[str, str]]]:
    position = 0
    while position < len(text.rstrip()):
        match = _ITEM.match(text, position)
        if match is None:
            raise OptionError(
                f"cannot read pipeline {text!r} at {text[position:]!r}; "
                "expected pass names like 'relu-mask,plan{memory=6GiB}'"
            )
        options = {}
        for part in filter(None, (match["options"] or "").split(",")):
            key, equals, value = part.partition("=")
            if not equals:
                raise OptionError(f"option {part.strip()!r} of {match['name']!r} has no value")
            options[key.strip()] = value.strip()
        yield match["name"], options
        position = match.end()


def _saves_bytes(p: Pass[Any]) -> bool:
    """Whether a pass lets the backward do with less; others choose among what there is."""
    rewrites = isinstance(p, SitePass | PayingPass)
    return rewrites and p.works_on is JointGraph and p.knob is Knob.RESIDUAL


def _kept(passes: Iterable[Pass[Any]], graph: Graph) -> int:
    """Bytes that a plan keeps once these passes have run. One that fails is left out."""
    for p in passes:
        with contextlib.suppress(Exception):  # it fails again, and says so, when its turn comes
            graph = _run_one(p, graph, Gate(), Step(str(p), p.contract))
    return planned_bytes(cast(JointGraph, graph.copy()))


def _run_one(p: Pass[Any], graph: Graph, gate: Gate, step: Step) -> Graph:
    if isinstance(p, SitePass) and not list(p.sites(graph)):
        return graph  # nothing matched: no copy needed
    private = graph.copy()
    private.author = p.name
    step.stats = p.run(private, gate.permission(p.name))
    step.contract = step.stats.contract or step.contract
    if isinstance(private, JointGraph):
        if private.cut is None:
            private.eliminate_dead_code()
        check_joint(private, graph if isinstance(graph, JointGraph) else None)
    elif isinstance(private, ForwardGraph) and isinstance(graph, ForwardGraph):
        private.eliminate_dead_code()
        check_forward(private, graph)
    elif isinstance(private, Program) and isinstance(graph, Program):
        private.eliminate_dead_code()
        check_program(private, graph)
    private.author = ""
    return private


def _blame(p: Pass[Any], error: Exception, note: str) -> Exception:
    """The same error with the name of the pass; foreign errors become a PassError."""
    if isinstance(error, GTransError):
        message = f"pass {p.name!r} failed: {error}{note}"
        return PassError(message) if type(error) is GTransError else type(error)(message)
    return PassError(
        f"pass {p.name!r} failed with {type(error).__name__}: {error}\n"
        f"  The model and its graph are unchanged. Skip the pass: skip=[{p.name!r}]{note}"
    )


def _op_changes(before: Graph, after: Graph) -> dict[str, int]:
    def count(graph: Graph) -> Counter[str]:
        return Counter(target_name(n) for n in graph.nodes if n.op.startswith("call"))

    if before is after:
        return {}
    changes = count(after)
    changes.subtract(count(before))
    return {op: n for op, n in sorted(changes.items()) if n}
