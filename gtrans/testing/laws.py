"""The laws that every pass must keep, one function each, and `check_pass`, which runs them.

What a pass must keep follows from its knob and its contract; no law needs a line by its author:

    law                               holds for
    reports_what_it_does              every pass
    running_twice_changes_nothing     every pass
    graph_does_not_depend_on_values   every pass
    saved_bytes_are_as_predicted      every pass
    any_cut_gives_the_same            every pass that works on joint graphs
    forward_is_unchanged              every knob but operator and parameters
    saves_no_more                     knob residual
    a_schedule_is_a_permutation       knob schedule
    (of `gtrans.testing.structure`)   knob parameters, instead of all others
    homogeneous_in_the_cotangent      passes with `homogeneous = True` (the default)
    linear_in_the_cotangent           passes with `linear = True` (the default)
    special_values_pass_alike         passes that are exact to the bit
    gradient_keeps_the_contract       every pass, by its contract:
        exact        every element, in float64 and in the working type; if bitwise, every bit
        close        the relative error of every gradient
        unbiased     a z-test over seeds on fixed probes; a draw without variance is refused
        iterative    exact where it claims to be, finite elsewhere
        the others   finite

The reference is the same model through the same backend without the pass, and plain autograd.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from gtrans.contract import Close, Contract, Exact, Iterative, Unbiased
from gtrans.core import Knob, Pass, Stats
from gtrans.errors import VerifyError
from gtrans.ir.program import Program
from gtrans.pipeline import Gate, Graph, Pipeline, Step
from gtrans.plan.planner import Plan
from gtrans.testing.compare import (
    first_difference,
    flat,
    largest,
    pairs,
    require_bitwise,
    require_near,
    rounding_bound,
)
from gtrans.testing.measure import (
    Cotangents,
    Record,
    Runner,
    other_values,
    with_special_values,
)
from gtrans.testing.placement import OFFERED, RandomPlacement, graph_text
from gtrans.testing.structure import check_structure

_PLAIN = Pipeline((Plan(recompute="none"),))
_FORWARD_KNOBS = frozenset({Knob.RESIDUAL, Knob.RULE, Knob.WIRE, Knob.SCHEDULE})
_DRAWS = 300
_PROBES = 8
# Largest |z| of eight probes under the null hypothesis, once in about 100,000 tests.
_LARGEST_Z = 4.8
_CUTS = 1


@dataclass(frozen=True)
class Pair:
    """One step without the pass and one with it, in one dtype."""

    before: Record
    after: Record


@dataclass
class Case:
    """One pass (or several) on one model, with the runs that the laws share.

    Args:
        pipeline: the passes to check.
        model: the model; it stays as it is.
        inputs: its positional inputs.
        seed: of the random state during steps.
    """

    pipeline: Pipeline
    model: nn.Module
    inputs: Sequence[Any]
    seed: int = 0
    log: "Log" = field(init=False)

    def __post_init__(self) -> None:
        # Dynamo reuses what it compiled for another model with the same code; not here.
        torch.compiler.reset()
        self.log = Log(self.pipeline)

    @cached_property
    def candidate(self) -> Runner:
        """The model through the passes, in its own dtype."""
        return Runner(self.model, self.inputs, self.pipeline, observers=(self.log.observe,))

    @cached_property
    def working(self) -> Pair:
        """The steps in the model's own dtype."""
        before = Runner(self.model, self.inputs, self.reference).step(self.seed)
        return Pair(before, self.candidate.step(self.seed))

    @property
    def reference(self) -> Pipeline:
        """The step to compare with: the same function, and nothing rewritten."""
        return Pipeline((*self.pipeline.changing.passes, *_PLAIN.passes))

    @cached_property
    def wide_reference(self) -> Runner:
        """Plain autograd in float64, of the function that is trained."""
        changed = self.reference if self.pipeline.changing.passes else None
        return Runner(self.model, self.inputs, changed, torch.float64)

    @cached_property
    def wide_candidate(self) -> Runner:
        """The model through the passes in float64."""
        return Runner(self.model, self.inputs, self.pipeline, torch.float64)

    @property
    def contract(self) -> Contract:
        """The contract of the passes that rewrote something in this model."""
        _ = self.working
        return self.candidate.contract

    @property
    def knobs(self) -> set[Knob]:
        """What the passes edit."""
        return {p.knob for p in self.pipeline.passes}

    def followed_by(self, *more: Pass[Any]) -> Pipeline:
        """The passes under test, less their plan, and then others; last of all, schedules."""
        kept = [p for p in self.pipeline.passes if not isinstance(p, Plan)]
        last = [p for p in kept if p.knob is Knob.SCHEDULE]
        return Pipeline((*(p for p in kept if p not in last), *more, *last))


