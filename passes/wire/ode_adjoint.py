"""Take the gradient of a solver that is written as a loop, without what its steps computed.

    y[t+1] = y[t] + d(t, y[t])            t = 0 .. T - 1: Euler, midpoint, Heun, Runge-Kutta, ..

    checkpoint   y[0] .. y[T-1] are kept; each step is run and pulled again from its state
    backsolve    y[T] is kept; y[t] is found from y[t+1] by y <- y[t+1] - d(t, y), k times

Shapes: y: whatever the solver carries, one tensor or several.
Saves: all stages of all steps; with backsolve the states between steps too, so that memory does not
    grow with T. Peaks at one step.
Costs: the forward once more; with backsolve k further times.
Contract: checkpoint: exact, the gradient of the numbers that the solver computed. Backsolve:
    aligned: exact as its iterations settle, which they do where a step's d changes by less than y
    does (h |df/dy| < 1); a warning says where the way back misses the first state.
Needs: a loop in Python, the same function in each step; checkpoint takes any such loop, backsolve
    those that add to their state. What differs between steps, such as the time, is a number or a
    tensor. Steps of reversible Heun are inverted to rounding by `reversible`, which is the pass to
    ask for there.
Source: Chen et al., NeurIPS 2018, arXiv:1806.07366 (backsolve), here with the solver's own steps
    taken backwards, so that what remains is the error of the inversion; k = 1 is one step of the
    same solver. Checkpoints per step: Matsubara et al., NeurIPS 2021, arXiv:2102.09750.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from gtrans.analysis.loops import Loop
from gtrans.contract import Aligned, Contract, Exact
from gtrans.core import Knob, require
from gtrans.ir.forward import ForwardGraph
from gtrans.rewrite.recurrences import LoopPass
from gtrans.rewrite.rolled import cannot_roll
from gtrans.rewrite.stepwise import roll_stepwise, traced_step


@dataclass(frozen=True)
class OdeAdjoint(LoopPass):
    """Compute what a solver's backward needs again, step by step.

    Args:
        method: what is kept, see the module.
        iterations: of backsolve, for each step.
        min_steps: leave shorter loops alone.
    """

    name: ClassVar[str] = "ode-adjoint"
    knob: ClassVar[Knob] = Knob.WIRE

    method: Literal["checkpoint", "backsolve"] = "checkpoint"
    iterations: int = 3
    min_steps: int = 4

    def __post_init__(self) -> None:
        require(
            self.method in ("checkpoint", "backsolve"),
            "ode-adjoint: method must be 'checkpoint' or 'backsolve' (reversible Heun is inverted "
            f"by the pass reversible), got {self.method!r}",
        )
        for option in ("iterations", "min_steps"):
            given = getattr(self, option)
            require(given >= 1, f"ode-adjoint: {option} must be at least 1, got {given}")

    @property
    def contract(self) -> Contract:
        """Exact where the states are kept; a direction where they are found again."""
        return Exact(bitwise=False) if self.method == "checkpoint" else Aligned()

    def refuse_loop(self, graph: ForwardGraph, loop: Loop) -> str | None:
        """Refuses what cannot be called as one operator, or taken backwards where it must be."""
        step = traced_step(loop)
        if isinstance(step, str):
            return step
        if self.method == "backsolve" and not step.adds_to_its_carry():
            return "a step does not add to what it carries; method=checkpoint takes any"
        return cannot_roll(graph, loop) or step.not_repeatable()

    def rewrite_loop(self, graph: ForwardGraph, loop: Loop) -> None:
        """Calls the loop by the rule of the method."""
        step = traced_step(loop)
        assert not isinstance(step, str)  # see `refuse_loop`
        roll_stepwise(graph, loop, step, rule=self.method, count=self.iterations)
