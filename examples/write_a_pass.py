"""Write a pass of your own, look at what it does, and check it against the true gradient.

    python examples/write_a_pass.py

LeakyReLU's backward asks of its input only whether each element is positive. Autograd keeps the
whole input for that; this pass keeps one byte an element.

    dx = leaky_relu_backward(dy, x, a)  -->  up = gt(x, 0);  dx = where(up, dy, a * dy)

To give a pass a name that works everywhere (`passes="leaky-mask,plan"`, the command line), let your
package register it: [project.entry-points."gtrans.passes"] leaky-mask = "my_package:LeakyMask"
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

import gtrans
from gtrans.ir.sizes import human

aten = torch.ops.aten


@dataclass(frozen=True)
class LeakyMask(gtrans.SitePass[gtrans.JointGraph]):
    """Replace a LeakyReLU's saved input by a mask of its positive elements."""

    name: ClassVar[str] = "leaky-mask"
    knob: ClassVar[gtrans.Knob] = gtrans.Knob.RESIDUAL

    @property
    def contract(self) -> gtrans.Contract:
        """The same gradient, bit for bit."""
        return gtrans.Exact()

    def sites(self, graph: gtrans.JointGraph) -> Iterable[fx.Node]:
        """Every backward of a LeakyReLU."""
        return graph.calls(aten.leaky_relu_backward.default)

    def refuse(self, graph: gtrans.JointGraph, site: fx.Node) -> str | None:
        """Refuses where the mask would come on top of the input instead of in its place."""
        x = site.args[1]
        if not isinstance(x, fx.Node) or not graph.is_forward(x):
            return "its input is no forward value"
        return None if graph.backward_readers(x) == [site] else "its input is saved anyway"

    def rewrite(self, graph: gtrans.JointGraph, site: fx.Node) -> None:
        """Lets the backward read the mask."""
        dy, x, slope = site.args[:3]
        assert isinstance(x, fx.Node)
        up = graph.insert_after(x, aten.gt.Scalar, x, 0)
        graph.save_for_backward(up)
        smaller = graph.insert_before(site, aten.mul.Scalar, dy, slope)
        graph.replace(site, graph.insert_before(site, aten.where.self, up, dy, smaller))


def main() -> None:
    """Explains and verifies the pass on a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.LeakyReLU(0.1), nn.Linear(256, 64))
    x = torch.randn(128, 64)
    pipeline = gtrans.Pipeline((LeakyMask(),))
    explanation = gtrans.explain(model, x, passes=pipeline)
    print(explanation)
    before, after = explanation.saved_bytes_before, explanation.saved_bytes
    print(f"\nkept for the backward: {human(before)} -> {human(after)}\n")
    print(gtrans.verify(model, x, passes=pipeline).require())


if __name__ == "__main__":
    main()
