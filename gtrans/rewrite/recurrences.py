"""Recurrences in a forward graph, found and rewritten: recurrent layers, and loops in Python.

Dynamo shows `nn.RNN`, `nn.GRU` and `nn.LSTM` as one call each; autograd would unroll it. Each pass
sets a few arguments of `gtrans.runtime.recurrence.recurrent_network`, so that one may choose how
the states are found and another how their cotangents are. A loop over any other step is unrolled
when it is captured; `gtrans.analysis.loops` finds its steps again.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import fx

from gtrans.analysis.loops import Loop, find_loops, refreshed
from gtrans.analysis.recurrence_speed import RecurrenceSize
from gtrans.core import HELD_BACK, Pass, Permission, Stats
from gtrans.ir.forward import ForwardGraph, value
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import hint
from gtrans.rewrite.numbers import numbers_as_tensors
from gtrans.rewrite.rolled import (
    cannot_roll,
    gate_of,
    not_side_by_side,
    operators_of,
    roll,
    step_of,
)
from gtrans.runtime.cells import CELLS
from gtrans.runtime.fused_lstm import not_fused
from gtrans.runtime.loop import rolled_loop
from gtrans.runtime.recurrence import recurrent_network

_KINDS = {getattr(torch, kind): kind for kind in CELLS}
_OWN = (recurrent_network, rolled_loop)

PACKED = "its sequences are packed"

May = Callable[[fx.Node, str | None], bool]
"""Told of a place and why it must stay, if so; counts it, and answers whether to rewrite it."""


class ForwardPass(Pass[ForwardGraph]):
    """A pass that looks at one recurrence of a forward graph after another."""

    works_on: ClassVar[type[JointGraph] | type[ForwardGraph]] = ForwardGraph

    def run(self, graph: ForwardGraph, permitted: Permission) -> Stats:
        """Looks at one recurrence after another."""
        stats = Stats()

        def may(site: fx.Node, reason: str | None) -> bool:
            stats.matched += 1
            if reason is None and not permitted(site.name):
                reason = HELD_BACK
            if reason is not None:
                stats.refuse(site, reason)
            stats.rewritten += reason is None
            return reason is None

        with numbers_as_tensors(graph):
            self.visit(graph, may)
        return stats

    @abstractmethod
    def visit(self, graph: ForwardGraph, may: May) -> None:
        """Rewrites every recurrence that may be."""


class LoopPass(ForwardPass):
    """A pass that rewrites loops.

    The option `min_steps`, which every such pass has, leaves shorter recurrences alone.

    Attributes:
        takes_stacks: whether it rewrites loops, too, whose steps have weights of their own.
    """

    takes_stacks: ClassVar[bool] = False

    min_steps: int

    def visit(self, graph: ForwardGraph, may: May) -> None:
        """Rewrites every loop that may be."""
        for found in find_loops(graph):
            loop = refreshed(found)  # an earlier one may have been rewritten
            if loop.is_running_sum() or not (loop.tied or self.takes_stacks):
                continue  # nothing to carry; blocks with weights of their own are no recurrence
            short = "fewer steps than min_steps" if loop.length < self.min_steps else None
            if may(loop.last, short or self.refuse_loop(graph, loop)):
                self.rewrite_loop(graph, loop)

    @abstractmethod
    def refuse_loop(self, graph: ForwardGraph, loop: Loop) -> str | None:
        """Why a loop must stay as it is, or None."""

    @abstractmethod
    def rewrite_loop(self, graph: ForwardGraph, loop: Loop) -> None:
        """Rewrites a loop that was not refused."""


def detach_carry(graph: ForwardGraph, loop: Loop, step: int) -> None:
    """Lets no gradient flow from a step, or one that is not finished, to the one before."""
    readers = loop.steps[step] if step < len(loop) else loop.unfinished
    for carried in loop.carry_into(step):
        detached = graph.insert_after(carried, torch.detach, carried)
        for reader in readers:
            reader.replace_input_with(carried, detached)


class RecurrencePass(LoopPass):
    """A pass that sets arguments of recurrent layers, each called as one operator.

    Attributes:
        rolls_loops: whether it calls loops as one operator too, and sets the same arguments there.
    """

    rolls_loops: ClassVar[bool] = False

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments to set."""

    def visit(self, graph: ForwardGraph, may: May) -> None:
        """Rewrites the recurrent layers, then the loops."""
        for site in list(self.sites(graph)):
            if may(site, self.refuse(graph, site)):
                self.rewrite(graph, site)
        super().visit(graph, may)

    def refuse_loop(self, graph: ForwardGraph, loop: Loop) -> str | None:
        """Why a loop must stay as it is, or None."""
        if not self.rolls_loops:
            return f"a loop of {len(loop)} steps written in Python, not a recurrent layer"
        reason = cannot_roll(graph, loop)
        if reason is not None:
            return reason
        step = operators_of(loop, step_of(loop))
        return step if isinstance(step, str) else not_side_by_side(loop, step)

    def rewrite_loop(self, graph: ForwardGraph, loop: Loop) -> None:
        """Calls the loop as one operator with the arguments of this pass."""
        written = step_of(loop)
        step, gate = operators_of(loop, written), gate_of(loop, written)
        assert isinstance(step, fx.GraphModule)  # see `refuse_loop`
        roll(graph, loop, step, rolled_loop, gate=gate, **self.settings())

    def sites(self, graph: ForwardGraph) -> Iterable[fx.Node]:
        """Every recurrent layer, and the loops that are one operator already."""
        own = _OWN if self.rolls_loops else _OWN[:1]
        return graph.calls(*_KINDS, *own)

    def refuse(self, graph: ForwardGraph, site: fx.Node) -> str | None:
        """Refuses packed sequences, projections, dropout between layers, and what is set."""
        given = site.kwargs
        if site.target not in _OWN:
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
        target, args = site.target, site.args
        given = {**site.kwargs, **self.settings()}
        kind = _KINDS.get(target)
        if kind is not None:
            target = recurrent_network
            x, hx, weights, biases, layers, _, _, both, first = args
            args = (kind, x, hx, weights, biases, layers, both, first)
            assert isinstance(weights, list | tuple)
            assert isinstance(weights[0], fx.Node)
            made, own = value(site)[0].dtype, value(weights[0]).dtype
            given |= {} if made is own else {"dtype": made}  # under autocast
        assert callable(target)
        new = graph.insert_before(site, target, *args, **given)
        graph.replace(site, new)


