"""How many blocks of a reversible network to invert, as one more choice of the budget search.

    blocks:     first ... ...  last            of the network; the backward meets the last one first
    variant 0:  s     s   s    s               their values are saved or computed again
    variant 1:  i     s   s    s               those of the first ones are rebuilt from the streams
    variant 2:  i     i   s    s               between the blocks
    variant 3:  i     i   i    i               as the pass wrote it

The first blocks are inverted first: what is saved for the last ones is let go of before these run
again. Where a pass rebuilt nothing there is one variant, the graph itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from gtrans.ir.joint import JointGraph
from gtrans.rewrite.forward_streams import read_forward_streams, recovered_blocks

# Parts into which the blocks are divided; each is inverted as a whole or not at all.
_PARTS = 3


@dataclass(frozen=True)
class Variant:
    """A graph of which some blocks are inverted.

    Attributes:
        joint: a copy; where nothing can be inverted, the graph itself.
        inverted: how many blocks are.
        blocks: how many could be.
        first: number of the first block that is, for `write`.
    """

    joint: JointGraph
    inverted: int
    blocks: int
    first: int

    def write(self, joint: JointGraph) -> None:
        """Makes this variant of the graph that it is a copy of."""
        if self.inverted < self.blocks:
            read_forward_streams(joint, self.first)


def variants(joint: JointGraph) -> Iterator[Variant]:
    """The variants of a graph, those with the least work first; each is made when asked for."""
    blocks = recovered_blocks(joint)
    if not blocks:
        yield Variant(joint, 0, 0, 0)
        return
    counts = sorted({round(len(blocks) * part / _PARTS) for part in range(_PARTS + 1)})
    for inverted in counts:
        number = len(blocks) - inverted
        first = blocks[number] if inverted else blocks[-1] + 2
        variant = Variant(joint.copy(), inverted, len(blocks), first)
        variant.write(variant.joint)
        yield variant
