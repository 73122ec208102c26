"""Keep a forward value as codes, and let the backward read what they decode to.

    v                                         v
                                              parts = encode(v)              # saved
    dw = f(dy, view(v))                -->    dw    = f(dy, view(decode(parts)))

The input of a norm is coded as it is normalised, by two independent sets of codes, one for each
factor of the norm's gradient; what else reads the norm's output reads it made of the first. The
output of a softmax has two sets of codes for the same reason.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from typing import Any

from torch import fx

from gtrans.analysis.kinks import reads_kink
from gtrans.analysis.linear_uses import NormUse, Role, Use, norm_use, uses_of
from gtrans.analysis.rounding import relative_error
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import numel
from gtrans.rewrite.late import seed_of, splice_late
from gtrans.runtime.norm_gradient import (
    NormShape,
    affine,
    denormalised,
    gradients,
    normalised,
    softmax_gradient,
)
from gtrans.runtime.quantise import Grid, decode, encode, frame

# The second copy of a norm's input is read through a mean over many terms only. It has the fewest
# bits that add less than this share of the first copy's error.
_SHARE = 0.5


@dataclass(frozen=True)
class CodedValue:
    """A forward value, its readers that can do with codes, and the codes.

    Attributes:
        value: allocates what it is stored in.
        uses: readers of the value that are affine in it, or read its sign.
        softmaxes: backwards of softmax whose output it is.
        norms: norms whose input it is.
        image_uses: readers of those norms' outputs, affine in them.
        grid: of the codes.
        second: of the second copy, for norms and softmax; None: one copy does.
    """

    value: fx.Node
    uses: tuple[Use, ...]
    softmaxes: tuple[Use, ...]
    norms: tuple[NormUse, ...]
    image_uses: tuple[tuple[NormUse, Use], ...]
    grid: Grid
    second: Grid | None

    @property
    def bytes(self) -> float:
        """What is kept in place of the value."""
        count = numel(self.value.meta["val"])
        copies = [self.grid] + ([self.second] if self.second else [])
        return self.grid.frame_bytes(count) + sum(g.code_bytes(count) for g in copies)

    @property
    def readers(self) -> list[fx.Node]:
        """The backward nodes that read codes."""
        found = [u.reader for u in (*self.uses, *self.softmaxes)]
        found += [n.backward for n in self.norms]
        return sorted(dict.fromkeys(found + [u.reader for _, u in self.image_uses]))

    @property
    def noisy_readers(self) -> list[fx.Node]:
        """Those to which codes are more than a sign, which is exact."""
        exact = {u.reader for u in self.uses if u.role is Role.SIGN}
        return [r for r in self.readers if r not in exact]

    def let_go(self, trial: JointGraph, twin: Any) -> None:
        """Cuts the edges from the value to its readers, in a copy of the graph that never runs."""
        direct = (*self.uses, *self.softmaxes, *(u for _, u in self.image_uses))
        edges = [(u.reader, u.operand) for u in direct]
        edges += [(n.backward, n.x) for n in self.norms]
        for reader, operand in edges:
            cut_edge(trial, twin(reader), twin(operand))

    def rewrite(self, graph: JointGraph) -> None:
        """Inserts the codes, and lets the readers read what they decode to.

        A norm's input is coded as the norm has normalised it: its rows differ in scale, and the
        rounding error of a large one would swamp a small one of the same group. Not so the output
        of a ReLU, whose zeros are to stay zeros, nor what norms read through views only.
        """
        direct = [n for n in self.norms if n.x is self.value and not self.grid.zeros]
        source, main = self.value, next(iter(direct), None)
        if main is not None:
            last = max(n for n in (main.x, main.mean, main.rstd) if n is not None)
            function = partial(normalised, _shape(main))
            (source,) = graph.splice_after(last, function, main.x, main.mean, main.rstd)
        frames = graph.splice_after(_written(graph, source), partial(frame, self.grid), source)
        decoded = partial(self._decoded, graph, source, frames)
        first = decoded(self.grid, self.readers[0], "first")
        for use in self.uses:
            x = first if main is None else _denormalised(graph, main, first, use.reader)
            reread(graph, use, self.value, x)
        for norm, use in self.image_uses:
            y = _image(graph, norm, self._of_norm(graph, main, norm, first, use.reader), use.reader)
            assert norm.y is not None
            reread(graph, use, norm.y, y)
        for norm in self.norms:
            z = other = self._of_norm(graph, main, norm, first, norm.backward)
            if self.second is not None:
                second = decoded(self.second, norm.backward, norm.backward.name)
                other = self._of_norm(graph, main, norm, second, norm.backward)
            replace_norm(graph, norm, z, other)
        for use in self.softmaxes:
            assert self.second is not None
            second = decoded(self.second, use.reader, use.reader.name)
            replace_softmax(graph, use.reader, first, second)

    def _of_norm(
        self, graph: JointGraph, main: NormUse | None, norm: NormUse, copy: fx.Node, anchor: fx.Node
    ) -> fx.Node:
        """What a norm makes of a copy of the value, or of what another one normalised it to."""
        if main is not None and norm.rstd is main.rstd:
            return copy
        x = copy if main is None else _denormalised(graph, main, copy, anchor)
        x = through_views(graph, norm.x, self.value, x, anchor)
        function = partial(normalised, _shape(norm))
        return splice_late(graph, anchor, function, x, norm.mean, norm.rstd)[0]

    def _decoded(
        self,
        graph: JointGraph,
        source: fx.Node,
        frames: Sequence[fx.Node],
        grid: Grid,
        anchor: fx.Node,
        draw: str,
    ) -> fx.Node:
        return decoded_late(graph, source, frames, grid, anchor, f"{self.value.name} {draw}")


def _written(graph: JointGraph, value: fx.Node) -> fx.Node:
    """The first product of the forward that reads a value, or the value if there is none.

    What a product reads is in memory. Coded before that, compilers compute the value again for its
    ranges and for its codes.
    """
    products, pending = list[fx.Node](), [value]
    while pending:
        for user in filter(graph.is_forward, pending.pop().users):
            pending += [user] if ops.is_view(user) else []
            products += [user] if ops.is_contraction(user) else []
    return min(products, default=value)


def decoded_late(
    graph: JointGraph,
    source: fx.Node,
    frames: Sequence[fx.Node],
    grid: Grid,
    anchor: fx.Node,
    name: str,
) -> fx.Node:
    """Codes a forward value and decodes it right before its first reader.

    Args:
        graph: the graph to edit.
        source: the value.
        frames: what `frame` makes of the value.
        grid: how.
        anchor: the first reader.
        name: of the copy; another name is another draw of the noise.
    """
    val = source.meta["val"]
    seed = seed_of(graph, name) if grid.stochastic else None
    packed = graph.splice_after(max(frames), partial(encode, grid), source, seed, *frames)
    shape = tuple(n if isinstance(n, int) else -1 for n in val.shape)
    (made,) = splice_late(graph, anchor, partial(decode, grid, shape, val.dtype), *frames, *packed)
    return made


def cut_edge(trial: JointGraph, reader: fx.Node, operand: fx.Node) -> None:
    """Lets a backward node read a cotangent instead of a value, in a graph that never runs."""
    if operand in reader.all_input_nodes:
        stand_in = next(n for n in reader.all_input_nodes if trial.is_backward(n))
        reader.replace_input_with(operand, stand_in)
        trial.cut = None


def coded_value(
    joint: JointGraph,
    value: fx.Node,
    *,
    grid: Grid,
    others: Collection[str] = (),
    any_reader: bool = False,
) -> CodedValue:
    """A value with all the readers that codes would do for; there may be none.

    Args:
        joint: the graph.
        value: the value.
        grid: how to code it.
        others: names of backward nodes that are taken care of in another way, such as those that
            compute a derivative which has codes of its own.
        any_reader: code the value also for readers that are not affine in it, if they do not
            compare it with anything; one copy does then.
    """
    uses = [u for u in uses_of(joint, value) if u.reader.name not in others]
    taken = {Role.LINEAR, Role.SIGN} | ({Role.SOFTMAX} if any_reader else set())
    plain = tuple(
        u
        for u in uses
        if u.role in taken or (any_reader and u.role is Role.OTHER and not reads_kink(u.reader))
    )
    softmaxes = tuple(
        u for u in uses if u.role is Role.SOFTMAX and u.operand is value and not any_reader
    )
    norms = tuple(n for u in uses if u.role is Role.NORM and (n := norm_use(u.reader)) is not None)
    images: list[tuple[NormUse, Use]] = []
    for norm in {n.y: n for n in norms if n.y is not None}.values():
        assert norm.y is not None
        images += [
            (norm, u)
            for u in uses_of(joint, norm.y)
            if u.role is Role.LINEAR and u.reader.name not in others
        ]
    second = None
    if (norms or softmaxes) and not any_reader:
        terms = [n.terms for n in norms]
        terms += [value.meta["val"].shape[ops.argument(u.reader, "dim")] for u in softmaxes]
        second = replace(grid, bits=_second_bits(grid, terms))
    return CodedValue(value, plain, softmaxes, norms, tuple(images), grid, second)


def _second_bits(grid: Grid, sums: Sequence[object]) -> int:
    """The bits of a copy that is read through sums over so many terms."""
    terms = min(n if isinstance(n, int) else 1 for n in sums)
    error = partial(relative_error, group=grid.group, stochastic=grid.stochastic)
    bound = _SHARE * error(grid.bits) * sqrt(terms)
    fits = [b for b in (1, 2, 4) if error(b) <= bound and b > grid.zeros]
    return min([*fits, grid.bits])


def reread(graph: JointGraph, use: Use, value: fx.Node, decoded: fx.Node) -> None:
    """Lets a reader read the decoded value, through the same views.

    Args:
        graph: the graph to edit.
        use: a reader of the value.
        value: what it reads now.
        decoded: what to read in its place, of the same shape and dtype.
    """
    again = through_views(graph, use.operand, value, decoded, use.reader)
    graph.replace_uses(use.operand, again, [use.reader])


def through_views(
    graph: JointGraph, operand: fx.Node, value: fx.Node, decoded: fx.Node, anchor: fx.Node
) -> fx.Node:
    """Repeats the views that lead from a value to an operand on the decoded value.

    Args:
        graph: the graph to edit.
        operand: the value, or a view of it.
        value: what it is a view of.
        decoded: what to view in its place, of the same shape and dtype.
        anchor: the backward node that will read the result.
    """
    path: list[fx.Node] = []
    node = operand
    while node is not value:
        path.append(node)
        node = node.all_input_nodes[0]
    made = {value: decoded}
    for view in reversed(path):
        args, kwargs = fx.map_arg((view.args, dict(view.kwargs)), lambda n: made.get(n, n))
        made[view] = graph.repeat_before(anchor, view, args, kwargs)
        graph.rebuild_in_backward(made[view])
    return made[operand]


def _image(graph: JointGraph, norm: NormUse, z: fx.Node, anchor: fx.Node) -> fx.Node:
    assert norm.y is not None
    function = partial(affine, _shape(norm), norm.y.meta["val"].dtype)
    return splice_late(graph, anchor, function, z, norm.weight, norm.bias)[0]


def _denormalised(graph: JointGraph, norm: NormUse, z: fx.Node, anchor: fx.Node) -> fx.Node:
    function = partial(denormalised, _shape(norm), norm.x.meta["val"].dtype)
    return splice_late(graph, anchor, function, z, norm.mean, norm.rstd)[0]


def replace_norm(graph: JointGraph, norm: NormUse, z: fx.Node, other: fx.Node) -> None:
    """Computes the gradients of a norm from two copies of its normalised input.

    Args:
        graph: the graph to edit.
        norm: which norm.
        z, other: the copies; they may be the same.
    """
    node = norm.backward
    function = partial(gradients, _shape(norm), norm.x.meta["val"].dtype)
    centred = norm.mean is not None
    made = splice_late(graph, node, function, norm.dy, z, other, norm.rstd, norm.weight, centred)
    for position, part in ops.parts(node).items():
        graph.replace(part, made[position])
    graph.erase(node)


def replace_softmax(graph: JointGraph, node: fx.Node, y: fx.Node, other: fx.Node) -> None:
    """Computes the gradient of a softmax from two copies of its output.

    Args:
        graph: the graph to edit.
        node: the backward of the softmax.
        y, other: the copies.
    """
    function = partial(softmax_gradient, ops.argument(node, "dim"), node.meta["val"].dtype)
    (made,) = splice_late(graph, node, function, ops.argument(node, "grad_output"), y, other)
    graph.replace(node, made)


def _shape(norm: NormUse) -> NormShape:
    return NormShape(norm.channels, norm.rank)
