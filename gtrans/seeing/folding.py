"""Folds a picture until it fits: single pieces, then modules, nearer to the root each time."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def fold(
    pieces_at: Callable[[int | None], T], deepest: int, fits: Callable[[T], bool]
) -> tuple[T, int | None]:
    """The finest pieces that fit; the coarsest if none do.

    Args:
        pieces_at: the pieces when modules below a depth are one; unfolded for None.
        deepest: the depth of the deepest module.
        fits: whether pieces need no more folding.

    Returns:
        The pieces, and the depth they are folded to.
    """
    depth: int | None = None
    pieces = pieces_at(None)
    for coarser in range(deepest, 0, -1):
        if fits(pieces):
            break
        depth, pieces = coarser, pieces_at(coarser)
    return pieces, depth
