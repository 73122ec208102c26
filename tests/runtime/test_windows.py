"""Positions in a map survive as places in their windows."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gtrans.runtime.windows import Windows


@st.composite
def pools(draw: st.DrawFn) -> tuple[Windows, bool]:
    rank = draw(st.integers(2, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    size, dilation = each(1, 3), each(1, 2)
    padding = tuple(draw(st.integers(0, n // 2)) for n in size)
    map_ = tuple(draw(st.integers((n - 1) * d + 1, 9)) for n, d in zip(size, dilation, strict=True))
    return Windows(map_, size, each(1, 3), padding, dilation), draw(st.booleans())


@given(pools(), st.sampled_from([1, 3, 8]), st.integers(0, 99))
def test_what_a_pool_returns_comes_back(
    pool: tuple[Windows, bool], channels: int, seed: int
) -> None:
    windows, ceil = pool
    x = torch.randn(1, channels, *windows.map, generator=torch.Generator().manual_seed(seed))
    run = F.max_pool2d if len(windows.map) == 2 else F.max_pool3d
    _, index = run(x, windows.size, windows.stride, windows.padding, windows.dilation, ceil, True)
    dim = 1 if channels == 8 else None
    packed = windows.pack(dim, index)
    assert torch.equal(windows.unpack(dim, tuple(index.shape), *packed), index)
    assert windows.bits is not None
    assert sum(p.numel() for p in packed) == -(-index.numel() // 8) * windows.bits


def test_maps_beyond_the_whole_numbers_of_float32() -> None:
    side = 4097
    windows = Windows((side, side), (2, 2), (2, 2), (0, 0), (1, 1))
    rows, columns = torch.tensor([0, 3, 4095]), torch.tensor([1, 2, 4095])
    index = torch.zeros(2048, 2048, dtype=torch.int64)
    first = torch.arange(2048) * 2
    index += first[:, None] * side + first
    index[rows // 2, columns // 2] = rows * side + columns
    packed = windows.pack(0, index)
    assert torch.equal(windows.unpack(0, (2048, 2048), *packed), index)


@pytest.mark.parametrize(("size", "bits"), [(1, 1), (2, 2), (4, 4), (5, 8), (16, 8), (17, None)])
def test_bits_of_a_place(size: int, bits: int | None) -> None:
    assert Windows((32, 32), (size, size), (1, 1), (0, 0), (1, 1)).bits == bits
