"""Recurrent layers in a forward graph: found, and replaced by one operator whose parts passes set.

Dynamo shows `nn.RNN`, `nn.GRU` and `nn.LSTM` as one call each; autograd would unroll it. Each pass
sets a few arguments of `gtrans.runtime.recurrence.recurrent_network`, so that one may choose how
the states are found and another how their cotangents are.
"""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import fx

from gtrans.analysis.recurrence_speed import RecurrenceSize
from gtrans.core import SitePass
from gtrans.ir.forward import ForwardGraph, value
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import hint
from gtrans.runtime.cells import CELLS
from gtrans.runtime.recurrence import recurrent_network

_KINDS = {getattr(torch, kind): kind for kind in CELLS}


class RecurrencePass(SitePass[ForwardGraph]):
    """A pass that sets arguments of recurrent layers.

    The option `min_steps`, which every such pass has, leaves shorter recurrences alone.
    """

    works_on: ClassVar[type[JointGraph] | type[ForwardGraph]] = ForwardGraph

    min_steps: int

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments to set."""

    def sites(self, graph: ForwardGraph) -> Iterable[fx.Node]:
        """Every recurrent layer."""
        return graph.calls(*_KINDS, recurrent_network)

    def refuse(self, graph: ForwardGraph, site: fx.Node) -> str | None:
        """Refuses packed sequences, projections, dropout between layers, and what is set."""
        given = site.kwargs
        if site.target is not recurrent_network:
            reason = _not_plain(site)
            if reason is not None:
                return reason
            given = {}
        if steps_of(site) < self.min_steps:
            return "fewer steps than min_steps"
        wanted = self.settings()
        if all(given.get(key) == setting for key, setting in wanted.items()):
            return "it is so already"
        if any(key in given for key in wanted):
            return "another pass has set how it runs"
        return None

    def rewrite(self, graph: ForwardGraph, site: fx.Node) -> None:
        """Calls the operator with the arguments of this pass."""
        args, given = site.args, dict(site.kwargs)
        kind = _KINDS.get(site.target)
        if kind is not None:
            x, hx, weights, biases, layers, _, _, both, first = args
            args = (kind, x, hx, weights, biases, layers, both, first)
        new = graph.insert_before(site, recurrent_network, *args, **{**given, **self.settings()})
        graph.replace(site, new)


def steps_of(site: fx.Node) -> int:
    """The steps of a recurrence; where their number changes, those of the first call."""
    own = site.target is recurrent_network
    x, batch_first = (site.args[1], site.args[7]) if own else (site.args[0], site.args[8])
    assert isinstance(x, fx.Node)
    return hint(value(x).shape[1 if batch_first else 0])


def state_size(site: fx.Node) -> int:
    """Elements of one state: batch times width."""
    size = size_of(site)
    return size.batch * size.width


def size_of(site: fx.Node) -> RecurrenceSize:
    """What a recurrent layer computes, as far as its speed goes: one layer in one direction."""
    own = site.target is recurrent_network
    kind = site.args[0] if own else _KINDS[site.target]
    hx: Any = site.args[2 if own else 1]
    state = value(hx[0] if isinstance(hx, list | tuple) else hx)
    batch, width = (hint(n) for n in state.shape[-2:])
    return RecurrenceSize(
        str(kind), steps_of(site), batch, width, state.dtype, str(state.device.type)
    )


def _not_plain(site: fx.Node) -> str | None:
    if site.kwargs or len(site.args) != 9 or not isinstance(site.args[2], list | tuple):
        return "its sequences are packed"
    _, _, weights, biases, layers, dropout, training, both, _ = site.args
    assert isinstance(weights, list | tuple)
    assert isinstance(layers, int)
    cells = layers * (2 if both else 1)
    if len(weights) != cells * (4 if biases else 2):
        return "it projects its states"
    if dropout and training and layers != 1:
        return "it drops values between its layers"
    return None
