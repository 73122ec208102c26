"""Let the gradient run through the last steps of a loop that has settled, and no further.

    z[t] = f(z[t-1]),  t = 1 .. T                  the same values
    w[t-1] = J^T w[t],  t = T .. 1         -->     w[t-1] = J^T w[t],  t = T .. T - k

Where the loop has settled, J is the same at all steps, and this is the gradient of the fixed point
with k terms of Neumann's series: its error is about |J|^(k+1).

Shapes: z, w: whatever the loop carries.
Saves: all that the backward of the first T - k - 1 steps would read.
Contract: iterative: exact, the gradient of the loop as it is written, at k = T - 1.
Needs: a loop in Python whose steps all read the same, and whose last state only is read. A warning
    says if the last step still changed the state by much: such a loop has no fixed point to speak
    of, and is truncated like any other.
Source: Geng et al., NeurIPS 2021, arXiv:2111.05177 (unrolled phantom gradient without damping);
    k = 0: Fung et al., AAAI 2022, arXiv:2103.12803. For equilibria that are solved in other ways
    there is `gtrans.runtime.equilibrium`.
"""

from dataclasses import dataclass
from typing import ClassVar

from gtrans.analysis.loops import Loop
from gtrans.contract import Contract, Iterative
from gtrans.core import Knob, require
from gtrans.ir.forward import ForwardGraph
from gtrans.rewrite.recurrences import LoopPass, detach_carry
from gtrans.runtime.watch import WATCH_STEP


@dataclass(frozen=True)
class DeqBackward(LoopPass):
    """Take the gradient of a fixed point by a few of the steps that led to it.

    Args:
        terms: how often the gradient goes through a step to the one before; 0 is known as
            Jacobian-free.
        min_steps: leave shorter loops alone.
    """

    name: ClassVar[str] = "deq-backward"
    knob: ClassVar[Knob] = Knob.WIRE

    terms: int = 5
    min_steps: int = 4

    def __post_init__(self) -> None:
        for option, least in (("terms", 0), ("min_steps", 1)):
            given = getattr(self, option)
            require(given >= least, f"deq-backward: {option} must be at least {least}, got {given}")

    @property
    def contract(self) -> Contract:
        """A truncated series; how many terms are exact depends on the loop."""
        return Iterative(iterations=self.terms)

    def refuse_loop(self, graph: ForwardGraph, loop: Loop) -> str | None:
        """Refuses loops that do not iterate one function, or whose way is read."""
        if any(len(set(column)) > 1 for column in loop.inputs):
            return "its steps read something new each time, so it settles nowhere"
        on_the_way = (n for body in loop.steps[:-1] for n in body)
        if any(user not in loop.nodes for n in on_the_way for user in n.users):
            return "a state on the way is read as well"
        if len(loop) <= self.terms + 1:
            return "no more steps than terms"
        return None

    def rewrite_loop(self, graph: ForwardGraph, loop: Loop) -> None:
        """Detaches what the first of the last steps reads, and watches the last."""
        detach_carry(graph, loop, len(loop) - self.terms - 1)
        last, before = (loop.carry_into(t)[0] for t in (len(loop), len(loop) - 1))
        readers = [user for user in last.users if user not in loop.nodes]
        watched = graph.insert_after(last, WATCH_STEP, last, before, f"the loop at {last.name}")
        for reader in readers:
            reader.replace_input_with(last, watched)