@dataclass(frozen=True)
class Entry:
    """What one pass did to one graph, and what it does when run again or not permitted."""

    name: str
    stats: Stats
    before: str
    after: str
    nodes_before: str
    nodes_after: str
    again: str
    held_back: str
    held_back_rewritten: int
    asked: int
    plans: bool


@dataclass
class Log:
    """Watches a compilation and runs each pass once more on what it left."""

    pipeline: Pipeline
    entries: list[Entry] = field(default_factory=list)

    def observe(self, step: Step, before: Graph, after: Graph) -> None:
        """Called by the pipeline after each pass."""
        found = [p for p in self.pipeline.passes if str(p) == step.text]
        if not found:
            return  # the plan that the compiler added
        only = Pipeline((found[0],))
        again, _ = only.run(after)
        asked = Gate()
        only.run(before, gate=asked)
        held, steps = only.run(before, gate=Gate(()))
        self.entries.append(
            Entry(
                step.name,
                step.stats,
                graph_text(before),
                graph_text(after),
                _sorted_nodes(before),
                _sorted_nodes(after),
                graph_text(again),
                graph_text(held),
                steps[0].stats.rewritten,
                len(asked.seen),
                isinstance(found[0], Plan),
            )
        )


# ---------------------------------------------------------------------------------------- laws


def reports_what_it_does(case: Case) -> None:
    """The counts of `Stats` fit the graph, and nothing is rewritten that was not permitted.

    Raises:
        VerifyError: they do not.
    """
    _ = case.working
    for entry in case.log.entries:
        where, stats = f"pass {entry.name!r}", entry.stats
        if stats.rewritten + stats.skipped.total() > stats.matched:
            raise VerifyError(f"{where} reports more rewritten and skipped than matched: {stats}")
        # A plan writes what it decided into the graph, also if that is to change nothing.
        if stats.rewritten == 0 and entry.after != entry.before and not entry.plans:
            raise VerifyError(
                f"{where} changed the graph but reports no rewrite:\n"
                + first_difference(entry.before, entry.after)
            )
        if stats.rewritten and not entry.asked:
            raise VerifyError(
                f"{where} rewrote {stats.rewritten} places without asking for permission, so "
                "bisection cannot find a wrong one; call permitted(site) before each rewrite"
            )
        changed = entry.held_back != entry.before and not entry.plans
        if entry.held_back_rewritten or changed:
            raise VerifyError(
                f"{where} rewrites although permission was refused:\n"
                + first_difference(entry.before, entry.held_back)
            )


def running_twice_changes_nothing(case: Case) -> None:
    """P(P(graph)) = P(graph).

    Raises:
        VerifyError: the second run changed the graph.
    """
    _ = case.working
    for entry in case.log.entries:
        if entry.again != entry.after:
            raise VerifyError(
                f"pass {entry.name!r} is not idempotent; running it again changes the graph:\n"
                + first_difference(entry.after, entry.again)
            )


def graph_does_not_depend_on_values(case: Case) -> None:
    """Other input values of the same shapes give the same graph: no data was captured.

    Raises:
        VerifyError: the graph is another one.
    """
    _ = case.working
    log = Log(case.pipeline)
    Runner(case.model, other_values(case.inputs), case.pipeline, observers=(log.observe,)).step(
        case.seed
    )
    for first, second in zip(case.log.entries, log.entries, strict=True):
        if first.after != second.after:
            raise VerifyError(
                f"pass {first.name!r} makes another graph for other input values:\n"
                + first_difference(first.after, second.after)
            )


