"""Traces are shared where the operators are the same, and nowhere else."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from gtrans.ir import tracing
from gtrans.ir.tracing import traced

aten = torch.ops.aten


def scaled(factor: float, x: torch.Tensor, *, twice: bool = False) -> torch.Tensor:
    y = x * factor
    return y + y if twice else y


class Holder:
    """Might change, or keep a graph alive."""

    factor = 2.0


def scaled_by(holder: Holder, x: torch.Tensor) -> torch.Tensor:
    return x * holder.factor


def trace(
    function: Callable[..., Any], shape: tuple[int, ...] = (2, 3), *constants: object
) -> fx.Graph:
    mode = FakeTensorMode()
    with mode:
        value = torch.empty(shape)
    node = fx.Graph().placeholder("x")
    return traced(function, [*constants, node], [value], mode)


def test_the_same_is_traced_once() -> None:
    graph = trace(partial(scaled, 2.0))
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [aten.mul.Tensor]
    assert trace(partial(scaled, 2.0)) is graph
    assert not any(n.meta for n in graph.nodes)


def test_what_differs_is_traced_for_itself() -> None:
    graphs = [
        trace(partial(scaled, 2.0)),
        trace(partial(scaled, 3.0)),
        trace(partial(scaled, 2)),
        trace(partial(scaled, 2.0), (3, 2)),
        trace(partial(scaled, 2.0, twice=True)),
        trace(scaled, (2, 3), 2.0),
    ]
    assert len({id(g) for g in graphs}) == len(graphs)


def test_what_may_change_or_hold_a_graph_is_traced_anew() -> None:
    factors = [2.0]

    def local(x: torch.Tensor) -> torch.Tensor:
        return x * factors[0]

    assert trace(local) is not trace(local)
    before = len(tracing._seen)
    trace(scaled_by, (2, 3), Holder())
    assert len(tracing._seen) == before
