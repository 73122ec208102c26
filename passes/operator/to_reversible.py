"""Turn residual streams x = x + f(x), which cannot be inverted, into ones that can.

    two-streams   a = b = x;  a += f0(b);  b += f1(a);  a += f2(b); ...;  x = (a + b) / 2
    momentum      v = g v + (1 - g) f(x);  x = x + v
    bdia          x' = s/2 x_before + (1 - s/2) x + (1 + s/2) f(x),  s = +-1 by sample and block

`reversible`, later in the pipeline, rebuilds the streams. Without a grid they are as wide as the
model's; on a grid 2^-bits they are fixed point numbers in float64, and come back to the bit: sums
are exact, products of `momentum` leave an int64 an element, halvings of `bdia` one bit each.

Saves: nothing by itself. With `reversible`, what the branches keep, at every depth.
Costs: two-streams and momentum a few passes over the stream; a grid twice the bytes of its ends.
Contract: the forward changes; the gradient is exact for it (rounding to the grid passes it on).
Needs: two links or more in a row. A post-norm block, x = norm(x + f(x)), is none: what the norm
    takes away (the scale of the sum) is in no later value. `bdia` needs a grid, and gradients.
Source: two-streams: Reformer (arXiv:2001.04451) eq. 8, its streams averaged; momentum:
    arXiv:2102.07870 eq. 3; bdia: arXiv:2407.09093 eq. 15-21, whose grid has 9 bits.
"""

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from operator import getitem
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from gtrans.analysis.residuals import Link, residual_runs
from gtrans.contract import Changed, Contract
from gtrans.core import HELD_BACK, Knob, Pass, Permission, Stats, require
from gtrans.ir.forward import ForwardGraph, value
from gtrans.ir.joint import JointGraph
from gtrans.ir.printer import target_name
from gtrans.ir.source import location
from gtrans.runtime import streams

ALONE = "a single residual sum: there is nothing to alternate with"
CHANGED = (
    "nothing goes on from one residual sum to the next but what an operator makes of it, such as "
    "the norm of a post-norm block: there is no stream that a later one could give back"
)
MADE = "its stream is one that this pass has made"
INFERENCE = "gradients are off: the model runs as it was written"
_MOST_BITS = 40

Kind = Literal["two-streams", "momentum", "bdia"]


@dataclass(frozen=True)
class ToReversible(Pass[ForwardGraph]):
    """Make residual streams invertible by changing the forward.

    Args:
        kind: "two-streams", "momentum" or "bdia".
        bits: binary places of a fixed-point stream; 0 keeps floating streams ("bdia" has none).
        gamma: g of momentum, between 0 and 1.
    """

    name: ClassVar[str] = "to-reversible"
    knob: ClassVar[Knob] = Knob.OPERATOR
    works_on: ClassVar[type[JointGraph] | type[ForwardGraph]] = ForwardGraph

    kind: Kind = "two-streams"
    bits: int = 0
    gamma: float = 0.9

    def __post_init__(self) -> None:
        bits = f"to-reversible: bits must be between 0 and {_MOST_BITS}, got {self.bits}"
        require(0 <= self.bits <= _MOST_BITS, bits)
        require(0 < self.gamma < 1, f"to-reversible: gamma must be in (0, 1), got {self.gamma}")
        needed = "to-reversible: bdia halves the stream, which takes a grid to undo; bits=16, say"
        require(self.kind != "bdia" or self.bits > 0, needed)

    @property
    def contract(self) -> Contract:
        """Another forward."""
        return Changed()

    def run(self, graph: ForwardGraph, permitted: Permission) -> Stats:
        """Rewrites each run of residual sums as a whole."""
        stats = Stats()
        runs = residual_runs(graph)
        heads = {run[0].stream for run in runs}
        for run in runs:
            stats.matched += len(run)
            reason = self._refuse(run, heads)
            if reason is None and not permitted(run[0].output.name):
                reason = HELD_BACK
            if reason is not None:
                stats.refuse_all({link.output: reason for link in run})
                continue
            _WRITERS[self.kind](graph, self).write(run)
            stats.rewritten += len(run)
            stats.notes.append(f"{len(run)} residual sums in a row became {self.kind}")
        return stats

    @property
    def factor(self) -> Fraction:
        """g as a fraction of small numbers."""
        return Fraction(self.gamma).limit_denominator(1000)

    def _refuse(self, run: list[Link], heads: Collection[fx.Node]) -> str | None:
        if any(link.stream.meta.get("made_by") == self.name for link in run):
            return MADE
        if len(run) < 2:
            changed = list(run[0].output.users)
            if len(changed) == 1 and changed[0] in heads:
                return f"{CHANGED} ({target_name(changed[0])} at {location(changed[0])})"
            return ALONE
        if self.kind == "bdia" and not torch.is_grad_enabled():
            return INFERENCE
        if self.kind == "momentum" and self.bits and len(run) > streams.most_links(self.factor):
            most = streams.most_links(self.factor)
            return f"more than {most} links: their remainders do not fit into one int64 an element"
        return None


