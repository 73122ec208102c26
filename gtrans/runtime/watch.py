"""Says when truncated sweeps have not settled."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

log = logging.getLogger("gtrans")

LIMIT = 0.5
"""The share of the result that the last sweep may make up before it is worth a warning."""

_CHECKED_FIRST, _CHECKED_EVERY = 4, 256
_calls: dict[str, int] = {}
_warned: set[str] = set()
_paused = False


@contextmanager
def unwatched() -> Iterator[None]:
    """Within it nothing is looked at or counted: what runs is no training step."""
    global _paused
    _paused, before = True, _paused
    try:
        yield
    finally:
        _paused = before


SETTLED = 0.05
"""The share of its size by which the last step may still change the state of a loop."""


def watch_ratio(last: torch.Tensor, before: torch.Tensor | None, where: str, sweeps: int) -> None:
    """Warns once a place if the last sweep still changed much of the result.

    Reading a number off a device waits for it, so only the first calls and every 256th look. The
    gradient is not touched: what reacts to a cotangent is not linear in it, and gradients could
    not be accumulated over batches any more.

    Args:
        last: wk.
        before: w(k-1); None if there was no sweep.
        where: the place, for the message.
        sweeps: k.
    """
    if before is None:
        return
    ratio = _change(last, before, where, LIMIT)
    if ratio is not None:
        log.warning(
            "gtrans: sweep %d over %s still changed the gradient by %.0f %%: it is far from the "
            "true one. More sweeps (iterations) settle it; gtrans.verify measures how far it is",
            sweeps,
            where,
            100 * ratio,
        )


def _change(last: torch.Tensor, before: torch.Tensor, where: str, limit: float) -> float | None:
    """The relative change, if it is time to look at a place and the change is above a limit."""
    if _paused or where in _warned:
        return None
    calls = _calls[where] = _calls.get(where, 0) + 1
    if calls > _CHECKED_FIRST and calls % _CHECKED_EVERY:
        return None
    ratio = float((last - before).norm() / last.norm())
    if ratio <= limit:
        return None
    _warned.add(where)
    return ratio


def forget() -> None:
    """Warns again, and looks at the next calls again."""
    _calls.clear()
    _warned.clear()


@torch.library.custom_op("gtrans::watch_sweeps", mutates_args=())
def watch_sweeps(last: torch.Tensor, before: torch.Tensor, where: str, sweeps: int) -> torch.Tensor:
    """A copy of the last iterate, after `watch_ratio` has looked at it."""
    watch_ratio(last, before, where, sweeps)
    return last.clone()


@watch_sweeps.register_fake
def _(last: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(last)


WATCH = torch.ops.gtrans.watch_sweeps.default


@torch.library.custom_op("gtrans::watch_step", mutates_args=())
def watch_step(last: torch.Tensor, before: torch.Tensor, where: str) -> torch.Tensor:
    """A copy of the last state of a loop; warns if the last step changed it by much."""
    ratio = _change(last, before, where, SETTLED)
    if ratio is not None:
        log.warning(
            "gtrans: the last step of %s still changed the state by %.0f %%: it has not settled, "
            "so deq-backward truncates its gradient. More steps, or leave deq-backward out",
            where,
            100 * ratio,
        )
    return last.clone()


@watch_step.register_fake
def _(last: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(last)


def _pass_on(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return gradient, None, None


watch_step.register_autograd(_pass_on)
WATCH_STEP = torch.ops.gtrans.watch_step.default


DRIFT = 1e-2
"""How far from the first state of a loop, relative to its size, the way back to it may end."""


def watch_drift(found: Sequence[torch.Tensor], true: Sequence[torch.Tensor], count: int) -> None:
    """Warns once if the steps of a loop, taken backwards, did not lead to where it began."""
    a, b = (torch.cat([t.flatten() for t in ts]) for ts in (found, true))
    where = f"a solver of {b.numel()} values"
    # Relative to what was found: a start of zeros has no size.
    ratio = _change(a, b, where, DRIFT)
    if ratio is not None:
        log.warning(
            "gtrans: %s, taken backwards, misses its first state by %.0f %%: the gradient of "
            "ode-adjoint is as far off. More iterations than %d or smaller steps help, or "
            "method=checkpoint, which is exact",
            where,
            100 * ratio,
            count,
        )
