"""What is known of a captured graph, and of what its model holds in memory."""

from dataclasses import dataclass, field

from torch import nn

from gtrans.contract import Contract, compose_all
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import tensor_bytes
from gtrans.pipeline import Step
from gtrans.plan.saved import SavedValue


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
    """

    bytes: int
    trainable_bytes: int

    @staticmethod
    def of(model: nn.Module) -> "Resident":
        """Adds up a model's parameters and buffers, each once."""
        parameters = list(model.parameters())
        return Resident(
            sum(t.nbytes for t in (*parameters, *model.buffers())),
            sum(p.nbytes for p in parameters if p.requires_grad),
        )


def parameter_bytes(joint: JointGraph, *, trainable: bool = False) -> int:
    """Bytes of a graph's parameters and buffers, or of those that get a gradient."""
    return sum(
        tensor_bytes(node.meta.get("val"))
        for info, node in zip(joint.signature.inputs, joint.primals, strict=True)
        if info.kind in ("parameter", "buffer")
        and (not trainable or joint.gradient_of(node) is not None)
    )
