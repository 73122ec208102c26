"""Let no gradient cross every k-th step of a recurrence: truncated backpropagation through time.

    w[t] = e[t] + J[t+1]^T w[t+1]     -->     the same, but w[t] = e[t] where t is a multiple of k

Shapes: w: [T, B, s d].
Saves: all of the gates. The T / k parts run side by side, so the backward is k steps long.
Contract: local: exact within a part, nothing flows across. k = T is the exact gradient, k = 1 what
    is known as fully truncated.
Needs: as `hoist-recurrence`. For loops over cells written in Python, `cut` detaches modules.
Source: Williams and Peng, Neural Computation 1990, as graph surgery.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from gtrans.contract import Contract, Local
from gtrans.core import Knob, require
from gtrans.rewrite.recurrences import RecurrencePass


@dataclass(frozen=True)
class CutCarry(RecurrencePass):
    """Truncate the backward of recurrent layers.

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
