"""Run a half operator by operator with torch's own kernels: the reference backend.

Every value is freed right after its last use, so peaks measured here are those of the schedule.
"""

from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen, _BoxedCodeGen

from gtrans.ir.half import Half, Runnable

aten = torch.ops.aten


class Eager:
    """The reference lowering: no fusion, no rewriting, nothing to compile."""

    name = "eager"

    def unavailable(self) -> str | None:
        """Always available."""
        return None

    def compile(self, half: Half) -> Runnable:
        """Generates Python code that calls one operator after another and frees as it goes."""
        module = fx.GraphModule(half.module, _with_tolerant_views(half.module.graph))
        codegen: CodeGen = _BoxedCodeGen()
        module.graph.set_codegen(codegen)
        module.recompile()
        return _boxed(module.forward)


def _boxed(run: Any) -> Runnable:
    def boxed(arguments: list[Any]) -> Any:
        return run(arguments)

    boxed._boxed_call = True  # type: ignore[attr-defined]  # AOTAutograd reads this mark
    return boxed


def _with_tolerant_views(graph: fx.Graph) -> fx.Graph:
    """A copy in which `view` copies where strides demand it.

    Fake kernels sometimes predict other strides than real ones return (batch norm of a transposed
    input, in torch 2.13). On a functional graph `reshape` computes the same values either way.
    """
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    return copy
