"""Gradient streams in a joint graph: chains of sums that a cotangent runs through.

Where a value of the model is used twice, autograd adds up two cotangents. Along a residual stream
these sums follow one another:

    x[t] = K[t](x[t-1]) + a[t]            t = 1 .. n, from the loss to the input

`K[t]` is the way past a block and `a[t]` the way through it. A way past is *structural*: it costs
at most a pass or two over memory, and no product of matrices (the identity, a ReLU's mask, a
factor, the backward of a normalisation). `a[t]` is the end of a cone: the backward nodes that lie
between earlier points of the stream and the sum. An addend that depends on no point of the stream
is a local cotangent, such as the one of a second loss.

The level of a point is how many cones lie in a row before it, so how many sweeps of a fixed-point
iteration over the stream make it exact. A way past a block that is not structural (a strided
convolution, a concatenation) ends a stream, and the next one begins at the sum behind it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import same_shape

aten = torch.ops.aten

# Linear in the one argument that depends on a tangent, element by element.
_FACTORS = frozenset(
    {
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.neg.default,
        aten.where.self,
        aten.masked_fill.Scalar,
        aten.threshold_backward.default,
        aten.native_dropout_backward.default,
    }
)
_COPIES = frozenset({aten.clone.default, aten._to_copy.default})
# The first of the results of these is linear in the first argument.
_NORMS = frozenset({aten.native_layer_norm_backward.default, aten._fused_rms_norm_backward.default})
_IDENTITY, _FACTOR, _NORM = 0, 1, 3
_COLLECTIVES = ("c10d", "_c10d_functional", "_dtensor")


@dataclass(frozen=True)
class Link:
    """One sum of a chain: ``node = kept + addend``.

    Attributes:
        node: the sum, the point x[t].
        kept: the argument that comes from the point before by structural operators only.
        addend: the other argument: the end of a cone, or a local cotangent.
        level: sweeps after which the point is exact.
        local: whether the addend is a local cotangent, so depends on no point of the chain.
        through: whether the level grows here; of several addends read off one point, the first.
    """

    node: fx.Node
    kept: fx.Node
    addend: fx.Node
    level: int
    local: bool
    through: bool


@dataclass(frozen=True)
class Chain:
    """A maximal run of links.

    Attributes:
        head: the point x[0]; it does not depend on the other points.
        links: the sums that follow, in graph order.
        end: why the chain goes no further.
    """

    head: fx.Node
    links: tuple[Link, ...]
    end: str

    @property
    def points(self) -> tuple[fx.Node, ...]:
        """The head and the sums."""
        return (self.head, *(link.node for link in self.links))

    @property
    def depth(self) -> int:
        """Cones in a row: sweeps after which all of the chain is exact."""
        return self.links[-1].level

    def dependents(self) -> dict[fx.Node, frozenset[fx.Node]]:
        """The sums that each node between head and end depends on, not through another sum.

        Nodes that depend on none of the sums, but at most on the head, are missing.
        """
        sums = {link.node for link in self.links}
        found: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in _between(self.head, self.links[-1].node):
            if node in sums:
                found[node] = frozenset({node})
            else:
                read = [found[n] for n in node.all_input_nodes if n in found]
                if read:
                    found[node] = frozenset().union(*read)
        return found

    def moving(self) -> frozenset[fx.Node]:
        """The nodes up to the end that depend on a point, and the points."""
        found = {self.head}
        for node in _between(self.head, self.links[-1].node):
            if any(n in found for n in node.all_input_nodes):
                found.add(node)
        return frozenset(found | set(self.points))


END_OF_STREAM = "the stream ends"


def find_chains(joint: JointGraph) -> list[Chain]:
    """The chains of a joint graph that have at least one cone, deepest first.

    Every gradient accumulation is a sum of at most one chain.
    """
    before: dict[fx.Node, _Step] = {}
    length: dict[fx.Node, int] = {}
    for node in _sums(joint):
        step = _step_before(joint, node, length)
        length[node] = 0 if step is None else 1 + length.get(step.point, 0)
        if step is not None:
            before[node] = step
    chains: list[Chain] = []
    used: set[fx.Node] = set()
    for last in sorted(length, key=lambda n: -length[n]):
        steps: list[_Step] = []
        point = last
        while point not in used and point in before:
            used.add(point)
            steps.append(before[point])
            point = before[point].point
        chains += _chains_of(joint, steps[::-1])
    return sorted(chains, key=lambda c: -c.depth)


@dataclass(frozen=True)
class _Step:
    """A sum and what it follows: ``node = kept + addend``, kept made of point structurally."""

    point: fx.Node
    node: fx.Node
    kept: fx.Node
    addend: fx.Node


def _sums(joint: JointGraph) -> list[fx.Node]:
    """The accumulations of two cotangents, as autograd makes them."""
    return [
        n
        for n in joint.gradient_accumulations()
        if n.target is aten.add.Tensor and not n.kwargs and all(map(joint.is_backward, n.args))
    ]


def _step_before(joint: JointGraph, node: fx.Node, length: dict[fx.Node, int]) -> _Step | None:
    """What a sum follows: the stream is the side that the other side's cone reads."""
    a, b = node.args
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    for kept, addend in ((a, b), (b, a)):
        root, _ = _source(joint, kept, _IDENTITY, length)
        if kept is not addend and _depends(addend, root):
            source, _ = _source(joint, kept, _NORM, length)
            return _Step(source if source in length else root, node, kept, addend)
    # Neither reads the other: a second addend of the same cone, or a local cotangent.
    sides: list[tuple[int, int, int, fx.Node, fx.Node, fx.Node]] = []
    for kept, addend in ((a, b), (b, a)):
        source, cost = _source(joint, kept, _NORM, length)
        if source in length:
            sides.append((cost, -length[source], len(sides), source, kept, addend))
    if not sides:
        return None
    *_, source, kept, addend = min(sides)
    return _Step(source, node, kept, addend)


