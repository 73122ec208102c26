"""gtrans: a compiler for the training step of PyTorch models.

    model = gtrans.optimize(model)          # same object, same state_dict, same gradients

Public names load on first use, so that `import gtrans` and the command line's help stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gtrans.accuracy import gradient_error
    from gtrans.adaptive import adapt
    from gtrans.api import explain, optimize, report, restore, restructure, to_reversible
    from gtrans.contract import (
        Aligned,
        Attribution,
        Changed,
        Close,
        Contract,
        Exact,
        Iterative,
        Local,
        Unbiased,
    )
    from gtrans.core import Knob, Pass, SitePass, Stats
    from gtrans.drift import measured_drift
    from gtrans.ir import ForwardGraph, JointGraph
    from gtrans.pipeline import Pipeline
    from gtrans.pruning import PrunePlan, prune
    from gtrans.verification import verify

__version__ = "0.1.0"

_HOMES = {
    "gtrans.accuracy": ("gradient_error",),
    "gtrans.adaptive": ("adapt",),
    "gtrans.api": (
        "explain",
        "optimize",
        "report",
        "restore",
        "restructure",
        "to_reversible",
    ),
    "gtrans.contract": (
        "Aligned",
        "Attribution",
        "Changed",
        "Close",
        "Contract",
        "Exact",
        "Iterative",
        "Local",
        "Unbiased",
    ),
    "gtrans.core": ("Knob", "Pass", "SitePass", "Stats"),
    "gtrans.drift": ("measured_drift",),
    "gtrans.ir": ("ForwardGraph", "JointGraph"),
    "gtrans.pruning": ("PrunePlan", "prune"),
    "gtrans.pipeline": ("Pipeline",),
    "gtrans.verification": ("verify",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Aligned",
    "Attribution",
    "Changed",
    "Close",
    "Contract",
    "Exact",
    "ForwardGraph",
    "Iterative",
    "JointGraph",
    "Knob",
    "Local",
    "Pass",
    "Pipeline",
    "PrunePlan",
    "SitePass",
    "Stats",
    "Unbiased",
    "adapt",
    "explain",
    "gradient_error",
    "measured_drift",
    "optimize",
    "prune",
    "report",
    "restore",
    "restructure",
    "to_reversible",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gtrans' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
