"""Capture: from a user's model through Dynamo and AOTAutograd to joint graphs, and back.

This file and `backends/` are the only places that import private modules of torch.
"""

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import trace_rules
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed, RestartAnalysis
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import _extract_fwd_bwd_modules
from torch._guards import CompileContext, TracingContext
from torch._logging._internal import trace_structured
from torch.nn.modules import transformer
from torch.nn.modules.transformer import _detect_is_causal_mask
from torch.utils import _pytree as pytree

from gtrans.analysis.recorded import recorded_bytes
from gtrans.captured import Captured, Resident, require_room, surroundings
from gtrans.errors import BudgetError, CaptureError, GTransError, OptionError
from gtrans.ir import ops
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.half import Backend, Half, Role, Runnable
from gtrans.ir.joint import Input, JointGraph, Signature
from gtrans.ir.normal_form import normalise
from gtrans.ir.printer import to_code
from gtrans.ir.program import Program
from gtrans.ir.source import readable_path
from gtrans.ir.tracing import without_collection
from gtrans.memory import Budget
from gtrans.pipeline import UNDER_BUDGET, Gate, Graph, Observer, OnFailure, Pipeline, Step
from gtrans.plan.cut import read_directly
from gtrans.plan.planner import Plan
from gtrans.plan.saved import saved_bytes, saved_values
from gtrans.registry import load_backend
from gtrans.rewrite.recurrences import differentiable_layers

log = logging.getLogger("gtrans")

OLDEST_TORCH = (2, 11)


@dataclass
class Compiler:
    """A Dynamo backend that runs a pipeline over every captured graph and lowers the result.

    Args:
        pipeline: the passes to run. A `plan` is added if it has none, before schedule passes.
        backend: name of the lowering, or a lowering.
        skip_failures: train on without a pass that fails, after a warning.
        gate: which rewrites to perform (for bisection); all by default.
        observers: called after every pass on every graph.
        mode: mode of the named backend.
        options: options of the named backend; a mode and options exclude each other.
        resident: what the model holds in memory, for plans under a budget; if it is not given,
            parameters that a graph does not have count as nothing.
        on_failure: called when a pass fails.
        first_index: number of the first graph.
    """

    pipeline: Pipeline
    backend: str | Backend = "inductor"
    skip_failures: bool = True
    gate: Gate = field(default_factory=Gate)
    observers: Sequence[Observer] = ()
    mode: str | None = None
    options: Mapping[str, Any] | None = None
    captured: list[Captured] = field(default_factory=list)
    resident: Resident | None = None
    on_failure: OnFailure | None = None
    first_index: int = 0

    def __post_init__(self) -> None:
        require_supported_torch()
        if structural := self.pipeline.on(Program).passes:
            raise OptionError(
                f"pass {structural[0].name!r} changes which parameters there are, so it cannot be "
                "part of a compiled step; apply it first: model = gtrans.restructure(model, "
                f"*inputs, passes={str(structural[0])!r})"
            )
        if not any(isinstance(p, Plan) for p in self.pipeline.passes):
            self.pipeline = self.pipeline.planned(Plan())
        self._lowering = usable_backend(self.backend, self.mode, self.options)

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        """Called by Dynamo with one captured forward graph and its inputs."""
        record = Captured(self.first_index + len(self.captured), _frame())
        self.captured.append(record)
        start = time.perf_counter()
        forward = ForwardGraph(module)
        forward, record.forward_steps = self.pipeline.on_forward(forward).run(
            forward,
            gate=self.gate,
            observers=self.observers,
            skip_failures=self.skip_failures,
            on_failure=self.on_failure,
            index=record.index,
        )
        self._warn(record.forward_steps)
        forward = self.pipeline.marked(forward)
        record.own_seconds += time.perf_counter() - start
        job = _Job(self, record, _inputs_of(module), len(_outputs_of(module)))
        if self.budget is not None:
            start = time.perf_counter()
            forward = self._with_what_pays(forward, job, example_inputs)
            record.own_seconds += time.perf_counter() - start
        try:
            return job.lower(forward, example_inputs)
        except RestartAnalysis:  # Dynamo will call again, with another graph
            self.captured.remove(record)
            raise

    def _with_what_pays(
        self, forward: ForwardGraph, job: "_Job", example_inputs: Sequence[Any]
    ) -> ForwardGraph:
        """Lets the plan choose among forward passes that nobody asked for by name.

        Whether one pays is known once both joint graphs are traced and planned, so both are.
        """
        for name in UNDER_BUDGET:
            if any(p.name == name for p in self.pipeline.passes):
                continue
            other, (step,) = Pipeline.parse(name).run(forward, index=job.record.index)
            if not step.stats.rewritten:
                continue
            with_it, without = (job.planned_seconds(f, example_inputs) for f in (other, forward))
            if with_it is not None and (without is None or with_it < without):
                step.stats.notes.append("called in by the plan: nothing faster fits the budget")
                job.record.forward_steps.append(step)
                forward = other
        return forward

    @property
    def budget(self) -> Budget | None:
        """What a plan keeps the step's memory under, if there is such a bound."""
        plans = [p for p in self.pipeline.passes if isinstance(p, Plan)]
        return next((p.memory for p in plans if p.memory is not None), None)

    @property
    def reserved_bytes(self) -> int:
        """What is in memory besides all the time, such as the optimizer's state."""
        return max(
            (p.reserved_bytes for p in self.pipeline.passes if isinstance(p, Plan)), default=0
        )

    def _warn(self, steps: list[Step]) -> None:
        for step in steps:
            if step.error:
                log.warning(
                    "gtrans left out pass %r, which failed; training goes on without it. %s",
                    step.name,
                    step.error,
                )


