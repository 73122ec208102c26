"""Find the rewrites that break the gradient: first the pass, then the rewrite within it.

Every rewrite of a pipeline has a number (`gtrans.pipeline.Gate`), counted over all passes and
graphs of the model. A check performs some of them and compares the step with the untouched model.
A single culprit among n is found by halving in about log2(n) checks; several that break the
gradient only together by delta debugging (Zeller and Hildebrandt, Simplifying and isolating
failure-inducing input, 2002, the algorithm ddmin); several that each break it, one after another.

The model is captured once. A check then runs the joint passes on a copy of the captured graphs and
both halves on the recorded values of one step, which takes a fraction of capturing again. The
result is confirmed by `gtrans.verification.compare` on the whole model. Where the recorded graphs
cannot tell (a pass worked on the forward graph, so that capture differs), every check is a
comparison.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import nn

from gtrans.errors import GTransError, OptionError
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.source import location
from gtrans.pipeline import Gate, Pipeline, Rewrite
from gtrans.plan.planner import Plan
from gtrans.replay import Recording
from gtrans.verification import Loss, Verification, compare

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
        }


def bisect(
    model: nn.Module,
    inputs: Sequence[Any],
    keyword_inputs: dict[str, Any],
    pipeline: Pipeline,
    *,
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
    return search.run(most)


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
        self.background: tuple[int, ...] = ()
        self.known: dict[frozenset[int], bool] = {}
        self.checks = 0
        self.recaptured = 0

    def run(self, most: int) -> Bisection:
        """Compares with all rewrites, searches if that differs, and confirms what it found."""
        start = time.perf_counter()
        gate = Gate()
        whole = self._compare(gate)
        if whole.ok:
            return self._result((), True, whole, len(gate.seen), start)
        self._narrow_dtypes(whole)
        self.recording = self._record(gate.seen)
        culprits, complete = self._search(gate.seen, most)
        final = Gate({*self.background, *(n for c in culprits for n in c)})
        verification = self._compare(final) if culprits else whole
        if self.recording is not None and (verification.ok or not culprits):
            # What the recorded graphs show is not what the model shows: trust only the model.
            self.recording = None
            self.known.clear()
            culprits, complete = self._search(gate.seen, most)
            final = Gate({*self.background, *(n for c in culprits for n in c)})
            verification = self._compare(final) if culprits else whole
        performed = {r.number: r for r in (*gate.seen, *final.seen)}
        where = _places(verification)
        named = tuple(
            Culprit(
                tuple(performed[n] for n in c),
                tuple(where.get(performed[n].site, "") for n in c),
            )
            for c in culprits
        )
        return self._result(named, complete, verification, len(gate.seen), start)

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
                wrong = not self.recording.agrees(self.pipeline, Gate(numbers))
            else:
                wrong = not self._compare(Gate(numbers)).ok
        except GTransError:
            # A pass cannot run with only these rewrites. That says nothing about the gradient.
            wrong = False
        if self.on_check is not None:
            self.on_check(len(numbers), wrong)
        return wrong

    def _compare(self, gate: Gate) -> Verification:
        self.checks += 1
        self.recaptured += 1
        inputs, keywords = self.arguments
        return compare(
            self.model,
            inputs,
            keywords,
            self.pipeline,
            loss=self.loss,
            seed=self.seed,
            gate=gate,
            dtypes=self.dtypes,
        )

    def _narrow_dtypes(self, whole: Verification) -> None:
        """Further checks need only one dtype that shows the fault."""
        wrong = {c.dtype for c in whole.comparisons if not c.ok}
        self.dtypes = (torch.float64,) if torch.float64 in wrong else (None,)

    def _record(self, rewrites: Sequence[Rewrite]) -> Recording | None:
        """The recorded graphs, if no pass has rewritten the forward graph they come from."""
        names = {p.name for p in self.pipeline.passes if p.works_on is ForwardGraph}
        if any(r.pass_name in names for r in rewrites):
            return None
        inputs, keywords = self.arguments
        return Recording(
            self.model, inputs, keywords, dtype=self.dtypes[0], loss=self.loss, seed=self.seed
        )

    def _result(
        self,
        culprits: tuple[Culprit, ...],
        complete: bool,
        verification: Verification,
        rewrites: int,
        start: float,
    ) -> Bisection:
        return Bisection(
            verification.explanation.pipeline,
            rewrites,
            self.background,
            culprits,
            complete,
            self.checks,
            self.recaptured,
            time.perf_counter() - start,
            verification,
        )


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


def format_numbers(numbers: Collection[int]) -> str:
    """Numbers with runs folded: ``1-16,18``; the inverse of `parse_numbers`."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_numbers(text: str) -> frozenset[int]:
    """Reads ``1-16,18``; the empty text is the empty set.

    Raises:
        OptionError: the text is no list of positive numbers and ranges.
    """
    found: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise OptionError(
                f"cannot read rewrite numbers {text!r} at {part!r}; write '18' or '1-16,18'"
            )
        low, high = int(first), int(last or first)
        if not 1 <= low <= high:
            raise OptionError(
                f"rewrite numbers start at 1 and ranges go upwards; {part!r} in {text!r} does not"
            )
        found.update(range(low, high + 1))
    return frozenset(found)


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
