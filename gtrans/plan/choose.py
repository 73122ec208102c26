"""Which of many simulated plans are worth having, by peak, time and products that run again.

    fastest    c_0 c_1 ... c_n    nothing is faster at the same peak or less
    leanest    l_0 l_1 ... l_n    of all that are about as fast as c_i at c_i's peak or less, the
                                  one with the least cost

    cost = seconds + 5 * seconds of the plain step * flops of products again / of all products

The roofline does not tell plans apart whose predicted times are close, but it is certain which of
them multiplies less: a hundredth of all products is worth a twentieth of the step. Along both lists
the peak falls and the time grows, so that a larger budget never gives a slower plan.
"""

from collections.abc import Collection

from gtrans.plan.rebuild import Candidate

# Predicted times that differ by less are alike.
ALIKE = 1.1
# What the share of products that run again counts, relative to a share of the step's time.
DEARER = 5.0


def fastest(candidates: Collection[Candidate]) -> list[Candidate]:
    """The candidates that no other beats in both peak and time, fastest first."""
    front: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.seconds, c.peak)):
        if not front or c.peak < front[-1].peak:
            front.append(c)
    return front


def leanest(candidates: Collection[Candidate]) -> list[Candidate]:
    """For every peak the cheapest candidate that is about as fast as any, fastest first."""
    found: list[Candidate] = []
    for bound in reversed(fastest(candidates)):
        alike = [
            c
            for c in candidates
            if c.peak <= bound.peak
            and c.seconds <= ALIKE * bound.seconds
            and (not found or c is found[-1] or _is_above(c, found[-1]))
        ]
        best = min(alike, key=lambda c: (c.cost, c.seconds, c.peak))
        if not found or best is not found[-1]:
            found.append(best)
    return found[::-1]


def _is_above(c: Candidate, other: Candidate) -> bool:
    return c.peak > other.peak and c.seconds < other.seconds
