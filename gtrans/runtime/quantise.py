"""Tensors as small whole numbers, group by group, in plain ATen that backends fuse.

    low, span = range of a group of consecutive elements          step = span / (2**bits - 1)
    code      = floor((x - low) / step + u)                       u ~ U[0, 1), or 1/2 for nearest
    x'        = low + step * code                                 E[x'] = x

Two variants change what is coded. `zeros` keeps zeros exact by a code of their own, for outputs of
ReLU, whose mask is then exact as well; `block` first takes the averages of square blocks of a map
away (kept in 16 bits), which leaves a smaller range to code. The ranges and averages, a frame, do
not depend on the noise: several copies of a value share theirs.

Codes are clamped to their range, which is that of the tensor itself: nothing is ever clipped.

Sources: group-wise stochastic rounding: ActNN (arXiv:2104.14129), GACT (arXiv:2206.11357); averages
apart from the rest: DIVISION (arXiv:2302.05206); groups that lie within one attention head: Mesa
(arXiv:2111.11124), whose running range estimates are left out, because they clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch.nn.functional import avg_pool2d

from gtrans.runtime.bits import pack_codes, unpack_codes
from gtrans.runtime.noise import uniform

_WIDEN = 1 + 2.0**-20
_TINIEST = 2.0**-100
_WHOLE = 2.0**15 - 1


@dataclass(frozen=True)
class Grid:
    """How a tensor is coded.

    Attributes:
        bits: 1, 2, 4 or 8 bits per element.
        group: consecutive elements, in memory, that share their statistics; a multiple of 8.
        order: the dimensions from the outermost to the innermost in memory.
        zeros: code 0 stands for zero, the others for positive numbers.
        block: side of the square blocks of a [B, C, H, W] whose averages are kept apart; 0 for
            none.
        stochastic: round at random; otherwise to the nearest code.
    """

    bits: int
    group: int
    order: tuple[int, ...]
    zeros: bool = False
    block: int = 0
    stochastic: bool = False

    @property
    def rows_are_dense(self) -> bool:
        """Whether the last dimension is the innermost in memory."""
        return self.order[-1:] == (len(self.order) - 1,)

    @property
    def largest(self) -> int:
        """How many steps the span of a group has."""
        return (1 << self.bits) - 1 - self.zeros

    def frame_bytes(self, numel: float) -> float:
        """What is kept of so many elements for all copies together."""
        averages = 2 * numel / self.block**2 if self.block else 0.0
        return numel / self.group * 8 + averages

    def code_bytes(self, numel: float) -> float:
        """What is kept of so many elements for one copy."""
        return numel * self.bits / 8


def frame(grid: Grid, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The ranges that a tensor is coded in.

    Args:
        grid: how; its bits do not matter.
        x: [*s], floating, dense in the grid's order of dimensions.

    Returns:
        low [groups, 1] and span [groups, 1]; if there are blocks, averages and their unit.
    """
    wide = x.to(_wide(x.dtype))
    parts: list[torch.Tensor] = []
    if grid.block:
        averages = avg_pool2d(wide, grid.block)
        unit = averages.abs().amax().clamp_min(_TINIEST) / _WHOLE
        # As whole numbers: a compiler may leave out a conversion to a smaller float and back.
        parts = [unit, (averages / unit).round().to(torch.int16)]
    groups = _groups(grid, wide, parts)
    low = _smallest_positive(groups) if grid.zeros else groups.amin(1, keepdim=True)
    span = ((groups.amax(1, keepdim=True) - low) * _WIDEN).clamp_min(_TINIEST)
    return (low, span, *parts)


