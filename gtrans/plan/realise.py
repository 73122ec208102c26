"""Write a plan into the joint graph: what is not kept is computed again, right where it is read.

The schedule comes from `gtrans.plan.rebuild`; here its tasks become nodes, in the same order.
Torch's own split puts all recomputed values in front of the backward, where they are alive at once:
a smaller budget then has a higher peak (pytorch issue 197838).
"""

from collections.abc import Collection
from typing import Any

from torch import fx

from gtrans.analysis.schedule import Schedule, Task
from gtrans.errors import PlanError
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Placement
from gtrans.plan.rebuild import Choice, Rebuilder


def realise(joint: JointGraph, cut: Collection[fx.Node]) -> int:
    """Rewires the backward to read kept values and recomputed ones, and records the cut.

    Args:
        joint: edited in place. Its offers are used up.
        cut: forward values to keep; with what is recomputed from them they must suffice.

    Returns:
        How many nodes run again in the backward.

    Raises:
        PlanError: the cut does not separate the halves: some value would have to be recomputed from
            itself, or from something that cannot be run again.
    """
    schedule = Rebuilder(joint).schedule(Choice(frozenset(cut)))
    assert schedule is not None  # nothing is computed twice where everything waits
    for node in set(schedule.cut) - set(cut):
        raise PlanError(f"{node.name} cannot be computed again, and the plan does not keep it")
    return write(joint, schedule, cut)


def write(joint: JointGraph, schedule: Schedule, cut: Collection[fx.Node] | None = None) -> int:
    """Writes a schedule into its graph.

    Args:
        joint: the graph that the schedule was made for; edited in place. Its offers are used up.
        schedule: the order of the backward.
        cut: what to record as kept; by default what the schedule reads.

    Returns:
        How many nodes run again in the backward.
    """
    writer = _Writer(joint, schedule)
    pending: list[int] = []
    for number in range(schedule.boundary, len(schedule.tasks)):
        task = schedule.tasks[number]
        if task.node.op == "placeholder":
            continue
        if task.again:
            pending.append(number)
            continue
        for again in pending:
            writer.run_again(again, task.node)
        pending.clear()
        writer.rewire(task)
    for again in pending:
        writer.run_again(again, joint.output)
    writer.rewire_gradients()
    joint.offers = {}
    joint.eliminate_dead_code()
    joint.cut = tuple(sorted(schedule.cut if cut is None else cut))
    return writer.count


class _Writer:
    def __init__(self, joint: JointGraph, schedule: Schedule) -> None:
        self.joint = joint
        self.tasks = schedule.tasks
        self.made: dict[int, fx.Node] = {
            i: t.node for i, t in enumerate(schedule.tasks) if not t.again
        }
        self.latest: dict[fx.Node, fx.Node] = {}
        self.count = 0

    def rewire(self, task: Task) -> None:
        """Lets a node of the backward read what the schedule says."""
        for source, read in zip(ops.tensor_inputs(task.node), task.reads, strict=True):
            if self.made[read] is not source:
                self.joint.replace_uses(source, self.made[read], [task.node])

    def rewire_gradients(self) -> None:
        """Gradients that depend on no tangent (constants) are recomputed or kept like the rest."""
        joint = self.joint
        output = joint.output
        values: list[Any] = list(output.args[0])  # type: ignore[arg-type]  # one flat list
        for i, gradient in enumerate(joint.gradients, joint.signature.num_forward_outputs):
            if gradient is not None:
                values[i] = self.latest.get(gradient, gradient)
        output.args = (values,)

    def run_again(self, number: int, reader: fx.Node) -> None:
        """Inserts the node of a task right before a node of the backward."""
        task = self.tasks[number]
        reads = [self.made[r] for r in task.reads]
        again = (
            self._offered(task, reads, reader) if task.offered else self._same(task, reads, reader)
        )
        self.made[number] = self.latest[task.node] = again

    def _same(self, task: Task, reads: list[fx.Node], reader: fx.Node) -> fx.Node:
        node = task.node
        swap = dict(zip(ops.tensor_inputs(node), reads, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: swap.get(n, n))
        again = self.joint.repeat_before(reader, node, args, kwargs)
        self._mark(again)
        return again

    def _offered(self, task: Task, reads: list[fx.Node], reader: fx.Node) -> fx.Node:
        offer = self.joint.offers[task.node]
        swap = dict(zip(offer.nodes, reads, strict=True))
        first = reader.prev
        inputs = fx.map_arg(offer.inputs, lambda n: swap[n])
        (again,) = self.joint.splice_before(reader, offer.function, *inputs)
        while first.next is not reader:
            first = first.next
            self._mark(first)
        return again

    def _mark(self, node: fx.Node) -> None:
        self.count += 1
        self.joint.place(node, Placement.REBUILT)
