"""What gtrans is compared with: torch's own memory budget, and checkpointing block by block.

Torch's partitioner runs on the same joint graph, and its halves are lowered by the same eager
backend, so that only the plans differ. Checkpointing is torch's own, without a compiler.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gtrans.analysis.cost import node_flops
from gtrans.ir import ops
from gtrans.ir.half import Half, Role, Runnable
from gtrans.registry import load_backend

aten = torch.ops.aten


@dataclass
class TorchBudget:
    """`torch.compile` under torch's `activation_memory_budget`, lowered by gtrans' eager backend.

    Args:
        share: the budget, between 0 and 1.
    """

    share: float
    flops: int = field(default=0, init=False)

    def compile(self, model: nn.Module) -> None:
        """Lets the model run compiled, in place."""
        model.compile(
            backend=aot_autograd(
                fw_compiler=partial(self._lower, "forward"),
                bw_compiler=partial(self._lower, "backward"),
                partition_fn=self._partition,
                decompositions={},
            )
        )

    def _partition(
        self, module: fx.GraphModule, inputs: Any, **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        with functorch_config.patch(activation_memory_budget=self.share):
            halves: tuple[fx.GraphModule, fx.GraphModule] = min_cut_rematerialization_partition(
                module, inputs, **options
            )
        return halves

    def _lower(self, role: Role, module: fx.GraphModule, inputs: Any) -> Runnable:
        self.flops += sum(map(product_flops, module.graph.nodes))
        run: Runnable = load_backend("eager").compile(Half(module, list(inputs), role))
        return run


def product_flops(node: fx.Node) -> int:
    """Floating-point operations of products, convolutions and attention; of others none."""
    return node_flops(node) if ops.is_contraction(node) else 0


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: members of its outermost lists and sequences."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 1:
            found += [m for m in child if any(True for _ in m.parameters())]
        else:
            found += blocks_of(child)
    return found


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Computes every block again in its backward, by torch.utils.checkpoint."""
    blocks = blocks_of(model)
    for block in blocks:
        forward: Callable[..., Any] = block.forward
        block.forward = partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def eager_flops(step: Callable[[], object]) -> int:
    """The same count as `product_flops`, of a step that runs without a compiler."""
    attention = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = {
        attention: lambda q, k, *_, **__: 4 * prod(q) * k[-2],
        backward: lambda _, q, k, *__, **___: 10 * prod(q) * k[-2],
    }
    counter = FlopCounterMode(display=False, custom_mapping=known)
    with counter:
        step()
    return int(counter.get_total_flops())
