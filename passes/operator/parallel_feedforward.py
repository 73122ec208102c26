"""Find the states of a recurrence or of a stack by sweeps over all steps, not step by step.

    for t = 1 .. T: h[t] = f(h[t-1], x[t])      -->      repeat: H = sweep(f, H) until it settles

A sweep evaluates the step at all states of the last guess as one batch, and carries the change on:

    jacobi, jacobi-gs, gs-jacobi    not at all      gate            by the cell's gate
    picard                          unchanged       quasi-newton    by the diagonal of its Jacobian
                                                    newton          by its Jacobian (small states)

Shapes: H: [T, B, s d], or whatever a loop carries.
Saves: the gates; the backward is the exact one of `hoist-recurrence` at the states that were
    found, and never goes through the sweeps. Of a loop, all but its states.
Costs: as many products over all steps as there are sweeps; far more work than step by step, in far
    fewer steps. `python -m benchmarks chain` maps where that pays.
Contract: exact up to rounding with tolerance 0: what a sweep leaves unchanged from the front is
    solved, and T sweeps solve all. With a tolerance, close. Where `max_sweeps` do not settle, the
    rest runs step by step.
Needs: as `hoist-recurrence`; or a loop in Python whose steps can run as a batch, with weights of
    their own or not: cells, solver steps, blocks of one structure. Its gate is found, see
    `gtrans.runtime.loop`; what the blocks of a stack read is stacked in every step.
Source: Song et al., ICML 2021, arXiv:2002.03629 (Jacobi and Gauss-Seidel); Lim et al., ICLR 2024,
    arXiv:2309.12252 (newton); Gonzalez et al., NeurIPS 2024, arXiv:2407.19115 (quasi-newton).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gtrans.analysis.loops import Loop
from gtrans.contract import Close, Contract, Exact
from gtrans.core import Knob, require
from gtrans.ir.forward import ForwardGraph, value
from gtrans.ir.sizes import hint
from gtrans.rewrite.recurrences import RecurrencePass
from gtrans.runtime.recurrence import METHODS

Method = Literal[
    "gauss-seidel", "jacobi", "jacobi-gs", "gs-jacobi", "picard", "gate", "quasi-newton", "newton"
]
_MARGIN = 1e3
"""How much a gradient may be off where states settled to a tolerance: contraction magnifies it."""
_LARGEST_JACOBIAN = 256
"""Elements of a state, batch included, of whose Jacobians there is one a step."""


@dataclass(frozen=True)
class ParallelFeedforward(RecurrencePass):
    """Solve for the states of recurrent layers, loops and stacks in parallel.

    Args:
        method: how a sweep carries changes on.
        tolerance: a state has settled if a sweep changes it by less than this times 1 + its size.
        max_sweeps: sweeps before the rest runs step by step; 0 for as many as there are steps.
        block: steps of a block of jacobi-gs, or of the window of gs-jacobi.
        min_steps: leave shorter recurrences alone.
    """

    name: ClassVar[str] = "parallel-feedforward"
    knob: ClassVar[Knob] = Knob.OPERATOR
    rolls_loops: ClassVar[bool] = True
    takes_stacks: ClassVar[bool] = True

    method: Method = "gate"
    tolerance: float = 1e-6
    max_sweeps: int = 0
    block: int = 16
    min_steps: int = 64

    def __post_init__(self) -> None:
        known = ", ".join(METHODS)
        require(
            self.method in METHODS,
            f"parallel-feedforward: method must be one of {known}; got {self.method!r}",
        )
        limits = {"tolerance": 0, "max_sweeps": 0, "block": 1, "min_steps": 1}
        for option, least in limits.items():
            given = getattr(self, option)
            require(
                given >= least,
                f"parallel-feedforward: {option} must be at least {least}, got {given}",
            )

    @property
    def contract(self) -> Contract:
        """The gradient at the states that were found."""
        if self.tolerance == 0 or self.method == "gauss-seidel":
            return Exact(bitwise=False)
        return Close(rtol=_MARGIN * self.tolerance)

    def settings(self) -> dict[str, Any]:
        """The method of the forward."""
        return {
            "method": self.method,
            "tolerance": self.tolerance,
            "max_sweeps": self.max_sweeps,
            "block": self.block,
        }

    def refuse_loop(self, graph: ForwardGraph, loop: Loop) -> str | None:
        """Refuses, too, Jacobians that are too large."""
        reason = super().refuse_loop(graph, loop)
        if reason is not None or self.method not in ("newton", "quasi-newton"):
            return reason
        size = sum(hint(value(n).numel()) for n in loop.starts)
        if size <= _LARGEST_JACOBIAN:
            return None
        return f"a state of {size} elements is too large for Jacobians: take method=gate"
