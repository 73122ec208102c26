"""Few-level approximations of an activation's derivative.

Nearest: thresholds s and levels y that minimise

    sum_k  integral over (s_k, s_k+1) of (h'(x) - y_k)^2 w(x) dx

by dynamic programming over a grid, and again over a finer one around the thresholds found. The cost
of a segment (i, j) comes from prefix integrals of w, h'w and h'^2 w: y = F1 / W, cost = F2 - y^2 W;
within a cell, from those of the polynomial through its quadrature points. Stochastic: equidistant
levels that cover the range of h'; rounding h'(x) at random to one of its two neighbours has the
expectation h'(x).

Source: the dynamic program is the one of few-bit backward (arXiv:2202.00441, section 4), whose
published tables come from gradient descent instead. The stochastic variant is gtrans' own.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.polynomial import legendre
from numpy.typing import NDArray

from gtrans.analysis.pointwise import Activation
from gtrans.ir.tracing import outside_tracing

Function = Callable[[torch.Tensor], torch.Tensor]
Weight = Literal["uniform", "normal"]
Floats = NDArray[np.float64]

REACH = 10.0
_CELLS = 1000
_POINTS = 8  # Gauss-Legendre points per cell
_FINER = 32  # parts of a cell, where a threshold is near
_FAR = 1e4
# Beyond the grid a derivative may exceed its range there by this share of it.
_SLACK = 1e-3
_WIDEN = 1e-6


@dataclass(frozen=True)
class Table:
    """Levels that stand for a derivative.

    Attributes:
        thresholds: ascending; code k means that k of them are smaller than x. Empty for stochastic
            rounding, where codes depend on h'(x).
        levels: what each code stands for.
        mean_square: E[(level - h'(x))^2] for x ~ N(0, 1), over x and the rounding.
        relative: root of that over E[h'(x)^2]: relative error of the gradient at x.
        largest: largest |level - h'(x)| of any x.
    """

    thresholds: tuple[float, ...]
    levels: tuple[float, ...]
    mean_square: float
    relative: float
    largest: float

    @property
    def step(self) -> float:
        """The distance between the first two levels; between any two, for stochastic rounding."""
        return self.levels[1] - self.levels[0]


@dataclass(frozen=True, eq=False)
class Samples:
    """A derivative on a grid; compared by identity, so that tables are computed once for each.

    Attributes:
        edges: [cells + 1], the ends of the cells of [-10, 10].
        at_edges: [cells + 1], h' there.
        x, h: [cells, points], the quadrature points of every cell and h' there.
        weights: [points], of the quadrature, summing to the width of a cell.
        tails: [2, points], h' far to the left and far to the right; NaN where it overflows.
        low, high: range of h' on [-10, 10].
    """

    edges: Floats
    at_edges: Floats
    x: Floats
    h: Floats
    weights: Floats
    tails: Floats
    low: float
    high: float

    @property
    def is_finite(self) -> bool:
        """Whether h' is a number all over [-10, 10]."""
        return bool(np.isfinite(self.h).all()) and math.isfinite(self.low + self.high)

    @property
    def is_bounded(self) -> bool:
        """Whether h' stays, far outside of [-10, 10], in the range that it has there."""
        slack = _SLACK * (self.high - self.low)
        inside = (self.tails >= self.low - slack) & (self.tails <= self.high + slack)
        return bool((inside | np.isnan(self.tails)).all())

    @property
    def is_piecewise_constant(self) -> bool:
        """Whether h' takes a handful of values, as that of ReLU and hardtanh does."""
        return len(np.unique(np.round(self.h, 9))) <= 4

    def expectation(self, values: Floats) -> float:
        """E[values] for x ~ N(0, 1), of values at the quadrature points."""
        return float((values * _density(self.x, "normal") * self.weights).sum())


def sample(derivative: Function) -> Samples:
    """Evaluates a derivative, in float64, wherever the tables need it."""
    edges = np.linspace(-REACH, REACH, _CELLS + 1)
    nodes, weights = legendre.leggauss(_POINTS)
    half = (edges[1] - edges[0]) / 2
    x = (edges[:-1] + half)[:, None] + half * nodes[None, :]
    far = np.concatenate([np.linspace(REACH, 100, 91), np.geomspace(100, _FAR, 21)])
    tails = _at(derivative, np.stack([-far, far]))
    h = _at(derivative, x)
    values = _at(derivative, edges)
    low, high = (_extreme(derivative, edges, values, sign) for sign in (-1.0, 1.0))
    return Samples(edges, values, x, h, weights * half, tails, low, high)


def samples_of(activation: Activation) -> Samples | None:
    """The derivative of an activation in a graph; None if dx is not linear in dy.

    Every expression is sampled once in a process.
    """
    key = activation.key
    if key not in _seen:
        _seen[key] = outside_tracing(lambda: _sample_linear(activation))
    return _seen[key]


_seen: dict[Hashable, Samples | None] = {}


def _sample_linear(activation: Activation) -> Samples | None:
    samples = sample(activation.derivative)
    grid = torch.from_numpy(samples.edges)
    once = activation.derivative(grid)
    for factor in (-1.0, 1e-60, 1e60):
        many = activation.derivative(grid, factor) / factor
        if not torch.allclose(many, once, rtol=1e-9, atol=1e-9, equal_nan=True):
            return None
    return samples


@cache
def nearest_table(samples: Samples, bits: int, weight: Weight = "uniform") -> Table:
    """The best thresholds and levels for 2**bits codes.

    Args:
        samples: the derivative.
        bits: bits per element.
        weight: of the error at x: "uniform" on [-10, 10] or "normal", the density of N(0, 1).
    """
    points = samples.edges
    ends, levels, _ = best_steps(_prefixes(samples, weight, points), 2**bits)
    cell = np.linspace(-1, 1, 2 * _FINER + 1) * (points[1] - points[0])
    near = np.clip(points[ends[1:-1], None] + cell, -REACH, REACH).round(12)
    points = np.unique(np.concatenate([near.ravel(), [-REACH, REACH]]))
    ends, levels, _ = best_steps(_prefixes(samples, weight, points), 2**bits)
    return given_table(samples, [float(points[i]) for i in ends[1:-1]], levels)


def given_table(samples: Samples, thresholds: Sequence[float], levels: Sequence[float]) -> Table:
    """Thresholds and levels from elsewhere, with their errors; thresholds may lie inside cells."""
    ends, y = np.array([-REACH, *thresholds, REACH]), np.array(levels)
    mass, first, second = (np.diff(p) for p in _prefixes(samples, "normal", ends))
    mean_square = float((second - 2 * y * first + y * y * mass).sum())
    # The supremum lies at thresholds, of which either side counts, or far outside.
    (at_ends,) = _interpolated(samples, ends, samples.h[None])
    inner = y[np.searchsorted(thresholds, samples.x, side="left")]
    errors = (
        samples.h - inner,
        at_ends[:-1] - y,
        at_ends[1:] - y,
        samples.tails - y[[0, -1]][:, None],
    )
    largest = max(float(np.nanmax(abs(e))) for e in errors)
    return _table(samples, list(thresholds), list(levels), mean_square, largest)


@cache
def stochastic_table(samples: Samples, bits: int) -> Table:
    """Equidistant levels over the range of h', for rounding at random to a neighbour."""
    low = min(samples.low, float(np.nanmin(samples.tails)))
    high = max(samples.high, float(np.nanmax(samples.tails)))
    margin = _WIDEN * (high - low)
    levels = np.linspace(low - margin, high + margin, 2**bits)
    below = np.clip(np.searchsorted(levels, samples.h, side="right") - 1, 0, len(levels) - 2)
    variance = (levels[below + 1] - samples.h) * (samples.h - levels[below])
    step = float(levels[1] - levels[0])
    return _table(samples, [], levels.tolist(), samples.expectation(variance), step)


def best_steps(prefixes: Floats, pieces: int) -> tuple[list[int], list[float], float]:
    """The step function with so many pieces that is nearest in weighted mean square.

    Args:
        prefixes: [3, n + 1], prefix integrals of w, f w and f^2 w over n cells.
        pieces: at most n.

    Returns:
        The ends of the pieces (pieces + 1 cell numbers from 0 to n), the level of each, the error.
    """
    n = prefixes.shape[1] - 1
    w, f1, f2 = prefixes[:, None, :] - prefixes[:, :, None]
    # Where there is no weight any level will do; the difference of prefixes is rounding noise.
    heavy = w > 1e-13 * prefixes[0, -1]
    level = np.divide(f1, w, out=np.zeros_like(w), where=heavy)
    cost = np.where(heavy, np.maximum(f2 - level * f1, 0.0), 0.0)
    cost[np.tril_indices(n + 1)] = np.inf
    total = np.full(n + 1, np.inf)
    total[0] = 0.0
    starts = []
    for _ in range(pieces):
        choices = total[:, None] + cost
        starts.append(choices.argmin(0))
        total = choices.min(0)
    ends = [n]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    ends.reverse()
    levels = [float(level[i, j]) for i, j in pairwise(ends)]
    return ends, levels, float(total[-1])


def _prefixes(samples: Samples, weight: Weight, points: Floats) -> Floats:
    """[3, n]: integrals of w, h'w and h'^2 w from the left end of the grid to each point."""
    w = _density(samples.x, weight)
    functions = np.stack([w, w * samples.h, w * samples.h**2])
    cells = np.cumsum((functions * samples.weights).sum(-1), axis=-1)
    before = np.pad(cells, [(0, 0), (1, 0)])[:, _cell(samples, points)]
    half = (samples.edges[1] - samples.edges[0]) / 2
    inside = _interpolated(samples, points, functions, integrate=True)
    prefixes: Floats = before + half * inside
    return prefixes


def _interpolated(
    samples: Samples, points: Floats, functions: Floats, *, integrate: bool = False
) -> Floats:
    """Functions [k, cells, points], or their integrals from the left end of a cell, at points."""
    nodes, _ = legendre.leggauss(_POINTS)
    cell = _cell(samples, points)
    coefficients = functions[:, cell] @ np.linalg.inv(legendre.legvander(nodes, _POINTS - 1)).T
    if integrate:
        coefficients = legendre.legint(coefficients, lbnd=-1, axis=-1)
    left, width = samples.edges[cell], samples.edges[1] - samples.edges[0]
    basis = legendre.legvander(2 * (points - left) / width - 1, coefficients.shape[-1] - 1)
    values: Floats = (coefficients * basis).sum(-1)
    return values


def _cell(samples: Samples, points: Floats) -> NDArray[np.intp]:
    return np.clip(np.searchsorted(samples.edges, points, side="right") - 1, 0, _CELLS - 1)


def _table(
    samples: Samples,
    thresholds: list[float],
    levels: list[float],
    mean_square: float,
    largest: float,
) -> Table:
    relative = math.sqrt(mean_square / samples.expectation(samples.h**2))
    return Table(tuple(thresholds), tuple(levels), mean_square, relative, largest)


def _density(x: Floats, weight: Weight) -> Floats:
    if weight == "uniform":
        return np.ones_like(x)
    density: Floats = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return density


def _extreme(derivative: Function, x: Floats, values: Floats, sign: float) -> float:
    """The largest value (sign 1) or smallest (sign -1), by two refinements around the grid's."""
    for _ in range(2):
        finite = np.where(np.isfinite(values), sign * values, -np.inf)
        best, step = x[finite.argmax()], x[1] - x[0]
        x = np.clip(np.linspace(best - step, best + step, 401), -REACH, REACH)
        values = np.concatenate([_at(derivative, x), [sign * finite.max()]])
        x = np.concatenate([x, [best]])
    return float(sign * np.nanmax(sign * values))


def _at(derivative: Function, x: Floats) -> Floats:
    values: Any = derivative(torch.from_numpy(x)).numpy()
    return np.asarray(values, dtype=np.float64)
