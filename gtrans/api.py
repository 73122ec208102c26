"""What users call: `optimize`, `restore`, `explain`, `report` and `restructure`."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.optim import Optimizer

from gtrans.analysis.optimizer_state import state_bytes
from gtrans.capture import Compiler, capture_always, compiled_call
from gtrans.captured import Resident
from gtrans.debugging.crash import write_repro
from gtrans.debugging.look import Look, to_stderr
from gtrans.errors import CaptureError, GTransError, ModelError, OptionError
from gtrans.explanation import Explanation
from gtrans.ir.joint import JointGraph
from gtrans.ir.program import Program, export_program
from gtrans.memory import Budget
from gtrans.pipeline import ADMITTED, Pipeline
from gtrans.plan.planner import Plan
from gtrans.rewrite.program_module import as_module

log = logging.getLogger("gtrans")

ModelT = TypeVar("ModelT", bound=nn.Module)

_sessions: WeakKeyDictionary[nn.Module, Compiler] = WeakKeyDictionary()


def optimize(
    model: ModelT,
    *,
    passes: str | Pipeline = "default",
    skip: Sequence[str] = (),
    memory: str | int | float | Budget | None = None,
    optimizer: Optimizer | None = None,
    allow: str | None = None,
    backend: str = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    on_error: Literal["skip", "raise"] = "skip",
) -> ModelT:
    """Compiles the training step of a model, in place; nothing is captured before its first call.

    Environment variables such as `GTRANS_PRINT_CHANGED=diff` let one look at the passes while they
    run, see `docs/debugging.md`; a pass that fails is written down for `gtrans repro`.

    Args:
        model: any module with trainable parameters.
        passes: pipeline text such as "default" or "relu-mask,plan{price=0.1}", or a
            `Pipeline` of pass objects, which need not be registered.
        skip: names of passes to leave out of it.
        memory: bound of the step's peak memory: "6GiB", or 0.4 of what it would be without gtrans.
            Parameters, buffers, inputs and gradients count. The fastest plan under it is chosen at
            the first call; `docs/memory-budget.md` has the rest.
        optimizer: whose state counts as well, as large as it is after a step.
        allow: the weakest contract to admit ("exact", "close", "unbiased", ...). By default the
            passes named in `passes` are admitted, since you named them; the default ones are exact.
            With the default passes, "close" and "unbiased" also add those that keep values for the
            backward in fewer bits (`gtrans.pipeline.ADMITTED`).
        backend: "inductor" or "eager"; falls back to "eager" where no compiler is at hand.
        mode: as for `torch.compile`, such as "max-autotune"; of the backends, "inductor" has modes.
        options: as for `torch.compile`, such as {"max_autotune": True}, instead of a mode. They
            hold while gtrans compiles, and configure nothing globally.
        dynamic: as for `torch.compile`: None finds out which sizes change.
        fullgraph: as for `torch.compile`: refuse graph breaks.
        on_error: what happens if a pass fails: "skip" trains on without it after a warning.

    Returns:
        The same object. Its parameters, `state_dict` keys, hooks and class are untouched.

    Raises:
        OptionError: a pass, option, mode or backend is unknown, or the budget cannot be read, or it
            cannot be told how much memory the optimizer keeps.
        ContractError: a pass promises less than `allow`.
        ModelError: the model has no trainable parameters.
    """
    if on_error not in ("skip", "raise"):
        raise OptionError(f"on_error must be 'skip' or 'raise', got {on_error!r}")
    require_trainable(model)
    pipeline = planned(passes, skip, memory, allow, optimizer)
    look = Look.from_environment()
    pipeline = look.pipeline(pipeline)
    compiler = Compiler(
        pipeline,
        backend,
        skip_failures=on_error == "skip",
        gate=look.gate(),
        observers=look.observers(pipeline, to_stderr) if look.wanted else (),
        mode=mode,
        options=options,
        on_failure=write_repro,
    )
    compiler.resident = Resident.of(model, optimizer)
    if model in _sessions:
        restore(model)
    install(model, compiler, dynamic=dynamic, fullgraph=fullgraph)
    return model


def to_reversible(
    model: ModelT,
    kind: Literal["two-streams", "momentum", "bdia"] = "two-streams",
    *,
    bits: int | None = None,
    gamma: float = 0.9,
    passes: str = "reversible,plan",
    **options: Any,
) -> ModelT:
    """Changes the forward of a residual model so that its backward can rebuild activations.

    x = x + f(x) cannot be inverted, so **another function is trained** from here on, with the same
    parameters, in training and (but for "bdia") in inference. `restore` gives the old one back.

    Args:
        model: any module with residual sums in a row.
        kind: "two-streams", "momentum" or "bdia"; see `docs/reversible.md` for what each computes.
        bits: binary places of fixed-point streams, which come back to the bit; 0 for floating ones.
            By default 0, and 16 for "bdia", which needs them.
        gamma: of "momentum".
        passes: what follows the change.
        options: as for `optimize`.

    Returns:
        The same object.

    Raises:
        OptionError: an option is unknown or out of range.
        ModelError: the model has no trainable parameters.
    """
    bits = bits if bits is not None else 16 * (kind == "bdia")
    change = f"to-reversible{{kind={kind},bits={bits},gamma={gamma}}}"
    return optimize(model, passes=f"{change},{passes}", **options)


def install(
    model: nn.Module, compiler: Compiler, *, dynamic: bool | None = None, fullgraph: bool = False
) -> None:
    """Lets calls of a model go through a compiler. `optimize` is the friendlier way."""
    call: Any = compiled_call(model, compiler, dynamic=dynamic, fullgraph=fullgraph)
    model._compiled_call_impl = call
    _sessions[model] = compiler


def restore(model: ModelT) -> ModelT:
    """Undoes `optimize`: the model runs as it was written.

    Raises:
        ModelError: the model was not optimized.
    """
    if _sessions.pop(model, None) is None:
        raise ModelError("this model was not optimized by gtrans, so there is nothing to restore")
    model._compiled_call_impl = None
    return model


def report(model: nn.Module) -> Explanation:
    """What was done to an optimized model so far: one entry per captured graph.

    Raises:
        ModelError: the model was not optimized, or has not been called yet.
    """
    if model not in _sessions:
        raise ModelError("this model was not optimized by gtrans; call gtrans.optimize(model)")
    compiler = _sessions[model]
    if not compiler.captured:
        raise ModelError("nothing is captured yet: call the model once, then ask for the report")
    return Explanation(compiler.pipeline, compiler.captured)


def explain(
    model: nn.Module,
    *inputs: Any,
    passes: str | Pipeline = "default",
    skip: Sequence[str] = (),
    memory: str | int | float | Budget | None = None,
    optimizer: Optimizer | None = None,
    allow: str | None = None,
    dynamic: bool | None = None,
    **keyword_inputs: Any,
) -> Explanation:
    """What each pass would do to this model on these inputs, before any step.

    The forward runs once, with torch's own kernels; buffers, random state, gradients and the model
    stay as they are.

    Args:
        model: the model.
        inputs: its positional inputs.
        passes: as for `optimize`.
        skip: as for `optimize`.
        memory: as for `optimize`.
        optimizer: as for `optimize`.
        allow: as for `optimize`.
        dynamic: True leaves the sizes of the inputs open, for `Explanation.formulas` and
            `Explanation.largest`. Sizes that are equal are taken to be the same dimension.
        keyword_inputs: its keyword inputs.

    Raises:
        ContractError: a pass promises less than `allow`.
        OptionError: a pass or option is unknown, or the budget cannot be read.
        BudgetError: no plan keeps the step under the budget; says how near one comes.
        ModelError: the model has no trainable parameters, or does not accept the inputs.
    """
    pipeline = planned(passes, skip, memory, allow, optimizer)
    return explained(model, inputs, keyword_inputs, pipeline, dynamic=dynamic, optimizer=optimizer)


def explained(
    model: nn.Module,
    inputs: Sequence[Any],
    keyword_inputs: dict[str, Any],
    pipeline: Pipeline,
    *,
    dynamic: bool | None = None,
    optimizer: Optimizer | None = None,
) -> Explanation:
    """`explain` with a ready pipeline."""
    require_trainable(model)
    compiler = Compiler(pipeline, "eager", skip_failures=False)
    compiler.resident = Resident.of(model, optimizer)
    capture(model, compiler, inputs, keyword_inputs, dynamic=dynamic)
    return Explanation(compiler.pipeline, compiler.captured)


def restructure(
    model: nn.Module, *inputs: Any, passes: str | Pipeline, **keyword_inputs: Any
) -> fx.GraphModule:
    """A new model with other parameters that computes what the passes' contracts say.

    The forward is captured as one graph (`torch.export`) in the mode the model is in. The result
    has the model's parameters under their old names; train it, or give it to `optimize`, like any
    module. `gtrans.prune(model, ...).erase()` keeps the model's class instead.

    Args:
        model: any module; it stays as it is.
        inputs: positional inputs to capture it with.
        passes: passes of the knob "parameters", such as "erase-zeros".
        keyword_inputs: keyword inputs.

    Returns:
        The new model; `meta["steps"]` says what each pass did, and so does a warning if that is
        nothing.

    Raises:
        OptionError: a pass or option is unknown, or a pass does not work on parameters.
        ModelError: not a module.
        CaptureError: the forward cannot be captured as one graph.
        GTransError: a pass failed; the message names it.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    pipeline = Pipeline.parse(passes)
    for p in pipeline.passes:
        if p.works_on is not Program:
            raise OptionError(
                f"pass {p.name!r} rewrites the training step, not the parameters; give it to "
                f"gtrans.optimize(model, passes={str(p)!r})"
            )
    program, steps = pipeline.run(export_program(model, inputs, keyword_inputs))
    if not any(step.stats.rewritten for step in steps):
        did = "; ".join(f"{step.text}: {step.stats}" for step in steps)
        log.warning("%s is restructured in nothing (%s)", type(model).__name__, did or "no passes")
    module, _ = as_module(program, type(model).__name__)
    module.meta["steps"] = steps
    return module


