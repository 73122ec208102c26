"""Let no gradient flow below the output of a module.

    h  = f(x)                                       h  = f(x)
    dx = f_backward(dh)                    -->      # dh is not used: f and all below it get zeros

Saves: whatever only the backward below the cut would have read.
Contract: local. Above the cut the gradient is the true one; below it, it is that of a loss that
    does not depend on the module's output (what reaches the loss by another way keeps that part).
Needs: backward operators below the cut that are linear in the cotangent, as autograd's are.
Source: `Tensor.detach`, without touching the model; truncated and block-local training build on it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from gtrans.contract import Contract, Local
from gtrans.core import Knob, SitePass, require
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.joint import JointGraph
from gtrans.rewrite.wires import cut, mark, outputs_of_modules, taps


@dataclass(frozen=True)
class Cut(SitePass[JointGraph]):
    """Detach the output of a module, or of several.

    Args:
        at: path of the module in the model, such as "encoder.layers.3", or a pattern of paths such
            as "encoder.layers.*". By default every module that the model holds directly.
    """

    name: ClassVar[str] = "cut"
    knob: ClassVar[Knob] = Knob.WIRE

    at: str = "*"

    def __post_init__(self) -> None:
        require(bool(self.at), "cut: at must name a module, such as 'encoder.layers.3'")

    @property
    def contract(self) -> Contract:
        """True gradients above the cut, none below."""
        return Local()

    def mark(self, graph: ForwardGraph) -> None:
        """Taps the module's outputs."""
        for number, node in enumerate(outputs_of_modules(graph, self.at)):
            mark(graph, node, f"cut {self.at} {number}")

    def sites(self, graph: JointGraph) -> Iterable[fx.Node]:
        """The taps of this pass."""
        return [t.value for t in taps(graph) if t.key.startswith(f"cut {self.at} ")]

    def refuse(self, graph: JointGraph, site: fx.Node) -> str | None:
        """Refuses outputs that no gradient reaches."""
        if all(t.cotangent is None for t in taps(graph) if t.value is site):
            return "no gradient reaches this output"
        return None

    def rewrite(self, graph: JointGraph, site: fx.Node) -> None:
        """Cuts the wire."""
        for tap in taps(graph):
            if tap.value is site:
                cut(graph, tap)
