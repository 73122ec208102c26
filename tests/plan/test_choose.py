"""Of plans that are about as fast, the one that multiplies least; peak and time stay monotone."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gtrans.plan.choose import ALIKE, fastest, leanest
from gtrans.plan.rebuild import Candidate, Choice


def _candidate(peak: int, seconds: float, products: float) -> Candidate:
    return Candidate("", Choice(frozenset()), peak, seconds, seconds + products)


_PLANS = st.lists(
    st.builds(_candidate, st.integers(1, 9), st.integers(20, 30).map(float), st.integers(0, 5)),
    min_size=1,
    max_size=12,
)


@given(_PLANS)
def test_higher_peaks_take_less_time(plans: list[Candidate]) -> None:
    for front in (fastest(plans), leanest(plans)):
        for a, b in pairwise(front):
            assert a.peak > b.peak
            assert a.seconds < b.seconds


@given(_PLANS)
def test_every_budget_has_a_plan_that_is_about_the_fastest(plans: list[Candidate]) -> None:
    for budget in range(1, 10):
        fitting = [c for c in plans if c.peak <= budget]
        chosen = next((c for c in leanest(plans) if c.peak <= budget), None)
        assert (chosen is not None) == bool(fitting)
        if chosen is not None:
            assert chosen.seconds <= ALIKE * min(c.seconds for c in fitting)


def test_of_two_that_are_alike_the_one_that_multiplies_less() -> None:
    few, many, slow = _candidate(90, 1.05, 1), _candidate(100, 1.0, 7), _candidate(80, 1.5, 0)
    assert leanest([many, few, slow]) == [few, slow]
    assert fastest([many, few, slow]) == [many, few, slow]


def test_no_plan_is_so_lean_that_a_larger_budget_takes_longer() -> None:
    """With room for 10 the last one would multiply least, but with room for 8 another is faster."""
    high, low, lean = _candidate(10, 1.0, 5), _candidate(8, 1.02, 3), _candidate(9, 1.08, 0)
    assert leanest([high, low, lean]) == [low]
    assert leanest([high, lean]) == [lean]
