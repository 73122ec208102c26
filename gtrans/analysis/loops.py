"""Loops that tracing unrolled, found again in a forward graph.

    h[1] = f(h[0], x[1]);  ..  h[T] = f(h[T-1], x[T])         T copies of f, one after another

A Python loop over a cell, over solver steps, or over blocks of one structure leaves the same
operators again and again, in the same order. So a loop is looked for as a period of the node list;
the values that one period hands to the next make the steps a chain. What lies on a cycle of that
hand-over is the body: it reads the carry and leads to the next carry. All else in a period, such as
a product with the step's input or an output layer, is before or behind the loop. A cycle that is
detached somewhere is none: a loop is a chain of gradients as well.

A period may hold several loops, as two recurrent layers in one Python loop do, or a state and a
running sum of outputs: each strongly connected part of the hand-over is a loop of its own.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import networkx as nx
import numpy as np
import torch
from torch import fx

from gtrans.ir.forward import ForwardGraph, value
from gtrans.ir.sizes import numel, same_shape

CALLS = ("call_function", "call_method", "get_attr")
_SUMS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})


class Source(NamedTuple):
    """Where an argument of a body comes from: another place in it, the carry, or outside."""

    kind: Literal["body", "carry", "input"]
    number: int


@dataclass(frozen=True)
class Loop:
    """Steps of one structure, each of which reads what the one before made.

    Attributes:
        steps: the nodes of each step's body, in the same order in all steps.
        reads: for each place in a body, where its arguments that are nodes come from.
        carried: the places in a body of what the next step reads.
        starts: what the first step reads in their stead.
        inputs: what is read from outside: slot by slot, a node for each step.
        tied: whether all steps read the same parameters.
    """

    steps: tuple[tuple[fx.Node, ...], ...]
    reads: tuple[tuple[Source, ...], ...]
    carried: tuple[int, ...]
    starts: tuple[fx.Node, ...]
    inputs: tuple[tuple[fx.Node, ...], ...]
    tied: bool

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> fx.Node:
        """The node that ends the loop."""
        return self.steps[-1][-1]

    @cached_property
    def nodes(self) -> frozenset[fx.Node]:
        """The nodes of all bodies."""
        return frozenset(n for body in self.steps for n in body)

    def carry_into(self, step: int) -> tuple[fx.Node, ...]:
        """What a step reads as its carry; with as many as there are steps, what the last left."""
        if step == 0:
            return self.starts
        return tuple(self.steps[step - 1][place] for place in self.carried)

    def results(self) -> tuple[int, ...]:
        """The places in a body that something outside of the loop reads, in any step."""
        return tuple(
            place
            for place in range(len(self.reads))
            if any(user not in self.nodes for body in self.steps for user in body[place].users)
        )

    @cached_property
    def unfinished(self) -> frozenset[fx.Node]:
        """What reads the last carry as a step does, in a further step without some of its nodes.

        The last step of a Python loop often does: what nobody reads of it is not captured.
        """
        carry = self.carry_into(len(self))
        shared = [column[0] if len(set(column)) == 1 else None for column in self.inputs]

        def like(node: fx.Node, place: int) -> bool:
            given = _arguments(node)
            sources = self.reads[place]
            if _skeleton(node) != _skeleton(self.steps[-1][place]) or len(given) != len(sources):
                return False
            wanted = {"carry": carry, "input": shared}
            return all(
                source.kind == "body" or wanted[source.kind][source.number] in (read, None)
                for read, source in zip(given, sources, strict=True)
            )

        readers = {user for node in carry for user in node.users if user not in self.nodes}
        first = [i for i, row in enumerate(self.reads) if any(s.kind == "carry" for s in row)]
        return frozenset(n for n in readers if any(like(n, place) for place in first))

    @property
    def length(self) -> int:
        """How many steps there are, with one that is not finished."""
        return len(self) + bool(self.unfinished)

    @cached_property
    def begun(self) -> bool:
        """Whether what the first step reads was made as steps make it, by one that is no like.

        The first step of a Python loop often makes the state that it starts from.
        """
        made = zip(self.starts, self.carry_into(1), strict=True)
        return any(_skeleton(start) == _skeleton(carried) for start, carried in made)

    def is_running_sum(self) -> bool:
        """Whether values are only added to the carry, and nothing reads it before the end.

        The gradient of such a sum goes to every step as it is, so there is nothing to carry.
        """
        inner = (n for body in self.steps[:-1] for n in body)
        sums = all(n.target in _SUMS for n in self.steps[0])
        return sums and all(user in self.nodes for n in inner for user in n.users)


def find_loops(graph: ForwardGraph, min_steps: int = 4) -> list[Loop]:
    """The loops of a graph, in the order in which they end; no node is in two of them.

    Args:
        graph: a captured forward.
        min_steps: leave out shorter ones; at least 2.
    """
    order = [n for n in graph.nodes if n.op in CALLS]
    at = {n: i for i, n in enumerate(order)}
    labels = _labels(order)
    found: list[Loop] = []
    taken: set[fx.Node] = set()
    settled: list[_Region] = []
    whole = max(min_steps - 1, 2)  # the last step may be unfinished
    for period in range(1, len(order) // whole + 1):
        for start, length in _repeats(labels, period, (whole - 1) * period):
            region = _Region(order, at, start, length + period, period)
            if any(region.tells_no_more_than(other) for other in settled):
                continue
            loops, complete = region.loops(min_steps, taken)
            for loop in loops:
                # Stages of one step may look like a loop of their own, which the others have not.
                apart = loop.nodes.isdisjoint(taken)
                inner = [] if apart else [f for f in found if not f.nodes.isdisjoint(loop.nodes)]
                if all(other.nodes <= loop.nodes for other in inner):
                    found = [*(other for other in found if other not in inner), loop]
                    taken |= loop.nodes
            if complete:
                settled.append(region)
    return sorted(found, key=lambda loop: loop.last)


def _labels(order: Sequence[fx.Node]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A number for each node, the same for the same function or method."""
    numbers: dict[Any, int] = {}
    # A submodule that a higher-order operator calls has another name in every step.
    keys = [n.op if n.op == "get_attr" else (n.op, n.target) for n in order]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _repeats(
    labels: np.ndarray[Any, np.dtype[np.int64]], period: int, least: int
) -> Iterator[tuple[int, int]]:
    """Maximal runs of places whose label is that of a period later: first place and length."""
    same = np.concatenate([[False], labels[:-period] == labels[period:], [False]])
    edges = np.flatnonzero(same[1:] != same[:-1])
    for start, stop in edges.reshape(-1, 2).tolist():
        if stop - start >= max(least, 1):
            yield start, stop - start


