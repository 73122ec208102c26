"""Fusion for steps under a memory budget: no kernel does work before its time.

    a = silu(g) * u                            a, dg, du = fused(g, u, da)       # by default
    dW = mm(dy^T, a)            Inductor  -->  dW = mm(dy^T, a)
    dg, du = f(g, u, da)                       # a, dg and du are in memory at once

Two kernels that read the same values are fused to read them once, which brings the later one to the
place of the earlier one. If a product stands between them, it may be there to free something. So
under a budget such pairs stay apart; neighbours, producers and consumers, and reductions, whose
results are small, are fused as ever.
"""

from bisect import bisect_right
from typing import Any

from torch._inductor.choices import InductorChoices


class FrugalFusion(InductorChoices):
    """Inductor's own choices, but for pairs with a product between them."""

    def __init__(self) -> None:
        super().__init__()
        self._products: dict[Any, list[int]] = {}  # of each scheduler

    def can_fuse_horizontal(  # type: ignore[override]  # static in torch, called on the instance
        self, scheduler: Any, node1: Any, node2: Any, shared_data_score: int
    ) -> bool:
        """Whether two kernels that share inputs become one."""
        allowed: bool = super().can_fuse_horizontal(scheduler, node1, node2, shared_data_score)
        if not allowed or node1.is_reduction() or node2.is_reduction():
            return allowed
        first, second = sorted((node1, node2), key=lambda n: n.min_order)
        if scheduler not in self._products:  # never fused, so they stay what and where they are
            products = sorted(n.min_order for n in scheduler.nodes if n.is_extern())
            self._products[scheduler] = products
        orders = self._products[scheduler]
        return bisect_right(orders, first.max_order) == bisect_right(orders, second.min_order)