class _Planned(Exception):
    """Ends a trace that was made for its plan alone."""

    def __init__(self, seconds: float | None) -> None:
        super().__init__(seconds)
        self.seconds = seconds


def _traced(
    forward: ForwardGraph,
    example_inputs: Sequence[Any],
    partition: Callable[..., Any],
    compiler: Callable[[Role], Callable[..., Any]],
) -> Any:
    """The step of a forward graph, traced and lowered by AOTAutograd."""
    trace = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=compiler("inference"),
        partition_fn=partition,
        decompositions={},
        keep_inference_input_mutations=True,
    )
    # AOTAutograd's cache would return a step made by another pipeline: its key is the graph as
    # captured, without passes. It looks a backend like this up only if it is forced to.
    with functorch_config.patch(force_autograd_cache=False), differentiable_layers(forward):
        return trace(forward.module, example_inputs)


@dataclass
class _Job:
    """The compilation of one captured graph."""

    owner: Compiler
    record: Captured
    inputs: list[Input]
    num_outputs: int
    static_names: set[str] = field(default_factory=set)
    shared: dict[str, Any] = field(default_factory=dict)
    traced: int = 0

    def lower(self, forward: ForwardGraph, example_inputs: Sequence[Any]) -> Any:
        """Traces, rewrites and compiles the step of a forward graph."""
        return _traced(forward, example_inputs, self.partition, self.compiler)

    def planned_seconds(self, forward: ForwardGraph, example_inputs: Sequence[Any]) -> float | None:
        """Predicted seconds of the plan of a forward graph; None if no plan fits.

        Traces and plans, and throws the result away.
        """
        owner = replace(self.owner, observers=(), gate=Gate(), on_failure=None)
        trial = replace(self, owner=owner, record=replace(self.record))

        def plan_only(module: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
            trial.partition(module, joint_inputs, **options)
            assert trial.record.rewritten is not None
            raise _Planned(self._plan.seconds(trial.record.rewritten))

        def not_trained(role: Role) -> Callable[..., Any]:
            def stop(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
                raise _Planned(None)

            return stop

        try:
            _traced(forward, example_inputs, plan_only, not_trained)
        except _Planned as outcome:
            return outcome.seconds
        except BudgetError:
            pass
        return None

    @property
    def _plan(self) -> Plan:
        return [p for p in self.owner.pipeline.passes if isinstance(p, Plan)][-1]

    def partition(
        self, module: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """AOTAutograd's `partition_fn`: rewrite the joint graph, then split it."""
        with without_collection():
            return self._partition(module, joint_inputs, num_fwd_outputs)

    def _partition(
        self, module: fx.GraphModule, joint_inputs: Any, num_fwd_outputs: int
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        start = time.perf_counter()
        record = self.record
        record.training = True
        joint = JointGraph(module, self._signature(joint_inputs, num_fwd_outputs))
        normalise(joint)
        record.original = joint
        owner = self.owner
        slack = owner._lowering.slack if owner.budget is not None else None
        joint.surroundings = surroundings(
            record, owner.captured, owner.resident, owner.reserved_bytes, slack
        )
        self._trace("joint", lambda: to_code(joint.graph))
        rewritten, record.steps = self.owner.pipeline.on(JointGraph).run(
            joint,
            gate=self.owner.gate,
            observers=(*self.owner.observers, self._trace_step),
            skip_failures=self.owner.skip_failures,
            on_failure=self.owner.on_failure,
            index=record.index,
        )
        self.owner._warn(record.steps)
        self._trace("passes", lambda: "\n".join(f"{s.text}: {s.stats}" for s in record.steps))
        plan = self._plan
        if rewritten.cut is None:  # the plan itself failed, or a pass ran after it
            plan = Plan(recompute="none")
            plan.run(rewritten, lambda site: True)
        assert rewritten.cut is not None
        record.rewritten = rewritten
        record.saved = saved_values(rewritten, rewritten.cut, plan.why_kept)
        record.saved_bytes = saved_bytes(rewritten, rewritten.cut)
        record.saved_bytes_before = saved_bytes(joint, read_directly(joint))
        halves = split(rewritten)
        record.own_seconds += time.perf_counter() - start
        return halves

    def _trace_step(self, step: Step, before: Graph, after: Graph) -> None:
        if after is not before:
            self.traced += 1
            name = f"{self.traced:02}_after_{step.name}"
            self._trace(name, lambda: to_code(after.graph))

    def _trace(self, name: str, content: Callable[[], str]) -> None:
        """Hands text to torch's structured trace, if there is one, so that tlparse shows it."""
        about = {"name": f"gtrans_{self.record.index}_{name}", "encoding": "string"}
        trace_structured("artifact", metadata_fn=lambda: about, payload_fn=content)

    def compiler(self, role: Role) -> Callable[[fx.GraphModule, Sequence[Any]], Runnable]:
        """AOTAutograd's compiler of one half."""

        def compile_half(module: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
            start = time.perf_counter()
            half = Half(
                module=module,
                inputs=list(inputs),
                role=role,
                visible_outputs=self._visible_outputs(module, role),
                static_inputs=self._static_inputs(module, role),
                graph=self.record.index,
                pipeline=str(self.owner.pipeline),
                frugal=self.owner.budget is not None,
                shared=self.shared,
            )
            if role == "forward" and not self.owner._lowering.overwrites_saved:
                _keep_saved_values()
            half = self.owner._lowering.prepare(half)
            self.record.own_seconds += time.perf_counter() - start
            start = time.perf_counter()
            try:
                return self.owner._lowering.compile(half)
            finally:
                self.record.lower_seconds += time.perf_counter() - start

        return compile_half

    def _signature(self, joint_inputs: Any, num_forward_outputs: int) -> Signature:
        primals = joint_inputs[0]
        inputs = list(self.inputs)
        if len(inputs) < len(
            primals
        ):  # AOTAutograd flattened or added some (RNG state, subclasses)
            extra = range(len(inputs), len(primals))
            inputs += [Input(f"extra_{i}", "input") for i in extra]
        return Signature(tuple(inputs[: len(primals)]), num_forward_outputs)

    def _visible_outputs(self, module: fx.GraphModule, role: Role) -> list[int]:
        outputs = _outputs_of(module)
        if role == "backward":
            return []
        first = 0
        context = TracingContext.try_get()
        if role == "forward" and context is not None and context.fw_metadata is not None:
            first = context.fw_metadata.num_mutated_inp_runtime_indices
        last = len(outputs) if role == "inference" else first + self.num_outputs
        return [i for i in range(first, min(last, len(outputs))) if isinstance(outputs[i], fx.Node)]

    def _static_inputs(self, module: fx.GraphModule, role: Role) -> list[int]:
        """Positions of the parameters; the backward's are known by their names in the forward."""
        names = [n.name for n in module.graph.find_nodes(op="placeholder")]
        if role == "backward":
            return [i for i, name in enumerate(names) if name in self.static_names]
        context = TracingContext.try_get()
        if context is None or context.fw_metadata is None:
            return []
        indices = list(context.fw_metadata.static_input_indices or [])
        self.static_names = {names[i] for i in indices if i < len(names)}
        return indices


def split(joint: JointGraph) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Splits a planned joint graph into its forward and backward half.

    Raises:
        CaptureError: the graph has no cut, or its cut does not separate the halves.
    """
    if joint.cut is None:
        raise CaptureError("the joint graph has no plan; run the 'plan' pass before splitting it")
    symbols = [n for n in joint.nodes if joint.is_forward(n) and _is_symint(n)]
    forward, backward = _extract_fwd_bwd_modules(
        joint.module,
        # The body of a higher-order operator is no value: each half has its own.
        [n for n in joint.cut if n.op != "get_attr" or "val" in n.meta],
        saved_sym_nodes=symbols,
        num_fwd_outputs=joint.signature.num_forward_outputs,
    )
    _erase_unread_draws(backward)
    return forward, backward


def require_supported_torch() -> None:
    """Checks the version of torch once, where it matters: before the first capture.

    Raises:
        CaptureError: torch is older than gtrans supports.
    """
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise CaptureError(
            f"gtrans needs torch {oldest} or newer, and this is {torch.__version__}: "
            f"pip install 'torch>={oldest}'"
        )


def _erase_unread_draws(backward: fx.GraphModule) -> None:
    """Erases random operators that nothing in the backward reads, and what only they read.

    Torch's split copies every operator that may draw random numbers (attention with dropout is one)
    into the backward, and takes it for an effect that has to stay, even if all its results are
    saved.
    """
    for node in reversed(backward.graph.nodes):
        draw = ops.is_random(node) and not ops.mutates(node)
        if node.op == "call_function" and not node.users and (draw or not ops.is_effect(node)):
            backward.graph.erase_node(node)
    backward.recompile()


def usable_backend(
    name: str | Backend, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Backend:
    """The named backend, or `eager` with one line of warning if it cannot run on this machine.

    Raises:
        OptionError: there is no such backend, or it has no such mode or option.
    """
    if not isinstance(name, str):
        return name
    backend: Backend = load_backend(name, mode=mode, options=options)
    reason = backend.unavailable()
    if reason is None:
        return backend
    log.warning("gtrans: backend %r cannot run here: %s; using 'eager'", name, reason)
    fallback: Backend = load_backend("eager")
    return fallback


@contextmanager
def capture_always() -> Iterator[None]:
    """Lets Dynamo capture however often it has captured the same code before.

    Past its limit Dynamo silently runs the model as it was written. A comparison with the untouched
    model would then compare that model with itself, and find no difference.
    """
    many = 1 << 30
    with dynamo_config.patch(recompile_limit=many, accumulated_recompile_limit=many):
        yield


_LEVELS = {"debug", "info", "warning", "warn", "error", "exception", "critical", "fatal", "log"}


def _frame() -> int:
    compile_id = CompileContext.current_compile_id()
    number = None if compile_id is None else compile_id.frame_id
    return number or 0


def _is_symint(node: fx.Node) -> bool:
    return ops.is_symbol(node) and isinstance(
        node.meta["val"], (torch.SymInt, torch.SymFloat, torch.SymBool)
    )


def _outputs_of(module: fx.GraphModule) -> tuple[Any, ...]:
    outputs = module.graph.output_node().args[0]
    return tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)


def _inputs_of(module: fx.GraphModule) -> list[Input]:
    """What Dynamo's placeholders are in the user's model."""
    found = []
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        argument = node.meta.get("grapharg")
        path, source = str(node.target), ""
        if argument is not None and argument.source is not None:
            source = argument.source.name
            path = readable_path(source)
        if isinstance(value, nn.Parameter) or node.meta.get("tensor_dict", {}).get(
            "_is_param", False
        ):
            found.append(Input(path, "parameter"))
        elif not isinstance(value, torch.Tensor):
            found.append(Input(path, "symbol"))
        elif "_buffers" in source:
            found.append(Input(path, "buffer"))
        else:
            found.append(Input(path, "input"))
    return found


def _keep_saved_values() -> None:
    """Tells AOTAutograd that no backward overwrites its inputs, so that it may run twice."""
    context = TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        context.fw_metadata.bw_donated_idxs = []


def compiled_call(
    model: nn.Module,
    compiler: Compiler,
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Callable[..., Any]:
    """A model's call, hooks included, through a compiler; errors of gtrans reach the user as such.

    Dynamo neither traces frames of torch's own modules (`nn.Sequential`) nor, by default, keeps
    more than eight compilations of one `forward`, whichever models and backends they belong to:
    past that it runs the model uncompiled, without an error. Hence a frame of our own around the
    former, and a cache of its own for each call where torch offers that (from 2.13).
    """
    call: Callable[..., Any] = model._call_impl
    if trace_rules.check(model.forward):
        call = _with_own_frame(model)
    options: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    run = as_captured(
        torch.compile(call, backend=compiler, dynamic=dynamic, fullgraph=fullgraph, **options)
    )

    budget = compiler.budget
    if budget is None:
        return run

    def within_budget(*args: Any, **kwargs: Any) -> Any:
        known = len(compiler.captured)
        output = run(*args, **kwargs)
        if len(compiler.captured) > known:
            given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
            beside = recorded_bytes(output, [*given, *model.parameters(), *model.buffers()])
            state = compiler.resident.state_bytes if compiler.resident is not None else 0
            require_room(compiler.captured, budget, beside, compiler.reserved_bytes, state)
        return output

    return within_budget


@contextmanager
def capture_settings() -> Iterator[None]:
    """Lets Dynamo capture more of a model than it does by default.

    Recurrent layers are captured. Calls of a logger are left out, as `torch.export` leaves them
    out: Dynamo would end the graph at each, and trace everything before it a second time. So is the
    question of `nn.Transformer` whether a mask happens to be the causal one, for which Dynamo gives
    up the whole model: the mask is applied as it is given. Whoever compares gtrans with
    `torch.compile` lets that run under the same settings.
    """
    with (
        dynamo_config.patch(allow_rnn=True, ignore_logger_methods=_log_methods()),
        patch.object(transformer, _detect_is_causal_mask.__name__, _as_it_is_said),
    ):
        yield


def _as_it_is_said(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Whether a mask is said to be causal."""
    return is_causal is True


def _log_methods() -> set[Callable[..., Any]]:
    """The methods of a logger that write, those that libraries have added (`warning_once`) too."""
    names = [n for n in vars(logging.Logger) if n.partition("_")[0] in _LEVELS]
    methods = {getattr(logging.Logger, name) for name in names}
    return methods | set(dynamo_config.ignore_logger_methods)


def _with_own_frame(model: nn.Module) -> Callable[..., Any]:
    self = model  # Dynamo writes this name into paths, and everywhere else a model is `self`

    def entry(*args: Any, **kwargs: Any) -> Any:
        return self._call_impl(*args, **kwargs)

    entry.__code__ = entry.__code__.replace()  # Dynamo keeps its cache in the code object
    return entry


def as_captured(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a call that `torch.compile` made, for capture as gtrans wants it.

    It runs under `capture_settings`, and an error of gtrans reaches the user as itself (Dynamo
    wraps what a backend raises in an error of its own).
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with capture_settings():
                return compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            inner = error.inner_exception
            if isinstance(inner, GTransError):
                raise inner from None
            raise CaptureError(
                f"a captured graph could not be compiled: {type(inner).__name__}: {inner}\n"
                "  gtrans.restore(model) lets the model run as it was written"
            ) from inner

    return call
