"""Positions in a map as places in the windows they were taken from.

    index = row * width + column                                     what a max pool returns
    row   = window's first row + (place // window's width) * dilation
    place = 0 .. window's height * width - 1                         1 to 8 bits

Any number of dimensions. Whole numbers are computed with as floating ones: Inductor's C++ divides
and packs those in vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from gtrans.runtime.bits import pack_codes, unpack_codes

_WIDTHS = (1, 2, 3, 4, 8)
_EXACT = 2**22  # float32 holds these and their halves


@dataclass(frozen=True)
class Windows:
    """The windows of a pool, a number for each dimension of the map.

    Attributes:
        map: sizes of what is pooled.
        size: of a window.
        stride: between windows.
        padding: in front of the map.
        dilation: between the places of a window.
    """

    map: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def bits(self) -> int | None:
        """Of a place; None if windows have more than 256."""
        return next((b for b in _WIDTHS if 2**b >= prod(self.size)), None)

    def pack(self, dim: int | None, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Packs the places of positions.

        Args:
            dim: as for `pack_codes`.
            index: [*outer, *windows], positions in the flattened map, each in its window.

        Returns:
            Tensors of uint8, `bits` for each position.
        """
        rest = index.to(self._wide)
        code, weight = torch.zeros_like(rest), 1
        for d in reversed(range(len(self.map))):
            outer = _quotient(rest, self.map[d])
            at = rest - outer * self.map[d] - self._first(index, d)
            code = code + (at / self.dilation[d]).round() * weight
            rest, weight = outer, weight * self.size[d]
        return pack_codes(code, self.bits or 8, dim)

    def unpack(self, dim: int | None, shape: Sequence[int], *packed: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`.

        Args:
            dim: as given to `pack`.
            shape: of the index.
            packed: what `pack` returned.

        Returns:
            [*shape] of int64.
        """
        rest = unpack_codes(packed, self.bits or 8, dim, shape).to(self._wide)
        index, weight = torch.zeros_like(rest), 1
        for d in reversed(range(len(self.map))):
            outer = _quotient(rest, self.size[d])
            at = (rest - outer * self.size[d]) * self.dilation[d] + self._first(rest, d)
            index = index + at * weight
            rest, weight = outer, weight * self.map[d]
        return index.to(torch.int64)

    @property
    def _wide(self) -> torch.dtype:
        return torch.float32 if prod(self.map) <= _EXACT else torch.float64

    def _first(self, like: torch.Tensor, d: int) -> torch.Tensor:
        """Where the windows begin along a dimension; broadcasts with a tensor of windows."""
        dim = like.dim() - len(self.map) + d
        count = torch.arange(like.shape[dim], device=like.device).to(self._wide)
        sizes = [-1 if k == dim else 1 for k in range(like.dim())]
        return (count * self.stride[d] - self.padding[d]).reshape(sizes)


def _quotient(x: torch.Tensor, divisor: int) -> torch.Tensor:
    return ((x + 0.5) / divisor).floor()
