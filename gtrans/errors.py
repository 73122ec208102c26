"""The errors gtrans raises on purpose. Each message says what, where, and the way out."""

from collections.abc import Iterable
from difflib import get_close_matches


class GTransError(Exception):
    """Base class of every error that gtrans raises on purpose."""


class OptionError(GTransError, ValueError):
    """A pass, pipeline, backend or memory option is unknown or out of range."""


class ModelError(GTransError, ValueError):
    """The model or its inputs cannot be used as asked."""


class CaptureError(GTransError, RuntimeError):
    """The model's training step could not be captured as a graph."""


class GraphError(GTransError, RuntimeError):
    """A graph breaks a structural rule of the IR (see ``gtrans.ir.check``)."""


class PassError(GTransError, RuntimeError):
    """A pass failed or left an illegal graph behind."""


class ContractError(GTransError, ValueError):
    """A pipeline asks for a weaker contract than the caller admitted."""


class PlanError(GTransError, RuntimeError):
    """No plan fits what was asked for."""


class BudgetError(PlanError):
    """No plan keeps the step under the memory budget. Never skipped: training on would break it."""


class VerifyError(GTransError, AssertionError):
    """A rewritten step does not compute what its contract promises."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'a' or 'b'?"``, or the list of known names if none is near."""
    known = sorted(known)
    near = get_close_matches(name, known, n=2, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; known: " + ", ".join(known) if known else ""