def forward_is_unchanged(case: Case) -> None:
    """Outputs and buffers are bitwise those without the pass; reassociated for knob operator.

    That holds for models that draw as well: passes have random numbers of their own.

    Raises:
        VerifyError: an element differs.
    """
    pair = case.working
    for kind, before, after in (
        ("", pair.before.outputs, pair.after.outputs),
        ("buffer ", pair.before.buffers, pair.after.buffers),
    ):
        if case.knobs <= _FORWARD_KNOBS:
            require_bitwise(before, after, f"{case.pipeline}: {kind}")
        else:
            require_near(
                before, after, f"{case.pipeline}: {kind}", rounding_bound(case.model, case.inputs)
            )


def saved_bytes_are_as_predicted(case: Case) -> None:
    """The bytes autograd is given to keep are the bytes that the report states.

    Raises:
        VerifyError: they are not.
    """
    _require_predicted(case.working.after, case.candidate, str(case.pipeline))


def saves_no_more(case: Case) -> None:
    """A residual pass never makes the backward keep more, with or without recomputation.

    Raises:
        VerifyError: it does.
    """
    if case.knobs != {Knob.RESIDUAL}:
        return
    plans = [p for p in case.pipeline.passes if isinstance(p, Plan)] or [
        Plan(),
        Plan(recompute="none"),
    ]
    others = [p for p in case.pipeline.passes if not isinstance(p, Plan)]
    for plan in plans:
        reference = Pipeline((plan,) if others else (Plan(recompute="none"),))
        before = Runner(case.model, case.inputs, reference).step(case.seed).saved_bytes
        after = Runner(case.model, case.inputs, case.followed_by(plan)).step(case.seed).saved_bytes
        if after > before:
            raise VerifyError(
                f"{case.pipeline}: keeps {after} bytes for the backward under {plan}, "
                f"{before} without the pass"
            )


def any_cut_gives_the_same(case: Case) -> None:
    """Saving or rebuilding other values changes no bit of any output, buffer or gradient.

    Where a pass offers values that are not the same to the bit, which of them are taken depends on
    the cut, and gradients of an exact pass then agree up to rounding.

    Raises:
        VerifyError: a bit differs.
    """
    expected = case.working.after
    offered = any(f"\n{OFFERED} " in e.after for e in case.log.entries)
    for seed in range(case.seed, case.seed + _CUTS):
        pipeline = case.followed_by(RandomPlacement(seed=seed), Plan())
        runner = Runner(case.model, case.inputs, pipeline)
        found = runner.step(case.seed)
        require_bitwise(expected.outputs, found.outputs, f"{pipeline}: ")
        require_bitwise(expected.buffers, found.buffers, f"{pipeline}: buffer ")
        where = f"{pipeline}: gradient of "
        if not offered or case.pipeline.contract.of_gradient == Exact(bitwise=True):
            require_bitwise(expected.gradients, found.gradients, where)
        elif isinstance(case.pipeline.contract.of_gradient, Exact):
            require_near(
                expected.gradients, found.gradients, where, rounding_bound(case.model, case.inputs)
            )
        _require_predicted(found, runner, str(pipeline))


def linear_in_the_cotangent(case: Case) -> None:
    """bwd(2 u - 3 v) = 2 bwd(u) - 3 bwd(v), for passes that do not declare otherwise.

    Raises:
        VerifyError: it is not.
    """
    if not all(p.linear for p in case.pipeline.passes):
        return
    runner = case.wide_candidate
    u = runner.step(case.seed, Cotangents(((1, 1.0),))).gradients
    v = runner.step(case.seed, Cotangents(((2, 1.0),))).gradients
    both = runner.step(case.seed, Cotangents(((1, 2.0), (2, -3.0)))).gradients
    expected = {}
    for name, value in both.items():
        a, b = u[name], v[name]
        expected[name] = None if a is None or b is None else 2 * a - 3 * b
        if expected[name] is None and value is not None:
            raise VerifyError(f"{case.pipeline}: gradient of {name} comes and goes")
    require_near(
        expected,
        both,
        f"{case.pipeline}: not linear in the cotangent (declare linear = False if that is meant): "
        "gradient of ",
        # Three gradients, each within the admitted error of a linear map.
        6 * contract.rtol if isinstance(contract := case.contract.of_gradient, Close) else 1e-9,
    )


