"""What is known of a captured graph, and of what is in memory beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx, nn
from torch.optim import Optimizer

from gtrans.analysis.liveness import simulate
from gtrans.analysis.optimizer_state import state_bytes
from gtrans.analysis.schedule import schedule_of
from gtrans.analysis.workspace import allow_for_loss
from gtrans.contract import Contract, compose_all
from gtrans.errors import BudgetError
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Surroundings
from gtrans.ir.sizes import human, numel, tensor_bytes
from gtrans.memory import Budget
from gtrans.pipeline import Step
from gtrans.plan.budget import plain_liveness
from gtrans.plan.saved import SavedValue

_LOSS_BYTES = 16


@dataclass
class Captured:
    """One graph of a model, and what became of it. A model with graph breaks has several.

    Attributes:
        index: number of the graph in the order of capture.
        frame: Dynamo's number of the code that was captured; captured again, it has the same.
        training: whether it has a backward; inference graphs are lowered as they are.
        forward_steps: what the forward passes did.
        steps: what the joint passes did.
        original: the joint graph in normal form before any pass; None for inference.
        rewritten: the joint graph after all passes, with its cut; None for inference.
        saved: what is kept for the backward.
        saved_bytes: their sum without parameters and buffers.
        saved_bytes_before: the same if nothing had been rewritten, as autograd would.
        own_seconds: time spent in gtrans: passes, planning, splitting, preparing for the backend.
        lower_seconds: time spent in the backend.
    """

    index: int
    frame: int = 0
    training: bool = False
    forward_steps: list[Step] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    original: JointGraph | None = None
    rewritten: JointGraph | None = None
    saved: list[SavedValue] = field(default_factory=list)
    saved_bytes: int = 0
    saved_bytes_before: int = 0
    own_seconds: float = 0.0
    lower_seconds: float = 0.0

    @property
    def contract(self) -> Contract:
        """What the passes that ran on this graph promise together."""
        ran = [s for s in (*self.forward_steps, *self.steps) if not s.error and s.stats.rewritten]
        return compose_all([s.contract for s in ran])


@dataclass(frozen=True)
class Resident:
    """What a model holds in memory all the time.

    Attributes:
        bytes: its parameters and buffers.
        trainable_bytes: the parameters that get a gradient.
        state_bytes: the state of the optimizer, if a plan reserves memory for it.
    """

    bytes: int
    trainable_bytes: int
    state_bytes: int = 0

    @staticmethod
    def of(model: nn.Module, optimizer: Optimizer | None = None) -> "Resident":
        """Adds up a model's parameters and buffers, each once."""
        parameters = list(model.parameters())
        return Resident(
            sum(t.nbytes for t in (*parameters, *model.buffers())),
            sum(p.nbytes for p in parameters if p.requires_grad),
            state_bytes(optimizer) if optimizer is not None else 0,
        )


def parameter_bytes(joint: JointGraph, *, trainable: bool = False) -> int:
    """Bytes of a graph's parameters and buffers, or of those that get a gradient."""
    return sum(
        tensor_bytes(node.meta.get("val"))
        for info, node in zip(joint.signature.inputs, joint.primals, strict=True)
        if info.kind in ("parameter", "buffer")
        and (not trainable or joint.gradient_of(node) is not None)
    )


def surroundings(
    record: Captured,
    captured: Sequence[Captured],
    resident: Resident | None,
    reserved_bytes: int,
    slack: float | None,
) -> Surroundings:
    """What is in memory beside a graph that was just captured.

    Graphs of one model run forward in the order of capture, and backward in the opposite one. So
    while a graph runs, the ones before it hold what they saved, and the ones after it have left the
    gradients of their parameters. What those will save is not known yet: they are planned later,
    with what this one leaves them.

    Args:
        record: the graph; under a budget, room for a loss outside of it is left in it.
        captured: all graphs of the model so far.
        resident: what the model holds; if it is not known, nothing besides this graph's own.
        reserved_bytes: besides the model.
        slack: share of a budget to leave free; None without a budget.
    """
    assert record.original is not None
    latest = {c.frame: c for c in captured if c.training and c.frame < record.frame}
    earlier = list(latest.values())
    # A loss that is computed elsewhere is held with the number that its backward starts from.
    outputs = [o for o in record.original.forward_outputs if isinstance(o, fx.Node)]
    has_loss = any(numel(o.meta["val"]) == 1 for o in outputs if not ops.is_symbol(o))
    beside = reserved_bytes + (0 if has_loss else _LOSS_BYTES)
    if resident is not None:
        graphs = [c.original for c in earlier if c.original is not None]
        done = sum(parameter_bytes(g, trainable=True) for g in (*graphs, record.original))
        beside += max(0, resident.bytes - parameter_bytes(record.original))
        beside += max(0, resident.trainable_bytes - done)
    held = beside + sum(c.saved_bytes for c in earlier)
    if slack is None:
        return Surroundings(held, reserved_bytes=reserved_bytes)
    if not has_loss:
        allow_for_loss(record.original.tangents)
    plain = plain_liveness(record.original).peak
    plain += beside + sum(c.saved_bytes_before for c in earlier)
    return Surroundings(held, plain, slack, reserved_bytes)


def require_room(
    captured: Sequence[Captured], budget: Budget, beside: int, reserved_bytes: int, state_bytes: int
) -> None:
    """Checks that what Dynamo left to plain Python has room beside the graphs under a budget.

    Args:
        captured: the graphs.
        budget: of the step's peak.
        beside: bytes that autograd keeps outside of them.
        reserved_bytes: what was reserved, for that but for the optimizer's state.
        state_bytes: of the optimizer, as far as they are reserved.

    Raises:
        BudgetError: it has not.
    """
    planned = [c.rewritten for c in captured if c.rewritten is not None]
    beside -= reserved_bytes - state_bytes
    if beside <= 0 or not planned:
        return
    limit = budget.in_bytes(max(g.surroundings.plain_peak or 0 for g in planned))
    peak = max(simulate(schedule_of(g)).peak + g.surroundings.held_bytes for g in planned)
    if peak + beside > limit:
        room = reserved_bytes + beside
        raise BudgetError(
            f"the captured graphs peak at {human(peak)} of {human(limit)}, and a part of the model "
            f"that Dynamo runs as plain Python keeps {human(beside)} more for its backward.\n"
            "  TORCH_LOGS=graph_breaks shows which part and why. Change that, or leave room for it "
            f"with 'plan{{memory={limit}B,reserve={-(-room // 1024)}KiB}}'"
        )
