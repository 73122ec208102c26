"""How large the error of group-wise rounding is, for numbers from a normal distribution.

    nearest     step^2 / 12        stochastic     step^2 / 6        step = range / (2**bits - 1)

The range is that of a group: its expectation for n numbers from N(0, 1) is the integral over t of
1 - Phi(t)^n - (1 - Phi(t))^n.
"""

from functools import cache
from math import erf, sqrt

import numpy as np


@cache
def expected_range(count: int) -> float:
    """E[max - min] of so many numbers from N(0, 1)."""
    t = np.linspace(-9.0, 9.0, 4001)
    below = np.array([(1 + erf(v / sqrt(2))) / 2 for v in t])
    return float(np.trapezoid(1 - below**count - (1 - below) ** count, t))


def relative_error(bits: int, group: int, *, stochastic: bool) -> float:
    """The root mean square error of a coded N(0, 1) tensor.

    Args:
        bits: per element.
        group: elements that share their range.
        stochastic: whether rounding is at random.
    """
    step = expected_range(group) / (2**bits - 1)
    return float(step / sqrt(6 if stochastic else 12))
