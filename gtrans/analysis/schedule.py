"""A training step as a list of tasks: the forward half, then the backward half.

A task runs one node of a joint graph. A node that the plan computes again is a second task of the
same node, so that plans can be compared without writing each of them into a graph.

    primals | forward tasks | tangents | backward tasks, with forward nodes that run again
    ^ constants             ^ boundary
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from gtrans.errors import PlanError
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import numel


class Task(NamedTuple):
    """One run of a node.

    Attributes:
        node: what runs.
        reads: the tasks whose values it reads, in the order of `ops.tensor_inputs(node)`; of a task
            that takes an offer, in the order of the offer's nodes.
        again: whether it is a forward node that runs a second time, for the backward.
        offered: whether it gets the value by an offer of a pass instead of running the node.
    """

    node: fx.Node
    reads: tuple[int, ...]
    again: bool = False
    offered: bool = False


@dataclass(frozen=True)
class Schedule:
    """A forward and backward half, in the order in which they run.

    Attributes:
        tasks: placeholders and calls.
        boundary: number of the first task of the backward half.
        constants: tasks that hold what was in memory before the step: parameters, buffers, inputs.
        kept: tasks whose values stay alive to the end: constants, outputs, the
            seed of the backward, gradients.
        cut: what is kept for the backward, in graph order.
        forward: the tasks of the forward half; the same object in schedules that share it.
    """

    tasks: list[Task]
    boundary: int
    constants: frozenset[int]
    kept: frozenset[int]
    cut: tuple[fx.Node, ...]
    forward: "Forward"

    @property
    def again(self) -> list[Task]:
        """The tasks that run a second time."""
        return [t for t in self.tasks if t.again]


def schedule_of(joint: JointGraph) -> Schedule:
    """The schedule of a graph whose plan is written into it, as the halves will run it.

    Raises:
        PlanError: the graph has no plan.
    """
    if joint.cut is None:
        raise PlanError("the graph has no plan yet; run the 'plan' pass on it first")
    cut = frozenset(joint.cut)
    index = Index(joint)
    needed: set[fx.Node] = set()
    index.add_ancestors([g for g in joint.gradients if g is not None], needed, cut)
    builder = Builder(index)
    builder.add_forward(joint.cut)
    made: dict[fx.Node, int] = {}
    for node in joint.graph.nodes:
        if node.op != "call_function" or ops.is_symbol(node) or node in cut:
            continue
        if node in needed or (joint.is_backward(node) and ops.mutates(node)):
            reads = []
            for source in ops.tensor_inputs(node):
                number = made.get(source, builder.at_hand.get(source))
                assert number is not None  # what is not kept is needed, and so made before
                reads.append(number)
            made[node] = builder.append(Task(node, tuple(reads), again=joint.is_forward(node)))
    gradients = [made.get(g, builder.at_hand.get(g)) for g in joint.gradients if g is not None]
    return builder.finish([g for g in gradients if g is not None])


# Forward halves that are kept for schedules to come.
_HALVES = 16


class Forward:
    """The tasks of a forward half, which many schedules of one graph have in common.

    Attributes:
        tasks: placeholders and calls, in order.
        made: the task that makes each value.
        constants: those that hold what was in memory before.
        outputs: tasks whose values the caller gets.
        shared: what analyses find out about these tasks, once for all schedules.
    """

    def __init__(self, index: "Index", needed: Container[fx.Node]) -> None:
        self.tasks: list[Task] = []
        self.made: dict[fx.Node, int] = {}
        for node in index.forward:
            if node in needed:
                self.made[node] = len(self.tasks)
                reads = tuple([self.made[n] for n in index.inputs[node]])
                self.tasks.append(Task(node, reads))
        self.constants = {n: i for n, i in self.made.items() if n.op in ("placeholder", "get_attr")}
        self.outputs = [self.made[o] for o in index.outputs if o in self.made]
        self.shared: dict[str, Any] = {}


class Index:
    """What all schedules of one graph have in common, found once.

    Attributes:
        joint: the graph.
        inputs: the tensor inputs of every node.
        forward: the forward nodes that hold tensors, in order.
        always: those that every forward half runs.
        outputs: those that the forward returns.
        tangents: the placeholders of the backward half.
    """

    def __init__(self, joint: JointGraph) -> None:
        self.joint = joint
        self.inputs = {n: tuple(ops.tensor_inputs(n)) for n in joint.graph.nodes}
        self.forward = [
            n for n in joint.graph.nodes if joint.is_forward(n) and not ops.is_symbol(n)
        ]
        self.outputs = [o for o in joint.forward_outputs if isinstance(o, fx.Node)]
        self.tangents = [n for n in joint.tangents if not ops.is_symbol(n)]
        effects = [n for n in self.forward if ops.mutates(n)]
        self.always: set[fx.Node] = set(joint.primals)
        self.add_ancestors([*self.outputs, *effects], self.always)
        self._halves: dict[frozenset[fx.Node], Forward] = {}

    def forward_half(self, cut: Iterable[fx.Node]) -> "Forward":
        """The forward that makes outputs and a cut; most cuts of a graph need the same nodes."""
        extra: set[fx.Node] = set(self.always)
        self.add_ancestors([n for n in cut if n not in self.always], extra)
        key = frozenset(extra - self.always) if len(extra) > len(self.always) else frozenset()
        if key not in self._halves:
            if len(self._halves) >= _HALVES:
                self._halves.clear()
            self._halves[key] = Forward(self, extra)
        return self._halves[key]

    def add_ancestors(
        self, roots: Iterable[fx.Node], found: set[fx.Node], stop: Container[fx.Node] = ()
    ) -> None:
        """Adds the nodes that the roots are computed from, themselves included.

        Args:
            roots: where to start.
            found: the set to extend; what is in it is taken to be complete.
            stop: nodes whose own inputs are not wanted.
        """
        pending = list(roots)
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                if node not in stop:
                    pending += self.inputs[node]


class Builder:
    """Puts a schedule together: `add_forward`, then `append` each backward task, then `finish`."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.tasks: list[Task] = []
        self.boundary = 0
        self.at_hand: dict[fx.Node, int] = {}
        self._forward: Forward | None = None
        self._cut: tuple[fx.Node, ...] = ()

    def add_forward(self, cut: Iterable[fx.Node]) -> None:
        """Adds placeholders and the forward half that makes outputs and the cut.

        After it, `at_hand` has the task of every value that the backward may read as it is.
        """
        self._cut = tuple(cut)
        self._forward = forward = self.index.forward_half(self._cut)
        self.tasks = list(forward.tasks)
        self.boundary = len(self.tasks)
        self.at_hand = dict(forward.constants)
        self.at_hand.update((n, forward.made[n]) for n in self._cut if n in forward.made)
        for node in self.index.tangents:
            self.at_hand[node] = self.append(Task(node, ()))

    def append(self, task: Task) -> int:
        """Adds a task; returns its number."""
        self.tasks.append(task)
        return len(self.tasks) - 1

    def finish(self, gradients: Iterable[int]) -> Schedule:
        """The schedule, given the tasks that hold gradients."""
        assert self._forward is not None
        # `loss.backward()` holds the one number that it starts from.
        seeds = [self.at_hand[n] for n in self.index.tangents if numel(n.meta["val"]) == 1]
        constants = frozenset(self._forward.constants.values())
        kept = frozenset((*constants, *self._forward.outputs, *seeds, *gradients))
        return Schedule(self.tasks, self.boundary, constants, kept, self._cut, self._forward)
