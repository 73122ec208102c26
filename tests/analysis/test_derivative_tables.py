"""Tables of levels: optimal, as symmetric as the derivative, and as good as published figures."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn import functional

from gtrans.analysis.derivative_tables import (
    Samples,
    Table,
    Weight,
    best_steps,
    nearest_table,
    sample,
    stochastic_table,
)

Function = Callable[[torch.Tensor], torch.Tensor]


def derivative(function: Function) -> Function:
    def of(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).sum(), x)
        return gradient

    return of


GELU = sample(derivative(functional.gelu))
SILU = sample(derivative(functional.silu))
MISH = sample(derivative(functional.mish))
SOFTPLUS = sample(derivative(functional.softplus))


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_dynamic_program_finds_what_trying_all_finds(pieces: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    cells = 9
    w, f = random.uniform(0.1, 1, cells), random.normal(size=cells)

    def prefix(values: np.ndarray) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(values)])

    def error(ends: tuple[int, ...]) -> float:
        total = 0.0
        for i, j in zip((0, *ends), (*ends, cells), strict=True):
            mean = np.average(f[i:j], weights=w[i:j])
            total += float((w[i:j] * (f[i:j] - mean) ** 2).sum())
        return total

    ends, levels, found = best_steps(
        np.stack([prefix(w), prefix(w * f), prefix(w * f * f)]), pieces
    )
    best = min(error(inner) for inner in combinations(range(1, cells), pieces - 1))
    assert found == pytest.approx(best, abs=1e-12)
    assert error(tuple(ends[1:-1])) == pytest.approx(best, abs=1e-12)
    assert len(levels) == pieces


def test_two_bits_of_gelu_are_as_good_as_the_best_known() -> None:
    uniform, normal = nearest_table(GELU, 2), nearest_table(GELU, 2, "normal")
    assert uniform.mean_square <= 0.0085
    assert normal.mean_square <= 0.0081
    assert uniform.thresholds == pytest.approx([-0.46, 0, 0.46], abs=0.01)  # on a grid of 0.02
    assert uniform.levels == pytest.approx([-0.0156, 0.3228, 0.6772, 1.0156], abs=4e-3)
    assert nearest_table(MISH, 2).levels == pytest.approx(
        [-0.0312, 0.2954, 0.6666, 1.0116], abs=4e-3
    )


# Integral of (level - h')^2 over [-10, 10] with 1 to 4 bits for the tables that the authors of
# few-bit backward published (computed from `builtin.npz` of their package).
PUBLISHED: dict[Function, tuple[float, ...]] = {
    functional.gelu: (0.141047, 0.044358, 0.011983, 0.004109),
    functional.silu: (0.214978, 0.058370, 0.027237, 0.005352),
    functional.mish: (0.169904, 0.048136, 0.014086, 0.003850),
    functional.softplus: (0.368038, 0.060470, 0.012903, 0.003008),
    torch.sigmoid: (0.149231, 0.014744, 0.003295, 0.001094),
    torch.tanh: (1.260894, 0.119091, 0.026471, 0.008767),
}
POINTS = np.linspace(-10, 10, 400_001)[:-1] + 2.5e-5


def error_of(table: Table, h: np.ndarray, w: np.ndarray) -> float:
    levels = np.array(table.levels)[np.searchsorted(table.thresholds, POINTS)]
    return float((w * (levels - h) ** 2).sum())


def improved(h: np.ndarray, w: np.ndarray, thresholds: np.ndarray) -> float:
    """The error after alternating between the best levels and the best thresholds."""
    count = len(thresholds) + 1
    for _ in range(12):
        code = np.searchsorted(thresholds, POINTS)
        level = np.bincount(code, w * h, count) / np.bincount(code, w, count)
        for k, start in enumerate(np.searchsorted(POINTS, thresholds)):
            near = slice(max(0, start - 400), start + 400)  # to either side by 0.02
            gain = (h[near] - level[k]) ** 2 - (h[near] - level[k + 1]) ** 2
            thresholds[k] = POINTS[near][np.cumsum(w[near] * gain).argmin()]
    code = np.searchsorted(thresholds, POINTS)
    return float((w * (level[code] - h) ** 2).sum())


@pytest.mark.parametrize("weight", ["uniform", "normal"])
@pytest.mark.parametrize("function", PUBLISHED, ids=lambda f: f.__name__)
def test_no_table_is_better(function: Function, weight: Weight) -> None:
    samples = sample(derivative(function))
    h = derivative(function)(torch.from_numpy(POINTS)).numpy()
    density = np.exp(-(POINTS**2) / 2) / np.sqrt(2 * np.pi) if weight == "normal" else 1.0
    w = density * np.full_like(POINTS, 5e-5)
    for bits, published in enumerate(PUBLISHED[function], 1):
        table = nearest_table(samples, bits, weight)
        found = error_of(table, h, w)
        assert found <= improved(h, w, np.array(table.thresholds)) + 1e-6
        if weight == "uniform":
            assert found <= published + 1e-6
        else:
            assert found == pytest.approx(table.mean_square, abs=1e-8)


def test_most_published_tables_are_worse() -> None:
    better = 0
    for function, published in PUBLISHED.items():
        h = derivative(function)(torch.from_numpy(POINTS)).numpy()
        for bits, theirs in enumerate(published, 1):
            table = nearest_table(sample(derivative(function)), bits)
            better += error_of(table, h, np.full_like(POINTS, 5e-5)) < 0.99 * theirs
    assert better == 20  # of 24


@pytest.mark.parametrize("samples", [GELU, SILU, SOFTPLUS])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_tables_are_as_antisymmetric_as_the_derivative(samples: Samples, bits: int) -> None:
    table = nearest_table(samples, bits)
    assert [a + b for a, b in zip(table.levels, table.levels[::-1], strict=True)] == pytest.approx(
        [1.0] * 2**bits, abs=1e-9
    )
    assert table.thresholds == pytest.approx([-t for t in table.thresholds[::-1]], abs=1e-9)


@pytest.mark.parametrize("samples", [GELU, SILU, MISH, SOFTPLUS])
def test_more_bits_err_less(samples: Samples) -> None:
    for tables in (
        [nearest_table(samples, b) for b in (1, 2, 3, 4)],
        [nearest_table(samples, b, "normal") for b in (1, 2, 3, 4)],
        [stochastic_table(samples, b) for b in (1, 2, 3, 4)],
    ):
        errors = [t.mean_square for t in tables]
        assert errors == sorted(errors, reverse=True)
        assert len(set(errors)) == 4


def test_the_error_is_the_one_of_looking_levels_up() -> None:
    table = nearest_table(GELU, 3)
    x = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codes = torch.bucketize(x, torch.tensor(table.thresholds, dtype=x.dtype))
    error = torch.tensor(table.levels, dtype=x.dtype)[codes] - derivative(functional.gelu)(x)
    assert float(error.square().mean()) == pytest.approx(table.mean_square, rel=0.03)
    assert float(error.abs().max()) <= table.largest + 1e-9


def test_stochastic_levels_cover_the_range_of_the_derivative() -> None:
    table = stochastic_table(GELU, 2)
    assert (table.levels[0], table.levels[-1]) == pytest.approx((-0.128904, 1.128904), abs=5e-6)
    x = torch.linspace(-30, 30, 100_001, dtype=torch.float64)
    for samples, function in ((GELU, functional.gelu), (SOFTPLUS, functional.softplus)):
        levels, h = stochastic_table(samples, 2).levels, derivative(function)(x)
        assert levels[0] < float(h.min())
        assert float(h.max()) < levels[-1]
    assert table.mean_square == pytest.approx(0.0239, abs=1e-4)


def test_what_no_table_fits_is_recognised() -> None:
    def of(function: Function) -> Samples:
        return sample(derivative(function))

    assert not of(torch.exp).is_bounded
    assert not of(lambda x: x * x).is_bounded
    assert not of(torch.sqrt).is_finite
    assert of(functional.relu).is_piecewise_constant
    assert of(functional.hardtanh).is_piecewise_constant
    for smooth in (GELU, SILU, MISH, SOFTPLUS, of(torch.sin), of(functional.hardswish)):
        assert smooth.is_finite
        assert smooth.is_bounded
        assert not smooth.is_piecewise_constant
