"""Dead code elimination in forward graphs keeps what is there for its effect."""

import operator

import torch
from torch import fx, nn

from gtrans.ir.forward import ForwardGraph


def test_a_counter_that_nobody_reads_is_kept() -> None:
    plain = fx.Graph()
    count, x = plain.placeholder("count"), plain.placeholder("x")
    plain.call_method("add_", (count, 1))
    plain.output((plain.call_function(torch.relu, (x,)),))

    graph = ForwardGraph(fx.GraphModule(nn.Module(), plain)).copy()

    assert graph.eliminate_dead_code() == 0
    assert len(graph.calls("add_")) == 1


def test_in_place_calls_stay_when_their_readers_go() -> None:
    plain = fx.Graph()
    x, y = plain.placeholder("x"), plain.placeholder("y")
    effects = [
        plain.call_method("add_", (x, 1)),
        plain.call_function(torch.relu_, (x,)),
        plain.call_function(nn.functional.relu, (y,), {"inplace": True}),
        plain.call_function(operator.iadd, (x, y)),
        plain.call_function(operator.ior, (x, y)),
        plain.call_function(torch.mul, (x, y), {"out": y}),
        plain.call_function(operator.setitem, (x, 0, y)),
    ]
    negatives = [plain.call_function(operator.neg, (e,)) for e in effects]
    inverted = plain.call_function(operator.invert, (x,))
    together = plain.call_function(torch.stack, ([*negatives, inverted],))
    result = plain.output((together,))
    graph = ForwardGraph(fx.GraphModule(nn.Module(), plain))

    result.args = ((x,),)  # what a pass does that finds another way to the result

    assert graph.eliminate_dead_code() == len(negatives) + 2
    assert set(effects) <= set(graph.nodes)
