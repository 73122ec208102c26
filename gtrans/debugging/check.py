"""What goes wrong in a case, and which pass is to blame."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gtrans.comparison import Comparison
from gtrans.contract import Contract, Exact, compose_all
from gtrans.core import Pass
from gtrans.debugging.case import Case, Failure
from gtrans.debugging.running import Lowerings, Results, StepGraph, compare, run
from gtrans.errors import GTransError
from gtrans.ir.joint import JointGraph
from gtrans.pipeline import Gate, Graph, Pipeline, Step
from gtrans.registry import load_backend


@dataclass(frozen=True)
class Outcome:
    """What one run of a pipeline on a case gave.

    Attributes:
        comparisons: every tensor of the rewritten graph against the untouched one; empty if a pass
            or the rewritten graph raised.
        error: what was raised, if anything.
        raised_by: the pass that raised, "" where it was the rewritten graph.
    """

    comparisons: Sequence[Comparison] = ()
    error: Exception | None = None
    raised_by: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing was raised and everything is within the contract."""
        return self.error is None and all(c.ok for c in self.comparisons)


class Checker:
    """Runs pipelines on one case and compares what comes out with the untouched graph.

    The untouched graph is run once.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.expected: Results = run(case.graph, case.values, case.seed)

    def outcome(
        self, pipeline: Pipeline, lowerings: Lowerings | None = None, gate: Gate | None = None
    ) -> Outcome:
        """What a pipeline does to the case; an error is part of the outcome.

        Args:
            pipeline: the passes.
            lowerings: backends for the halves.
            gate: which rewrites to perform, by default those of the case.
        """
        case = self.case
        failed: list[str] = []

        def on_failure(step: Step, graph: Graph, passes: Pipeline) -> str:
            failed.append(step.name)
            return ""

        gate = gate or Gate(case.allowed)
        try:
            graph, steps = pipeline.on(type(case.graph)).run(
                case.graph, gate=gate, on_failure=on_failure
            )
        except GTransError as error:
            cause = error.__cause__
            raised = cause if isinstance(cause, Exception) else error
            return Outcome(error=raised, raised_by=failed[-1] if failed else "")
        return self.compared(graph, contract_of(steps), lowerings)

    def compared(
        self, graph: StepGraph, contract: Contract, lowerings: Lowerings | None = None
    ) -> Outcome:
        """How a rewritten graph compares with the untouched one."""
        try:
            found = run(graph, self.case.values, self.case.seed, lowerings)
            return Outcome(compare(self.expected, found, contract, self.case.terms))
        except Exception as error:  # whatever the operators of a wrong graph raise
            return Outcome(error=error)

    def failure(self) -> Failure | None:
        """What goes wrong, and which pass is to blame: the one of the case's own failure if it has
        one, else the first after which it is wrong; the backend where no pass is.
        """
        case = self.case
        lowerings = lowered(case)
        outcome = self.outcome(case.pipeline, lowerings)
        if outcome.ok:
            return None
        if outcome.raised_by:
            return described(outcome, (outcome.raised_by,))
        if case.failure is not None:
            suspects = case.failure.passes
            needed = tuple(p for p in suspects if self.outcome(_without(case, p), lowerings).ok)
            return described(outcome, needed) if needed == suspects else None
        if lowerings and self.outcome(case.pipeline).ok:
            return described(outcome, ())
        return described(outcome, self._first_wrong())

    def _first_wrong(self) -> tuple[str, ...]:
        passes: list[Pass[Any]] = []
        for p in self.case.pipeline.on(type(self.case.graph)).passes:
            passes.append(p)
            if not self.outcome(Pipeline(tuple(passes))).ok:
                return (p.name,)
        return ()


def failure_of(case: Case) -> Failure | None:
    """What goes wrong in a case; None if nothing does.

    Raises:
        Exception: the untouched graph cannot be run on the values.
    """
    return Checker(case).failure()


def described(outcome: Outcome, passes: tuple[str, ...]) -> Failure:
    """The failure that an outcome shows."""
    if outcome.error is not None:
        kind = type(outcome.error).__name__
        first = (str(outcome.error).splitlines() or [""])[0]
        by = "" if outcome.raised_by else "what it made "
        return Failure("raises", passes, error=kind, text=f"{by}raises {kind}: {first}")
    wrong = [c for c in outcome.comparisons if not c.ok]
    worst = max(wrong, key=lambda c: (c.relative != c.relative, c.relative))
    where = tuple(sorted({c.kind for c in wrong}))
    if worst.relative != worst.relative:
        return Failure("nan", passes, where, text=f"{worst.kind} {worst.name} is not finite")
    text = f"{worst.kind} {worst.name} differs by {worst.relative:.1e}, allowed {worst.bound:.1e}"
    return Failure("differs", passes, where, text=text)


def lowered(case: Case) -> Lowerings | None:
    """The backend of a case for both halves; None where they run operator by operator."""
    if case.backend == "eager" or not isinstance(case.graph, JointGraph):
        return None
    backend = load_backend(case.backend)
    return {"forward": backend, "backward": backend}


def contract_of(steps: Sequence[Step]) -> Contract:
    """What the passes that rewrote something promise together."""
    return compose_all([Exact(), *(s.contract for s in steps if s.stats.rewritten)])


def _without(case: Case, name: str) -> Pipeline:
    return Pipeline(tuple(p for p in case.pipeline.passes if p.name != name))
