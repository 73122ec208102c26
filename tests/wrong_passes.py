"""Passes that are wrong on purpose, each in one way, and a few correct relatives of them.

Also a file for `--plugin`: a class without a name is a base, all others can be named in pipelines.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from gtrans.contract import Aligned, Close, Contract, Exact, Iterative, Unbiased
from gtrans.core import GraphKind, Knob, Pass, Permission, SitePass, Stats
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.joint import JointGraph

aten = torch.ops.aten


@dataclass(frozen=True)
class OnGradients(SitePass[JointGraph]):
    """Base: edits the gradient of each parameter, once."""

    knob: ClassVar[Knob] = Knob.RULE

    @property
    def contract(self) -> Contract:
        return Exact()

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        grads = [graph.gradient_of(p) for p in graph.parameters.values()]
        return dict.fromkeys(g for g in grads if g is not None)

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        return "done before" if site.meta["gtrans"].made_by == self.name else None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        author = graph.author
        new = self.edited(graph, site)
        graph.author = author
        if new is not site:
            users = [u for u in site.users if u.op == "output"]
            graph.replace_uses(site, new, users)

    def edited(self, graph: JointGraph, gradient: fx.Node) -> fx.Node:
        raise NotImplementedError


@dataclass(frozen=True)
class Scaled(OnGradients):
    """Every gradient 0.1 % too large."""

    name: ClassVar[str] = "scaled"

    def edited(self, graph: JointGraph, gradient: fx.Node) -> fx.Node:
        return graph.insert_after(gradient, aten.mul.Tensor, gradient, 1.001)


@dataclass(frozen=True)
class Rounded(OnGradients):
    """Gradients go through bfloat16."""

    name: ClassVar[str] = "rounded"

    def edited(self, graph: JointGraph, gradient: fx.Node) -> fx.Node:
        dtype = gradient.meta["val"].dtype
        low = graph.insert_after(gradient, aten._to_copy.default, gradient, dtype=torch.bfloat16)
        return graph.insert_after(low, aten._to_copy.default, low, dtype=dtype)


@dataclass(frozen=True)
class TooClose(Rounded):
    """Promises a smaller error than it makes."""

    name: ClassVar[str] = "too-close"

    @property
    def contract(self) -> Contract:
        return Close(1e-6)


@dataclass(frozen=True)
class HonestlyClose(Rounded):
    """Correct: the error of bfloat16 is what it promises."""

    name: ClassVar[str] = "honestly-close"

    @property
    def contract(self) -> Contract:
        return Close(1e-2)


@dataclass(frozen=True)
class WrongType(OnGradients):
    """Leaves gradients in another dtype."""

    name: ClassVar[str] = "wrong-type"

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        low = graph.insert_after(site, aten._to_copy.default, site, dtype=torch.float16)
        site.replace_all_uses_with(low, delete_user_cb=lambda user: user is not low)


@dataclass(frozen=True)
class DroppedTerm(SitePass[JointGraph]):
    """Forgets one term of each sum of cotangents."""

    name: ClassVar[str] = "dropped-term"
    knob: ClassVar[Knob] = Knob.RULE

    @property
    def contract(self) -> Contract:
        return Exact()

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        return graph.gradient_accumulations()

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        return None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        kept = site.args[0]
        assert isinstance(kept, fx.Node)
        graph.replace(site, kept)


@dataclass(frozen=True)
class StaleResidual(SitePass[JointGraph]):
    """tanh's backward reads tanh's input instead of its output."""

    name: ClassVar[str] = "stale-residual"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    @property
    def contract(self) -> Contract:
        return Exact()

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        return graph.calls(aten.tanh_backward.default)

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        y = site.args[1]
        stale = isinstance(y, fx.Node) and y.target is aten.tanh.default
        return None if stale else "not tanh's own output"

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        y = site.args[1]
        assert isinstance(y, fx.Node)
        x = y.args[0]
        assert isinstance(x, fx.Node)
        graph.replace_uses(y, x, [site])


@dataclass(frozen=True)
class Swapped(Pass[JointGraph]):
    """Swaps the gradients of the first two parameters of equal shape."""

    name: ClassVar[str] = "swapped"
    knob: ClassVar[Knob] = Knob.RULE

    @property
    def contract(self) -> Contract:
        return Exact()

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        stats = Stats()
        found = [(p, g) for p in graph.parameters.values() if (g := graph.gradient_of(p))]
        for (p, a), (q, b) in itertools.combinations(found, 2):
            if a is b or p.meta["val"].shape != q.meta["val"].shape:
                continue
            stats.matched += 1
            if a.meta["gtrans"].made_by == "" and permitted(a.name):
                first = graph.insert_after(max(a, b), aten.clone.default, b)
                second = graph.insert_after(max(a, b), aten.clone.default, a)
                graph.output.replace_input_with(a, first)
                graph.output.replace_input_with(b, second)
                stats.rewritten += 1
            return stats
        return stats


@dataclass(frozen=True)
class WrongNaN(SitePass[JointGraph]):
    """ReLU's mask by `gt`, which a NaN fails, so that no gradient passes there."""

    name: ClassVar[str] = "wrong-nan"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    @property
    def contract(self) -> Contract:
        return Exact()

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        return graph.calls(aten.threshold_backward.default)

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        return None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        dy, y, _ = site.args
        assert isinstance(y, fx.Node)
        on = graph.insert_after(y, aten.gt.Scalar, y, 0)
        off = graph.insert_after(on, aten.logical_not.default, on)
        graph.replace(site, graph.insert_before(site, aten.masked_fill.Scalar, dy, off, 0))


