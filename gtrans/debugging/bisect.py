"""Find the rewrites that break the gradient: first the pass, then the rewrite within it.

Every rewrite of a pipeline has a number (`gtrans.pipeline.Gate`), counted over all passes and
graphs of the model. A check performs some of them and compares the step with the untouched model.
A single culprit among n is found by halving in about log2(n) checks; several that break the
gradient only together by delta debugging (Zeller and Hildebrandt, Simplifying and isolating
failure-inducing input, 2002, the algorithm ddmin); several that each break it, one after another.

The model is captured once. A check then runs the passes on a copy of the captured graphs, and the
graphs on the recorded values of one step, which takes a fraction of capturing again: the forward
passes on the forward graphs as Dynamo made them, the joint passes on the joint graphs of what all
forward passes made. The result is confirmed by `gtrans.verification.compare` on the whole model.
Where the recorded graphs cannot tell, every check is a comparison.

Un-lowered graphs come first. Only where they are right and what a backend makes of them is wrong is
the backend to blame; then the halves of graphs that it takes are found in the same way.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import nn

from gtrans.backends.eager import Eager
from gtrans.capture import usable_backend
from gtrans.comparison import Loss
from gtrans.debugging.numbers import format_numbers
from gtrans.debugging.recording import Recording
from gtrans.errors import CaptureError, GTransError, OptionError, VerifyError
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.half import Backend, Half, Role, Runnable
from gtrans.ir.joint import JointGraph
from gtrans.ir.source import location
from gtrans.pipeline import WHOLE_LAYERS, Gate, Graph, Pipeline, Rewrite
from gtrans.plan.planner import Plan
from gtrans.verification import Verification, compare

T = TypeVar("T")

OnCheck = Callable[[int, bool], None]
"""Told after every check: how many rewrites it performed, and whether the gradient was wrong."""


@dataclass(frozen=True)
class Culprit:
    """Rewrites that break the gradient: a single one, or several that do so only together.

    Attributes:
        rewrites: the rewrites; without any one of them the others do no harm.
        where: the line of the user's model that each belongs to, "" where unknown.
    """

    rewrites: tuple[Rewrite, ...]
    where: tuple[str, ...]

    def __str__(self) -> str:
        named = [
            f"{r} ({w})" if w else str(r) for r, w in zip(self.rewrites, self.where, strict=True)
        ]
        return " together with ".join(named)


@dataclass(frozen=True)
class Bisection:
    """The result of `bisect`.

    Attributes:
        pipeline: the passes that were searched.
        rewrites: how many rewrites they perform.
        background: rewrites that do no harm by themselves but without which others come to nothing,
            performed in every check: what the plan does, which takes up the offers of passes.
        culprits: what breaks the gradient; empty where nothing does.
        complete: whether the gradient is right without the culprits. False if the search stopped at
            its limit, or if the gradient is wrong without any rewrite.
        checks: how many sets of rewrites were tried.
        recaptured: how many of them ran the whole model rather than its recorded graphs.
        seconds: how long the search took.
        verification: the comparison with all rewrites, or with the culprits alone if there are any.
        backend: the backend that breaks the gradient, "" where it is not one.
        halves: the halves it breaks, as "backward half of graph 0"; the culprits are then the
            rewrites without which it does not, none if it does so without any.
    """

    pipeline: Pipeline
    rewrites: int
    background: tuple[int, ...]
    culprits: tuple[Culprit, ...]
    complete: bool
    checks: int
    recaptured: int
    seconds: float
    verification: Verification
    backend: str = ""
    halves: tuple[str, ...] = ()

    @property
    def passes(self) -> list[str]:
        """The passes that the culprits belong to."""
        return list(dict.fromkeys(r.pass_name for c in self.culprits for r in c.rewrites))

    @property
    def numbers(self) -> str:
        """What shows the fault, as `--only-rewrites` takes it: culprits and background."""
        numbers = [r.number for c in self.culprits for r in c.rewrites]
        return format_numbers([*numbers, *self.background] if numbers else [])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for `--json`."""
        return {
            "ok": self.verification.ok,
            "pipeline": str(self.pipeline),
            "rewrites": self.rewrites,
            "passes": self.passes,
            "culprits": [
                [
                    {"number": r.number, "pass": r.pass_name, "site": r.site, "where": where}
                    for r, where in zip(c.rewrites, c.where, strict=True)
                ]
                for c in self.culprits
            ],
            "background": list(self.background),
            "only_rewrites": self.numbers,
            "complete": self.complete,
            "checks": self.checks,
            "recaptured": self.recaptured,
            "seconds": self.seconds,
            "backend": self.backend,
            "halves": list(self.halves),
        }


