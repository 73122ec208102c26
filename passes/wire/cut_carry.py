"""Let no gradient cross every k-th step of a recurrence: truncated backpropagation through time.

    w[t] = e[t] + J[t+1]^T w[t+1]     -->     the same, but w[t] = e[t] where t is a multiple of k

Shapes: w: [T, B, s d], or whatever a loop carries.
Saves: all of the gates of a recurrent layer; of a loop, nothing. The T / k parts do not wait for
    each other, so the backward is k steps long.
Contract: local: exact within a part, nothing flows across. k = T is the exact gradient, k = 1 what
    is known as fully truncated, and of spiking networks as spatial learning through time.
Needs: a recurrent layer as `hoist-recurrence` does, or a loop in Python over any step that reads
    the same weights each time: cells, spiking neurons, solver steps. Sums of outputs are not cut,
    nor is what a step's output layer reads.
Source: Williams and Peng, Neural Computation 1990, as graph surgery; k = 1 for spiking networks:
    Meng et al., ICCV 2023, arXiv:2302.14311.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from gtrans.analysis.loops import Loop
from gtrans.contract import Contract, Local
from gtrans.core import Knob, require
from gtrans.ir.forward import ForwardGraph
from gtrans.rewrite.recurrences import RecurrencePass, detach_carry


@dataclass(frozen=True)
class CutCarry(RecurrencePass):
    """Truncate the backward of recurrent layers and loops.

    Args:
        every: steps between cuts.
        min_steps: leave shorter recurrences alone.
    """

    name: ClassVar[str] = "cut-carry"
    knob: ClassVar[Knob] = Knob.WIRE

    every: int = 16
    min_steps: int = 4

    def __post_init__(self) -> None:
        for option in ("every", "min_steps"):
            given = getattr(self, option)
            require(given >= 1, f"cut-carry: {option} must be at least 1, got {given}")

    @property
    def contract(self) -> Contract:
        """Exact gradients of parts, nothing across."""
        return Local()

    def settings(self) -> dict[str, Any]:
        """The rule of the backward."""
        return {"rule": "cut", "count": self.every}

    def refuse_loop(self, graph: ForwardGraph, loop: Loop) -> str | None:
        """Refuses loops that are shorter than a part."""
        return "no more steps than every" if loop.length <= self.every else None

    def rewrite_loop(self, graph: ForwardGraph, loop: Loop) -> None:
        """Detaches what the first step of each part reads from the step before."""
        for step in range(loop.length):
            number = step + loop.begun
            if number > 0 and number % self.every == 0:
                detach_carry(graph, loop, step)
