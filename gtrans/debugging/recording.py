"""Record one training step of a model, and run its graphs again without capturing again.

A recording holds, for each graph of the model, the graph before any joint pass and the values of
one step. The rewritten graph must give the same outputs, gradients and buffers from these as the
untouched graph does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from gtrans.api import install
from gtrans.backends.eager import Eager
from gtrans.capture import Compiler, capture_always
from gtrans.captured import Captured
from gtrans.comparison import Comparison, Loss, longest_sum
from gtrans.contract import Contract, compose_all
from gtrans.debugging.case import Case
from gtrans.debugging.check import contract_of
from gtrans.debugging.running import Results, StepGraph, compare, run
from gtrans.errors import CaptureError
from gtrans.ir.forward import ForwardGraph, value
from gtrans.ir.half import Half, Role, Runnable, boxed
from gtrans.ir.joint import JointGraph
from gtrans.pipeline import Gate, Pipeline
from gtrans.plan.planner import Plan
from gtrans.verification import in_dtype, private_copy, training_step


@dataclass
class _Recorder:
    """Runs halves as `eager` does, and keeps what they are called with: by role, graph and name."""

    name: str = "recorder"
    overwrites_saved: bool = False
    slack: float = 0.0
    seen: dict[tuple[Role, int], dict[str, Any]] = field(default_factory=dict)

    def unavailable(self) -> str | None:
        """Always available."""
        return None

    def prepare(self, half: Half) -> Half:
        """Nothing to prepare."""
        return half

    def compile(self, half: Half) -> Runnable:
        """Makes a half runnable."""
        run = Eager().compile(half)
        names = [n.name for n in half.module.graph.find_nodes(op="placeholder")]

        @boxed
        def recorded(arguments: list[Any]) -> Sequence[Any]:
            self.seen[half.role, half.graph] = {
                name: v.detach().clone() if isinstance(v, torch.Tensor) else v
                for name, v in zip(names, arguments, strict=True)
            }
            return run(arguments)

        return recorded


@dataclass
class _Capturing(Compiler):
    """Keeps the captured forward graphs, too."""

    forwards: list[ForwardGraph] = field(default_factory=list)

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        self.forwards.append(ForwardGraph(module).copy())
        return super().__call__(module, example_inputs)


class Recording:
    """The graphs of one training step of a model, with the values they were called with.

    Args:
        model: the model; it stays as it is.
        inputs: its positional inputs.
        keyword_inputs: its keyword inputs.
        dtype: dtype to run it in; None is the model's own.
        loss: as for `gtrans.verify`.
        seed: seed of the random state.
        forward: passes on forward graphs to run before the joint graphs are recorded; other passes
            of the pipeline are ignored.

    Raises:
        CaptureError: nothing with a backward was captured.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        keyword_inputs: dict[str, Any],
        *,
        dtype: torch.dtype | None = None,
        loss: Loss | None = None,
        seed: int = 0,
        forward: Pipeline | None = None,
    ) -> None:
        twin = private_copy(model, dtype)
        arguments = in_dtype((tuple(inputs), keyword_inputs), dtype)
        self._recorder = _Recorder()
        given = forward or Pipeline()
        passes = (*given.on(ForwardGraph).passes, Plan(recompute="none"))
        self._compiler = _Capturing(
            Pipeline(passes, unrolls=given.reads_steps), self._recorder, skip_failures=False
        )
        install(twin, self._compiler)
        with capture_always():
            training_step(twin, arguments, loss, seed)
        self._terms = longest_sum(model, arguments)
        self._seed = seed
        if not self.captured:
            raise CaptureError(
                f"nothing of {type(model).__name__}'s training step was captured, so that there is "
                "nothing to record; TORCH_LOGS=graph_breaks shows why"
            )

    @property
    def captured(self) -> list[Captured]:
        """The graphs that have a backward."""
        return [c for c in self._compiler.captured if c.original is not None]

    @property
    def indices(self) -> list[int]:
        """The numbers of the recorded graphs."""
        return [c.index for c in self.captured]

    @cached_property
    def joints(self) -> list[Case]:
        """The joint graphs, in order of capture, as cases without passes."""
        return [self._case(c.original, self._joint_values(c)) for c in self.captured if c.original]

    @cached_property
    def forwards(self) -> list[Case]:
        """The forward graphs that belong to `joints`, before any pass.

        Raises:
            CaptureError: AOTAutograd has changed the inputs of a graph, so that its values are not
                those of the forward graph.
        """
        return [
            self._case(graph, self._forward_values(graph, c))
            for c in self.captured
            for graph in [self._compiler.forwards[c.index]]
        ]

    @cached_property
    def _expected(self) -> dict[int, Results]:
        return {}

    def agrees(self, pipeline: Pipeline, gate: Gate) -> bool:
        """Whether every graph computes the same with the rewrites that the gate lets through."""
        return all(c.ok for c in self.compare(pipeline, gate))

    def compare(self, pipeline: Pipeline, gate: Gate) -> list[Comparison]:
        """Runs passes on every graph, runs the graph, and compares all it computes.

        Args:
            pipeline: passes on forward graphs only, which are run on those, or any others, of which
                those on joint graphs are run on these, and a plan after them.
            gate: which of their rewrites to perform.

        Raises:
            GTransError: a pass failed.
        """
        passes = pipeline.on(JointGraph)
        cases = self.joints
        if pipeline.passes and not passes.passes:
            passes, cases = pipeline, self.forwards
        elif not any(isinstance(p, Plan) for p in passes.passes):
            passes = passes.planned(Plan())
        results: list[Results] = []
        contracts: list[Contract] = []
        for case in cases:
            graph, steps = passes.run(case.graph, gate=gate)
            contracts.append(contract_of(steps))
            results.append(run(graph, case.values, case.seed))
        contract = compose_all(contracts)
        pairs = zip(map(self._untouched, cases), results, strict=True)
        return [c for a, b in pairs for c in compare(a, b, contract, self._terms)]

    def _untouched(self, case: Case) -> Results:
        if (key := id(case)) not in self._expected:
            self._expected[key] = run(case.graph, case.values, case.seed)
        return self._expected[key]

    def _case(self, graph: StepGraph, values: dict[str, Any]) -> Case:
        return Case(graph, values, Pipeline(), seed=self._seed, terms=self._terms)

    def _joint_values(self, captured: Captured) -> dict[str, Any]:
        """Of all placeholders; of the tangents only if the step has come back through the graph."""
        assert captured.original is not None
        forward = self._recorder.seen["forward", captured.index]
        backward = self._recorder.seen.get(("backward", captured.index), {})
        tangents = {n.name for n in captured.original.tangents} & backward.keys()
        values = {n.name: forward[n.name] for n in captured.original.primals}
        return values | {name: backward[name] for name in tangents}

    def _forward_values(self, graph: ForwardGraph, captured: Captured) -> dict[str, Any]:
        assert captured.original is not None
        seen = self._recorder.seen["forward", captured.index]
        inputs, primals = graph.graph.find_nodes(op="placeholder"), captured.original.primals
        if len(inputs) != len(primals):
            raise CaptureError(
                f"graph {captured.index} has {len(inputs)} inputs before autograd and "
                f"{len(primals)} after it: its forward graph cannot be run on recorded values"
            )
        found: dict[str, Any] = {}
        for node, primal in zip(inputs, primals, strict=True):
            recorded, traced = seen[primal.name], value(node)
            if isinstance(traced, torch.Tensor) and traced.requires_grad:
                recorded = recorded.requires_grad_()
            found[node.name] = recorded
        return found
