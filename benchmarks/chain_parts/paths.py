"""How many products of the backward stand in a row, before and after Highway-BP.

The prediction: a segment of n blocks, each at most c products deep, is passed in k + 1 blocks
instead of n, one more measures the damping, and what is not in a segment stays as it is.
"""

from typing import Any

import torch
from torch import fx, nn

import gtrans
from benchmarks.table import Table
from benchmarks.zoo import huggingface
from gtrans.analysis.chains import Chain, find_chains
from gtrans.analysis.critical_path import backward_critical_path
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.pipeline import Pipeline

_SWEEPS = (0, 1, 3, 5)


def critical_paths(quick: bool, device: str) -> tuple[bool, str]:
    """Prints the table; whether all are as short as predicted, and the figure."""
    print("longest row of products in the backward; (): as many as are predicted at most")
    table = Table(
        ["model", "blocks", "chains", "before", *(f"k={k}" for k in _SWEEPS)],
        [10, 8, 12, 8, *[12] * len(_SWEEPS)],
    )
    layers, blocks = (8, 18) if quick else (24, 54)
    gpt, batch = huggingface("gpt2", n_layer=layers, n_embd=16, n_head=2, vocab_size=50)
    cases: list[tuple[str, int, nn.Module, dict[str, Any]]] = [
        ("GPT", layers, gpt, batch),
        ("ResNet", blocks, PreActivation(blocks), {"x": torch.randn(2, 3, 8, 8)}),
    ]
    ok, found = True, []
    for name, depth, model, inputs in cases:
        graphs = _backwards(model, inputs)
        by_sweeps = {sweeps: _Case(graphs, sweeps) for sweeps in _SWEEPS}
        cells = [f"{case.after} ({case.predicted})" for case in by_sweeps.values()]
        ok &= all(case.after <= case.predicted for case in by_sweeps.values())
        first, shown = by_sweeps[0], by_sweeps[3]
        table.row(name, depth, "+".join(map(str, first.depths)), first.before, *cells)
        ok &= shown.after < shown.before
        found.append(f"{name} of {depth} {shown.before} to {shown.after} with 3 sweeps")
    return ok, "products in a row: " + ", ".join(found)


def _backwards(model: nn.Module, inputs: dict[str, Any]) -> list[JointGraph]:
    """The training graphs of a model as autograd leaves them."""
    captured = gtrans.explain(model, passes="none", **inputs).captured
    return [c.original for c in captured if c.original is not None]


class _Case:
    """A model's backward with some sweeps: what is in a row, and what was predicted."""

    def __init__(self, graphs: list[JointGraph], sweeps: int) -> None:
        passes = Pipeline.parse(f"highway-bp{{iterations={sweeps}}}")
        self.before = self.after = self.predicted = 0
        self.depths: list[int] = []
        for graph in graphs:
            chains = [c for c in find_chains(graph) if c.depth > max(3, sweeps)]
            rewritten, _ = passes.run(graph)
            assert isinstance(rewritten, JointGraph)
            self.before += len(backward_critical_path(graph))
            self.after += len(backward_critical_path(rewritten))
            self.predicted += _predicted(graph, chains, sweeps)
            self.depths += [c.depth for c in sorted(chains, key=lambda c: c.head)]


def _predicted(joint: JointGraph, chains: list[Chain], sweeps: int) -> int:
    """What is in a row if a segment counts as `sweeps` + 2 of its deepest blocks."""
    inside: set[fx.Node] = set()
    total = 0
    for chain in chains:
        inside |= chain.moving()
        total += (sweeps + 2) * max(_depth(chain, link.addend) for link in chain.links)

    def outside(node: fx.Node) -> bool:
        return node not in inside and ops.is_contraction(node)

    return total + len(backward_critical_path(joint, outside))


def _depth(chain: Chain, addend: fx.Node) -> int:
    """Products in a row from the points that a cone reads to its end."""
    points, moving = set(chain.points), chain.moving()
    depth: dict[fx.Node, int] = {}
    stack = [addend]
    while stack:
        node = stack[-1]
        sources = [n for n in node.all_input_nodes if n in moving and n not in points]
        missing = [n for n in sources if n not in depth]
        if missing:
            stack += missing
            continue
        stack.pop()
        depth[node] = max((depth[n] for n in sources), default=0) + int(ops.is_contraction(node))
    return depth[addend]


class PreActivation(nn.Module):
    """A ResNet with the activation before each convolution; three stages, as for CIFAR-10."""

    def __init__(self, blocks: int, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList()
        for stage in range(3):
            before = width * max(1, 2 ** (stage - 1)) if stage else width
            for i in range(blocks // 3):
                wide = width * 2**stage
                self.blocks.append(_Block(before if i == 0 else wide, wide))
        self.last = nn.Linear(width * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 3, height, width]. Returns: [batch, 10]."""
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.last(x.mean((2, 3)))
        return out


class _Block(nn.Module):
    def __init__(self, before: int, wide: int) -> None:
        super().__init__()
        stride = 1 if before == wide else 2
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(wide)
        self.conv1 = nn.Conv2d(before, wide, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(before, wide, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        out: torch.Tensor = self.short(x) + self.conv2(torch.relu(self.norm2(y)))
        return out
