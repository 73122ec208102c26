"""Sums over the slices of a tensor along one of its dimensions.

The products that are summed are as large as the tensor; made a piece at a time they stay in the
processor's cache, which is several times as fast as writing them to memory.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

PIECE = 1 << 19
"""Bytes of a piece: large enough for two threads, small enough to be allocated without the
operating system, which clears the pages of larger blocks each time."""

Term = Callable[..., torch.Tensor]
"""Makes the values to be summed from one piece of every tensor."""


def pieces(tensor: torch.Tensor) -> Iterator[slice]:
    """Cuts dimension 0 so that pieces fit a cache; one piece where kernels are launched."""
    rows = max(1, tensor.shape[0])
    step = max(1, PIECE * rows // max(1, tensor.nbytes)) if tensor.device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, start + step)


def slice_sums(
    terms: Sequence[Term],
    dim: int,
    like: torch.Tensor,
    read: Callable[[slice], tuple[torch.Tensor, ...]],
) -> torch.Tensor:
    """For every index of a dimension the sums of some terms over everything else.

    Args:
        terms: functions of what `read` gives.
        dim: the dimension that is not summed over.
        like: a tensor of the shape of all that is read.
        read: the tensors at a piece of dimension 0.

    Returns:
        Float64 [terms, size of the dimension], on the device of the tensors.
    """
    others = [d for d in range(like.ndim) if d != dim]
    total = torch.zeros(len(terms), like.shape[dim], dtype=torch.float64, device=like.device)
    for piece in pieces(like):
        given = read(piece)
        made = [term(*given) for term in terms]
        sums = torch.stack([m.sum(others) if others else m for m in made])
        into = total[:, piece] if dim == 0 else total
        into += sums
    return total