def homogeneous_in_the_cotangent(case: Case) -> None:
    """bwd(4 u) = 4 bwd(u), also for rules that are not linear.

    Raises:
        VerifyError: it is not.
    """
    passes = case.pipeline.passes
    if all(p.linear for p in passes) or not all(p.homogeneous for p in passes):
        return  # linear ones are homogeneous anyway
    runner = case.wide_candidate
    one = runner.step(case.seed, Cotangents(((1, 1.0),))).gradients
    four = runner.step(case.seed, Cotangents(((1, 4.0),))).gradients
    expected = {name: None if value is None else 4 * value for name, value in one.items()}
    where = f"{case.pipeline}: not homogeneous in the cotangent: gradient of "
    require_near(expected, four, where, 1e-9)


def a_schedule_is_a_permutation(case: Case) -> None:
    """A schedule pass keeps every node as it is, and with it every value.

    Raises:
        VerifyError: a node came, went or reads something else.
    """
    _ = case.working
    for p, entry in ((p, e) for p in case.pipeline.passes for e in case.log.entries):
        if p.knob is not Knob.SCHEDULE or p.name != entry.name:
            continue
        if entry.nodes_before != entry.nodes_after:
            raise VerifyError(
                f"pass {p.name!r} edits more than the order:\n"
                + first_difference(entry.nodes_before, entry.nodes_after)
            )


def _sorted_nodes(graph: Graph) -> str:
    """Every node by name, whatever the order."""
    return "\n".join(sorted(f"{n.name} = {n.target} {n.args} {n.kwargs}" for n in graph.nodes))


def gradient_keeps_the_contract(case: Case) -> None:
    """Gradients are what the contract of the passes promises.

    Raises:
        VerifyError: they are not.
    """
    match case.contract.of_gradient:
        case Exact(bitwise=bitwise):
            _check_exact(case, bitwise)
        case Close(rtol=rtol):
            _check_close(case, rtol)
        case Unbiased():
            _check_unbiased(case)
        case Iterative(iterations=done, exact_at=needed) if 0 < needed <= done:
            _check_exact(case, False)
        case _:
            _require_finite(case.working, str(case.pipeline))


def special_values_pass_alike(case: Case) -> None:
    """NaN, infinities, zeros and subnormals in the inputs give the same bits without the pass.

    Raises:
        VerifyError: a bit differs.
    """
    if case.contract != Exact(bitwise=True) or not case.knobs <= _FORWARD_KNOBS:
        return
    inputs = with_special_values(case.inputs)
    before = Runner(case.model, inputs, _PLAIN).step(case.seed)
    after = Runner(case.model, inputs, case.pipeline).step(case.seed)
    where = f"{case.pipeline}: with NaN and infinities among the inputs, "
    require_bitwise(before.outputs, after.outputs, where)
    require_bitwise(before.gradients, after.gradients, f"{where}gradient of ")


LAWS: tuple[Callable[[Case], None], ...] = (
    forward_is_unchanged,
    gradient_keeps_the_contract,
    saved_bytes_are_as_predicted,
    reports_what_it_does,
    running_twice_changes_nothing,
    saves_no_more,
    any_cut_gives_the_same,
    linear_in_the_cotangent,
    homogeneous_in_the_cotangent,
    a_schedule_is_a_permutation,
    graph_does_not_depend_on_values,
    special_values_pass_alike,
)


def check_pass(
    passes: "str | Pass[Any] | Pipeline",
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    seed: int = 0,
    laws: Sequence[Callable[[Case], None]] = LAWS,
) -> int:
    """Checks every law that holds for the knobs and contracts of some passes on one model.

    Args:
        passes: a pass, a pipeline, or pipeline text.
        model: the model; it stays as it is.
        inputs: its positional inputs.
        seed: of the random state during steps.
        laws: the laws to check; all by default.

    Returns:
        How many places the passes rewrote, so that a test can refuse to have tested nothing.

    Raises:
        VerifyError: a law is broken; the message names the law, the passes and the tensor.
        GTransError: a pass failed.
    """
    pipeline = as_pipeline(passes)
    if pipeline.on(Program).passes:
        return check_structure(pipeline, model, inputs, seed)
    case = Case(pipeline, model, inputs, seed)
    for law in laws:
        try:
            law(case)
        except VerifyError as error:
            raise VerifyError(f"law {law.__name__!r} is broken. {error}") from error
    return case.candidate.rewritten


