"""Defects to plant into the training step of a GPT, for `benchmarks.defects`; for `--plugin`.

`planted{defect=stale-input,at=1}` rewrites every place that its defect could be at. All rewrites
but one do nothing (they add a copy), so that the wrong one has to be told from right ones.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from gtrans.backends.eager import Eager
from gtrans.contract import Contract, Exact
from gtrans.core import HELD_BACK, Knob, Pass, Permission, Stats, require
from gtrans.ir.half import Half, Runnable
from gtrans.ir.joint import JointGraph

aten = torch.ops.aten

Sites = Callable[[JointGraph], Iterable[fx.Node]]
Edit = Callable[[JointGraph, fx.Node], None]


def calls(*targets: Any) -> Sites:
    """Every call of an operator."""
    return lambda graph: graph.calls(*targets)


def _then(graph: JointGraph, node: fx.Node, target: Any, *args: Any) -> None:
    """Lets the readers of a node read a function of it, whose first argument it is."""
    users = list(node.users)
    new = graph.insert_after(node, target, node, *args)
    graph.replace_uses(node, new, users)


def _instead(graph: JointGraph, node: fx.Node, function: Callable[..., Any], *args: Any) -> None:
    """Lets the readers of a node read a function of other nodes."""
    users = list(node.users)
    (new,) = graph.splice_after(node, function, *args)
    graph.replace_uses(node, new, users)


def _again(graph: JointGraph, node: fx.Node, *args: Any) -> None:
    """Lets the readers of a node read the same call with other arguments."""
    new = graph.insert_after(node, node.target, *args, **node.kwargs)  # type: ignore[arg-type]
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _parts(node: fx.Node) -> list[fx.Node]:
    return sorted(node.users, key=lambda user: int(str(user.args[1])))


# ---------------------------------------------------------------------- the defects


def _sign(graph: JointGraph, site: fx.Node) -> None:
    _then(graph, site, aten.neg.default)


def _scale(graph: JointGraph, site: fx.Node) -> None:
    _then(graph, site, aten.mul.Tensor, 1.001)


def _dropped(graph: JointGraph, site: fx.Node) -> None:
    _then_reads(graph, site, site.args[0])


def _counted_twice(graph: JointGraph, site: fx.Node) -> None:
    _instead(graph, site, torch.add, site, site.args[1])


def _then_reads(graph: JointGraph, site: fx.Node, other: Any) -> None:
    graph.replace_uses(site, other, list(site.users))


def _stale_input(graph: JointGraph, site: fx.Node) -> None:
    """GELU's backward reads GELU's output."""
    x: Any = site.args[1]
    y = next(u for u in x.users if u.target is aten.gelu.default)
    graph.replace_uses(x, y, [site])


def _stale_layer(graph: JointGraph, site: fx.Node) -> None:
    """A layer norm's backward reads the statistics of another layer norm."""
    norms = graph.calls(aten.native_layer_norm.default)
    mean: Any = site.args[3]
    other = norms[norms.index(mean.args[0]) - 1]
    for index in (3, 4):
        own: Any = site.args[index]
        theirs = next(p for p in _parts(other) if p.args[1] == own.args[1])
        graph.replace_uses(own, theirs, [site])


def _swapped(graph: JointGraph, site: fx.Node) -> None:
    """The gradients of a layer norm's weight and bias change places."""
    weight, bias = _parts(site)[1:]
    after_weight, after_bias = list(weight.users), list(bias.users)
    graph.replace_uses(weight, bias, after_weight)
    graph.replace_uses(bias, weight, after_bias)


def _square(graph: JointGraph) -> list[fx.Node]:
    """The gradients of square weights."""
    found = [graph.gradient_of(p) for p in graph.parameters.values()]
    shaped = [(g, g.meta["val"].shape) for g in found if g is not None]
    return sorted(g for g, shape in shaped if len(shape) == 2 and shape[0] == shape[1])


def _transposed(graph: JointGraph, site: fx.Node) -> None:
    _then(graph, site, aten.t.default)


def _low_precision(graph: JointGraph, site: fx.Node) -> None:
    dtype = site.meta["val"].dtype
    _instead(graph, site, lambda dy: dy.to(torch.bfloat16).to(dtype), site)


def _redrawn(graph: JointGraph, site: fx.Node) -> None:
    """The backward of dropout draws a mask of its own."""
    dy, mask = site.args[:2]
    drawn = graph.splice_before(site, lambda g: torch.bernoulli(torch.full_like(g, 0.9)).bool(), dy)
    graph.replace_uses(mask, drawn[0], [site])  # type: ignore[arg-type]


def _aliased(graph: JointGraph, site: fx.Node) -> None:
    """The result of a backward is written over its incoming cotangent, which others still read."""
    dy: Any = site.args[0]
    users = list(site.users)
    over = graph.insert_after(site, aten.copy_.default, dy, site)
    graph.replace_uses(site, over, users)