def bisect(
    model: nn.Module,
    inputs: Sequence[Any],
    keyword_inputs: dict[str, Any],
    pipeline: Pipeline,
    *,
    backend: str = "eager",
    loss: Loss | None = None,
    seed: int = 0,
    most: int = 5,
    on_check: OnCheck | None = None,
) -> Bisection:
    """Finds the rewrites of a pipeline that break the gradient of a model.

    Args:
        model: the model; it stays as it is.
        inputs: its positional inputs.
        keyword_inputs: its keyword inputs.
        pipeline: the passes to search.
        backend: what to lower with, if the un-lowered graphs are right.
        loss: as for `gtrans.verify`.
        seed: seed of the random state.
        most: stop after so many culprits; a pass that is wrong everywhere has many.
        on_check: called after every check.

    Raises:
        OptionError: `most` is less than one.
        ModelError: the model does not accept the inputs.
        GTransError: a pass failed on the model.
    """
    if most < 1:
        raise OptionError(f"most must be at least 1, got {most}")
    search = _Search(model, inputs, keyword_inputs, pipeline, loss, seed, on_check)
    return search.run(most, backend)


class _Search:
    """One bisection: the checks it made, and how it makes them."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        keyword_inputs: dict[str, Any],
        pipeline: Pipeline,
        loss: Loss | None,
        seed: int,
        on_check: OnCheck | None,
    ) -> None:
        self.model = model
        self.arguments = (inputs, keyword_inputs)
        self.pipeline = pipeline
        self.loss = loss
        self.seed = seed
        self.on_check = on_check
        self.dtypes: Sequence[torch.dtype | None] = (torch.float64, None)
        self.recording: Recording | None = None
        self.own_numbers: dict[type[Graph], list[int]] = {}
        self.background: tuple[int, ...] = ()
        self.known: dict[frozenset[int], bool] = {}
        self.checks = 0
        self.recaptured = 0

    def run(self, most: int, backend: str) -> Bisection:
        """Compares with all rewrites, searches if that differs, and confirms what it found."""
        start = time.perf_counter()
        gate = Gate()
        whole = self._compare(gate, backend)
        if whole.ok:
            return self._result((), True, whole, gate, start)
        self._narrow_dtypes(whole)
        if backend != "eager":
            plain = self._compare(gate)
            if plain.ok:
                return self._in_backend(backend, whole, gate, start)
            whole = plain
        self.recording = self._record(gate.seen)
        culprits, complete, final, verification = self._confirmed(gate, whole, most)
        if self.recording is not None and (verification.ok or not culprits):
            # What the recorded graphs show is not what the model shows: trust only the model.
            self.recording = None
            self.known.clear()
            culprits, complete, final, verification = self._confirmed(gate, whole, most)
        return self._result(
            self._named(culprits, (gate, final), verification), complete, verification, gate, start
        )

    def _confirmed(
        self, gate: Gate, whole: Verification, most: int
    ) -> tuple[list[tuple[int, ...]], bool, Gate, Verification]:
        culprits, complete = self._search(gate.seen, most)
        final = Gate({*self.background, *(n for c in culprits for n in c)})
        return culprits, complete, final, self._compare(final) if culprits else whole

    def _named(
        self, culprits: Sequence[tuple[int, ...]], gates: Sequence[Gate], found: Verification
    ) -> tuple[Culprit, ...]:
        performed = {r.number: r for gate in gates for r in gate.seen}
        where = _places(found)
        return tuple(
            Culprit(
                tuple(performed[n] for n in c),
                tuple(where.get(performed[n].site, "") for n in c),
            )
            for c in culprits
        )

    def _in_backend(self, name: str, whole: Verification, gate: Gate, start: float) -> Bisection:
        """The halves that a backend breaks, and the rewrites without which it does not."""
        lowering = usable_backend(name)
        training = [c.index for c in whole.explanation.captured if c.training]
        halves: list[tuple[int, Role]] = [
            (index, role) for index in training for role in ("forward", "backward")
        ]

        def breaks(some: Sequence[tuple[int, Role]]) -> bool:
            return not self._compare(Gate(), Partly(lowering, frozenset(some))).ok

        broken = minimal_failing(halves, breaks)
        partly = Partly(lowering, frozenset(broken))
        needed: tuple[int, ...] = ()
        if self._compare(Gate(()), partly).ok:
            numbers = [r.number for r in gate.seen]
            needed = minimal_failing(
                numbers, lambda some: not self._compare(Gate(set(some)), partly).ok
            )
        named = self._named([needed] if needed else [], (gate,), whole)
        texts = tuple(f"{role} half of graph {index}" for index, role in broken)
        found = self._result(named, True, whole, gate, start)
        return replace(found, backend=name, halves=texts)

    def _search(self, rewrites: Sequence[Rewrite], most: int) -> tuple[list[tuple[int, ...]], bool]:
        """Culprits as tuples of numbers, and whether the rest does no harm."""
        self.background = ()
        if self.fails(()):
            return [], False
        planned = tuple(r.number for r in rewrites if r.pass_name == Plan.name)
        if not self.fails(planned):
            self.background = planned
        found: list[tuple[int, ...]] = []
        left = [r for r in rewrites if r.number not in self.background]
        while self.fails([r.number for r in left]):
            if len(found) == most:
                return found, False
            culprit = self._culprit(left)
            found.append(culprit)
            left = [r for r in left if r.number not in culprit]
        return found, True

    def _culprit(self, rewrites: Sequence[Rewrite]) -> tuple[int, ...]:
        """One minimal set: the passes it takes first, then the rewrites within them."""
        groups = [
            tuple(r.number for r in group)
            for _, group in groupby(
                sorted(rewrites, key=lambda r: (r.pass_name, r.number)), lambda r: r.pass_name
            )
        ]
        passes = minimal_failing(groups, lambda some: self.fails([n for g in some for n in g]))
        return minimal_failing(sorted(n for g in passes for n in g), self.fails)

    def fails(self, numbers: Collection[int]) -> bool:
        """Whether the gradient is wrong with these rewrites and the background; remembered."""
        key = frozenset((*numbers, *self.background))
        if key not in self.known:
            self.known[key] = self._check(key)
        return self.known[key]

    def _check(self, numbers: frozenset[int]) -> bool:
        try:
            if self.recording is not None:
                self.checks += 1
                wrong = not all(
                    self.recording.agrees(self.pipeline.on(kind), Gate(_renumbered(numbers, own)))
                    for kind, own in self.own_numbers.items()
                    if own
                )
            else:
                wrong = not self._compare(Gate(numbers)).ok
        except VerifyError:
            wrong = True  # what they make cannot be run
        except GTransError:
            # A pass cannot run with only these rewrites. That says nothing about the gradient.
            wrong = False
        if self.on_check is not None:
            self.on_check(len(numbers), wrong)
        return wrong

    def _compare(self, gate: Gate, backend: str | Backend = "eager") -> Verification:
        self.checks += 1
        self.recaptured += 1
        inputs, keywords = self.arguments
        return compare(
            self.model,
            inputs,
            keywords,
            self.pipeline,
            backend=backend,
            loss=self.loss,
            seed=self.seed,
            gate=gate,
            dtypes=self.dtypes,
            until_wrong=True,
        )

    def _narrow_dtypes(self, whole: Verification) -> None:
        """Further checks need only one dtype that shows the fault."""
        wrong = {c.dtype for c in whole.comparisons if not c.ok}
        self.dtypes = (torch.float64,) if torch.float64 in wrong else (None,)

    def _record(self, rewrites: Sequence[Rewrite]) -> Recording | None:
        """The recorded graphs; None where they cannot be run by themselves."""
        names = {p.name for p in self.pipeline.on(ForwardGraph).passes} | set(WHOLE_LAYERS)
        self.own_numbers = {
            ForwardGraph: [r.number for r in rewrites if r.pass_name in names],
            JointGraph: [r.number for r in rewrites if r.pass_name not in names],
        }
        inputs, keywords = self.arguments
        try:
            return Recording(
                self.model,
                inputs,
                keywords,
                dtype=self.dtypes[0],
                loss=self.loss,
                seed=self.seed,
                forward=self.pipeline,
            )
        except CaptureError:
            return None

    def _result(
        self,
        culprits: tuple[Culprit, ...],
        complete: bool,
        verification: Verification,
        gate: Gate,
        start: float,
    ) -> Bisection:
        return Bisection(
            verification.explanation.pipeline,
            len(gate.seen),
            self.background,
            culprits,
            complete,
            self.checks,
            self.recaptured,
            time.perf_counter() - start,
            verification,
        )


@dataclass
class Partly:
    """A lowering of some halves by a backend, and of the others by `eager`.

    Attributes:
        backend: what lowers the chosen halves.
        halves: number of the graph and role of each.
        name: of the lowering.
        overwrites_saved: whether halves may overwrite saved values; so they may if one does.
        slack: share of a memory budget to leave free.
    """

    backend: Backend
    halves: frozenset[tuple[int, Role]]
    name: str = "partly"
    overwrites_saved: bool = True
    slack: float = 0.0

    def unavailable(self) -> str | None:
        """As the backend."""
        return self.backend.unavailable()

    def prepare(self, half: Half) -> Half:
        """As whoever lowers this half."""
        return self._lowering(half).prepare(half)

    def compile(self, half: Half) -> Runnable:
        """As whoever lowers this half."""
        return self._lowering(half).compile(half)

    def _lowering(self, half: Half) -> Backend:
        return self.backend if (half.graph, half.role) in self.halves else Eager()


def _renumbered(numbers: Collection[int], own: Sequence[int]) -> set[int]:
    """Numbers of rewrites as they are counted where only these are asked for."""
    return {i for i, number in enumerate(own, 1) if number in numbers}


def minimal_failing(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> tuple[T, ...]:
    """A subset that fails, and of which no single element can be left out.

    Args:
        items: something that fails as a whole.
        fails: whether a subset does; it should remember its answers.
    """
    suspects = list(items)
    while len(suspects) > 1:  # right if a single element is to blame, and cheap
        half = suspects[: len(suspects) // 2]
        suspects = half if fails(half) else suspects[len(half) :]
    if fails(suspects):
        return tuple(suspects)
    return _ddmin(items, fails)


def _ddmin(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> tuple[T, ...]:
    suspects, parts = list(items), 2
    while len(suspects) > 1:
        size = -(-len(suspects) // parts)
        chunks = [suspects[i : i + size] for i in range(0, len(suspects), size)]
        rests = [[s for c in chunks if c is not chunk for s in c] for chunk in chunks]
        smaller = next((c for c in chunks if fails(c)), None)
        if smaller is not None:
            suspects, parts = smaller, 2
        elif (rest := next((r for r in rests if fails(r)), None)) is not None:
            suspects, parts = rest, max(2, len(chunks) - 1)
        elif parts < len(suspects):
            parts = min(2 * parts, len(suspects))
        else:
            break
    return tuple(suspects)


def _places(verification: Verification) -> dict[str, str]:
    """The user's line behind each node name of the captured graphs."""
    places: dict[str, str] = {}
    for captured in verification.explanation.captured:
        for graph in (captured.rewritten, captured.original):
            for node in graph.nodes if graph is not None else []:
                place = location(node)
                if place.file:
                    module = f"{place.module}: " if place.module else ""
                    places[node.name] = f"{module}{place}"
    return places
