"""Let a saved value wait in the host's memory, and fetch it before it is wanted.

    v = f(x)                        v = f(x)
    y = g(v)                        h = to_host(v)         # copied while the forward goes on
    ...                             y = g(v)
    ---- saved: v                   k = sent(h, v)         # v is let go of
                                    ---- saved: k
    ...                             ...
    dz = b(dy)                      d = to_device(k)       # copied back while others run
    ...                             dz = b(dy)
    dx = c(dz, v)                   w = arrived(d); dx = c(dz, w)

Contract: exact, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from gtrans.ir.joint import JointGraph, Placement, Side, runs_in
from gtrans.runtime.host_memory import ARRIVED, SENT, TO_DEVICE, TO_HOST


@dataclass(frozen=True)
class Trip:
    """One value's way to the host and back, in nodes of a graph whose plan is written into it.

    Attributes:
        value: a saved value that owns its memory; it stands before `fetch`.
        let_go: the node before which it is on the host; in the forward, or the first one behind it.
        fetch: the node of the backward before which its copy back starts.
    """

    value: fx.Node
    let_go: fx.Node
    fetch: fx.Node


def send_to_host(joint: JointGraph, trips: Sequence[Trip]) -> None:
    """Rewrites a planned graph in place; its plan keeps the copies instead of the values.

    Args:
        joint: with its cut.
        trips: of values of the cut, in the order in which they are to be fetched where two are
            fetched before the same node.
    """
    assert joint.cut is not None
    kept = {n: n for n in joint.cut}
    for trip in trips:
        value, device = trip.value, trip.value.meta["val"].device
        readers = sorted(u for u in value.users if runs_in(u) is Side.BACKWARD)
        # Forward nodes may stand behind backward ones; only the order within a half counts.
        anchor = min(trip.let_go, trip.fetch)
        host = joint.insert_after(value, TO_HOST, value)
        sent = joint.insert_before(max(anchor, host.next), SENT, host, value)
        joint.place(sent, Placement.SAVED)
        fetched = joint.insert_before(trip.fetch, TO_DEVICE, sent, torch.device(device))
        arrived = joint.insert_before(readers[0], ARRIVED, fetched)
        for node in (fetched, arrived):
            joint.place(node, Placement.REBUILT)
        joint.replace_uses(value, arrived, readers)
        kept[value] = sent
    joint.cut = tuple(sorted(kept.values()))
