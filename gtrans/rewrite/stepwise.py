"""Run a loop by `gtrans.runtime.stepwise_loop`: its step, and the gradient of its step, as graphs.

Both are traced to ATen, once for all steps, so that whatever a step calls may be in it: functions
with a backward of their own, values detached from the gradient.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from gtrans.analysis.loops import Loop
from gtrans.ir.forward import ForwardGraph, value
from gtrans.rewrite.rolled import (
    fake_mode_of,
    has_cotangent,
    not_repeatable,
    result_order,
    roll,
    step_of,
)
from gtrans.runtime.stepwise_loop import stepwise_loop

aten = torch.ops.aten

_THRESHOLDS = frozenset(
    {
        aten.gt, aten.ge, aten.lt, aten.le, aten.heaviside, aten.sign, aten.sgn, aten.floor,
        aten.ceil, aten.round, aten.trunc, aten.signbit,
    }
)  # fmt: skip

_ADDITIONS = (aten.add.Tensor, aten.sub.Tensor, aten.addcmul.default, aten.add_.Tensor)


@dataclass(frozen=True)
class TracedStep:
    """The step of a loop in ATen.

    Attributes:
        call: (carries, inputs) to (new carries, further results).
        pull: see `gtrans.runtime.stepwise_loop.StepwiseLoop`.
        carries: how many values it hands over.
        trained: for each carry's start and each input, whether it gets a gradient.
        floating: for each result, whether it has a cotangent.
    """

    call: fx.GraphModule
    pull: fx.GraphModule
    carries: int
    trained: tuple[bool, ...]
    floating: tuple[bool, ...]

    def not_repeatable(self) -> str | None:
        """Why its step may not run once more in the backward, or None."""
        return not_repeatable(self.call.graph) or not_repeatable(self.pull.graph)

    def has_threshold(self) -> bool:
        """Whether a step compares what it carries."""
        moving: set[fx.Node] = set(self.call.graph.find_nodes(op="placeholder")[: self.carries])
        for node in self.call.graph.nodes:
            if not moving.isdisjoint(node.all_input_nodes):
                if getattr(node.target, "overloadpacket", None) in _THRESHOLDS:
                    return True
                moving.add(node)
        return False

    def adds_to_its_carry(self) -> bool:
        """Whether every new carry is the old one plus something."""
        carries = self.call.graph.find_nodes(op="placeholder")[: self.carries]
        made = self.call.graph.output_node().args[0]
        assert isinstance(made, list | tuple)
        return all(_is_sum(new, old) for new, old in zip(made, carries, strict=False))


def _is_sum(new: Any, old: fx.Node) -> bool:
    """Whether a value is made by additions, one of which is of another value, once, as it is."""
    if not isinstance(new, fx.Node) or new.target not in _ADDITIONS:
        return False
    first, second = new.args[:2]
    plain = new.target is aten.add.Tensor and bool(new.kwargs.get("alpha", 1) == 1)
    if first is old or (plain and second is old):
        return True
    return _is_sum(first, old) or (plain and _is_sum(second, old))


def traced_step(loop: Loop) -> TracedStep | str:
    """The step of a loop, or why it has none."""
    outside = [*loop.starts, *(n for column in loop.inputs for n in column)]
    if not all(isinstance(value(n), torch.Tensor) for n in outside):
        return "a step reads what is no tensor"
    carries = [value(n).detach() for n in loop.starts]
    if not all(map(has_cotangent, carries)):
        return "it hands over what has no gradient"
    inputs = [value(column[0]) for column in loop.inputs]
    trained = tuple(v.requires_grad for v in (*map(value, loop.starts), *inputs))
    results = [value(loop.steps[-1][place]) for place in result_order(loop)]
    if not all(isinstance(r, torch.Tensor) for r in results):
        return "a step's results are not all tensors"
    floating = tuple(map(has_cotangent, results))
    step, given = step_of(loop), [*carries, *(i.detach() for i in inputs)]
    cotangents = [r.detach() for r, one in zip(results, floating, strict=True) if one]

    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [_own(r, tensors) for r in step(*tensors)]

    def pull(*tensors: torch.Tensor) -> list[torch.Tensor]:
        read, sent = tensors[: len(given)], tensors[len(given) :]
        flags = [*(True for _ in carries), *trained[len(carries) :]]
        with torch.enable_grad():
            leaves = [
                t.detach().requires_grad_(flag) for t, flag in zip(read, flags, strict=True)
            ]  # fmt: skip
            made = list(step(*leaves))
            paired = zip([m for m, one in zip(made, floating, strict=True) if one], sent,
                         strict=True)  # fmt: skip
            drives = [(m, c) for m, c in paired if m.requires_grad]
            wanted = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
            found = torch.autograd.grad(
                [m for m, _ in drives], wanted, [c for _, c in drives], allow_unused=True
            )
        pairs = zip(found, wanted, strict=True)
        gradients = [torch.zeros_like(w) if g is None else g for g, w in pairs]
        return [_own(m.detach(), tensors) for m in made[: len(carries)]] + gradients

    try:
        with fake_mode_of(given) or nullcontext():
            modules = make_fx(call)(*given), make_fx(pull)(*given, *cotangents)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        return f"its step cannot be traced: {str(error).strip().splitlines()[0]}"
    if any(m.graph.find_nodes(op="get_attr") for m in modules):
        return "its step holds constants"
    for module in modules:
        module.graph.eliminate_dead_code()
        module.recompile()
    return TracedStep(*modules, len(carries), trained, floating)


def _own(result: torch.Tensor, given: Sequence[torch.Tensor]) -> torch.Tensor:
    """The result in memory of its own: an operator may not return what it was given."""
    return result.clone() if result._is_view() or any(result is t for t in given) else result


def roll_stepwise(
    graph: ForwardGraph,
    loop: Loop,
    step: TracedStep,
    *,
    rule: str,
    count: int = 1,
    draws: int = 0,
    ahead: int = 0,
) -> None:
    """Calls the loop as one operator; the options are those of `stepwise_loop`."""
    order = result_order(loop)
    read = [
        t * len(order) + i
        for t, body in enumerate(loop.steps)
        for i, place in enumerate(order)
        if any(user not in loop.nodes for user in body[place].users)
    ]
    roll(
        graph, loop, step.call, stepwise_loop, pull=step.pull, trained=list(step.trained),
        floating=list(step.floating), read=read, rule=rule, count=count, draws=draws, ahead=ahead,
    )  # fmt: skip
