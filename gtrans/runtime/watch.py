"""Says when truncated sweeps have not settled."""

import logging
from collections.abc import Iterator
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
    if _paused or before is None or where in _warned:
        return
    calls = _calls[where] = _calls.get(where, 0) + 1
    if calls > _CHECKED_FIRST and calls % _CHECKED_EVERY:
        return
    ratio = float((last - before).norm() / last.norm())
    if ratio > LIMIT:
        _warned.add(where)
        log.warning(
            "gtrans: sweep %d over %s still changed the gradient by %.0f %%: it is far from the "
            "true one. More sweeps (iterations) settle it; gtrans.verify measures how far it is",
            sweeps,
            where,
            100 * ratio,
        )


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