@dataclass(frozen=True)
class RedrawnDropout(SitePass[JointGraph]):
    """The backward of dropout draws a mask of its own."""

    name: ClassVar[str] = "redrawn-dropout"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    @property
    def contract(self) -> Contract:
        return Exact()

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        return graph.calls(aten.native_dropout_backward.default)

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        return None if graph.is_forward(site.args[1]) else "done before"

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        dy, mask = site.args[:2]
        assert isinstance(mask, fx.Node)
        drawn = graph.insert_before(site, aten.bernoulli.p, dy, 0.7)
        new = graph.insert_before(site, aten._to_copy.default, drawn, dtype=torch.bool)
        graph.replace_uses(mask, new, [site])


@dataclass(frozen=True)
class ChangedForward(SitePass[JointGraph]):
    """GELU by its tanh formula, in the forward only."""

    name: ClassVar[str] = "changed-forward"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    @property
    def contract(self) -> Contract:
        return Close(0.1)

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        return graph.calls(aten.gelu.default)

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        return "done before" if site.kwargs else None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        new = graph.insert_before(site, aten.gelu.default, site.args[0], approximate="tanh")
        graph.replace(site, new)


@dataclass(frozen=True)
class Noisy(OnGradients):
    """Multiplies gradients by 1 + bias + noise * N(0, 1). Correct where bias is 0.

    Args:
        bias: of the factor.
        noise: standard deviation of the factor.
    """

    name: ClassVar[str] = "noisy"

    bias: float = 0.0
    noise: float = 0.1

    @property
    def contract(self) -> Contract:
        return Unbiased(noise=frozenset({"factor"}))

    def edited(self, graph: JointGraph, gradient: fx.Node) -> fx.Node:
        noise = graph.insert_after(gradient, aten.randn_like.default, gradient)
        scaled = graph.insert_after(noise, aten.mul.Tensor, noise, self.noise)
        factor = graph.insert_after(scaled, aten.add.Tensor, scaled, 1 + self.bias)
        return graph.insert_after(factor, aten.mul.Tensor, gradient, factor)


@dataclass(frozen=True)
class InfiniteIteration(Scaled):
    """Claims to be a truncated iteration, and overflows."""

    name: ClassVar[str] = "infinite-iteration"

    @property
    def contract(self) -> Contract:
        return Iterative(iterations=1, exact_at=5)

    def edited(self, graph: JointGraph, gradient: fx.Node) -> fx.Node:
        return graph.insert_after(gradient, aten.div.Tensor, gradient, 0.0)