def _source(
    joint: JointGraph, node: fx.Node, most: int, stops: dict[fx.Node, int]
) -> tuple[fx.Node, int]:
    """Goes up by structural operators of at most some cost, to the first sum or the last of them.

    Returns:
        The node arrived at, and the largest cost of an operator on the way.
    """
    worst = _IDENTITY
    while node not in stops:
        above = _structural_argument(joint, node)
        if above is None or above[1] > most:
            break
        node = above[0]
        worst = max(worst, above[1])
    return node, worst


def _structural_argument(joint: JointGraph, node: fx.Node) -> tuple[fx.Node, int] | None:
    """The argument that a structural operator carries on, and the cost of the operator."""
    if ops.is_getitem(node):
        norm = node.args[0]
        if not isinstance(norm, fx.Node) or norm.target not in _NORMS or node.args[1] != 0:
            return None
        source, cost = norm.args[0], _NORM
        others = norm.all_input_nodes[1:]
    else:
        moving = [n for n in ops.tensor_inputs(node) if joint.is_backward(n)]
        if len(moving) != 1:
            return None
        source, cost = moving[0], _FACTOR if node.target in _FACTORS else _IDENTITY
        if not (node.target in _FACTORS or node.target in _COPIES or ops.is_view(node)):
            return None
        if node.target is aten.div.Tensor and node.args[0] is not source:
            return None
        others = []
    if not isinstance(source, fx.Node) or any(map(joint.is_backward, others)):
        return None
    return (source, cost) if _same_count(source, node) else None


def _same_count(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have as many elements and the same type, so that nothing is cut off."""
    first, second = a.meta.get("val"), b.meta.get("val")
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return False
    if first.dtype != second.dtype:
        return False
    if same_shape(first, second):
        return True
    # A symbolic product is compared as an expression: a guard would narrow the captured sizes.
    return bool(str(first.numel()) == str(second.numel()))


def _depends(node: fx.Node, on: fx.Node) -> bool:
    """Whether a node depends on an earlier one; a node does not depend on itself."""
    pending, seen = list(node.all_input_nodes), set[fx.Node]()
    while pending:
        source = pending.pop()
        if source is on:
            return True
        if source not in seen and on < source:
            seen.add(source)
            pending += source.all_input_nodes
    return False


def _chains_of(joint: JointGraph, steps: list[_Step]) -> Iterator[Chain]:
    """Cuts a run of steps where a cone cannot be copied, and works out the levels."""
    start = 0
    while start < len(steps):
        end, links = END_OF_STREAM, list[Link]()
        head = steps[start].point
        levels: dict[fx.Node, int] = {head: 0}
        read: dict[fx.Node, frozenset[fx.Node]] = {head: frozenset({head})}
        at = head
        for step in steps[start:]:
            start += 1
            _extend(read, at, step.node)
            at = step.node
            read[at] = frozenset({at})
            reason = _not_copyable(step.addend, read) or _does_not_fit(step)
            if reason is not None:
                end = reason
                break
            before, points = levels[step.point], read.get(step.addend, frozenset())
            levels[at] = max(before, *(1 + levels[n] for n in points), 0)
            through = levels[at] > before
            links.append(Link(at, step.kept, step.addend, levels[at], not points, through))
        while links and links[0].level == 0:  # a sum that needs no sweep is as good a head
            head = links.pop(0).node
        if links:
            yield Chain(head, tuple(links), end)


def _extend(read: dict[fx.Node, frozenset[fx.Node]], after: fx.Node, last: fx.Node) -> None:
    """Notes which points the nodes between two points depend on."""
    for node in _between(after, last):
        found = [read[n] for n in node.all_input_nodes if n in read]
        if found:
            read[node] = frozenset().union(*found)


def _between(after: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = after
    while node is not last:
        node = node.next
        yield node


def _not_copyable(addend: fx.Node, read: dict[fx.Node, frozenset[fx.Node]]) -> str | None:
    """Why a cone must not run several times, or None."""
    pending, seen = [addend], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen or node not in read or read[node] == frozenset({node}):
            continue
        seen.add(node)
        pending += node.all_input_nodes
        if ops.is_random(node):
            return f"the cone draws random numbers ({node.target})"
        if ops.is_effect(node):
            return f"the cone has an effect ({node.target})"
        op = ops.overload(node)
        if op is None and not ops.is_getitem(node):
            return f"the cone calls what is no plain operator ({node.target})"
        if op is not None and op.namespace in _COLLECTIVES:
            return f"the cone talks to other processes ({node.target})"
    return None


def _does_not_fit(step: _Step) -> str | None:
    total, kept = step.node.meta["val"], step.kept.meta["val"]
    if kept.dtype != total.dtype or not same_shape(kept, total):
        return "the way past the block has another shape or type than the sum"
    return None
