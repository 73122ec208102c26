"""Carry the gradient of a recurrent layer back by one constant diagonal instead of its Jacobians.

    w[t] = e[t] + J[t+1]^T w[t+1]     -->     w[t] = e[t] + a w[t+1]          one scan

Shapes: w: [T, B, s d]; a: [s d].
Saves: all of the gates; no product is carried.
Contract: aligned, without a bound; exact where every Jacobian is the diagonal a.
Needs: as `hoist-recurrence`; or a loop in Python whose steps can run as a batch.
Source: Caillon, Fagnou and Allauzen, arXiv:2503.23104. The paper fixes a to a ramp from 0 to 1,
    which is `feedback=linspace`; by default a is the mean diagonal of the Jacobians of the batch,
    which points much nearer to the gradient.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gtrans.contract import Aligned, Contract
from gtrans.core import Knob, require
from gtrans.rewrite.recurrences import RecurrencePass


@dataclass(frozen=True)
class StationaryFeedback(RecurrencePass):
    """Replace the carried product of a recurrent backward by a constant.

    Args:
        feedback: "measured" takes the mean over steps and batch, "linspace" the paper's ramp.
        min_steps: leave shorter recurrences alone.
    """

    name: ClassVar[str] = "stationary-feedback"
    knob: ClassVar[Knob] = Knob.WIRE
    rolls_loops: ClassVar[bool] = True

    feedback: Literal["measured", "linspace"] = "measured"
    min_steps: int = 4

    def __post_init__(self) -> None:
        require(
            self.feedback in ("measured", "linspace"),
            "stationary-feedback: feedback must be 'measured' or 'linspace', "
            f"got {self.feedback!r}",
        )
        require(
            self.min_steps >= 1,
            f"stationary-feedback: min_steps must be at least 1, got {self.min_steps}",
        )

    @property
    def contract(self) -> Contract:
        """A direction."""
        return Aligned()

    def settings(self) -> dict[str, Any]:
        """The rule of the backward."""
        return {"rule": "feedback" if self.feedback == "measured" else "linspace"}