@dataclass(frozen=True)
class FinishedIteration(Scaled):
    """Claims that its iteration has reached the exact point, which it has not."""

    name: ClassVar[str] = "finished-iteration"

    @property
    def contract(self) -> Contract:
        return Iterative(iterations=5, exact_at=5)


@dataclass(frozen=True)
class Rectified(OnGradients):
    """Not linear in the cotangent, without saying so."""

    name: ClassVar[str] = "rectified"

    @property
    def contract(self) -> Contract:
        return Aligned()

    def edited(self, graph: JointGraph, gradient: fx.Node) -> fx.Node:
        return graph.insert_after(gradient, aten.relu.default, gradient)


@dataclass(frozen=True)
class HonestlyRectified(Rectified):
    """Correct: declares that it is not linear."""

    name: ClassVar[str] = "honestly-rectified"
    linear: ClassVar[bool] = False


@dataclass(frozen=True)
class NotIdempotent(OnGradients):
    """Wraps gradients in one more clone each time."""

    name: ClassVar[str] = "not-idempotent"

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        return None

    def edited(self, graph: JointGraph, gradient: fx.Node) -> fx.Node:
        return graph.insert_after(gradient, aten.clone.default, gradient)


@dataclass(frozen=True)
class Unasked(Pass[JointGraph]):
    """Rewrites without asking for permission."""

    name: ClassVar[str] = "unasked"
    knob: ClassVar[Knob] = Knob.RULE

    @property
    def contract(self) -> Contract:
        return Exact()

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        return NotIdempotent().run(graph, lambda site: True)


@dataclass(frozen=True)
class Silent(Pass[JointGraph]):
    """Rewrites and reports nothing."""

    name: ClassVar[str] = "silent"
    knob: ClassVar[Knob] = Knob.RULE

    @property
    def contract(self) -> Contract:
        return Exact()

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        NotIdempotent().run(graph, permitted)
        return Stats()


@dataclass(frozen=True)
class Hoarder(Pass[JointGraph]):
    """Lets the backward read a copy of every ReLU output, which is then kept besides it."""

    name: ClassVar[str] = "hoarder"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    @property
    def contract(self) -> Contract:
        return Exact()

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        stats = Stats()
        for y in graph.calls(aten.relu.default):
            readers = [u for u in y.users if graph.is_backward(u)]
            if len(readers) < 2:
                continue
            stats.matched += 1
            if permitted(y.name):
                twin = graph.insert_after(y, aten.clone.default, y)
                graph.save_for_backward(twin)
                graph.replace_uses(y, twin, readers[:1])
                stats.rewritten += 1
        return stats


_runs = itertools.count()


@dataclass(frozen=True)
class Counting(OnGradients):
    """Puts something into the graph that is another thing at every run."""

    name: ClassVar[str] = "counting"

    def edited(self, graph: JointGraph, gradient: fx.Node) -> fx.Node:
        zero = graph.insert_after(gradient, aten.mul.Tensor, gradient, 0 * next(_runs) + 1)
        return graph.insert_after(zero, aten.clamp_max.default, zero, 1e30 + next(_runs) * 1e25)


@dataclass(frozen=True)
class Raises(OnGradients):
    """Fails after its first rewrite."""

    name: ClassVar[str] = "raises"

    def edited(self, graph: JointGraph, gradient: fx.Node) -> fx.Node:
        graph.insert_after(gradient, aten.mul.Tensor, gradient, 2.0)
        raise ZeroDivisionError("on purpose")


@dataclass(frozen=True)
class Unrunnable(OnGradients):
    """Takes elements that do not exist: shapes fit, and the step raises."""

    name: ClassVar[str] = "unrunnable"

    def edited(self, graph: JointGraph, gradient: fx.Node) -> fx.Node:
        far = graph.insert_after(
            gradient, aten.full_like.default, gradient, 2**40, dtype=torch.int64
        )
        return graph.insert_after(far, aten.take.default, gradient, far)


