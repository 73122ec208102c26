"""The backward half that follows from a choice of what to keep, as a schedule.

    forward:  y = gelu(x)                       forward:  y = gelu(x)
    backward: dw = mm(dz, y)            -->     backward: y' = gelu(x)      # x is kept, y is not
                                                          dw = mm(dz, y')

Every recomputed value is computed right before its first reader, or at once where that lets go of
more (`gtrans.plan.prompt`). One that has a second reader much later may be computed a second time
there instead of waiting in memory: a choice says which values wait (`hold`), and how far apart two
readers may be for all others (`window`).

    saved values                boundaries of segments        (in memory from the forward)
    held values                 what autograd would save      (in memory while the segment's
                                                               backward runs)
    all others                  cheap ones                    (in memory around their reader)
"""

from dataclasses import dataclass

from torch import fx

from gtrans.analysis.schedule import Builder, Index, Schedule, Task
from gtrans.errors import PlanError
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Placement, tag
from gtrans.ir.ops import storage_of
from gtrans.ir.sizes import tensor_bytes
from gtrans.plan.cut import made_of_what_they_rebuild, recipe
from gtrans.plan.prompt import prompt

# Row statistics and the like: waiting for a later reader costs them nothing worth the work.
_SMALL = 1 / 256
# A choice that runs more than this many tasks per node of the graph is not worth simulating.
_MOST_TASKS = 6


@dataclass(frozen=True)
class Choice:
    """What to save, and what of the rest waits in memory once it is computed again.

    Attributes:
        save: values to save where the backward needs them.
        hold: recomputed values that wait for their last reader; None lets all wait.
        window: how many backward nodes apart two readers of any other recomputed value may be to
            share it.
        dropped: values that are let go of before the backward node of this number, saved or not,
            and computed again should a later one want them.
    """

    save: frozenset[fx.Node]
    hold: frozenset[fx.Node] | None = None
    window: int = 0
    dropped: frozenset[tuple[fx.Node, int]] = frozenset()


@dataclass(frozen=True)
class Candidate:
    """One plan.

    Attributes:
        label: how it came about.
        choice: what it saves.
        peak: simulated peak in bytes, constants included.
        seconds: predicted time of forward and backward.
        cost: seconds, and more for the products that run again; see `gtrans.plan.choose`.
        boundaries: positions of its segments, if it has any.
    """

    label: str
    choice: Choice
    peak: int
    seconds: float
    cost: float
    boundaries: tuple[int, ...] = ()


class Rebuilder:
    """Makes schedules of one graph; what they have in common is found once.

    Args:
        joint: the graph, not changed.
    """

    def __init__(self, joint: JointGraph) -> None:
        self.joint = joint
        self.index = Index(joint)
        self.backward = [
            (n, [(s, joint.is_forward(s)) for s in self.index.inputs[n]])
            for n in joint.nodes
            if joint.is_backward(n) and n.op == "call_function"
        ]
        self._bytes = {n: tensor_bytes(n.meta.get("val")) for n in self.index.forward}
        self.small = max(self._bytes.values(), default=0) * _SMALL
        self._rebuilt = {n for n in self.index.forward if tag(n).placement is Placement.REBUILT}
        self._position = {n: i for i, n in enumerate(joint.graph.nodes)}
        self._overwritten = {
            storage_of(n.all_input_nodes[0]) for n in joint.nodes if ops.mutates(n)
        }
        self._circular = made_of_what_they_rebuild(joint)
        self._recipes: dict[fx.Node, list[fx.Node]] = {}
        self._must_save: dict[fx.Node, bool] = {}

    def is_small(self, node: fx.Node) -> bool:
        """Whether a value may wait in memory whatever the choice says."""
        return 0 < self._bytes[node] <= self.small

    def may_save(self, node: fx.Node) -> bool:
        """Whether no pass has ruled that the value be computed again."""
        return node not in self._rebuilt

    @property
    def rebuilds(self) -> bool:
        """Whether passes have ruled that some values be computed again."""
        return bool(self._rebuilt)

    def position(self, node: fx.Node) -> int:
        """Where a node stands in the graph."""
        return self._position[node]

    def recipe(self, node: fx.Node) -> list[fx.Node]:
        """What a node is computed from if it is computed again."""
        if node not in self._recipes:
            self._recipes[node] = recipe(self.joint, node)
        return self._recipes[node]

    def must_save(self, node: fx.Node) -> bool:
        """Whether a value cannot be had again in any other way than by saving it."""
        if node not in self._must_save:
            self._must_save[node] = self._find_must_save(node)
        return self._must_save[node]

    def schedule(self, choice: Choice) -> Schedule | None:
        """The schedule of a choice; None if it would run the same nodes too often.

        Raises:
            PlanError: a value would have to be computed from itself.
        """
        return _Run(self, choice).schedule()

    def _find_must_save(self, node: fx.Node) -> bool:
        placement = tag(node).placement
        if node.op in ("placeholder", "get_attr") or placement is Placement.SAVED:
            return True
        if placement is Placement.REBUILT or node in self.joint.offers:
            return False
        if node in self._circular:
            return True
        if ops.is_getitem(node) and not ops.is_view(node.all_input_nodes[0]):
            return self._unrepeatable(node.all_input_nodes[0])
        return self._unrepeatable(node)

    def _unrepeatable(self, node: fx.Node) -> bool:
        if node.op != "call_function" or ops.is_effect(node) or ops.is_random(node):
            return True
        return bool(self._overwritten) and any(
            storage_of(n) in self._overwritten for n in ops.tensor_inputs(node)
        )