def as_pipeline(passes: "str | Pass[Any] | Pipeline") -> Pipeline:
    """A pipeline from whatever `check_pass` accepts.

    Raises:
        OptionError: the text names an unknown pass or option.
    """
    if isinstance(passes, str):
        return Pipeline.parse(passes)
    return passes if isinstance(passes, Pipeline) else Pipeline((passes,))


# ----------------------------------------------------------------------------------- contracts


def _check_exact(case: Case, bitwise: bool) -> None:
    pair = case.working
    if bitwise:
        where = f"{case.pipeline}: not bitwise the gradient of "
        require_bitwise(pair.before.gradients, pair.after.gradients, where)
    where = f"{case.pipeline}: gradient of "
    require_near(
        pair.before.gradients, pair.after.gradients, where, rounding_bound(case.model, case.inputs)
    )
    expected = case.wide_reference.step(case.seed)
    found = case.wide_candidate.step(case.seed)
    require_near(expected.gradients, found.gradients, f"{where[:-4]} in float64 of ", 1e-9)
    require_near(expected.outputs, found.outputs, f"{case.pipeline}: in float64, ", 1e-9)


def _check_close(case: Case, rtol: float) -> None:
    expected = case.wide_reference.step(case.seed).gradients
    found = case.wide_candidate.step(case.seed).gradients
    for name, a, b in pairs(expected, found, f"{case.pipeline}: gradient of "):
        error = float((a - b).norm()) / max(float(a.norm()), 1e-12 * largest(expected))
        if not error <= rtol:
            raise VerifyError(
                f"{case.pipeline}: gradient of {name} is off by {error:.2e} (relative norm); "
                f"its contract admits {rtol:g}"
            )


def _check_unbiased(case: Case) -> None:
    differences = []
    probes: list[torch.Tensor] = []
    for seed in range(_DRAWS):
        truth = flat(case.wide_reference.step(seed).gradients)
        drawn = flat(case.wide_candidate.step(seed).gradients)
        if not probes:
            generator = torch.Generator().manual_seed(0)
            probes = [
                torch.randn(truth.shape, generator=generator, dtype=torch.float64)
                for _ in range(_PROBES)
            ]
        differences.append(torch.stack([(drawn - truth) @ v for v in probes]))
    samples = torch.stack(differences)
    if not samples.isfinite().all():
        raise VerifyError(f"{case.pipeline}: a drawn gradient is not finite")
    deviation, mean = samples.std(0), samples.mean(0)
    scale = largest(case.wide_reference.step(0).gradients)
    if float(deviation.max()) <= 1e-12 * scale:
        raise VerifyError(
            f"{case.pipeline}: claims to be unbiased over random draws, but {_DRAWS} seeds gave "
            "the same gradient; declare it exact or close"
        )
    z = math.sqrt(_DRAWS) * mean / deviation.clamp_min(1e-12 * scale)
    if float(z.abs().max()) > _LARGEST_Z:
        raise VerifyError(
            f"{case.pipeline}: the mean of {_DRAWS} draws is {float(z.abs().max()):.1f} standard "
            f"errors away from the gradient; chance allows {_LARGEST_Z}"
        )


# --------------------------------------------------------------------------------- comparisons


def _require_predicted(found: Record, runner: Runner, where: str) -> None:
    predicted = sum(c.saved_bytes for c in runner.captured if c.training)
    if found.saved_bytes != predicted:
        raise VerifyError(
            f"{where}: the report says {predicted} bytes are kept for the backward, the forward "
            f"handed over {found.saved_bytes}"
        )


def _require_finite(pair: Pair, where: str) -> None:
    for name, a, b in pairs(pair.before.gradients, pair.after.gradients, where):
        if bool(a.isfinite().all()) and not bool(b.isfinite().all()):
            raise VerifyError(f"{where}: the gradient of {name} is not finite")
