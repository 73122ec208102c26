"""Run the captured graphs of one training step again, with other rewrites, without capturing again.

A recording holds, for each graph of the model, its joint graph before any pass and the primals and
tangents of one step. The rewritten graph must give the same outputs, gradients and buffers from
these as the untouched graph does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from gtrans.api import install
from gtrans.backends.eager import Eager
from gtrans.capture import Captured, Compiler, capture_always, split
from gtrans.contract import Contract, Exact, compose_all
from gtrans.ir.half import Half, Role, Runnable
from gtrans.ir.joint import JointGraph
from gtrans.pipeline import Gate, Pipeline
from gtrans.plan.planner import Plan
from gtrans.verification import (
    Comparison,
    Loss,
    compare_tensors,
    in_dtype,
    longest_sum,
    private_copy,
    rounding_scale,
    training_step,
)

Values = dict[str, Any]


@dataclass
class _Recorder:
    """Runs halves as `eager` does, and keeps what they are called with: by role, graph and name."""

    name: str = "recorder"
    overwrites_saved: bool = False
    seen: dict[tuple[Role, int], Values] = field(default_factory=dict)

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

        def recorded(arguments: list[Any]) -> Sequence[Any]:
            self.seen[half.role, half.graph] = _copies(dict(zip(names, arguments, strict=True)))
            return run(arguments)

        recorded._boxed_call = True  # type: ignore[attr-defined]  # AOTAutograd reads this mark
        return recorded


class Recording:
    """The graphs of one training step of a model, with the values they were called with.

    Args:
        model: the model; it stays as it is.
        inputs: its positional inputs.
        keyword_inputs: its keyword inputs.
        dtype: dtype to run it in; None is the model's own.
        loss: as for `gtrans.verify`.
        seed: seed of the random state.
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
    ) -> None:
        twin = private_copy(model, dtype)
        arguments = in_dtype((tuple(inputs), keyword_inputs), dtype)
        self._recorder = _Recorder()
        untouched = Pipeline((Plan(recompute="none"),))
        compiler = Compiler(untouched, self._recorder, skip_failures=False)
        install(twin, compiler)
        with capture_always():
            training_step(twin, arguments, loss, seed)
        self.captured: list[Captured] = [c for c in compiler.captured if c.original is not None]
        self._size = longest_sum(model, arguments)
        self._seed = seed
        self._expected = [self._run(c.index, _rewritten(c)) for c in self.captured]

    def agrees(self, pipeline: Pipeline, gate: Gate) -> bool:
        """Whether every graph computes the same with the rewrites that the gate lets through."""
        return all(c.ok for c in self.compare(pipeline, gate))

    def compare(self, pipeline: Pipeline, gate: Gate) -> list[Comparison]:
        """Runs the joint passes on every graph, runs the graph, and compares all it computes.

        Raises:
            GTransError: a pass failed.
        """
        planned = pipeline.on(JointGraph)
        if not any(isinstance(p, Plan) for p in planned.passes):
            planned = Pipeline((*planned.passes, Plan()))
        results: list[dict[Any, torch.Tensor | None]] = []
        contracts: list[Contract] = [Exact()]
        for captured in self.captured:
            assert captured.original is not None
            graph, steps = planned.run(captured.original, gate=gate)
            assert isinstance(graph, JointGraph)
            contracts += [s.contract for s in steps if s.stats.rewritten]
            results.append(self._run(captured.index, graph))
        contract = compose_all(contracts)
        found: list[Comparison] = []
        for expected, values in zip(self._expected, results, strict=True):
            floor = rounding_scale({str(key): (key[0], v) for key, v in expected.items()})
            found += [
                compare_tensors(name, kind, value, values[kind, name], contract, self._size, floor)
                for (kind, name), value in expected.items()
                if value is not None or values[kind, name] is not None
            ]
        return found

    def _run(self, index: int, joint: JointGraph) -> dict[Any, torch.Tensor | None]:
        """Runs both halves of a graph: its tensors by kind and name."""
        if joint.cut is None:  # a pass ran after the plan
            Plan(recompute="none").run(joint, lambda site: True)
        forward, backward = split(joint)
        primals = _copies(self._recorder.seen["forward", index])
        found: dict[Any, torch.Tensor | None] = {}
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            values = _call(forward, primals, "forward")
            outputs = _results(forward, values)
            for i in range(joint.signature.num_forward_outputs):
                _keep(found, ("output", str(i)), values[i])
            if (tangents := self._recorder.seen.get(("backward", index))) is not None:
                torch.manual_seed(self._seed + 1)
                gradients = _call(backward, outputs | _copies(tangents, joint.tangents), "backward")
                for info, gradient in zip(joint.signature.inputs, gradients, strict=False):
                    _keep(found, ("gradient", info.name), gradient)
        for node, info in zip(joint.primals, joint.signature.inputs, strict=True):
            if info.kind == "buffer":
                _keep(found, ("buffer", info.name), primals[node.name])
        return found


def _rewritten(captured: Captured) -> JointGraph:
    assert captured.rewritten is not None
    return captured.rewritten


def _call(module: fx.GraphModule, known: Values, role: Role) -> Sequence[Any]:
    names = [n.name for n in module.graph.find_nodes(op="placeholder")]
    run = Eager().compile(Half(module, [], role))
    with torch.no_grad():
        return run([known[name] for name in names])


def _results(module: fx.GraphModule, values: Sequence[Any]) -> Values:
    """What a half returned, by the name of the node that made it."""
    outputs: Any = module.graph.output_node().args[0]
    return {
        node.name: value
        for node, value in zip(outputs, values, strict=True)
        if isinstance(node, fx.Node)
    }


def _keep(found: dict[Any, torch.Tensor | None], key: tuple[str, str], value: Any) -> None:
    if value is None or isinstance(value, torch.Tensor):
        found[key] = None if value is None else value.detach().clone()


def _copies(values: Values, only: Sequence[fx.Node] | None = None) -> Values:
    wanted = values.keys() if only is None else {n.name for n in only} & values.keys()
    return {
        name: v.detach().clone() if isinstance(v, torch.Tensor) else v
        for name, v in values.items()
        if name in wanted
    }
