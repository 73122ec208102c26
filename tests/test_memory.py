"""Memory budgets as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtrans.errors import OptionError
from gtrans.memory import Budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GiB", 6 * 2**30),
        ("500 MB", 500 * 10**6),
        ("1.5kib", 1536),
        (" 12B ", 12),
        ("4096", 4096),
        (4096, 4096),
    ],
)
def test_bytes(text: str | int, expected: int) -> None:
    assert Budget.parse(text) == Budget(bytes=expected)
    assert Budget.parse(text).in_bytes(10**12) == expected


@pytest.mark.parametrize(("text", "expected"), [("40%", 0.4), (0.4, 0.4), ("0.25", 0.25), (1, 1)])
def test_fractions_of_the_plain_peak(text: str | float, expected: float) -> None:
    budget = Budget.parse(text)
    assert budget.fraction == pytest.approx(expected)
    assert budget.in_bytes(1000) == int(1000 * expected)


@pytest.mark.parametrize("text", ["", "GiB", "six GiB", "-1GB", "0", "0%", "120%", "1.5", "3XB"])
def test_anything_else_is_refused_with_examples(text: str) -> None:
    with pytest.raises(OptionError, match=r"cannot read the memory budget .*'6GiB'"):
        Budget.parse(text)


@pytest.mark.parametrize("value", [True, None, 1.5, -3, [1]])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(OptionError, match="cannot read the memory budget"):
        Budget.parse(value)  # type: ignore[arg-type]


@given(st.integers(2, 2**50) | st.floats(1e-3, 1.0))
def test_a_budget_reads_back_as_it_prints(value: int | float) -> None:
    budget = Budget.parse(value)
    again = Budget.parse(str(budget))
    assert Budget.parse(budget) is budget
    assert again.bytes == budget.bytes
    if budget.fraction is not None:
        assert again.fraction == pytest.approx(budget.fraction, rel=1e-4)