class _Run:
    """One walk over the backward, with the values that are at hand."""

    def __init__(self, owner: Rebuilder, choice: Choice) -> None:
        self.owner = owner
        self.choice = choice
        self.tasks: list[tuple[fx.Node, list[fx.Node | int], bool]] = []
        self.made: dict[fx.Node, int] = {}
        self.made_at: dict[fx.Node, int] = {}
        self.read_at: dict[fx.Node, int] = {}
        self.cut: set[fx.Node] = set()
        self.drops: dict[fx.Node, list[int]] = {}
        for node, position in choice.dropped:
            self.drops.setdefault(node, []).append(position)
        self.limit = _MOST_TASKS * len(owner.joint.graph.nodes)

    def schedule(self) -> Schedule | None:
        joint, made = self.owner.joint, self.made  # of a tangent, the node itself
        for position, (node, sources) in enumerate(self.owner.backward):
            reads = [
                self.at(source, position) if is_forward else made.get(source, source)
                for source, is_forward in sources
            ]
            self.made[node] = self._add(node, reads, False)
            if len(self.tasks) > self.limit:
                return None
        end = len(self.owner.backward)
        gradients = [
            self.at(g, end) if joint.is_forward(g) else made.get(g, g)
            for g in joint.gradients
            if g is not None
        ]
        return self._assemble(gradients)

    def at(self, value: fx.Node, position: int) -> fx.Node | int:
        """The saved value, or the task that holds it; computed again if it is not at hand."""
        if self._at_hand(value, position):
            self.read_at[value] = position
            return self._reference(value, position)
        stack: list[fx.Node] = [value]
        on_stack = {value}
        while stack:
            top = stack[-1]
            if self._at_hand(top, position):
                self.read_at[top] = position
                on_stack.discard(stack.pop())
                continue
            missing = next(
                (n for n in self.owner.recipe(top) if not self._at_hand(n, position)), None
            )
            if missing is None:
                sources = self.owner.recipe(top)
                for n in sources:
                    self.read_at[n] = position
                reads = [self._reference(n, position) for n in sources]
                self.made[top] = self._add(top, reads, True)
                self.made_at[top] = self.read_at[top] = position
                on_stack.discard(stack.pop())
                continue
            if missing in on_stack:
                raise PlanError(f"{missing.name} would have to be recomputed from itself")
            on_stack.add(missing)
            stack.append(missing)
        return self._reference(value, position)

    def _at_hand(self, node: fx.Node, position: int) -> bool:
        if node in self.cut and not self._is_dropped(node, -1, position):
            return True
        if node in self.made and not self._is_dropped(node, self.made_at[node], position):
            hold = self.choice.hold
            if hold is None or node in hold:
                return True
            if position - self.read_at[node] <= self.choice.window:
                return True
            return self.owner.is_small(node)
        if self._is_dropped(node, -1, position):
            return False
        save = node in self.choice.save and self.owner.may_save(node)
        if save or self.owner.must_save(node):
            self.cut.add(node)
            return True
        return False

    def _is_dropped(self, node: fx.Node, since: int, position: int) -> bool:
        """Whether a value that was at hand at one backward node is let go of by another one."""
        drops = self.drops.get(node)
        return (
            drops is not None
            and any(since < d <= position for d in drops)
            and not self.owner.must_save(node)
        )

    def _reference(self, node: fx.Node, position: int) -> fx.Node | int:
        saved = node in self.cut and not self._is_dropped(node, -1, position)
        return node if saved else self.made[node]

    def _add(self, node: fx.Node, reads: list[fx.Node | int], again: bool) -> int:
        self.tasks.append((node, reads, again))
        return len(self.tasks) - 1

    def _assemble(self, gradients: list[fx.Node | int]) -> Schedule:
        owner = self.owner
        builder = Builder(owner.index)
        builder.add_forward(sorted(self.cut, key=owner.position))
        first, saved = len(builder.tasks), builder.at_hand
        offers = owner.joint.offers

        def number(read: fx.Node | int) -> int:
            return first + read if isinstance(read, int) else saved[read]

        builder.tasks += [
            Task(
                node,
                tuple([number(r) for r in reads]),
                again,
                again and node in offers,
            )
            for node, reads, again in self.tasks
        ]
        schedule = builder.finish([number(g) for g in gradients])
        # Only what passes placed in the backward can be wanted later than what it is made of.
        return prompt(schedule) if owner.rebuilds else schedule