@dataclass(frozen=True)
class _Region:
    """A part of the node list that repeats with some period."""

    order: Sequence[fx.Node]
    at: Mapping[fx.Node, int]
    start: int
    length: int
    period: int

    def index(self, node: fx.Node) -> int | None:
        """The place of a node in the region."""
        place = self.at.get(node, -1) - self.start
        return place if 0 <= place < self.length else None

    def tells_no_more_than(self, other: "_Region") -> bool:
        """Whether another one, whose cycles are all loops of its own length, holds this one.

        What repeats with a period repeats with its multiples, and a cycle there is one here too.
        """
        inside = other.start <= self.start and (
            self.start + self.length <= other.start + other.length
        )
        return inside and self.period % other.period == 0

    def loops(self, min_steps: int, taken: set[fx.Node]) -> tuple[list[Loop], bool]:
        """The loops of this period without taken nodes; whether they cover all of its cycles."""
        middle = (self.length // self.period) // 2 * self.period
        lags = self._hand_over(middle, taken)
        trained = [p for p in lags if _may_have_gradient(self.order[self.start + middle + p])]
        carried = set(_cycles(lags.subgraph(trained)))
        found: list[Loop] = []
        complete = True
        for part in nx.strongly_connected_components(lags):
            if carried.isdisjoint(part):
                continue
            rotation = self._rotation(lags.subgraph(part), middle)
            if rotation is None:
                complete = False
                continue
            chosen = sorted(part, key=lambda place: (place - rotation) % self.period)
            loops = list(self._aligned(chosen, rotation, min_steps))
            # A step less than there are periods, for its place in them, and one more for a start.
            complete &= any(len(loop) >= self.length // self.period - 2 for loop in loops)
            found += loops
        return found, complete

    def _hand_over(self, middle: int, taken: set[fx.Node]) -> "nx.DiGraph[int]":
        """The places of a period; an edge says how many periods later a place is read, at most."""
        graph: nx.DiGraph[int] = nx.DiGraph()
        for place in range(self.period):
            node = self.order[self.start + middle + place]
            if node in taken:
                continue
            graph.add_node(place)
            for source in node.all_input_nodes:
                at = self.index(source)
                if at is not None and source not in taken:
                    lag = middle // self.period - at // self.period
                    before = graph.get_edge_data(at % self.period, place, {"lag": lag})["lag"]
                    graph.add_edge(at % self.period, place, lag=max(lag, before))
        return graph

    def _rotation(self, inner: "nx.DiGraph[int]", middle: int) -> int | None:
        """Where to begin a step so that the least is handed over; None if more than one period."""

        def handed(rotation: int) -> tuple[int, ...] | None:
            carried: set[int] = set()
            for source, reader, lag in inner.edges(data="lag"):
                shifted = lag + (reader >= rotation) - (source >= rotation)
                if not 0 <= shifted <= 1:
                    return None
                if shifted == 1:
                    carried.add(source)
            return tuple(sorted(carried))

        best: tuple[int, int] | None = None
        for rotation in sorted(inner.nodes):
            carried = handed(rotation)
            if carried is not None:
                size = sum(_size(self.order[self.start + middle + place]) for place in carried)
                best = min(best or (size, rotation), (size, rotation))
        return None if best is None else best[1]

    def _aligned(self, places: Sequence[int], rotation: int, min_steps: int) -> Iterator[Loop]:
        """The runs of steps that read one another alike."""
        inner = [rotation + (place - rotation) % self.period for place in places]
        shifts = range(0, self.length - max(inner), self.period)
        bodies = [[self.order[self.start + shift + i] for i in inner] for shift in shifts]
        run: list[list[fx.Node]] = []
        for t, body in enumerate(bodies):
            if run and not alike(bodies, t, first=len(run) == 1):
                yield from self._loop(run, min_steps)
                run = []
            run.append(body)
        yield from self._loop(run, min_steps)

    def _loop(self, steps: list[list[fx.Node]], min_steps: int) -> Iterator[Loop]:
        """A loop of steps that are alike; the first may read several starts for one carry."""
        for skip in range(2):
            loop = self._made(steps[skip:]) if len(steps) - skip >= max(2, min_steps - 1) else None
            if loop is not None and loop.length >= min_steps:
                yield loop
                return

    def _made(self, steps: list[list[fx.Node]]) -> Loop | None:
        loop = loop_of(steps)
        return loop and replace(loop, tied=self._tied(loop))

    def _tied(self, loop: Loop) -> bool:
        """Whether every step reads the same parameters, directly or through its own period."""
        found: list[set[fx.Node]] = []
        for t, body in enumerate(loop.steps):
            first = self.at[body[0]] - self.period
            pending, seen = [c[t] for c in loop.inputs], set[fx.Node]()
            while pending:
                node = pending.pop()
                if node not in seen:
                    seen.add(node)
                    if self.index(node) is not None and self.at[node] > first:
                        pending += node.all_input_nodes
            found.append({n for n in seen if n.op == "placeholder" and _trains(n)})
        # What leads to the first step may lie before the region.
        return found[0] <= found[1] and all(f == found[1] for f in found[2:])


def loop_of(steps: Sequence[Sequence[fx.Node]]) -> Loop | None:
    """A loop of at least two steps that are alike; None if they hand over more than a carry."""
    place = {n: (t, i) for t, body in enumerate(steps) for i, n in enumerate(body)}
    carried = sorted({place[n][1] for n in steps[0] if any(_later(place, n, u) for u in n.users)})
    number_of = {at: number for number, at in enumerate(carried)}
    starts: dict[int, fx.Node] = {}
    columns: dict[tuple[fx.Node, ...], int] = {}
    reads: list[tuple[Source, ...]] = []
    arguments = [[_arguments(n) for n in body] for body in steps]
    for i, second in enumerate(arguments[1]):
        row: list[Source] = []
        for number, source in enumerate(second):
            t, at = place.get(source, (-1, -1))
            if t == 1:
                row.append(Source("body", at))
            elif t == 0:
                index, first = number_of[at], arguments[0][i][number]
                if starts.setdefault(index, first) is not first or not _fits(first, source):
                    return None
                row.append(Source("carry", index))
            else:
                column = tuple(body[i][number] for body in arguments)
                if not place.keys().isdisjoint(column):  # read more than a step later
                    return None
                row.append(Source("input", columns.setdefault(column, len(columns))))
        reads.append(tuple(row))
    return Loop(
        tuple(map(tuple, steps)),
        tuple(reads),
        tuple(carried),
        tuple(starts[i] for i in range(len(carried))),
        tuple(columns),
        tied=False,
    )


def refreshed(loop: Loop) -> Loop:
    """The same steps with what they read now, after other nodes have been replaced."""
    found = loop_of(loop.steps)
    return loop if found is None else replace(found, tied=loop.tied)


def alike(bodies: Sequence[Sequence[fx.Node]], t: int, *, first: bool) -> bool:
    """Whether a step calls and reads what the one before does, a step later.

    The one before may be the first, which reads a start from outside instead of the carry.
    """
    places = {
        step: {n: i for i, n in enumerate(bodies[step])} for step in (t - 2, t - 1, t) if step >= 0
    }

    def where(node: fx.Node, step: int) -> Source | None:
        if node in places[step]:
            return Source("body", places[step][node])
        if step and node in places[step - 1]:
            return Source("carry", places[step - 1][node])
        return None

    for a, b in zip(bodies[t - 1], bodies[t], strict=True):
        if _skeleton(a) != _skeleton(b) or not _fits(a, b):
            return False
        if a.op == "get_attr" and not _same_code(a, b):
            return False
        for x, y in zip(_arguments(a), _arguments(b), strict=True):
            before, now = where(x, t - 1), where(y, t)
            starts = first and before is None and now is not None and now.kind == "carry"
            if before != now and not starts:
                return False
            if now is None and y.op == "get_attr" and not _same_code(x, y):
                return False
    return True


def _arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that are nodes, in order, as often as they are read."""
    found: list[fx.Node] = []

    def note(argument: fx.Node) -> fx.Node:
        found.append(argument)
        return argument

    fx.map_arg((node.args, node.kwargs), note)
    return found


def _skeleton(node: fx.Node) -> str:
    """A call, with its arguments that are nodes as one word: a bias that is missing is another."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: "a node")
    target = "" if node.op == "get_attr" else node.target
    return f"{target} {args} {kwargs}"


def _later(place: dict[fx.Node, tuple[int, int]], node: fx.Node, user: fx.Node) -> bool:
    return user in place and place[user][0] == place[node][0] + 1


def _fits(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have the same type and sizes; what is no tensor fits."""
    first, second = value(a), value(b)
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return type(first) is type(second)
    return first.dtype == second.dtype and same_shape(first, second)


def _size(node: fx.Node) -> int:
    """How much it costs to hand a value over; what is no tensor is not handed over willingly."""
    val = value(node)
    return numel(val) if isinstance(val, torch.Tensor) else 1 << 60


def _trains(node: fx.Node) -> bool:
    val = value(node)
    return isinstance(val, torch.Tensor) and val.requires_grad


def _may_have_gradient(node: fx.Node) -> bool:
    """Whether a gradient can flow to a value: not what is detached or compared."""
    return _trains(node) or not isinstance(value(node), torch.Tensor)


def _same_code(a: fx.Node, b: fx.Node) -> bool:
    """Whether two submodules are the same operators on the same arguments."""
    first, second = (getattr(n.graph.owning_module, str(n.target), None) for n in (a, b))
    if not isinstance(first, fx.GraphModule) or not isinstance(second, fx.GraphModule):
        return first is second
    return _code(first.graph) == _code(second.graph)


def _code(graph: fx.Graph) -> list[str]:
    number = {n: i for i, n in enumerate(graph.nodes)}
    return [
        f"{'' if n.op == 'placeholder' else _skeleton(n)} {[number[m] for m in _arguments(n)]}"
        for n in graph.nodes
    ]


def _cycles(graph: "nx.DiGraph[int]") -> Iterator[int]:
    """The nodes that lie on a cycle."""
    for part in nx.strongly_connected_components(graph):
        if len(part) > 1 or any(graph.has_edge(node, node) for node in part):
            yield from part
