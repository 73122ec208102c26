"""The laws of passes that change which parameters there are (knob P).

    law                                  holds for
    the_model_is_left_alone              every pass
    nothing_without_permission           every pass
    running_again_changes_nothing        every pass
    it_does_not_depend_on_inputs         every pass
    it_computes_the_same                 passes with an exact contract: outputs, buffers, gradients

Where a parameter was cut, its gradient g has another shape and cannot be compared element by
element. What erasure must keep are sums over its elements p of g p, g² p and g p²: wherever an
element went, p or g was zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx, nn

from gtrans.contract import Exact
from gtrans.errors import OptionError, VerifyError
from gtrans.ir.program import Program, export_program
from gtrans.pipeline import Gate, Pipeline, Step
from gtrans.rewrite.program_module import as_module
from gtrans.testing.compare import first_difference, pairs, require_near, rounding_bound
from gtrans.testing.measure import Record, Runner, Values, in_dtype, other_values
from gtrans.testing.placement import graph_text

_MOMENTS = ((1, 1), (2, 1), (1, 2))


@dataclass(frozen=True)
class Restructured:
    """One model before and after the passes, in one dtype."""

    model: nn.Module
    program: Program
    steps: list[Step]
    module: fx.GraphModule

    @staticmethod
    def of(pipeline: Pipeline, model: nn.Module, inputs: Sequence[Any]) -> "Restructured":
        """Runs the passes.

        Raises:
            CaptureError: the model cannot be captured as one graph.
        """
        program, steps = pipeline.run(export_program(model, inputs, {}))
        return Restructured(model, program, steps, as_module(program, "Restructured")[0])


def check_structure(
    pipeline: Pipeline, model: nn.Module, inputs: Sequence[Any], seed: int = 0
) -> int:
    """Checks the laws above on one model.

    Args:
        pipeline: passes of the knob "parameters" only.
        model: the model; it stays as it is. One that draws random numbers is put into eval mode:
            another size draws other numbers.
        inputs: its positional inputs.
        seed: of the random state during steps.

    Returns:
        How many places the passes rewrote.

    Raises:
        OptionError: a pass of another knob is among them.
        CaptureError: the model cannot be captured as one graph.
        VerifyError: a law is broken; the message names it.
    """
    if any(p.works_on is not Program for p in pipeline.passes):
        raise OptionError(f"{pipeline} mixes passes on parameters with passes on training steps")
    twin = Runner(model, inputs, None).model
    if _is_random(twin, inputs, seed):
        twin.eval()
    before = {name: t.clone() for name, t in twin.state_dict().items()}
    done = Restructured.of(pipeline, twin, inputs)
    after = twin.state_dict()
    if before.keys() != after.keys() or any(not torch.equal(before[k], after[k]) for k in before):
        _broken("the_model_is_left_alone", f"{pipeline} changed the model it was given")
    _check_permission(pipeline, done, inputs)
    _check_again(pipeline, done)
    _check_inputs(pipeline, done, inputs)
    if isinstance(pipeline.contract, Exact):
        _check_same(pipeline, twin, inputs, seed)
    return sum(step.stats.rewritten for step in done.steps)


def _check_permission(pipeline: Pipeline, done: Restructured, inputs: Sequence[Any]) -> None:
    asked = Gate(())
    original = export_program(done.model, inputs, {})
    held, steps = pipeline.run(original, gate=asked)
    wanted = sum(step.stats.rewritten for step in done.steps)
    if any(step.stats.rewritten for step in steps) or graph_text(held) != graph_text(original):
        _broken("nothing_without_permission", f"{pipeline} rewrites although it may not")
    if wanted and not asked.seen:
        _broken("nothing_without_permission", f"{pipeline} never asked; call permitted(site)")
    for step in done.steps:
        if step.stats.rewritten + step.stats.skipped.total() > step.stats.matched:
            _broken("nothing_without_permission", f"{step.text} miscounts: {step.stats}")


def _check_again(pipeline: Pipeline, done: Restructured) -> None:
    again, _ = pipeline.run(done.program)
    if graph_text(again) != graph_text(done.program):
        where = first_difference(graph_text(done.program), graph_text(again))
        _broken("running_again_changes_nothing", f"{pipeline} is not idempotent:\n{where}")


def _check_inputs(pipeline: Pipeline, done: Restructured, inputs: Sequence[Any]) -> None:
    other = Restructured.of(pipeline, done.model, other_values(inputs))
    if graph_text(other.program) != graph_text(done.program):
        where = first_difference(graph_text(done.program), graph_text(other.program))
        _broken("it_does_not_depend_on_inputs", f"{pipeline}: other values, other graph:\n{where}")


def _check_same(pipeline: Pipeline, model: nn.Module, inputs: Sequence[Any], seed: int) -> None:
    where = f"law 'it_computes_the_same' is broken. {pipeline}: "
    for dtype, bound in ((None, rounding_bound(model, inputs)), (torch.float64, 1e-9)):
        plain = Runner(model, inputs, None, dtype)
        arguments = in_dtype(tuple(inputs), dtype)
        module = Restructured.of(pipeline, plain.model, arguments).module
        expected, found = plain.step(seed), Runner(module, arguments, None).step(seed)
        require_near(expected.outputs, found.outputs, where, bound)
    a, b = _whole_buffers(expected, found), _whole_buffers(found, expected)
    require_near(a, b, f"{where}buffer ", bound)
    a = _gradients(expected, plain.model, module)
    b = _gradients(found, module, plain.model)
    require_near(a, b, f"{where}gradient of ", bound)


def _whole_buffers(record: Record, other: Record) -> Values:
    """The buffers that keep their shape."""

    def shape(buffers: Values, name: str) -> Any:
        buffer = buffers.get(name)
        return None if buffer is None else buffer.shape

    names = [n for n in record.buffers if shape(record.buffers, n) == shape(other.buffers, n)]
    return {name: record.buffers[name] for name in names}


def _gradients(record: Record, model: nn.Module, other: nn.Module) -> Values:
    """Gradients as they are, or sums of gⁱ pʲ for parameters of another shape in `other`."""
    found = {name: g for name, g in record.gradients.items() if name.startswith("input ")}
    shapes = {name: p.shape for name, p in other.named_parameters()}
    for name, p in model.named_parameters():
        g = record.gradients.get(name)
        if g is None:
            continue
        if p.shape == shapes.get(name):
            found[name] = g
            continue
        for i, j in _MOMENTS:
            terms = g.double() ** i * p.detach().double() ** j
            found[f"{name} (sum of g^{i} p^{j})"] = terms.sum()
    return found


def _is_random(model: nn.Module, inputs: Sequence[Any], seed: int) -> bool:
    first, second = (Runner(model, inputs, None).step(s).outputs for s in (seed, seed + 1))
    return any(not torch.equal(a, b) for _, a, b in pairs(first, second, ""))


def _broken(law: str, message: str) -> NoReturn:
    raise VerifyError(f"law {law!r} is broken. {message}")
