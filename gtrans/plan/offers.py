"""The predicted time of the offers of passes, from the operators that they are made of."""

from collections.abc import Hashable

from torch import fx

from gtrans.analysis.cost import Device, node_seconds
from gtrans.ir.joint import JointGraph
from gtrans.ir.tracing import key_of


def offer_seconds(joint: JointGraph, device: Device) -> dict[fx.Node, float]:
    """Seconds to get each value that has an offer by it, operator by operator like all else.

    Offers are written into a copy; those that are made of the same operators, once.
    """
    if not joint.offers:
        return {}
    twin, known = joint.copy(), dict[Hashable, float]()
    anchor = next(n for n in reversed(twin.graph.nodes) if n.op == "output")
    found: dict[fx.Node, float] = {}
    for value, offer in zip(joint.offers, list(twin.offers.values()), strict=True):
        values = [n.meta["val"] for n in offer.nodes]
        key = key_of(offer.function, offer.inputs, values)
        if key is None or key not in known:
            before = len(twin.graph.nodes)
            twin.splice_before(anchor, offer.function, *offer.inputs)
            made = list(twin.graph.nodes)[before - 1 : -1]
            seconds = sum(node_seconds(n, device) for n in made)
            known[key] = seconds
        found[value] = known[key]
    return found
