"""The cheapest set of forward values to keep, as a minimum cut.

Every forward value v that the backward needs is either saved or computed again from its inputs:

    minimise  sum_saved bytes(v)  +  price * sum_recomputed cost(v)
    such that a recomputed value has all its inputs saved or recomputed

This is project selection, solved exactly as a minimum cut. Each value is split into v_in -> v_out:

    v_in  -> v_out   bytes(v)        cut: v is saved
    start -> v_in    price * cost    cut: v is recomputed; infinite where that is forbidden
    u_out -> v_in    infinite        v recomputed needs its input u
    v_out -> end     infinite        a backward node reads v

Views cost nothing to recompute and are never saved themselves (their storage is). Random draws,
effects and whatever the cost function forbids are never recomputed. What a pass added for the
backward alone (`rebuilt`, and no forward output needs it) is computed there, with all that follows
from it: saving any of it would move the computation into the forward.

Source: the construction is the one of torch's min-cut partitioner plus the recomputation edges of
project selection (Picard 1976), which torch's lacks.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch import fx

from gtrans.errors import PlanError
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Placement, tag
from gtrans.ir.ops import storage_of
from gtrans.ir.sizes import tensor_bytes
from gtrans.ir.source import location

RecomputeCost = Callable[[fx.Node], float | None]
"""Cost of getting a node again (by its offer, if it has one), in saved bytes; None forbids it."""

# scipy's maximum flow takes 32-bit capacities; a path longer than this many units is infinite.
_INFINITE = 2**30
_UNITS = 2**28
# Parameters are in memory anyway; of two equal cuts the one without them is the simpler.
_FREE = 1e-6


def minimum_cut(joint: JointGraph, cost: RecomputeCost) -> tuple[fx.Node, ...]:
    """The values to keep for the backward, in graph order.

    Args:
        joint: the graph to cut; it is not changed.
        cost: price of running a node again. It is not asked about views and getitem nodes, which
            are free, nor about random draws, effects and inputs, which are never run again.

    Returns:
        Tensor-valued forward nodes. Symbolic sizes are not among them: they are always available.

    Raises:
        PlanError: what passes fixed cannot be kept, such as rebuilding a random draw.
    """
    return Cutter(joint).cut(cost)


class Cutter:
    """Minimum cuts of one graph at several prices.

    Args:
        joint: the graph to cut; it is not changed, and must not change meanwhile.
    """

    def __init__(self, joint: JointGraph) -> None:
        self.joint = joint
        self._read = _read_by_backward(joint)
        self._network = _Network(joint)
        for node in self._network.values:
            self._network.add(node)

    def cut(self, cost: RecomputeCost) -> tuple[fx.Node, ...]:
        """The values to keep for the backward, in graph order, as `minimum_cut` has them.

        Raises:
            PlanError: what passes fixed cannot be kept.
        """
        network = self._network
        return _reached(self.joint, self._read, network.kept(network.solve(cost)))


def cut_with_substitutes(
    joint: JointGraph, cost: RecomputeCost, substitutes: Iterable[tuple[fx.Node, float]]
) -> tuple[tuple[fx.Node, ...], frozenset[fx.Node]]:
    """The minimum cut of a backward that would like some values, but can pay to do without them.

    In the network, v_out -> end gets the price as its capacity instead of an infinite one.

    Args:
        joint: the graph to cut; its backward does not read the values for this purpose.
        cost: as for `minimum_cut`.
        substitutes: values, each with the bytes that are kept if the backward does without it.

    Returns:
        The values to keep, in graph order (the substitutes not among them), and the values to do
        without. Where both cost the same, a value is kept.

    Raises:
        PlanError: what passes fixed cannot be kept.
    """
    network = _Network(joint)
    for node in network.values:
        network.add(node)
    wanted = list(substitutes)
    for node, price in wanted:
        network.want(node, price)
    reached = network.solve(cost)
    forgone = frozenset(n for n, _ in wanted if network.lacks(n, reached))
    return network.kept(reached), forgone


def used_by_backward(joint: JointGraph, cut: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """The values of a cut that the backward reads, itself or to compute others again."""
    return _reached(joint, _read_by_backward(joint), cut)


def _read_by_backward(joint: JointGraph) -> list[fx.Node]:
    read = {s for n in joint.graph.nodes if joint.is_backward(n) for s in n.all_input_nodes}
    read.update(g for g in joint.gradients if g is not None)
    return [n for n in read if joint.is_forward(n)]


def _reached(
    joint: JointGraph, roots: Iterable[fx.Node], cut: Iterable[fx.Node]
) -> tuple[fx.Node, ...]:
    """The values of a cut that some forward values are, or are computed from."""
    kept = set(cut)
    pending = list(roots)
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += [] if node in kept else recipe(joint, node)
    return tuple(n for n in cut if n in seen)


def read_directly(joint: JointGraph) -> tuple[fx.Node, ...]:
    """What autograd would keep: every forward value that a backward node reads, through views."""
    saved: dict[fx.Node, None] = {}
    pending = [
        source
        for node in joint.graph.nodes
        if joint.is_backward(node)
        for source in ops.tensor_inputs(node)
    ]
    pending += [g for g in joint.gradients if g is not None]
    seen: set[fx.Node] = set()
    late = backward_only(joint)
    while pending:
        source = pending.pop()
        if source in seen or not joint.is_forward(source):
            continue
        seen.add(source)
        if tag(source).placement is Placement.REBUILT or source in late:
            pending += ops.tensor_inputs(source)
        else:
            saved[storage_of(source)] = None
    return tuple(sorted(saved))


def recipe(joint: JointGraph, node: fx.Node) -> list[fx.Node]:
    """The values a node is computed from if it is computed again: those of an offer, if any."""
    offer = joint.offers.get(node)
    return ops.tensor_inputs(node) if offer is None else offer.nodes


def made_of_what_they_rebuild(joint: JointGraph) -> set[fx.Node]:
    """Inputs of an offer that are computed from the offered value: `mask -> packed -> mask`.

    Were they run again in turn, each of the two would be computed from the other and neither kept;
    an infinite edge is satisfied by such a circle, so the circle has to be opened here.
    """
    closing: set[fx.Node] = set()
    for value, offer in joint.offers.items():
        last = max(offer.nodes, default=value)
        below, pending = {value}, [value]
        while pending:
            for user in pending.pop().users:
                if user not in below and joint.is_forward(user) and user <= last:
                    below.add(user)
                    pending.append(user)
        closing.update(n for n in offer.nodes if n in below and n is not value)
    return closing


def backward_only(joint: JointGraph) -> set[fx.Node]:
    """The rebuilt values that no forward output needs, and the forward values made of them."""
    wanted = {n for n in joint.graph.nodes if joint.is_forward(n) and ops.is_effect(n)}
    wanted |= {n for n in joint.forward_outputs if isinstance(n, fx.Node)}
    for node in reversed(joint.graph.nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    late: set[fx.Node] = set()
    for node in joint.graph.nodes:
        if joint.is_forward(node) and node not in wanted:
            placement = tag(node).placement
            follows = placement is Placement.AUTO and any(n in late for n in node.all_input_nodes)
            if placement is Placement.REBUILT or follows:
                late.add(node)
    return late


class _Network:
    """The flow network of one joint graph: node 0 is the start, 1 the end, then in/out pairs."""

    def __init__(self, joint: JointGraph) -> None:
        self.joint = joint
        self.values = [n for n in joint.graph.nodes if joint.is_forward(n) and not ops.is_symbol(n)]
        self.index = {n: 2 + 2 * i for i, n in enumerate(self.values)}
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.capacities: list[float] = []
        self._priced: list[tuple[fx.Node, int]] = []
        self.needed = {g for g in joint.gradients if g is not None and joint.is_forward(g)}
        self.made_of_what_they_rebuild = made_of_what_they_rebuild(joint)
        self.overwritten = {storage_of(n.all_input_nodes[0]) for n in self.values if ops.mutates(n)}
        self.late = backward_only(joint)

    def add(self, node: fx.Node) -> None:
        """Adds the edges of one value; what it costs to compute it again is filled in later."""
        v_in, v_out = self.index[node], self.index[node] + 1
        placement = tag(node).placement
        self._edge(v_in, v_out, self._bytes_to_save(node))
        if placement is Placement.REBUILT or node in self.late:
            self._edge(v_in, 1, np.inf)
        else:
            price = np.inf if placement is Placement.SAVED else self._fixed_price(node)
            if price is None:
                self._priced.append((node, len(self.capacities)))
            self._edge(0, v_in, price or 0.0)
        if placement is Placement.SAVED or node in self.needed or self._is_read_backward(node):
            self._edge(v_out, 1, np.inf)
        for source in recipe(self.joint, node):
            self._edge(self.index[source] + 1, v_in, np.inf)

    def want(self, node: fx.Node, price: float) -> None:
        """Lets the backward pay for doing without a value."""
        self._edge(self.index[node] + 1, 1, price)

    def kept(self, reached: set[int]) -> tuple[fx.Node, ...]:
        """The values that a cut saves."""
        return tuple(
            n for n in self.values if self.index[n] in reached and self.index[n] + 1 not in reached
        )

    def lacks(self, node: fx.Node, reached: set[int]) -> bool:
        """Whether a cut leaves the backward without a value."""
        return self.index[node] + 1 in reached

    def solve(self, cost: RecomputeCost) -> set[int]:
        """Runs maximum flow; returns what the start reaches in the residual network."""
        if not self.starts:
            return set()
        capacities = np.array(self.capacities)
        for node, number in self._priced:
            price = cost(node)
            capacities[number] = np.inf if price is None else price
        finite = np.isfinite(capacities)
        unit = max(capacities[finite].sum() / _UNITS, 1e-9)
        units = np.full(len(capacities), _INFINITE, dtype=np.int32)
        units[finite] = np.maximum(1, np.rint(capacities[finite] / unit))
        used = capacities > 0
        starts, ends = np.array(self.starts), np.array(self.ends)
        size = 2 + 2 * len(self.values)
        matrix = csr_array((units[used], (starts[used], ends[used])), shape=(size, size))
        flow = maximum_flow(matrix, 0, 1).flow
        residual = csr_array(matrix - flow)
        residual.eliminate_zeros()
        reached = breadth_first_order(residual, 0, return_predecessors=False)
        inside = np.zeros(size, dtype=bool)
        inside[reached] = True
        self._require_finite(np.flatnonzero(~finite & inside[starts] & ~inside[ends]))
        return set(reached.tolist())

    def _require_finite(self, edges: NDArray[np.int64]) -> None:
        """No infinite edge may be cut; if one is, no choice keeps what passes fixed."""
        for number in edges:
            node = self.values[(max(self.starts[number], self.ends[number]) - 2) // 2]
            raise PlanError(
                f"no plan keeps what was asked of {node.name} ({location(node)}): it can "
                "neither be saved nor computed again in the backward. Views and tuples are "
                "not saved themselves, random draws are not repeated, and an input that the "
                "forward overwrites is gone by then"
            )

    def _edge(self, start: int, end: int, capacity: float) -> None:
        self.starts.append(start)
        self.ends.append(end)
        self.capacities.append(capacity)

    def _bytes_to_save(self, node: fx.Node) -> float:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            # Tuples are saved by their parts; constants (get_attr) are always at hand.
            return _FREE if node.op == "get_attr" else np.inf
        if node in self.overwritten and not self._is_read_backward(node):
            return np.inf  # by the time of the backward it holds another value
        if node.op == "placeholder" and self.joint.input_of(node).kind in ("parameter", "buffer"):
            return _FREE
        if storage_of(node) is not node:
            return np.inf
        return max(1.0, float(tensor_bytes(val)))

    def _fixed_price(self, node: fx.Node) -> float | None:
        """What it costs to compute a value again, where that is no matter of its price."""
        if node not in self.joint.offers:
            if node in self.made_of_what_they_rebuild:
                return np.inf
            if node.op in ("placeholder", "get_attr") or ops.is_effect(node) or ops.is_random(node):
                return np.inf
            if ops.is_view(node) or ops.is_getitem(node):
                return 0.0
        return None

    def _is_read_backward(self, node: fx.Node) -> bool:
        return any(self.joint.is_backward(u) for u in node.users)
