"""Bits are spent where they matter, never more than there are."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtrans.errors import OptionError
from gtrans.plan.widths import CHOICES, Widths, allocate

VALUES = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 100)), min_size=1, max_size=5)


def variance(costs: list[float], bits: tuple[int, ...]) -> float:
    return sum(c / (2**b - 1) ** 2 for c, b in zip(costs, bits, strict=True))


@settings(max_examples=60, deadline=None)
@given(VALUES, st.floats(2, 8))
def test_the_average_is_kept_and_one_step_back_from_it_is_optimal(
    values: list[tuple[int, float]], average: float
) -> None:
    sizes, costs = [v[0] for v in values], [v[1] for v in values]
    bits = allocate(sizes, costs, average)
    spent = sum(n * b for n, b in zip(sizes, bits, strict=True))
    assert spent <= average * sum(sizes) + 1e-9
    # Greedy steps on convex costs are optimal for what they spend.
    for other in itertools.product(CHOICES, repeat=len(sizes)):
        if sum(n * b for n, b in zip(sizes, other, strict=True)) <= spent:
            assert variance(costs, tuple(bits)) <= variance(costs, other) * 1.0001 + 1e-12


def test_the_sensitive_one_gets_the_bits() -> None:
    assert allocate([10, 10, 10], [1.0, 1000.0, 1.0], 4.0) == [2, 8, 2]


def test_fewer_bits_than_there_are() -> None:
    with pytest.raises(OptionError, match=r"bits must average at least 2, got 1\.5"):
        allocate([4], [1.0], 1.5)


def test_text() -> None:
    text = "1a2b3c4d.relu_1:4;1a2b3c4d.mm:8"
    assert str(Widths.parse(text)) == text
    for wrong in ("", "a", "a:3", "a:x", ":4"):
        with pytest.raises(OptionError, match="cannot read the widths"):
            Widths.parse(wrong)
