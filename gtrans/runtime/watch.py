"""Says when truncated sweeps have not settled."""

import logging

import torch

log = logging.getLogger("gtrans")

LIMIT = 0.5
"""The share of the result that the last sweep may make up before it is worth a warning."""

_CHECKED_FIRST, _CHECKED_EVERY = 4, 256
_calls: dict[str, int] = {}
_warned: set[str] = set()


def watch_ratio(ratio: torch.Tensor | None, where: str, sweeps: int) -> None:
    """Warns once a place if the last sweep still changed much of the result.

    Reading a number off a device waits for it, so only the first calls and every 256th look. The
    gradient is not touched: what reacts to a cotangent is not linear in it, and gradients could
    not be accumulated over batches any more.

    Args:
        ratio: |wk - w(k-1)| / |wk|.
        where: the place, for the message.
        sweeps: k.
    """
    if ratio is None or where in _warned:
        return
    calls = _calls[where] = _calls.get(where, 0) + 1
    if calls > _CHECKED_FIRST and calls % _CHECKED_EVERY:
        return
    found = float(ratio)
    if found > LIMIT:
        _warned.add(where)
        log.warning(
            "gtrans: sweep %d over %s still changed the gradient by %.0f %%: it is far from the "
            "true one. More sweeps (iterations) settle it; gtrans.verify measures how far it is",
            sweeps,
            where,
            100 * found,
        )


def forget() -> None:
    """Warns again, and looks at the next calls again."""
    _calls.clear()
    _warned.clear()
