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

from gtrans.runtime.bits import join, split, unpack_codes
from gtrans.runtime.noise import uniforms

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
    planes = split(_groups(grid, x.to(_wide(x.dtype)), averages), grid.bits, 1)
    per_step = max(1, grid.largest) / span
    codes = []
    for plane, offset in zip(planes, _offsets(grid, seed, planes), strict=True):
        code = ((plane - low) * per_step + offset).floor().clamp(0, grid.largest)
        codes.append(torch.where(plane > 0, code + 1, 0.0) if grid.zeros else code)
    return (join(codes, grid.bits),)


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
    """A multiple of 8 up to the wanted size that divides the known inner dimensions.

    Rows are parts of groups or groups parts of rows, unless that halves the size or more: what is
    read once a row, as the mean of a norm, cannot be read in vectors by groups across rows.

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
    aligned = [n for n in fitting if known[0] % n == 0 or n % known[0] == 0]
    largest = max(fitting, default=None)
    if aligned and 2 * aligned[-1] > (largest or 0):
        return aligned[-1]
    return largest


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


def _offsets(
    grid: Grid, seed: torch.Tensor | None, planes: Sequence[torch.Tensor]
) -> Sequence[float | torch.Tensor]:
    """What is added to each part of the groups before it is rounded down."""
    if not grid.stochastic:
        return [0.5] * len(planes)
    assert seed is not None
    return uniforms(seed, planes[0].shape, len(planes))


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