def steps_of(site: fx.Node) -> int:
    """The steps of a recurrence; where their number changes, those of the first call."""
    if is_loop(site):
        steps: Any = site.args[3]
        return int(steps)
    own = site.target is recurrent_network
    x, batch_first = (site.args[1], site.args[7]) if own else (site.args[0], site.args[8])
    assert isinstance(x, fx.Node)
    return hint(value(x).shape[1 if batch_first else 0])


def is_loop(site: fx.Node) -> bool:
    """Whether a recurrence is a loop that was written in Python."""
    return site.target is rolled_loop


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


def runs_fused(site: fx.Node) -> bool:
    """Whether eager torch computes a recurrent layer in one operator forward and one backward."""
    return site.target is torch.lstm and not_fused_site(site) is None


def not_fused_site(site: fx.Node) -> str | None:
    """Why a call of `torch.lstm` is no such operator, or None."""
    if site.kwargs or len(site.args) != 9 or not isinstance(site.args[2], list | tuple):
        return PACKED
    if any(n.target is torch.amp.autocast_mode._enter_autocast for n in site.graph.nodes):
        return "it may run under autocast"
    given: Any = fx.map_arg(site.args[:3], value)
    return not_fused(*given)


@contextmanager
def differentiable_layers(graph: ForwardGraph) -> Iterator[None]:
    """Lets torch take apart the LSTM layers of a graph while it is traced.

    Where the input of a layer needs no gradient, torch would trace oneDNN's layer as for inference,
    although its weights may need one, and the compiled code would fail.
    """
    inputs = [site.all_input_nodes[0] for site in graph.calls(torch.lstm)]
    enabled = torch.backends.mkldnn.enabled
    off = enabled and any(not value(x).requires_grad for x in inputs)
    try:
        if off:  # `mkldnn.flags` would set, and warn of, more than this
            torch._C._set_mkldnn_enabled(False)
        yield
    finally:
        if off:
            torch._C._set_mkldnn_enabled(True)


def _not_plain(site: fx.Node) -> str | None:
    if site.kwargs or len(site.args) != 9 or not isinstance(site.args[2], list | tuple):
        return PACKED
    _, _, weights, biases, layers, dropout, training, both, _ = site.args
    assert isinstance(weights, list | tuple)
    assert isinstance(layers, int)
    cells = layers * (2 if both else 1)
    if len(weights) != cells * (4 if biases else 2):
        return "it projects its states"
    if dropout and training and layers != 1:
        return "it drops values between its layers"
    return None