class _Writer:
    """Writes the links of one run; a subclass says what a link is, and who reads what."""

    def __init__(self, graph: ForwardGraph, options: ToReversible) -> None:
        self.graph = graph
        self.bits = options.bits
        self.factor = options.factor

    def write(self, run: list[Link]) -> None:
        """Replaces every sum of a run."""
        start = run[0].stream
        reads = [link.reads() for link in run]
        self.anchor = min(reads[0])
        self.dtype = value(start).dtype
        self.begin(self.call(streams.on_grid, start, self.bits) if self.bits else start)
        self._let_read(start, reads[0], self.read())
        for i, link in enumerate(run):
            self.anchor = link.output
            total, *others = link.branches
            for other in others:
                total = self.call(torch.add, total, other)
            self.update(total)
            following = reads[i + 1] if i + 1 < len(run) else []
            outside = [
                u for u in link.output.users if u not in following and not _is_next(u, run, i)
            ]
            self._let_read(link.output, following, self.read())
            if outside:
                self._let_read(link.output, outside, self.value())
        for link in reversed(run):
            self.graph.graph.erase_node(link.output)

    def begin(self, x: fx.Node) -> None:
        """Sets the state up."""
        raise NotImplementedError

    def update(self, branch: fx.Node) -> None:
        """Moves the state on by one link."""
        raise NotImplementedError

    def read(self) -> fx.Node:
        """What the next branch reads."""
        raise NotImplementedError

    def value(self) -> fx.Node:
        """What everything else reads."""
        return self.read()

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Inserts a call before the link that is written."""
        return self.graph.insert_before(self.anchor, target, *args, **kwargs)

    def rounded(self, x: fx.Node) -> fx.Node:
        """A branch as it is added to the stream."""
        return self.call(streams.on_grid, x, self.bits) if self.bits else x

    def _let_read(self, old: fx.Node, readers: list[fx.Node], new: fx.Node) -> None:
        if readers and new is not old:
            narrow = self.call(torch.Tensor.to, new, self.dtype) if self.bits else new
            for reader in readers:
                reader.replace_input_with(old, narrow)


class _TwoStreams(_Writer):
    def begin(self, x: fx.Node) -> None:
        self.reading = self.writing = x

    def update(self, branch: fx.Node) -> None:
        total = self.call(torch.add, self.writing, self.rounded(branch))
        self.reading, self.writing = total, self.reading

    def read(self) -> fx.Node:
        return self.reading

    def value(self) -> fx.Node:
        return self.call(torch.mul, self.call(torch.add, self.reading, self.writing), 0.5)


class _Momentum(_Writer):
    def begin(self, x: fx.Node) -> None:
        self.x = x
        self.v: fx.Node | None = None
        self.store: fx.Node | None = None

    def update(self, branch: fx.Node) -> None:
        g = self.factor
        added = self.rounded(self.call(torch.mul, branch, float(1 - g)))
        if self.v is None:
            self.v = added
        elif self.bits:
            store = self.store or self.call(torch.zeros_like, self.v, dtype=torch.int64)
            numbers = (g.numerator, g.denominator, self.bits)
            both = self.call(streams.SCALE, self.v, store, *numbers)
            self.v = self.call(torch.add, self.call(getitem, both, 0), added)
            self.store = self.call(getitem, both, 1)
        else:
            self.v = self.call(torch.add, self.call(torch.mul, self.v, float(g)), added)
        self.x = self.call(torch.add, self.x, self.v)

    def read(self) -> fx.Node:
        return self.x


class _Bdia(_Writer):
    def begin(self, x: fx.Node) -> None:
        self.before: fx.Node | None = None
        self.x = x

    def update(self, branch: fx.Node) -> None:
        before, self.before = self.before, self.x
        if before is None:
            self.x = self.call(torch.add, self.x, self.rounded(branch))
            return
        sign = self.call(streams.signs, before)
        mixed = self.call(streams.bdia_mean, self.x, branch, sign)
        half = self.call(getitem, self.call(streams.HALVE, before, sign, self.bits), 0)
        self.x = self.call(torch.add, half, self.rounded(mixed))

    def read(self) -> fx.Node:
        return self.x


_WRITERS: dict[Kind, type[_Writer]] = {
    "two-streams": _TwoStreams,
    "momentum": _Momentum,
    "bdia": _Bdia,
}


def _is_next(user: fx.Node, run: list[Link], i: int) -> bool:
    """Whether a reader of a link's sum is the next sum, which is going to be replaced."""
    return i + 1 < len(run) and user is run[i + 1].output