@dataclass(frozen=True)
class Breaks(OnGradients):
    """Leaves a graph behind in which a forward output depends on a tangent."""

    name: ClassVar[str] = "breaks"

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        y = next(o for o in graph.forward_outputs if isinstance(o, fx.Node))
        tangent: Any = graph.tangents[0]
        graph.output.replace_input_with(y, tangent)


@dataclass(frozen=True)
class WrongNothing(OnGradients):
    """Never finds anything."""

    name: ClassVar[str] = "wrong-nothing"

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        return ()


# ------------------------------------------------------------------ wrong in one place only


class Scales(SitePass[JointGraph]):
    """Base: multiplies results of activation backwards; all factors but the wrong ones are 1."""

    knob: ClassVar[Knob] = Knob.RULE

    @property
    def contract(self) -> Contract:
        return Exact()

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        return graph.calls(aten.gelu_backward.default, aten.threshold_backward.default)

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        return None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        users = list(site.users)
        index = list(self.sites(graph)).index(site)
        scaled = graph.insert_after(site, aten.mul.Tensor, site, self.factor(graph, index))
        graph.replace_uses(site, scaled, users)

    def factor(self, graph: JointGraph, index: int) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class WrongScale(Scales):
    """Scale the gradient of some activations by 1.001.

    Args:
        at: number of the first activation, counted from the loss, that is scaled wrongly.
        also: number of another one; -1 for none.
    """

    name: ClassVar[str] = "wrong-scale"

    at: int = 0
    also: int = -1

    def factor(self, graph: JointGraph, index: int) -> float:
        return 1.001 if index in (self.at, self.also) else 1.0


@dataclass(frozen=True)
class WrongPair(Scales):
    """Two rewrites, each harmless without the other.

    Args:
        first: number of one activation.
        second: number of the other, which is scaled wrongly if the first was rewritten.
    """

    name: ClassVar[str] = "wrong-pair"

    first: int = 0
    second: int = 2

    def factor(self, graph: JointGraph, index: int) -> float:
        site = list(self.sites(graph))[self.first]
        rewritten = any(u.target is aten.mul.Tensor for u in site.users)
        return 1.001 if index == self.second and rewritten else 1.0


@dataclass(frozen=True)
class WrongOffer(SitePass[JointGraph]):
    """Offer GELU's output as something near it, which shows only where the plan takes the offer.

    Args:
        at: number of the one with the wrong offer.
    """

    name: ClassVar[str] = "wrong-offer"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    at: int = 0

    @property
    def contract(self) -> Contract:
        return Exact()

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        return graph.calls(aten.gelu.default)

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        return None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        factor = 1.001 if list(self.sites(graph)).index(site) == self.at else 1.0

        def scaled(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(x) * factor

        graph.offer(site, scaled, site.args[0])


@dataclass(frozen=True)
class WrongForward(SitePass[ForwardGraph]):
    """Replace an exact GELU by its approximation and call that exact.

    Args:
        at: number of the one that is replaced wrongly.
    """

    name: ClassVar[str] = "wrong-forward"
    knob: ClassVar[Knob] = Knob.OPERATOR
    works_on: ClassVar[GraphKind] = ForwardGraph

    at: int = 0

    @property
    def contract(self) -> Contract:
        return Exact()

    def sites(self, graph: ForwardGraph) -> Iterable[fx.Node]:
        return graph.calls(torch.nn.functional.gelu)

    def refuse(self, graph: ForwardGraph, site: fx.Node) -> str | None:
        return None

    def rewrite(self, graph: ForwardGraph, site: fx.Node) -> None:
        number = list(self.sites(graph)).index(site)
        approximate = "tanh" if number == self.at else "none"
        with graph.graph.inserting_before(site):
            call = graph.graph.call_function(
                torch.nn.functional.gelu, site.args, {"approximate": approximate}
            )
        call.meta.update(site.meta)
        graph.replace(site, call)
