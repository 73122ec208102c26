"""What is in memory while a training step runs: its true peak, where it is, and what is alive then.

The simulated allocator is the one of the eager backend: a value is allocated when its node runs and
freed right after the last node that reads it or a view of it. Parameters, buffers and inputs are
there all the time, outputs stay until the step ends (the caller holds them), and so do gradients
once they are made. Tangents are freed like any other value, since autograd hands them over, but
for the one number that `loss.backward()` starts from.

    bytes(i) = constants + sum of the storages born at or before i whose last reader is i or later
    peak     = max_i bytes(i) + workspace(i)

One pass over the tasks. Symbolic sizes count with the values they were traced with.
Source: the reference counts of the eager backend; tests replay the graph on real tensors.
"""

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import fx

from gtrans.analysis.schedule import Schedule, Task
from gtrans.analysis.workspace import workspaces
from gtrans.ir import ops
from gtrans.ir.sizes import tensor_bytes


@dataclass(frozen=True, slots=True)
class Alive:
    """A storage that is in memory at some moment.

    Attributes:
        node: what allocated it.
        bytes: its size.
        value: the (fake) tensor in it; of a node with several results, the one it is for.
        role: "constant", "output", "tangent", "gradient", "saved", "recomputed" or "temporary".
    """

    node: fx.Node
    bytes: int
    value: Any
    role: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage over the whole step.

    Attributes:
        value: the (fake) tensor that it was allocated for.
        born: number of the task that allocates it; 0 for constants.
        last: number of the last task that needs it; the number of tasks if the step's end does.
    """

    value: Any
    born: int
    last: int


@dataclass(frozen=True)
class Liveness:
    """The memory of one schedule.

    Attributes:
        schedule: what was simulated.
        timeline: bytes in memory while each task runs, constants included.
        constant_bytes: parameters, buffers and inputs.
    """

    schedule: Schedule
    timeline: tuple[int, ...]
    constant_bytes: int
    _storages: "Storages"
    _workspaces: Mapping[fx.Node, int]

    @cached_property
    def peak(self) -> int:
        """The largest number of bytes in memory at once, constants included."""
        return max(self.timeline, default=0)

    @cached_property
    def peak_task(self) -> int:
        """Number of the task that runs at the peak."""
        return self.timeline.index(self.peak)

    @property
    def peak_node(self) -> fx.Node:
        """The node that runs at the peak."""
        return self.schedule.tasks[self.peak_task].node

    @property
    def at_boundary(self) -> int:
        """Bytes in memory between forward and backward, constants included."""
        return self._at(self.schedule.boundary - 0.5)

    def storages(self) -> Iterator[Storage]:
        """Every storage of the step, in the order of allocation."""
        constants = self.schedule.constants
        for ((owner, size), value), last in zip(
            self._storages.valued(), self._storages.last, strict=True
        ):
            yield Storage(value if size else None, 0 if owner in constants else owner, last)

    def workspace(self) -> dict[int, int]:
        """Bytes that kernels take while they run, by task; tasks without any are left out."""
        known = self._workspaces
        return {i: known[t.node] for i, t in enumerate(self.schedule.tasks) if t.node in known}

    def saved(self) -> Iterator[tuple[fx.Node, int]]:
        """What lives from the forward into the backward, outputs and constants apart."""
        schedule, end = self.schedule, len(self.schedule.tasks)
        for (owner, size), last in zip(self._storages.owners, self._storages.last, strict=True):
            if owner < schedule.boundary <= last < end and owner not in schedule.constants:
                yield schedule.tasks[owner].node, size

    def alive(self, task: int | None = None) -> list[Alive]:
        """What is in memory while a task runs (by default the one at the peak), largest first."""
        at = self.peak_task if task is None else task
        found = [
            Alive(self.schedule.tasks[owner].node, size, value, self._role(number, owner, at))
            for number, ((owner, size), value) in enumerate(self._storages.valued())
            if size
            and (owner <= at or owner in self.schedule.constants)
            and at <= self._storages.last[number]
        ]
        return sorted(found, key=lambda a: -a.bytes)

    def _at(self, moment: float) -> int:
        pairs = zip(self._storages.owners, self._storages.last, strict=True)
        return sum(size for (owner, size), last in pairs if owner <= moment <= last)

    def _role(self, storage: int, owner: int, at: int) -> str:
        schedule = self.schedule
        if owner in schedule.constants:
            return "constant"
        if owner >= schedule.boundary:
            if schedule.tasks[owner].node.op == "placeholder":
                return "tangent"
            if self._storages.last[storage] == len(schedule.tasks):
                return "gradient"
            return "recomputed" if schedule.tasks[owner].again else "temporary"
        if self._storages.last[storage] == len(schedule.tasks):
            return "output"
        return "saved" if self._storages.last[storage] >= schedule.boundary else "temporary"


def simulate(schedule: Schedule, extra: Mapping[fx.Node, int] | None = None) -> Liveness:
    """Runs a schedule through the simulated allocator.

    Args:
        schedule: the order of the step.
        extra: workspace of each node that needs any, from `workspaces`; found if not given.
    """
    storages = Storages(schedule)
    end = len(schedule.tasks)
    changes = [0] * (end + 2)
    for (owner, size), last in zip(storages.owners, storages.last, strict=True):
        changes[owner] += size
        changes[last + 1] -= size
    constant = sum(size for owner, size in storages.owners if owner in schedule.constants)
    early = sum(size for owner, size in storages.owners if owner in schedule.constants and owner)
    # Constants are in memory before the first task, whatever their place in the list.
    for owner, size in storages.owners:
        if owner in schedule.constants and owner:
            changes[owner] -= size
    changes[0] += early
    held = list(accumulate(changes))[:end]
    if extra is None:
        extra = workspaces(dict.fromkeys(t.node for t in schedule.tasks))
    timeline = tuple(h + extra.get(t.node, 0) for h, t in zip(held, schedule.tasks, strict=True))
    return Liveness(schedule, timeline, constant, storages, extra)


class Storages:
    """Which task allocates each storage, its bytes, and the last task that needs it.

    Attributes:
        owners: number of the task and bytes, per storage.
        last: number of the last task that needs it; the number of tasks if the step's end does.
        held: the storages of each task's value.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.owners: list[tuple[int, int]] = []
        self.last: list[int] = []
        self.held: list[tuple[int, ...]] = []
        self._tasks = schedule.tasks
        known: Storages | None = schedule.forward.shared.get(_FACTS)
        if known is None:
            self._run(0, schedule.boundary)
            schedule.forward.shared[_FACTS] = self._copied()
        else:
            known._copied(self)
        self._run(schedule.boundary, len(schedule.tasks))
        end = len(schedule.tasks)
        for number in schedule.kept:
            for storage in self.held[number]:
                self.last[storage] = end

    def _copied(self, into: "Storages | None" = None) -> "Storages":
        """Lists of its own for what is known so far."""
        into = copy(self) if into is None else into
        into.owners, into.last, into.held = list(self.owners), list(self.last), list(self.held)
        return into

    def _run(self, start: int, end: int) -> None:
        held, last = self.held, self.last
        for number in range(start, end):
            task = self._tasks[number]
            for read in task.reads:
                for storage in held[read]:
                    last[storage] = number
            held.append(self._result(number, task))

    def valued(self) -> Iterator[tuple[tuple[int, int], Any]]:
        """Every storage with the (fake) tensor that it was allocated for."""
        first = -1
        for number, (owner, size) in enumerate(self.owners):
            if number == 0 or self.owners[number - 1][0] != owner:
                first = number
            val = self._tasks[owner].node.meta.get("val")
            yield (owner, size), val[number - first] if isinstance(val, (tuple, list)) else val

    def _result(self, number: int, task: Task) -> tuple[int, ...]:
        sizes, source, part = _facts(task.node)
        if task.offered:
            sizes = (tensor_bytes(task.node.meta["val"]),)
        elif source is not None:
            held = self.held[task.reads[source]]
            return held if part is None or part >= len(held) else (held[part],)
        made = []
        for size in sizes:
            made.append(len(self.owners))
            self.owners.append((number, size))
            self.last.append(number)
        return tuple(made)


