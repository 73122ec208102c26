"""Which block of a reversible network each value belongs to that its backward rebuilds.

    y2 -> g' -> x2' = y2 - g'            block 0: g', x2'
          x2' -> f' -> x1' = y1 - f'     block 1: f', x1'

A recovered stream ends its block, and whatever is computed from it belongs to the next. Blocks are
numbered as the backward meets them, the last one of the network first.
"""

from collections.abc import Mapping

from torch import fx

from gtrans.ir.joint import JointGraph, Side, runs_in, tag


def recovery_blocks(joint: JointGraph) -> dict[fx.Node, int]:
    """The block of every rebuilt value; those that belong to none are left out."""
    rebuilt = [
        n
        for n in joint.nodes
        if n.op == "call_function" and joint.is_forward(n) and runs_in(n) is Side.BACKWARD
    ]
    found = {n: b for n in rebuilt if (b := tag(n).recovers) is not None}
    for _ in range(2):
        for node in rebuilt:
            inputs = [block_after(n, found) for n in node.all_input_nodes if n in found]
            if node not in found and inputs:
                found[node] = max(inputs)
        for node in reversed(rebuilt):
            users = [found[u] for u in node.users if u in found]
            if node not in found and users:
                found[node] = min(users)
    return found


def block_after(node: fx.Node, blocks: Mapping[fx.Node, int]) -> int:
    """The block that a reader of a rebuilt value belongs to."""
    return blocks[node] + (tag(node).recovers is not None)
