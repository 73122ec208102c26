"""The composition table: its arithmetic, and each row by enumeration on small tensors."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gtrans.contract import (
    LEVELS,
    Aligned,
    Attribution,
    Changed,
    Close,
    Contract,
    Exact,
    Iterative,
    Local,
    Unbiased,
    compose,
    compose_all,
    level,
)
from gtrans.errors import ContractError

contracts: st.SearchStrategy[Contract] = st.one_of(
    st.builds(Exact, st.booleans()),
    st.builds(Close, st.floats(1e-6, 0.5)),
    st.builds(
        Unbiased,
        st.sampled_from(["the loss", "a smoothed loss"]),
        st.frozensets(st.sampled_from(["a", "b", "c"])),
    ),
    st.builds(Iterative, st.integers(0, 4), st.integers(0, 4)),
    st.just(Aligned()),
    st.just(Local()),
    st.just(Attribution()),
    st.builds(Changed, st.one_of(st.builds(Exact, st.booleans()), st.builds(Close))),
)


# ------------------------------------------------------------------------------ arithmetic


@given(contracts, contracts)
def test_order_does_not_matter(a: Contract, b: Contract) -> None:
    first, second = compose(a, b), compose(b, a)
    assert first.rank == second.rank
    if not isinstance(first, (Attribution, Iterative)):
        assert first == second


@given(contracts)
def test_exact_is_the_unit(a: Contract) -> None:
    assert compose(a, Exact()) == a
    assert compose_all([]) == Exact()


@given(contracts, contracts)
def test_no_pass_raises_the_level(a: Contract, b: Contract) -> None:
    assert compose(a, b).rank >= max(a.rank, b.rank)


@given(contracts, contracts, contracts)
def test_grouping_does_not_matter(a: Contract, b: Contract, c: Contract) -> None:
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    assert left.rank == right.rank
    if isinstance(left, Close) and isinstance(right, Close):
        assert left.rtol == pytest.approx(right.rtol)


@given(contracts, contracts, contracts)
def test_a_weaker_part_never_makes_a_stronger_whole(a: Contract, b: Contract, c: Contract) -> None:
    if a.rank <= b.rank and type(a) is not type(b):
        assert compose(a, c).rank <= max(compose(b, c).rank, Aligned.rank)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (Exact(True), Exact(False), Exact(False)),
        (Close(0.1), Exact(), Close(0.1)),
        (Close(0.1), Unbiased(), Aligned()),
        (Unbiased(noise=frozenset("a")), Unbiased(noise=frozenset("a")), Aligned()),
        (Unbiased("l", frozenset("a")), Unbiased("m", frozenset("b")), Aligned()),
        (
            Unbiased(noise=frozenset("a")),
            Unbiased(noise=frozenset("b")),
            Unbiased(noise=frozenset("ab")),
        ),
        (Iterative(2, 5), Iterative(3, 4), Iterative(2, 5)),
        (Iterative(2, 5), Close(), Aligned()),
        (Aligned(), Iterative(), Aligned()),
        (Local(), Aligned(), Local()),
        (Attribution(), Local(), Attribution()),
        (Changed(), Close(0.1), Changed(Close(0.1))),
        (Changed(Exact(False)), Changed(Close(0.1)), Changed(Close(0.1))),
    ],
    ids=str,
)
def test_rows_of_the_table(a: Contract, b: Contract, expected: Contract) -> None:
    assert compose(a, b) == expected


def test_contracts_print_what_they_admit() -> None:
    assert str(Exact()) == "exact"
    assert str(Exact(bitwise=False)) == "exact (reassociated)"
    assert str(Close(0.05)) == "close (0.05)"
    assert str(Iterative(3, 8)) == "iterative (3 sweeps, exact at 8)"
    assert str(Unbiased()) == "unbiased"


def test_levels_by_name() -> None:
    assert level("close") is Close
    assert [LEVELS[n].rank for n in LEVELS] == sorted(c.rank for c in LEVELS.values())
    with pytest.raises(ContractError, match="unknown contract 'closed'; did you mean 'close'"):
        level("closed")


# -------------------------------------------------------------- the rows, on small tensors
#
# Two layers y = A x, z = B y; the backward multiplies the cotangent by B^T and then A^T.

A = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
B = torch.tensor([[0.5, -1.0], [2.0, 1.0]], dtype=torch.float64)
G = torch.tensor([1.0, -3.0], dtype=torch.float64)
TRUE = A.T @ (B.T @ G)
SIGNS = [torch.tensor(s, dtype=torch.float64) for s in itertools.product((-1.0, 1.0), repeat=2)]


def relative(found: torch.Tensor) -> float:
    return float((found - TRUE).norm() / TRUE.norm())


@given(st.floats(0, 0.3), st.floats(0, 0.3))
def test_close_errors_add_up_to_at_most_the_composed_bound(a: float, b: float) -> None:
    """Uniform scalings reach the bound (1 + a)(1 + b) - 1 exactly."""
    found = (1 + a) * A.T @ ((1 + b) * (B.T @ G))
    composed = compose(Close(a), Close(b))
    assert isinstance(composed, Close)
    assert relative(found) <= composed.rtol + 1e-12
    assert relative(found) >= composed.rtol - 1e-12


def test_independent_unbiased_layers_are_unbiased() -> None:
    """All sixteen pairs of signs of two independent noises."""
    draws = [
        A.T @ ((1 + 0.5 * s) * (B.T @ ((1 + 0.5 * t) * G)))
        for s, t in itertools.product(SIGNS, SIGNS)
    ]
    assert torch.allclose(torch.stack(draws).mean(0), TRUE, atol=1e-12)


def test_unbiased_layers_that_share_their_noise_are_biased() -> None:
    draws = [A.T @ ((1 + 0.5 * s) * (B.T @ ((1 + 0.5 * s) * G))) for s in SIGNS]
    assert relative(torch.stack(draws).mean(0)) > 0.05


def test_a_close_error_biases_an_expectation() -> None:
    draws = [A.T @ ((1 + 0.5 * s) * (B.T @ (1.01 * G))) for s in SIGNS]
    assert relative(torch.stack(draws).mean(0)) == pytest.approx(0.01)


def test_noise_before_a_nonlinear_rule_is_biased() -> None:
    """Why unbiased and close do not make close: the rule is not linear in its noisy residual."""
    x, h = 0.3, 0.5
    slope = [1 - math.tanh(x + h * s) ** 2 for s in (-1, 1)]
    assert abs(sum(slope) / 2 - (1 - math.tanh(x) ** 2)) > 0.05


def test_two_iterations_are_exact_where_both_are() -> None:
    """Neumann sweeps of two nilpotent systems: exact after 2 and after 3 sweeps."""
    n2 = torch.zeros(3, 3, dtype=torch.float64)
    n2[1, 0] = 1.0
    n3 = torch.zeros(3, 3, dtype=torch.float64)
    n3[1, 0], n3[2, 1] = 2.0, -1.0
    g = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def sweeps(n: torch.Tensor, v: torch.Tensor, count: int) -> torch.Tensor:
        total, term = v.clone(), v
        for _ in range(count - 1):
            term = n @ term
            total = total + term
        return total

    eye = torch.eye(3, dtype=torch.float64)
    exact = torch.linalg.solve(eye - n3, torch.linalg.solve(eye - n2, g))
    composed = compose(Iterative(2, 2), Iterative(3, 3))
    assert isinstance(composed, Iterative)
    at = composed.exact_at
    assert torch.allclose(sweeps(n3, sweeps(n2, g, at), at), exact)
    assert not torch.allclose(sweeps(n3, sweeps(n2, g, at - 1), at - 1), exact)


def test_an_iteration_over_approximate_values_has_no_exact_point() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    n = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    exact = torch.linalg.solve(eye - n, G)
    total, term = G.clone(), G
    for _ in range(50):
        term = 1.05 * (n @ term)
        total = total + term
    assert not torch.allclose(total, exact, rtol=1e-3)


def test_aligned_layers_do_not_add_up() -> None:
    """Each of two rotations by 50 degrees keeps a positive inner product; together they do not."""
    c, s = math.cos(math.radians(50)), math.sin(math.radians(50))
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    assert float(turn @ G @ G) > 0
    assert float((turn @ turn @ G) @ G) < 0


def test_nothing_flows_across_a_local_cut() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    weight = B.clone().requires_grad_()
    z = weight @ (A @ x).detach()
    z.sum().backward()
    assert weight.grad is not None
    assert x.grad is None