def planned(
    passes: str | Pipeline,
    skip: Sequence[str],
    memory: str | int | float | Budget | None,
    allow: str | None = None,
    optimizer: Optimizer | None = None,
) -> Pipeline:
    """The pipeline that the arguments of `optimize` describe.

    Raises:
        ContractError: a pass promises less than `allow`.
        OptionError: a pass or option is unknown, the budget cannot be read or is given twice, or it
            cannot be told how much memory the optimizer keeps.
    """
    if passes == "default" and allow in ADMITTED:
        passes = f"{ADMITTED[allow]},default"
    pipeline = Pipeline.parse(passes).without(skip)
    if allow is not None:
        pipeline.require(allow)
    chosen = pipeline.passes
    if memory is not None:
        chosen = Plan.under_budget(chosen, Budget.parse(memory))
    if optimizer is not None:
        chosen = Plan.beside(chosen, state_bytes(optimizer))
    return Pipeline(chosen)


def capture(
    model: nn.Module,
    compiler: Compiler,
    inputs: Sequence[Any],
    keyword_inputs: dict[str, Any],
    *,
    dynamic: bool | None = None,
) -> Any:
    """Runs one forward of a model through a compiler and leaves no trace in the model.

    Returns:
        What the forward returned.

    Raises:
        ModelError: the model does not accept the inputs.
        GTransError: a pass failed.
    """
    run = compiled_call(model, compiler, dynamic=dynamic)
    with unchanged(model), torch.enable_grad(), capture_always():
        try:
            output = run(*inputs, **keyword_inputs)
        except GTransError:
            raise
        except (TypeError, RuntimeError, ValueError, IndexError) as error:
            raise ModelError(f"the model does not accept these inputs: {error}") from error
    require_captured(model, compiler)
    return output


def require_captured(model: nn.Module, compiler: Compiler) -> None:
    """Checks that a call of the model went through the compiler at all.

    Raises:
        CaptureError: Dynamo captured nothing, so the model ran as plain Python.
    """
    if not any(c.training for c in compiler.captured):
        raise CaptureError(
            f"nothing of {type(model).__name__}'s training step was captured: Dynamo ran it as "
            "plain Python. TORCH_LOGS=graph_breaks shows why; the model must also be called with "
            "gradients enabled"
        )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restores buffers and random state of a model when the block ends."""
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in buffers:
                        buffer.copy_(buffers[name])


def graphs(explanation: Explanation) -> list[JointGraph]:
    """The rewritten joint graphs of an explanation, one per captured training graph."""
    return [c.rewritten for c in explanation.captured if c.rewritten is not None]


def require_trainable(model: nn.Module) -> None:
    """Checks that there is something to train.

    Raises:
        ModelError: the model is no module, or all its parameters are frozen.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} has no trainable parameters, so there is no training step to "
            "optimize; set requires_grad on some, or use torch.compile for inference"
        )
