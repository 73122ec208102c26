"""Sweeps over blocks with weights of their own: a product a block, or one product of all blocks.

Blocks that share their weights run as one batch. Of blocks that do not, the weights have to be
stacked, once a step for all of its sweeps, since an optimizer moves them; then the products of a
sweep are one `bmm`. What sweeps over n blocks of a perceptron (d to 4d to d) cost either way, the
stacking included, says where `highway-bp` should do that.
"""

from functools import partial

import torch

from benchmarks.chain_parts.recurrent import fastest
from benchmarks.table import Table

_SWEEPS = 5
Weights = list[torch.Tensor]


def untied_blocks(quick: bool, device: str) -> tuple[bool, str]:
    """Prints the table; there is no target."""
    print(
        f"milliseconds of {_SWEEPS} sweeps of cotangents through n untied blocks (d to 4d to d)\n"
        "stacked: weights stacked once, then one bmm for all blocks of a sweep"
    )
    table = Table(["n", "rows", "d", "each", "stacked", "gain"], [5, 7, 6, 10, 10, 8])
    sizes = [(12, 1, 32), (12, 64, 32), (12, 64, 128), (12, 512, 256)]
    if not quick:
        sizes += [(24, 1, 64), (24, 64, 64), (48, 1, 32), (48, 16, 32), (48, 512, 64)]
    gains = []
    for count, rows, width in sizes:
        shape = [(count, rows, width), (count, rows, 4 * width)]
        w, slope = (torch.randn(*s, device=device) for s in shape)
        first = [torch.randn(width, 4 * width, device=device) for _ in range(count)]
        second = [torch.randn(4 * width, width, device=device) for _ in range(count)]
        runs = [partial(run, w, slope, first, second) for run in (_each, _stacked)]
        one, all_ = fastest(runs, 5 if quick else 20)
        gains.append(one / all_)
        table.row(count, rows, width, f"{one:.2f}", f"{all_:.2f}", f"{one / all_:.2f}")
    return True, (
        f"untied blocks stacked for bmm are {min(gains):.2f}x to {max(gains):.2f}x as fast as one "
        "by one (no target)"
    )


def _each(w: torch.Tensor, slope: torch.Tensor, first: Weights, second: Weights) -> None:
    for _ in range(_SWEEPS):
        blocks = zip(w.unbind(0), slope.unbind(0), first, second, strict=True)
        torch.stack([torch.mm(torch.mm(v, a) * s, b) for v, s, a, b in blocks])


def _stacked(w: torch.Tensor, slope: torch.Tensor, first: Weights, second: Weights) -> None:
    a, b = torch.stack(first), torch.stack(second)
    for _ in range(_SWEEPS):
        torch.bmm(torch.bmm(w, a) * slope, b)
