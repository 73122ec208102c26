"""Sweeps over a chain of gradient sums instead of one sum after another.

See `gtrans.passes.wire.highway_bp` for what they compute. A sum that is exact from some sweep on is
computed once; a node of a cone is copied once a sweep, and only if something it reads differs.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from gtrans.analysis.chains import Chain, Link
from gtrans.ir.joint import TAG, JointGraph, tag
from gtrans.ir.sizes import hint, same_shape
from gtrans.rewrite.batched import Batches, Part, part_of, put_in_order
from gtrans.runtime.noise import fixed_signs
from gtrans.runtime.watch import WATCH

aten = torch.ops.aten
_MUL = aten.mul.Tensor


class Sweeps:
    """The rewrite of one chain.

    All that is new stands right before the sum it belongs to: whatever it reads stands before. What
    runs as a batch is moved behind what all of its blocks read.

    Args:
        joint: the graph.
        chain: one of its chains.
        iterations: sweeps.
        gamma: of all links, or None to measure it.
        worth: whether blocks like this one shall run as a batch.
    """

    def __init__(
        self,
        joint: JointGraph,
        chain: Chain,
        iterations: int,
        gamma: float | None,
        worth: Callable[[Part], bool] = lambda part: False,
    ) -> None:
        self.joint = joint
        self.chain = chain
        self.last = iterations
        self.gamma = gamma
        self.worth = worth
        self.batched = 0
        self.level = {link.node: link.level for link in chain.links}
        self.dependents = chain.dependents()
        self.made: dict[tuple[fx.Node, int], fx.Node] = {}
        self.measured: dict[fx.Node, fx.Node] = {}
        self.probes: list[fx.Node] = []

    def rewrite(self) -> None:
        """Inserts the sweeps, and lets all that read a sum read its last iterate."""
        if self.gamma is None:
            self._measure()
        for link in self.chain.links:
            for sweep in range(min(link.level, self.last + 1)):  # from its level on it is exact
                self.made[link.node, sweep] = self._iterate(link, sweep)
        for link in self.chain.links:
            final = self.made.get((link.node, self.last))
            if final is not None:
                self.joint.replace_uses(link.node, self._watched(link, final), link.node.users)
        self._batch()

    def _batch(self) -> None:
        """Lets the blocks of a sweep that are alike run as one batch, where that is worth it."""
        batches = Batches(self.joint)
        made: dict[int, set[fx.Node]] = defaultdict(set)
        for (original, sweep), node in self.made.items():
            if original not in self.level:
                made[sweep].add(node)
        for sweep in range(self.last):
            # Parts may hold one another, so none is replaced before all have run.
            groups = list(self._alike(sweep, made[sweep]))
            ran = [pair for group in groups for pair in self._run_as_one(batches, group)]
            for old, new in ran:
                self.joint.replace_uses(old, new, old.users)
                self.batched += 1
        if self.batched:
            put_in_order(self.joint)

    def _alike(self, sweep: int, inside: set[fx.Node]) -> Iterator[list[tuple[Link, Part]]]:
        """Links whose blocks compute the same in a sweep, and what they compute."""
        groups: dict[Hashable, list[tuple[Link, Part]]] = defaultdict(list)
        for link in self.chain.links:
            end = self.made.get((link.addend, sweep))
            part = None if end is None or link.local else part_of(end, inside)
            if part is not None and (link.node, sweep + 1) in self.made:
                groups[part.key].append((link, part))
        for group in groups.values():
            _, part = group[0]
            if len(group) > 1 and part.can_be_batched() and self.worth(part):
                yield group

    def _run_as_one(
        self, batches: Batches, group: list[tuple[Link, Part]]
    ) -> list[tuple[fx.Node, fx.Node]]:
        """Inserts the batch of a group; what each block computed so far, and computes there."""
        anchor = group[-1][0].node
        ends = [part.nodes[-1] for _, part in group]
        results = batches.run([part for _, part in group], anchor)
        return [
            (end, self._in_layout_of(end, result, anchor))
            for end, result in zip(ends, results, strict=True)
        ]

    def _watched(self, link: Link, final: fx.Node) -> fx.Node:
        """The last iterate; that of the last sum but one under watch.

        It has nearly the most to settle, and the sum behind it needs its iterate before as well.
        """
        if link not in self.chain.links[-2:-1] or self.last == 0:
            return final
        where = f"the stream at {link.node.name}"
        before = self.made[link.node, self.last - 1]
        return self.joint.insert_before(link.node, WATCH, final, before, where, self.last)

    def _iterate(self, link: Link, sweep: int) -> fx.Node:
        """The value of one sum in one sweep."""
        insert, sum_ = self.joint.insert_before, link.node
        value = self._at(link.kept, sweep, sum_)
        gamma = self.measured.get(sum_, self.gamma)
        if gamma and link.through:
            value = self._damped(value, link, sweep, gamma)
        if link.local:
            value = insert(sum_, aten.add.Tensor, value, link.addend)
        elif sweep > 0:
            addend = self._at(link.addend, sweep - 1, sum_)
            value = insert(sum_, aten.add.Tensor, value, addend)
        return self._in_layout_of(sum_, value)

    def _damped(self, value: fx.Node, link: Link, sweep: int, gamma: fx.Node | float) -> fx.Node:
        """(1 - gamma) of what went past the block in this sweep, gamma of it in the last."""
        insert, sum_ = self.joint.insert_before, link.node
        if sweep > 0:
            lerp = aten.lerp.Tensor if isinstance(gamma, fx.Node) else aten.lerp.Scalar
            return insert(sum_, lerp, value, self._at(link.kept, sweep - 1, sum_), gamma)
        if isinstance(gamma, fx.Node):
            return insert(sum_, aten.mul.Tensor, value, insert(sum_, aten.rsub.Scalar, gamma, 1))
        return insert(sum_, aten.mul.Scalar, value, 1 - gamma)

    def _measure(self) -> None:
        """Finds gamma of every link: minus what its cone makes of a probe, along the probe."""
        moving = self.chain.moving()
        insert = self.joint.insert_before
        for link in self.chain.links:
            probe = self._probe(link.node)
            if not link.through or probe is None:
                continue
            through = self._of_probe(link, moving)
            if through is None:
                continue
            mean = insert(link.node, aten.mean.default, insert(link.node, _MUL, through, probe))
            negative = insert(link.node, aten.neg.default, mean)
            self.measured[link.node] = insert(link.node, aten.clamp.default, negative, 0, 1)

    def _probe(self, like: fx.Node) -> fx.Node | None:
        """Signs in the shape of a point; None if that has not the elements of the head."""
        shape = like.meta["val"].shape
        for probe in self.probes:
            if same_shape(probe.meta["val"], like.meta["val"]):
                return probe
        head = self.chain.head
        if not self.probes:
            self.probes += self.joint.splice_after(head, fixed_signs, head)
            return self._probe(like)
        fixed = all(isinstance(n, int) for n in (*shape, *head.meta["val"].shape))
        if not fixed or shape.numel() != head.meta["val"].numel():
            return None
        (first, *_) = self.probes
        self.probes.append(self.joint.insert_after(first, aten.view.default, first, list(shape)))
        return self.probes[-1]

    def _of_probe(self, link: Link, moving: frozenset[fx.Node]) -> fx.Node | None:
        """The addend of a link if every point that its cone reads were the probe."""
        points = set(self.chain.points)
        made: dict[fx.Node, fx.Node | None] = {}
        pending, needed = [link.addend], {link.addend}
        while pending:
            for source in pending.pop().all_input_nodes:
                if source in points:
                    made[source] = self._probe(source)
                elif source in moving and source not in needed:
                    needed.add(source)
                    pending.append(source)
        if None in made.values() or link.addend in points:
            return None
        for original in sorted(needed):
            made[original] = self._call(original, link.node, made.get)
        return made[link.addend]

    def _at(self, node: fx.Node, sweep: int, anchor: fx.Node) -> fx.Node:
        """A node as it is when every sum has the value of some sweep; copied where it differs."""
        found = self._known(node, sweep)
        if found is not None:
            return found
        pending, needed = [node], {node}
        while pending:
            for source in pending.pop().all_input_nodes:
                if source not in needed and self._known(source, sweep) is None:
                    needed.add(source)
                    pending.append(source)
        for original in sorted(needed):
            known = partial(self._known, sweep=sweep)
            self.made[original, sweep] = self._call(original, anchor, known)
        return self.made[node, sweep]

    def _known(self, node: fx.Node, sweep: int) -> fx.Node | None:
        """The node that has the value in some sweep, if there is one already."""
        sums = self.dependents.get(node, frozenset())
        if all(self.level[s] <= sweep for s in sums):
            return node  # exact by then
        if sweep == self.last and node not in self.level:
            return node  # in the end it reads the last iterates itself
        return self.made.get((node, sweep))

    def _call(
        self, original: fx.Node, anchor: fx.Node, known: Callable[[fx.Node], fx.Node | None]
    ) -> fx.Node:
        """The same call on other arguments, where there are any."""
        args, kwargs = fx.map_arg((original.args, original.kwargs), lambda n: known(n) or n)
        target: Any = original.target
        made = self.joint.insert_before(anchor, target, *args, **kwargs)
        for key in ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr"):
            made.meta.pop(key, None)
            if key in original.meta:
                made.meta[key] = original.meta[key]
        made.meta[TAG] = replace(tag(made), region=tag(original).region)
        return made

    def _in_layout_of(self, old: fx.Node, value: fx.Node, anchor: fx.Node | None = None) -> fx.Node:
        """A value with the strides of another: what reads that may view it by its strides."""
        anchor = anchor or old
        wanted, got = old.meta["val"].stride(), value.meta["val"].stride()
        if all(statically_known_true(a == b) for a, b in zip(wanted, got, strict=True)):
            return value
        order = sorted(range(len(wanted)), key=lambda d: -hint(wanted[d]))
        back = [order.index(d) for d in range(len(order))]
        insert = self.joint.insert_before
        value = insert(anchor, aten.permute.default, value, order)
        value = insert(anchor, aten.clone.default, value, memory_format=torch.contiguous_format)
        return insert(anchor, aten.permute.default, value, back)
