"""Eight booleans to a byte, in plain ATen that backends fuse.

The eight bits of a byte come from eight places that lie far apart along one dimension (places
k * size/8 + j, k = 0..7), not from neighbours: packing is then eight contiguous reads, ors and one
contiguous write, which vectorises.
"""

import torch


def pack(mask: torch.Tensor, dim: int) -> torch.Tensor:
    """Packs booleans eight to a byte along a dimension.

    Args:
        mask: [*a, n, *b] of bool, n a multiple of 8.
        dim: which dimension n is.

    Returns:
        [*a, n / 8, *b] of uint8.
    """
    sizes = [*mask.shape[:dim], 8, mask.shape[dim] // 8, *mask.shape[dim + 1 :]]
    planes = mask.reshape(sizes).to(torch.uint8)
    packed: torch.Tensor = planes.select(dim, 0)
    for k in range(1, 8):
        packed = packed | (planes.select(dim, k) << k)
    return packed


def unpack(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of `pack`.

    Args:
        packed: [*a, m, *b] of uint8.
        dim: which dimension m is.

    Returns:
        [*a, 8 * m, *b] of bool.
    """
    planes: list[torch.Tensor] = [(packed >> k) & 1 for k in range(8)]
    return torch.stack(planes, dim).flatten(dim, dim + 1).to(torch.bool)
