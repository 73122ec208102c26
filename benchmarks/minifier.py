"""Asks torch's accuracy minifier about one planted defect; run by `benchmarks.defects`.

    python -m benchmarks.minifier pass        sigmoid becomes tanh in a joint pass
    python -m benchmarks.minifier lowering    the same in Inductor's lowering: the control

Prints by how much the loss is off, and whether the minifier noticed.
"""

import sys

import torch
import torch._dynamo.config
import torch._inductor.config
from torch._dynamo.debug_utils import AccuracyError
from torch._inductor import lowering

aten = torch.ops.aten


def main(place: str) -> None:
    """Compiles a product and a sigmoid with the defect, and compares with eager."""
    torch._dynamo.config.repro_after = "aot"
    torch._dynamo.config.repro_level = 4
    if place == "pass":
        torch._inductor.config.joint_custom_post_pass = _planted
    else:
        lowering.lowerings[aten.sigmoid.default] = lowering.lowerings[aten.tanh.default]
    torch.manual_seed(0)
    x, w = torch.randn(8, 8), torch.randn(8, 8, requires_grad=True)

    def step(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x @ w).sum()

    expected = step(x, w)
    try:
        loss = torch.compile(step)(x, w)
        loss.backward()
    except AccuracyError as error:
        print(f"noticed: {str(error).splitlines()[0]}")
        return
    print(f"noticed nothing; the loss is {float(loss):.2f} instead of {float(expected):.2f}")


def _planted(graph: torch.fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten.sigmoid.default):
        node.target = aten.tanh.default


if __name__ == "__main__":
    main(sys.argv[1])
