"""Keep the graphs of a model as they are before and after each pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from gtrans.api import capture, require_trainable
from gtrans.capture import Compiler
from gtrans.captured import Resident
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.joint import JointGraph
from gtrans.pipeline import Graph, Pipeline, Step


@dataclass(frozen=True)
class Snapshot:
    """One pass on one graph."""

    index: int
    step: Step
    before: Graph
    after: Graph


@dataclass
class Watcher(Compiler):
    """A compiler that remembers every graph it has seen.

    Attributes:
        forwards: the captured forward graphs before any pass.
        snapshots: what each pass did, in order.
    """

    forwards: list[ForwardGraph] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.observers = (self._observe,)

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        """Called by Dynamo."""
        self.forwards.append(ForwardGraph(module).copy())
        return super().__call__(module, example_inputs)

    def forward_at(self, index: int, name: str | None, *, earlier: bool) -> ForwardGraph:
        """The forward graph before or after a pass; after all passes if none is named."""
        graph = self._at(index, ForwardGraph, name, earlier)
        return graph if isinstance(graph, ForwardGraph) else self.forwards[index]

    def joint_at(self, index: int, name: str | None, *, earlier: bool) -> JointGraph:
        """The joint graph before or after a pass; after all passes if none is named."""
        graph = self._at(index, JointGraph, name, earlier)
        if isinstance(graph, JointGraph):
            return graph
        rewritten = self.captured[index].rewritten
        assert rewritten is not None
        return rewritten

    def _at(self, index: int, kind: type[Graph], name: str | None, earlier: bool) -> Graph | None:
        steps = [s for s in self.snapshots if s.index == index and isinstance(s.before, kind)]
        if name is not None:
            steps = [s for s in steps if s.step.name == name]
        if not steps:
            return None
        return steps[0].before if earlier else steps[-1].after

    def _observe(self, step: Step, before: Graph, after: Graph) -> None:
        self.snapshots.append(Snapshot(len(self.captured) - 1, step, before, after))


def watched(
    model: nn.Module, inputs: Sequence[Any], keyword_inputs: dict[str, Any], pipeline: Pipeline
) -> Watcher:
    """Captures one step of a model and keeps its graphs.

    Raises:
        ModelError: the model has no trainable parameters, or does not accept the inputs.
        GTransError: a pass failed.
    """
    require_trainable(model)
    watcher = Watcher(pipeline, "eager", skip_failures=False)
    watcher.resident = Resident.of(model)
    capture(model, watcher, inputs, keyword_inputs)
    return watcher
