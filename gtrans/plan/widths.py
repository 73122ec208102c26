"""How many bits each coded value gets, under a total.

    minimise    sum_l C_l / (2**b_l - 1)**2        the variance that coding l adds to the gradient
    such that   sum_l n_l b_l <= average * sum_l n_l,   b_l in {8, 4, 2}

The variance of stochastic rounding falls with the square of the number of steps, and noise of
different values is independent, so that variances add up. Start all at the most bits, and step down
where a bit costs least; the objective is convex in each b_l.

Source: the objective and the greedy steps are those of ActNN (arXiv:2104.14129) and GACT
(arXiv:2206.11357).
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from torch import fx

from gtrans.errors import OptionError
from gtrans.ir.joint import JointGraph

CHOICES = (8, 4, 2)


@dataclass(frozen=True)
class Widths:
    """Bits by value; text: `1a2b3c4d.relu_1:4;1a2b3c4d.relu_2:8`.

    Attributes:
        bits: pairs of a value's key and its bits.
    """

    bits: tuple[tuple[str, int], ...]

    @staticmethod
    def parse(text: str) -> "Widths":
        """Reads the text form.

        Raises:
            OptionError: it is no such text, or names a number of bits that is not offered.
        """
        pairs: list[tuple[str, int]] = []
        for item in text.split(";"):
            key, _, width = item.partition(":")
            if not key or not width.isdecimal() or int(width) not in CHOICES:
                raise OptionError(
                    f"cannot read the widths {text!r} at {item!r}; gtrans.adapt writes them, as "
                    "'graph.value:bits' with 2, 4 or 8 bits, separated by semicolons"
                )
            pairs.append((key, int(width)))
        return Widths(tuple(pairs))

    def of(self, graph: JointGraph, value: fx.Node) -> int | None:
        """The bits of a value; None if nothing is said about it."""
        return dict(self.bits).get(key_of(graph, value))

    def __str__(self) -> str:
        return ";".join(f"{key}:{width}" for key, width in self.bits)


def key_of(graph: JointGraph, value: fx.Node) -> str:
    """Names a value among all graphs of a model: by the inputs of its graph, and its own name."""
    inputs = "|".join(f"{i.kind} {i.name}" for i in graph.signature.inputs)
    return f"{crc32(inputs.encode()):08x}.{value.name}"


def allocate(sizes: Sequence[int], costs: Sequence[float], average: float) -> list[int]:
    """Bits for each value.

    Args:
        sizes: elements of each.
        costs: C_l, the variance that each adds with one step between the ends of its range.
        average: bits per element that are not exceeded.

    Raises:
        OptionError: the average is below the fewest bits there are.
    """
    if average < CHOICES[-1]:
        raise OptionError(f"bits must average at least {CHOICES[-1]}, got {average}")
    level = [0] * len(sizes)
    left = sum(sizes) * (CHOICES[0] - average)

    def step(i: int) -> tuple[float, int]:
        now, then = CHOICES[level[i]], CHOICES[level[i] + 1]
        gain = costs[i] * (1 / (2**then - 1) ** 2 - 1 / (2**now - 1) ** 2)
        return gain / (max(1, sizes[i]) * (now - then)), i

    heap = [step(i) for i in range(len(sizes))]
    heapq.heapify(heap)
    while left > 0 and heap:
        _, i = heapq.heappop(heap)
        left -= sizes[i] * (CHOICES[level[i]] - CHOICES[level[i] + 1])
        level[i] += 1
        if level[i] + 1 < len(CHOICES):
            heapq.heappush(heap, step(i))
    return [CHOICES[k] for k in level]
