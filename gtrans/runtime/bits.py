"""Small whole numbers packed into bytes, in plain ATen that backends fuse.

The numbers of a byte come from places that lie far apart along one dimension (of bits: places
k * size/8 + j, k = 0..7), not from neighbours: packing is then a few contiguous reads, sums and one
contiguous write. A byte is summed up as a floating number, and bits are tested as 32-bit integers:
Inductor's C++ is scalar, and up to ten times slower, where booleans meet integers of 8 bits.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch.nn.functional import pad

# Widths that divide a byte, low bits first: three bits are kept as a tensor of two and one of one.
_FIELDS: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def packed_dim(val: torch.Tensor) -> int | None:
    """The outermost dimension of known size that divides by eight: its planes are the longest runs.

    Args:
        val: a tensor, fake or not; sizes that are symbols are not known.
    """
    for dim, size in enumerate(val.shape):
        if isinstance(size, int) and size % 8 == 0 and size > 0:
            return dim
    return None


def pack(mask: torch.Tensor, dim: int) -> torch.Tensor:
    """Packs booleans eight to a byte along a dimension.

    Args:
        mask: [*a, n, *b] of bool, n a multiple of 8.
        dim: which dimension n is.

    Returns:
        [*a, n / 8, *b] of uint8.
    """
    return _pack(mask, 1, dim)


def unpack(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of `pack`.

    Args:
        packed: [*a, m, *b] of uint8.
        dim: which dimension m is.

    Returns:
        [*a, 8 * m, *b] of bool.
    """
    return _unpack(packed, 1, dim).to(torch.int32) > 0


def pack_codes(codes: torch.Tensor, bits: int, dim: int | None) -> tuple[torch.Tensor, ...]:
    """Packs numbers of 1 to 4 bits, or 8.

    Args:
        codes: [*s], whole numbers below 2**bits in a floating dtype.
        bits: 1, 2, 3, 4 or 8.
        dim: a dimension whose size is a multiple of 8; None packs the flattened, padded codes.

    Returns:
        Tensors of uint8 with numel * bits / 8 bytes together, before padding.
    """
    if dim is None:
        codes, dim = pad(codes.reshape(-1), (0, -codes.numel() % 8)), 0
    packed = []
    *lower, last = _FIELDS[bits]
    for width in lower:
        rest = (codes * 2.0**-width).floor()
        packed.append(_pack(codes - rest * 2.0**width, width, dim))
        codes = rest
    return (*packed, _pack(codes, last, dim))


def unpack_codes(
    packed: Sequence[torch.Tensor], bits: int, dim: int | None, shape: Sequence[int]
) -> torch.Tensor:
    """The inverse of `pack_codes`.

    Args:
        packed: what it returned.
        bits: as given to it.
        dim: as given to it.
        shape: of the codes; read only if dim is None.

    Returns:
        [*shape] of uint8.
    """
    codes, shift = None, 0
    for width, field in zip(_FIELDS[bits], packed, strict=True):
        part = _unpack(field, width, 0 if dim is None else dim)
        codes = part if codes is None else codes | (part << shift)
        shift += width
    assert codes is not None
    return codes if dim is not None else codes[: prod(shape)].reshape(list(shape))


def split(x: torch.Tensor, width: int, dim: int) -> tuple[torch.Tensor, ...]:
    """The parts of a tensor whose codes share bytes.

    Args:
        x: [*a, n, *b], n a multiple of 8.
        width: bits of a code: 1, 2, 4 or 8.
        dim: which dimension n is.

    Returns:
        8 / width tensors of [*a, n * width / 8, *b].
    """
    count = 8 // width
    sizes = [*x.shape[:dim], count, x.shape[dim] // count, *x.shape[dim + 1 :]]
    return x.reshape(sizes).unbind(dim)


def join(planes: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Bytes of the codes of the parts that `split` returned.

    Where codes are computed part by part, a compiler need not write them to memory in between.

    Args:
        planes: 8 / width tensors of [*s], whole numbers below 2**width in any dtype.
        width: bits of a code.

    Returns:
        [*s] of uint8.
    """
    first, *others = planes
    packed = first.to(torch.float32)
    for k, plane in enumerate(others, 1):
        packed = packed + plane.to(torch.float32) * 2.0 ** (k * width)
    return packed.to(torch.uint8)


def _pack(codes: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    return join(split(codes, width, dim), width)


def _unpack(packed: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    low = 2**width - 1
    planes = [(packed >> (k * width)) & low for k in range(8 // width)]
    return torch.stack(planes, dim).flatten(dim, dim + 1)
