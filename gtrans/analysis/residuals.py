"""Finds residual streams in a forward graph: runs of `x = x + f(x)`, before autograd.

    x1 = x0 + f0(x0),   x2 = x1 + f1(x1),   ...

The branch of a link depends on the stream it is added to; that, and not the name of a module, is
what makes a sum a residual one. A run that lies inside a branch of a longer one is left alone,
and so are sums of networks whose streams are coupled already.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from gtrans.ir.forward import ForwardGraph, value
from gtrans.ir.sizes import same_shape

_ADDS = (operator.add, operator.iadd, torch.add)
_METHODS = ("add", "add_")


@dataclass(frozen=True)
class Link:
    """One residual sum.

    Attributes:
        output: the sum.
        stream: what the branch is added to.
        branches: what is added, each dependent on the stream; several where attention and
            perceptron read the same value.
        inside: the nodes on the way from the stream to the sum.
    """

    output: fx.Node
    stream: fx.Node
    branches: tuple[fx.Node, ...]
    inside: frozenset[fx.Node]

    def reads(self) -> list[fx.Node]:
        """The nodes of the branches that read the stream."""
        return [u for u in self.stream.users if u in self.inside]


def residual_runs(graph: ForwardGraph) -> list[list[Link]]:
    """The residual streams of a forward graph, each as its links in order."""
    links = {link.stream: link for link in _links(graph)}
    ends = {link.output for link in links.values()}
    runs = []
    for link in links.values():
        if link.stream not in ends:
            run = [link]
            while run[-1].output in links:
                run.append(links[run[-1].output])
            runs.append(run)
    chosen: list[list[Link]] = []
    taken: set[fx.Node] = set()
    for run in sorted(runs, key=len, reverse=True):
        nodes = {n for link in run for n in (link.output, *link.inside)}
        if not nodes & taken:
            chosen.append(run)
            taken |= nodes
    return sorted(chosen, key=lambda run: run[0].output)


def _links(graph: ForwardGraph) -> Iterable[Link]:
    """The residual sums. Of two that add to one stream, the later one comes later."""
    found: dict[fx.Node, Link] = {}
    for node in graph.nodes:
        if _is_sum(node) and (link := _link(node, found)) is not None:
            found[node] = link
            for term in set(node.all_input_nodes) & link.inside:
                found.pop(term, None)  # a part of this sum
    return found.values()


def _link(node: fx.Node, found: dict[fx.Node, Link]) -> Link | None:
    first, second = node.all_input_nodes
    for stream, branch in ((first, second), (second, first)):
        inside = _between(stream, branch)
        if inside and not _overwritten(node, stream) and not _is_coupled(node, stream, inside):
            return Link(node, stream, (branch,), inside)
        partial = found.get(stream)
        if partial is not None and len(stream.users) == 1:
            inside = _between(partial.stream, branch)
            if inside:
                inside |= partial.inside | {stream}
                return Link(node, partial.stream, (*partial.branches, branch), inside)
    return None


def _is_coupled(total: fx.Node, stream: fx.Node, inside: frozenset[fx.Node]) -> bool:
    """Whether another stream, which goes on afterwards, is written between the stream and the sum.

    In a = a + f(b), with b = b + g(a) in between, f depends on a, but by another stream.
    """
    after = {stream, *inside}
    return any(
        _is_sum(n)
        and any(m not in after for m in n.all_input_nodes)
        and any(u not in inside and u is not total for u in n.users)
        for n in inside
    )


def _is_sum(node: fx.Node) -> bool:
    named = node.op == "call_method" and node.target in _METHODS
    if not (named or (node.op == "call_function" and node.target in _ADDS)):
        return False
    if len(node.all_input_nodes) != 2 or len(node.args) != 2 or node.kwargs:
        return False
    values = [value(n) for n in (node, *node.all_input_nodes)]
    if not all(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values):
        return False
    return all(same_shape(v, values[0]) and v.dtype == values[0].dtype for v in values)


def _between(stream: fx.Node, branch: fx.Node) -> frozenset[fx.Node]:
    """The nodes on a path from one value to another; empty if there is none."""
    if not stream < branch:
        return frozenset()
    after = {stream}
    node = stream.next
    while node is not branch.next and node.op != "output":
        if any(n in after for n in node.all_input_nodes):
            after.add(node)
        node = node.next
    if branch not in after:
        return frozenset()
    inside: set[fx.Node] = set()
    pending = [branch]
    while pending:
        node = pending.pop()
        if node in after and node not in inside and node is not stream:
            inside.add(node)
            pending += node.all_input_nodes
    return frozenset(inside)


def _overwritten(total: fx.Node, stream: fx.Node) -> bool:
    """Whether an in-place sum changes a stream that something reads later."""
    in_place = total.target in (operator.iadd, "add_")
    return in_place and any(total < u for u in stream.users)
