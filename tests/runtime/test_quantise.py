"""Codes of tensors: errors within a step, unbiased by quadrature, zeros and strides kept."""

import pytest
import torch

from gtrans.analysis.rounding import expected_range, relative_error
from gtrans.runtime import quantise
from gtrans.runtime.noise import noise_seeds
from gtrans.runtime.quantise import Grid, decode, encode, frame, group_size, memory_order


def coded(grid: Grid, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        noise = noise_seeds([torch.zeros(1)], [0])[0] if grid.stochastic else None
    parts = frame(grid, x)
    return decode(grid, x.shape, x.dtype, *parts, *encode(grid, x, noise, *parts))


def steps(grid: Grid, x: torch.Tensor) -> torch.Tensor:
    """[groups, 1]: the step of each group."""
    plain = Grid(grid.bits, grid.group, grid.order, grid.zeros)
    return frame(plain, x)[1].to(x.dtype) / max(1, plain.largest)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_error_is_at_most_a_step(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(6, 64) + 5).to(dtype)
    step = steps(Grid(bits, 32, (0, 1)), x.double())
    slack = 8 * torch.finfo(dtype).eps * float(x.abs().max())
    for stochastic, share in ((False, 0.5), (True, 1.0)):
        error = (
            coded(Grid(bits, 32, (0, 1), stochastic=stochastic), x).double() - x.double()
        ).abs()
        assert bool((error.reshape(-1, 32) <= share * step + slack).all())


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_is_unbiased_by_quadrature(
    monkeypatch: pytest.MonkeyPatch, bits: int, zeros: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64, dtype=torch.float64)
    x = x.relu() if zeros else x
    grid, draws = Grid(bits, 64, (0, 1), zeros=zeros, stochastic=True), 400
    mean = torch.zeros_like(x)
    for i in range(draws):
        u = (i + 0.5) / draws
        monkeypatch.setattr(quantise, "uniforms", lambda seed, shape, n, u=u: [u] * n)
        mean += coded(grid, x) / draws
    # The midpoint rule on a step function errs by at most half a cell.
    assert bool(((mean - x).abs() <= 0.51 / draws * steps(grid, x)).all())


def test_zeros_and_signs_are_exact() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64).relu()
    x[3] = 0
    x[4] = 7.0
    found = coded(Grid(2, 64, (0, 1), zeros=True, stochastic=True), x)
    assert torch.equal(found > 0, x > 0)
    assert torch.equal(found[3:5], x[3:5])


def test_averages_leave_less_to_code() -> None:
    torch.manual_seed(0)
    slow = torch.nn.functional.interpolate(torch.randn(2, 8, 2, 2), scale_factor=8.0)
    x = 10 * slow + 0.1 * torch.randn(2, 8, 16, 16)
    plain, blocks = (Grid(2, 256, (0, 1, 2, 3), block=side, stochastic=True) for side in (0, 8))
    error = [float((coded(g, x) - x).norm()) for g in (plain, blocks)]
    assert error[1] < 0.05 * error[0]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3)])
def test_strides_stay(order: tuple[int, ...]) -> None:
    back = sorted(range(4), key=order.__getitem__)
    x = torch.randn([[2, 8, 4, 4][d] for d in order]).permute(back)
    assert memory_order(x) == order
    for block in (0, 2):
        found = coded(Grid(8, 32, order, block=block), x)
        assert found.stride() == x.stride()
        torch.testing.assert_close(found, x, atol=0.05, rtol=0)


def test_groups() -> None:
    assert group_size([3, 197, 192], 192) == 192
    assert group_size([3, 7, 56], 256) == 168
    assert group_size([3, 5], 256) is None
    # Parts of rows rather than larger groups across them, but not groups of half the size.
    assert group_size([1536, 384], 256) == 192
    assert group_size([4, 10, 24], 256) == 240
    assert group_size([16, 264], 256) == 192
    assert memory_order(torch.randn(4, 4)[:, :2]) is None


def test_predicted_errors_are_those_of_normal_numbers() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 256)
    assert abs(float((x.amax(1) - x.amin(1)).mean()) / expected_range(256) - 1) < 0.02
    for bits, stochastic in ((2, True), (4, True), (4, False), (8, False)):
        found = float(
            (coded(Grid(bits, 256, (0, 1), stochastic=stochastic), x) - x).norm() / x.norm()
        )
        predicted = relative_error(bits, 256, stochastic=stochastic)
        assert abs(found / predicted - 1) < 0.05


def test_special_values() -> None:
    x = torch.zeros(4, 8)
    assert torch.equal(coded(Grid(2, 8, (0, 1), stochastic=True), x), x)
    x[1, 0] = torch.nan
    x[2, 0] = torch.inf
    found = coded(Grid(2, 8, (0, 1), stochastic=True), x)
    assert torch.equal(found[[0, 3]], x[[0, 3]])
    assert not bool(found[1:3].isfinite().any())
