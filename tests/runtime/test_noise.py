"""Noise of our own: uniform, independent across elements, salts and seeds, and nobody else's."""

import itertools

import pytest
import torch

from gtrans.runtime.noise import noise_seeds, salt_of, uniform, uniforms


def noise_seed(fresh: list[torch.Tensor]) -> torch.Tensor:
    return noise_seeds(fresh, [0])[0]


def seed_for(number: int, *fresh: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(number)
        return noise_seed(list(fresh) or [torch.zeros(1)])


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_numbers_are_uniform() -> None:
    u = uniform(seed_for(0) ^ salt_of("x"), (64, 1024)).double()
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    counts = torch.histc(u.flatten(), 256, 0, 1)
    # 255 degrees of freedom: mean 255, deviation 22.6.
    chi_square = float(((counts - 256) ** 2 / 256).sum())
    assert 150 < chi_square < 370


def test_a_salt_changes_the_seed_of_a_draw_and_no_other() -> None:
    torch.manual_seed(0)
    first, second, third = noise_seeds([torch.ones(5)], [0, salt_of("a"), salt_of("b")])
    assert torch.equal(second, first ^ salt_of("a"))
    assert torch.equal(third, first ^ salt_of("b"))


def test_elements_salts_and_seeds_are_independent() -> None:
    n = 1 << 16
    bound = 5 / n**0.5
    seeds = [seed_for(i) for i in range(3)]
    draws = [uniform(s ^ salt_of(name), (n,)) for s in seeds for name in ("a", "b")]
    for a, b in itertools.combinations(draws, 2):
        assert abs(correlation(a, b)) < bound
    for lag in (1, 2, 8, 64, 256, 4096):
        assert abs(correlation(draws[0][lag:], draws[0][:-lag])) < bound


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_tensors_that_share_words_are_uniform_and_independent(count: int) -> None:
    n = 1 << 16
    drawn = [u.double() for u in uniforms(seed_for(1), (64, n // 64), count)]
    assert len(drawn) == count
    for u in drawn:
        assert 0 <= float(u.min()) < float(u.max()) < 1
        counts = torch.histc(u.flatten(), 256, 0, 1)
        assert 150 < float(((counts - n / 256) ** 2 / (n / 256)).sum()) < 370
    for a, b in itertools.combinations(drawn, 2):
        assert abs(correlation(a, b)) < 5 / n**0.5


def test_words_cut_in_two_have_a_mean_of_one_half() -> None:
    found = sorted({float(u) for u in uniforms(seed_for(2), (1 << 18,), 2)[0]})
    assert min(found) == 2.0**-17
    assert all((u * 2**17) % 2 == 1 for u in found)


def test_one_element_over_many_seeds() -> None:
    drawn = torch.stack([uniform(seed_for(i), (4,)) for i in range(4000)]).double()
    assert float((drawn.mean(0) - 0.5).abs().max()) < 5 * (1 / 12 / 4000) ** 0.5
    assert abs(correlation(drawn[:, 0], drawn[:, 1])) < 5 / 4000**0.5


def test_the_generator_decides_and_stays_where_it_is() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = noise_seed([torch.ones(5)])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(noise_seed([torch.ones(5)]), first)
    torch.rand(1)
    assert not torch.equal(noise_seed([torch.ones(5)]), first)
    torch.manual_seed(3)
    assert torch.equal(noise_seed([torch.ones(5)]), first)


@pytest.mark.parametrize("value", [torch.ones(500), torch.arange(500)])
def test_a_changed_parameter_or_input_gives_other_numbers(value: torch.Tensor) -> None:
    torch.manual_seed(0)
    other = value.clone()
    other[0] += 1
    assert not torch.equal(noise_seed([value]), noise_seed([other]))
    assert not torch.equal(noise_seed([value, value]), noise_seed([value]))


def test_shapes() -> None:
    seed = seed_for(0)
    assert uniform(seed, ()).shape == ()
    assert uniform(seed, (0, 3)).shape == (0, 3)
    flat = uniform(seed, (24,))
    assert torch.equal(uniform(seed, (2, 3, 4)), flat.reshape(2, 3, 4))


@pytest.mark.inductor
def test_inductor_computes_the_same_numbers() -> None:
    seed = seed_for(0)
    compiled = torch.compile(lambda s: uniform(s, (33, 65)), fullgraph=True)
    assert torch.equal(compiled(seed), uniform(seed, (33, 65)))