def encode(
    grid: Grid, x: torch.Tensor, seed: torch.Tensor | None, *parts: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Codes a tensor.

    Args:
        grid: how.
        x: as given to `frame`.
        seed: one that `noise_seeds` returned; None for grids that are not stochastic.
        parts: what `frame` returned.

    Returns:
        The packed codes.
    """
    low, span, *averages = parts
    groups = _groups(grid, x.to(_wide(x.dtype)), averages)
    position = (groups - low) / (span / max(1, grid.largest))
    offset = _noise(seed, groups.shape) if grid.stochastic else 0.5
    codes = (position + offset).floor().clamp(0, grid.largest)
    if grid.zeros:
        codes = torch.where(groups > 0, codes + 1, 0.0)
    return pack_codes(codes, grid.bits, 1)


def decode(
    grid: Grid, shape: Sequence[int], dtype: torch.dtype, *parts: torch.Tensor
) -> torch.Tensor:
    """The inverse of `encode`, up to rounding.

    Args:
        grid: as given to `encode`.
        shape: of the tensor.
        dtype: of the tensor.
        parts: what `frame` returned, then what `encode` did.

    Returns:
        [*shape], with the strides that the tensor had.
    """
    low, span, *others = parts
    averages, packed = (others[:2], others[2:]) if grid.block else ([], others)
    codes = unpack_codes(packed, grid.bits, 1, ()).to(low.dtype)
    step = span / max(1, grid.largest)
    if grid.zeros:
        values = torch.where(codes > 0, low + (codes - 1) * step, 0.0)
    else:
        values = low + codes * step
    sizes = [shape[d] for d in grid.order]
    back = sorted(range(len(sizes)), key=grid.order.__getitem__)
    values = values.reshape(sizes).permute(back)
    if averages:
        values = values + _smooth(grid, averages, low.dtype)
    return values.to(dtype)


def group_size(shape: Sequence[object], wanted: int) -> int | None:
    """The largest multiple of 8 up to the wanted size that divides the known inner dimensions.

    Args:
        shape: sizes from the outermost to the innermost in memory; symbols are not known.
        wanted: upper bound.
    """
    known: list[int] = []
    for size in reversed(shape):
        if not isinstance(size, int):
            break
        known.append(size)
    inner = prod(known)
    fitting = [n for n in range(8, wanted + 1, 8) if inner % n == 0]
    return max(fitting, default=None)


def memory_order(x: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions from the outermost to the innermost; None if the tensor has gaps."""
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda d: (-int(strides[d]), d)) if _plain(strides) else []
    if not order:
        order = list(range(x.dim()))
    return tuple(order) if x.permute(order).is_contiguous() else None


def _plain(strides: Sequence[object]) -> bool:
    return all(isinstance(s, int) for s in strides)


def _groups(grid: Grid, x: torch.Tensor, averages: Sequence[torch.Tensor]) -> torch.Tensor:
    """[groups, group]: what is coded of a tensor."""
    rest = x - _smooth(grid, averages, x.dtype) if averages else x
    return rest.permute(grid.order).reshape(-1, grid.group)


def _smooth(grid: Grid, averages: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The part of a tensor that its averages stand for."""
    unit, whole = averages
    return _spread(grid, whole.to(dtype) * unit)


def _noise(seed: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor:
    assert seed is not None
    return uniform(seed, shape)


def _smallest_positive(groups: torch.Tensor) -> torch.Tensor:
    low = torch.where(groups > 0, groups, torch.inf).amin(1, keepdim=True)
    return torch.where(low == torch.inf, 0.0, low)


def _spread(grid: Grid, averages: torch.Tensor) -> torch.Tensor:
    """Every average at all places of its block."""
    *outer, height, width = averages.shape
    side = grid.block
    if grid.rows_are_dense:
        lifts = _lifts(side, width * side, averages)
        rows = (averages.reshape(-1, width) @ lifts).reshape([*outer, height, 1, width * side])
        spread = rows.expand(*outer, height, side, width * side)
    else:
        spread = averages[..., :, None, :, None].expand(*outer, height, side, width, side)
    return spread.reshape([*outer, height * side, width * side])


def _lifts(side: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """[width / side, width] of ones where a place belongs to a block.

    Rows are spread by products with this: neighbours that share a number keep Inductor's C++ from
    working in vectors.
    """
    places = torch.arange(width, device=like.device)
    blocks = torch.arange(width // side, device=like.device)
    return (places.div(side, rounding_mode="floor") == blocks[:, None]).to(like.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