_FACTS = "gtrans storage"
Facts = tuple[tuple[int, ...], int | None, int | None]


def _facts(node: fx.Node) -> Facts:
    """Bytes of each storage a node allocates; or which input it shares, and which part of it."""
    found = node.meta.get(_FACTS)
    val = node.meta.get("val")
    if found is None or found[0] is not val:
        found = node.meta[_FACTS] = (val, _find_facts(node))
    facts: Facts = found[1]
    return facts


def _find_facts(node: fx.Node) -> Facts:
    val = node.meta.get("val")
    if ops.is_getitem(node):
        part: Any = node.args[1]
        return (), 0, None if ops.is_view(node.all_input_nodes[0]) else part
    if ops.is_view(node):
        return (), 0, None
    if (shared := _written_argument(node)) is not None:
        return (), shared, None
    if ops.is_on_host(node):
        return (0,), None, None
    if node.op == "get_attr":
        val = node.meta.get("val", getattr(node.graph.owning_module, str(node.target), None))
    if isinstance(val, (tuple, list)):
        return tuple(tensor_bytes(v) for v in val), None, None
    return (tensor_bytes(val),), None, None


def _written_argument(node: fx.Node) -> int | None:
    """The tensor input that an in-place operator writes and returns."""
    op = ops.overload(node)
    if op is None or not ops.mutates(node):
        return None
    for argument, value in zip(op._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return ops.tensor_inputs(node).index(value) if isinstance(value, fx.Node) else None
    return None
