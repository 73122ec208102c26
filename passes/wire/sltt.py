"""Train a spiking network step by step: no gradient crosses time, and one step is held at a time.

    u[t] = f(u[t-1], x[t]),  s[t] = u[t] > 1           as written: all steps kept, T steps back
    -->  forward: no step is kept
         backward: for t = 1 .. T: run step t anew from u[t-1], and at once its gradient

Shapes: whatever the loop carries; all layers of a step are one step, from what differs between the
    steps to what they add up to.
Saves: all that is inside of steps; memory does not grow with T but for what goes in and comes out.
Costs: the forward once more. With `steps=K`, K of the parts get a gradient, drawn anew each time
    and scaled by T / K, so that their mean is that of all.
Contract: local: exact within `every` steps, nothing flows across; `every` = T is exact. The cut is
    that of `cut-carry{every=1}`.
Needs: a loop in Python, of any neurons with a threshold (a comparison, whatever its surrogate is),
    whose steps read the same weights. Where steps draw random numbers or write in place, it is
    refused; `stepwise=false`, which is the cut and no more, is not.
Source: Meng et al., ICCV 2023, arXiv:2302.14311 (SLTT, SLTT-K). There each step is pulled as it is
    made, which needs a loss for every step; here in a second run, which needs none. The paper does
    not scale by T / K.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from gtrans.analysis.loops import refreshed
from gtrans.analysis.stages import Stage, find_stages
from gtrans.contract import Contract, Local
from gtrans.core import Knob, require
from gtrans.ir.forward import ForwardGraph
from gtrans.rewrite.recurrences import ForwardPass, May, detach_carry
from gtrans.rewrite.rolled import cannot_roll
from gtrans.rewrite.stepwise import TracedStep, roll_stepwise, traced_step


@dataclass(frozen=True)
class Sltt(ForwardPass):
    """Cut the gradient of spiking networks in time, and compute it one step at a time.

    Args:
        every: steps between cuts.
        steps: how many of the parts between cuts get a gradient; 0 for all of them.
        stepwise: hold one part at a time; otherwise the gradient is cut and no more.
        min_steps: leave shorter loops alone.
    """

    name: ClassVar[str] = "sltt"
    knob: ClassVar[Knob] = Knob.WIRE

    every: int = 1
    steps: int = 0
    stepwise: bool = True
    min_steps: int = 4

    def __post_init__(self) -> None:
        for option, least in (("every", 1), ("steps", 0), ("min_steps", 1)):
            given = getattr(self, option)
            require(given >= least, f"sltt: {option} must be at least {least}, got {given}")
        require(self.stepwise or not self.steps, "sltt: steps needs stepwise=true")

    @property
    def contract(self) -> Contract:
        """Exact gradients of parts, nothing across."""
        return Local()

    def visit(self, graph: ForwardGraph, may: May) -> None:
        """Looks at one stage after another."""
        for found in find_stages(graph):
            whole = refreshed(found.whole)  # an earlier one may have been rewritten
            stage, step = replace(found, whole=whole), traced_step(whole)
            if may(whole.last, self._reason(graph, stage, step)):
                self._cut(graph, stage)
                if isinstance(step, TracedStep) and self.stepwise:
                    whole = refreshed(whole)
                    roll_stepwise(
                        graph, whole, step, rule="windows", count=self.every, draws=self.steps,
                        ahead=stage.ahead,
                    )  # fmt: skip

    def _reason(self, graph: ForwardGraph, stage: Stage, step: TracedStep | str) -> str | None:
        if stage.length < self.min_steps:
            return "fewer steps than min_steps"
        if isinstance(step, str):
            return step
        if not step.has_threshold():
            return "it compares nothing, so nothing in it spikes: cut-carry truncates any loop"
        if stage.length <= self.every and not self.stepwise:
            return "no more steps than every"
        if not self.stepwise:
            return None
        reason = cannot_roll(graph, stage.whole) or step.not_repeatable()
        return reason and f"{reason}; stepwise=false cuts its gradient all the same"

    def _cut(self, graph: ForwardGraph, stage: Stage) -> None:
        """Detaches what is handed over between parts; within the operator its rule does."""
        inner = range(len(stage.whole)) if self.stepwise else range(0)
        for loop, first in stage.parts:
            for step in range(loop.length):
                number = step - first + stage.ahead
                if number > 0 and number % self.every == 0 and step - first not in inner:
                    detach_carry(graph, loop, step)
        if inner and stage.ahead > 0 and stage.ahead % self.every == 0:
            detach_carry(graph, stage.whole, 0)
