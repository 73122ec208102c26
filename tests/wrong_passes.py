"""Passes that are wrong on purpose, to see whether they are found; a file for `--plugin`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import Knob, SitePass
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.joint import JointGraph

aten = torch.ops.aten


class _Scales(SitePass[JointGraph]):
    """Multiplies the results of activation backwards; all factors but the wrong ones are 1."""

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
class WrongScale(_Scales):
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
class WrongPair(_Scales):
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
    works_on: ClassVar[type[JointGraph] | type[ForwardGraph]] = ForwardGraph

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


@dataclass(frozen=True)
class Raises(_Scales):
    """Fail halfway through a graph."""

    name: ClassVar[str] = "raises"

    def factor(self, graph: JointGraph, index: int) -> float:
        raise ZeroDivisionError("no factor")
