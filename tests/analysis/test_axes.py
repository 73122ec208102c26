"""The algebra of axes: splitting, joining and unifying keep masks consistent."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gtrans.analysis.axes import (
    Axis,
    atoms,
    concatenate,
    find,
    freeze,
    is_frozen,
    kept_size,
    labels,
    mask,
    merge,
    segment,
    split,
    unify,
)


def _erase(axis: Axis, seed: int) -> dict[Axis, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {a: torch.rand(a.size, generator=generator) < 0.4 for a in dict.fromkeys(atoms(axis))}


@given(st.lists(st.integers(2, 4), min_size=1, max_size=3), st.integers(0, 9))
def test_mask_of_a_product_is_the_outer_product(sizes: list[int], seed: int) -> None:
    whole = Axis(int(torch.tensor(sizes).prod()))
    parts = split(whole, sizes)
    assert parts is not None
    erased = _erase(whole, seed)
    expected = torch.ones(1, dtype=torch.bool)
    for part in parts:
        expected = (expected[:, None] & mask(part, erased)[None, :]).reshape(-1)
    assert torch.equal(mask(whole, erased), expected)
    kept = {a: int((~gone).sum()) for a, gone in erased.items()}
    assert kept_size(whole, kept) == int(mask(whole, erased).sum())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 9))
def test_mask_of_a_concatenation_is_the_concatenation(sizes: list[int], seed: int) -> None:
    whole = Axis(sum(sizes))
    parts = segment(whole, sizes)
    assert parts is not None
    erased = _erase(whole, seed)
    assert torch.equal(mask(whole, erased), torch.cat([mask(p, erased) for p in parts]))


@given(st.sampled_from([[2, 6], [4, 3], [12], [3, 2, 2]]), st.sampled_from([[2, 6], [6, 2], [12]]))
def test_unified_axes_have_one_mask_from_then_on(left: list[int], right: list[int]) -> None:
    a, b = Axis(12), Axis(12)
    assert split(a, left) is not None
    assert split(b, right) is not None
    unify(a, b)
    if not is_frozen(a):
        erased = _erase(a, 3)
        assert torch.equal(mask(a, erased), mask(b, erased))


def test_what_is_learnt_later_holds_for_earlier_uses() -> None:
    a, b = Axis(12), Axis(12)
    unify(a, b)
    heads = split(b, [3, 4])
    assert heads is not None
    assert [x.size for x in atoms(a)] == [3, 4]
    assert labels(a, heads[0]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert labels(a, heads[1]).tolist() == [0, 1, 2, 3] * 3


def test_sizes_that_do_not_fit_freeze_both() -> None:
    a, b = merge([Axis(4), Axis(6)]), merge([Axis(6), Axis(4)])
    unify(a, b, "why")
    assert {x.frozen for x in (*atoms(a), *atoms(b))} == {"why"}


def test_freezing_survives_splitting_and_unifying() -> None:
    a = Axis(6)
    freeze(a, "input")
    assert all(x.frozen == "input" for part in split(a, [2, 3]) or [] for x in atoms(part))
    b = Axis(6)
    unify(b, a)
    assert is_frozen(b)


def test_a_concatenation_splits_where_every_piece_does() -> None:
    a, b = Axis(4), Axis(6)
    halves = split(concatenate([a, b]), [5, 2])
    assert halves is not None
    assert [x.size for x in atoms(a)] == [2, 2]
    assert find(atoms(a)[1]) is find(atoms(b)[1])
    assert split(concatenate([Axis(3), Axis(5)]), [4, 2]) is None


def test_a_product_is_cut_along_its_leading_factor() -> None:
    whole = merge([n := Axis(3), d := Axis(4)])
    cut = segment(whole, [4, 8])
    assert cut is not None
    assert find(n).kind == "cat"
    assert atoms(cut[1])[1] is find(d)
    assert segment(merge([Axis(3), Axis(4)]), [6, 6]) is None


def test_an_axis_within_itself_is_frozen() -> None:
    a = Axis(4)
    unify(a, concatenate([a, Axis(0)]))
    assert not is_frozen(a)
    b = Axis(4)
    unify(concatenate([Axis(2), Axis(2)]), b)
    product = merge([b, b])
    unify(product, Axis(16))
    assert product.size == 16
