"""Undo the rebuilding of streams for the last blocks: the backward reads the forward's own values.

    x2' = y2 - g'                                dw = b(dy, x2)
    dw  = b(dy, x2')             -->             x1' = y1 - f(x2)'
    x1' = y1 - f(x2')'

How the forward's values reach the backward is then the plan's choice, as for all others. Whatever
the pass that rebuilt them kept for that purpose alone is dead.
"""

from torch import fx

from gtrans.analysis.blocks import recovery_blocks
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Placement, tag


def recovered_blocks(joint: JointGraph) -> list[int]:
    """The numbers of the blocks whose streams the backward rebuilds, the last block first."""
    rebuilt = (n for n in joint.nodes if n.op != "output" and _is_copy(n))
    return sorted({b for n in rebuilt if (b := tag(n).recovers) is not None})


def read_forward_streams(joint: JointGraph, blocks: int) -> None:
    """Lets the backward read the forward's own values for the blocks below a number.

    Args:
        joint: edited in place.
        blocks: the first block that is still rebuilt.
    """
    own = {tag(n).twin: n for n in joint.nodes if n.op != "output" and not _is_copy(n)}
    found = recovery_blocks(joint)
    for copy in sorted(n for n, block in found.items() if block < blocks and _is_copy(n)):
        value = own.get(tag(copy).twin)
        if value is not None:
            joint.replace_uses(copy, value, list(copy.users))
        elif ops.is_getitem(copy) or ops.is_view(copy):
            _move_forward(joint, copy)
    joint.eliminate_dead_code()


def _move_forward(joint: JointGraph, copy: fx.Node) -> None:
    """Makes a forward value of what is dead in the forward since the backward reads the copy."""
    latest = max((*joint.primals[-1:], *joint.tangents[-1:], *copy.all_input_nodes))
    joint.move_before(copy, latest.next)
    joint.place(copy, Placement.AUTO)


def _is_copy(node: fx.Node) -> bool:
    return tag(node).twin is not None and tag(node).placement is Placement.REBUILT
