"""Codes come back from their packed form, whatever the shape."""

import pytest
import torch

from gtrans.runtime.bits import pack, pack_codes, unpack, unpack_codes

SHAPES = [(8,), (3, 16), (16, 3), (2, 8, 5), (1,), (7,), (5, 3), (3, 0), (9, 1, 2)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_come_back(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    dims = [None, *(d for d, n in enumerate(shape) if n % 8 == 0 and n)]
    for dim in dims:
        packed = pack_codes(codes, bits, dim)
        assert torch.equal(unpack_codes(packed, bits, dim, shape), codes)
        padding = 0 if dim is not None else -codes.numel() % 8
        assert sum(p.numel() for p in packed) == (codes.numel() + padding) * bits // 8


def test_codes_of_a_transposed_tensor_come_back() -> None:
    codes = torch.randint(0, 8, (16, 5), dtype=torch.uint8).t()
    for dim in (None, 1):
        assert torch.equal(unpack_codes(pack_codes(codes, 3, dim), 3, dim, codes.shape), codes)


def test_booleans_come_back() -> None:
    mask = torch.rand(3, 16, 5) < 0.5
    packed = pack(mask, 1)
    assert packed.shape == (3, 2, 5)
    assert torch.equal(unpack(packed, 1), mask)