def _masks(y: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """ReLU's backward by another mask of what not to let through."""

    def wrong(graph: JointGraph, site: fx.Node) -> None:
        dy, out = site.args[:2]
        _instead(graph, site, lambda g, o: torch.masked_fill(g, y(o), 0.0), dy, out)

    return wrong


def _first_row(graph: JointGraph, site: fx.Node) -> None:
    """A sum over the batch takes in one row only."""
    x, dims = site.args[:2]
    keep = bool(site.args[2]) if len(site.args) > 2 else False
    _instead(graph, site, lambda v: v[:1].sum(dims, keepdim=keep), x)


def _axis(graph: JointGraph, site: fx.Node) -> None:
    dy, y, _, dtype = site.args
    _again(graph, site, dy, y, 0, dtype)


def _not_causal(graph: JointGraph, site: fx.Node) -> None:
    _again(graph, site, *site.args[:7], False)


def _detached(graph: JointGraph, site: fx.Node) -> None:
    _then(graph, site, aten.zeros_like.default)


def _summed(graph: JointGraph, site: fx.Node) -> None:
    """The backward of a mean as if it were one of a sum."""
    _again(graph, site, *site.args[:4], 2, *site.args[5:])


def _padded(graph: JointGraph, site: fx.Node) -> None:
    """The embedding of the first token gets no gradient, as if it were padding."""
    _again(graph, site, *site.args[:3], 0, *site.args[4:])


def _at_odd_sizes(graph: JointGraph, site: fx.Node) -> None:
    _then(graph, site, aten.mul.Tensor, 1.5)


def _wrong_offer(graph: JointGraph, site: fx.Node) -> None:
    def near(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x, approximate="tanh")

    graph.offer(site, near, site.args[0])


def _copied(graph: JointGraph, site: fx.Node) -> None:
    """What all rewrites but one do."""
    value = site if isinstance(site.meta["val"], torch.Tensor) else _parts(site)[0]
    _then(graph, value, aten.clone.default)


def _right_offer(graph: JointGraph, site: fx.Node) -> None:
    graph.offer(site, torch.nn.functional.gelu, site.args[0])


def _has_odd_size(node: fx.Node) -> bool:
    return bool(node.meta["val"].shape[0] % 2)


def _backward_products(graph: JointGraph) -> list[fx.Node]:
    return [n for n in graph.calls(aten.mm.default) if graph.is_backward(n)]


@dataclass(frozen=True)
class Defect:
    """Where a defect may be, and what it does there; elsewhere a right rewrite happens."""

    sites: Sites
    wrong: Edit
    right: Edit = _copied
    only: Callable[[fx.Node], bool] | None = None


_GELU, _RELU = aten.gelu_backward.default, aten.threshold_backward.default
_NORM, _DROP = aten.native_layer_norm_backward.default, aten.native_dropout_backward.default
_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

DEFECTS: dict[str, Defect] = {
    "wrong-sign": Defect(calls(_GELU, _RELU), _sign),
    "scaled-by-1.001": Defect(calls(_GELU, _RELU), _scale),
    "dropped-term": Defect(JointGraph.gradient_accumulations, _dropped),
    "counted-twice": Defect(JointGraph.gradient_accumulations, _counted_twice),
    "stale-input": Defect(calls(_GELU), _stale_input),
    "stale-layer": Defect(calls(_NORM), _stale_layer),
    "swapped": Defect(calls(_NORM), _swapped),
    "transposed": Defect(_square, _transposed),
    "low-precision": Defect(calls(_GELU, _RELU), _low_precision),
    "redrawn": Defect(calls(_DROP), _redrawn),
    "aliased": Defect(calls(_DROP), _aliased),
    "odd-size": Defect(_backward_products, _at_odd_sizes, only=_has_odd_size),
    "nan-rule": Defect(calls(_RELU), _masks(lambda y: ~(y > 0))),
    "mask-edge": Defect(calls(_RELU), _masks(lambda y: y < 0)),
    "no-unbroadcast": Defect(calls(aten.sum.dim_IntList), _first_row),
    "wrong-axis": Defect(calls(aten._log_softmax_backward_data.default), _axis),
    "not-causal": Defect(calls(_ATTENTION), _not_causal),
    "detached": Defect(calls(_DROP), _detached),
    "sum-for-mean": Defect(calls(aten.nll_loss_backward.default), _summed),
    "padding": Defect(calls(aten.embedding_dense_backward.default), _padded),
    "wrong-offer": Defect(calls(aten.gelu.default), _wrong_offer, _right_offer),
}


@dataclass(frozen=True)
class Planted(Pass[JointGraph]):
    """A pass with one wrong rewrite among right ones.

    Args:
        defect: a key of `DEFECTS`.
        at: number of the site that is rewritten wrongly; the last one if there are fewer.
        second: number of another site without which the first is rewritten rightly; -1 for none.
    """

    name: ClassVar[str] = "planted"
    knob: ClassVar[Knob] = Knob.RULE

    defect: str = "wrong-sign"
    at: int = 1
    second: int = -1

    def __post_init__(self) -> None:
        require(self.defect in DEFECTS, f"planted: there is no defect {self.defect!r}")

    @property
    def contract(self) -> Contract:
        """What it does not keep."""
        return Exact()

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Rewrites every site, and notes which one wrongly."""
        stats, defect = Stats(), DEFECTS[self.defect]
        sites = list(dict.fromkeys(defect.sites(graph)))
        done: set[int] = set()
        for index, site in enumerate(sites):
            stats.matched += 1
            if not permitted(site.name):
                stats.skipped[HELD_BACK] += 1
                continue
            wrong = self._is_wrong(index, site, sites, done)
            if wrong:
                stats.notes.append(f"wrong at {site.name}")
            (defect.wrong if wrong else defect.right)(graph, site)
            done.add(index)
            stats.rewritten += 1
        return stats

    def _is_wrong(
        self, index: int, site: fx.Node, sites: Sequence[fx.Node], done: set[int]
    ) -> bool:
        only = DEFECTS[self.defect].only
        if only is not None:
            return bool(only(site))
        if index != min(self.at, len(sites) - 1):
            return False
        return self.second < 0 or self.second in done


class PlantedBackend(Eager):
    """A lowering that computes GELU's derivative by the tanh formula, in backward halves only."""

    name = "planted-backend"

    def compile(self, half: Half) -> Runnable:
        """Replaces the operator and lowers the rest as `eager` does."""
        for node in half.module.graph.find_nodes(op="call_function", target=_GELU):
            node.kwargs = {"approximate": "tanh"}
        return super().compile(half)
