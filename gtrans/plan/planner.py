"""Decide which forward values to keep for the backward and which to compute again there.

Saves: what the cut frees; the report lists every value that is kept, with its bytes.
Costs: one more pass over memory per recomputed pointwise or row-wise operator. Without a budget,
    products, convolutions, attention and reductions are not run again, unless the model asks for it
    with `torch.utils.checkpoint`; under a budget, whatever is cheapest by the roofline of the
    target.
Contract: exact, bit for bit (the same kernels run on the same values); under a budget, up to the
    order of sums over rows, where regions are taken by rows (`gtrans.plan.streamed`).
Needs: nothing. Random draws, mutations and collectives are never run again.
Source: project selection by minimum cut, `gtrans.plan.cut`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from gtrans.analysis.cost import Device, device_named, device_of, total_seconds
from gtrans.analysis.schedule import schedule_of
from gtrans.contract import Contract, Exact
from gtrans.core import HELD_BACK, Knob, Pass, Permission, Stats, require
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Placement, tag
from gtrans.ir.sizes import human, tensor_bytes
from gtrans.memory import Budget
from gtrans.plan.budget import fit
from gtrans.plan.cut import backward_only, minimum_cut, read_directly
from gtrans.plan.realise import realise
from gtrans.plan.saved import saved_bytes
from gtrans.rewrite.wires import erase_taps

# What the user put into `torch.utils.checkpoint`: to be run again, products included.
_ASKED_FOR = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
_ASKED_FOR_PRICE = 1e-3

# Writes and reads of a row-wise operator, relative to a pointwise one: two passes over its row.
_ROWWISE_WEIGHT = 2.0


@dataclass(frozen=True)
class Plan(Pass[JointGraph]):
    """Choose what to save for the backward.

    Args:
        recompute: "cheap" runs pointwise and row-wise operators again where that saves memory;
            "none" keeps what autograd would keep.
        price: bytes of saved memory that pay for one byte written by a recomputed operator.
        memory: bound of the step's true peak, parameters, buffers and inputs included; the fastest
            plan under it is chosen, and the two options above do not matter. Raises BudgetError
            before the first step where none fits.
        target: device to predict times for, "auto" for the one that the tensors are on.
        reserve: bytes that are in memory besides all the time and that gtrans does not see, such as
            the optimizer's state; they count as part of the peak.
    """

    name: ClassVar[str] = "plan"
    knob: ClassVar[Knob] = Knob.RESIDUAL

    recompute: Literal["cheap", "none"] = "cheap"
    price: float = 0.05
    memory: Budget | None = None
    target: str = "auto"
    reserve: Budget | None = None

    def __post_init__(self) -> None:
        require(self.price > 0, f"plan: price must be positive, got {self.price}")
        require(
            self.reserve is None or self.reserve.bytes is not None,
            f"plan: reserve must be a number of bytes ('1GiB'), got {self.reserve}",
        )
        if self.target != "auto":
            device_named(self.target)

    @property
    def contract(self) -> Contract:
        """The same gradient, bit for bit."""
        return Exact()

    @property
    def indispensable(self) -> bool:
        """Without it nothing keeps a budget."""
        return self.memory is not None

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Fixes the cut of the graph."""
        erase_taps(graph)
        late = backward_only(graph)
        graph.offers = {v: o for v, o in graph.offers.items() if v not in late}
        plain = read_directly(graph)
        stats = Stats(matched=len(plain))
        if (self.recompute == "none" and self.memory is None) or not permitted("the cut"):
            if self.recompute != "none":
                stats.skipped[HELD_BACK] += 1
            realise(graph, plain)
            return stats
        if self.memory is not None:
            self._fit(graph, self.memory, stats)
            return stats
        cut = minimum_cut(graph, lambda node: self.cost(graph, node))
        stats.rewritten = len(set(plain) - set(cut))
        before, after = saved_bytes(graph, plain), saved_bytes(graph, cut)
        count = realise(graph, cut)
        stats.notes.append(
            f"saved for backward: {human(before)} -> {human(after)}, {count} operators run again"
        )
        return stats

    def _fit(self, graph: JointGraph, budget: Budget, stats: Stats) -> None:
        plain = read_directly(graph)
        before = saved_bytes(graph, plain)
        device = self._device(graph)
        fitted = fit(graph, budget, device)
        assert graph.cut is not None
        stats.rewritten = len(set(plain) - set(graph.cut))
        stats.notes += [
            f"peak: plain {human(fitted.plain_peak)} -> {human(fitted.peak)}, "
            f"budget {human(fitted.limit)}",
            f"plan: {fitted.candidate.label}; {fitted.count} operators run again, predicted time "
            f"x{fitted.slowdown:.2f} on {device.name}",
            f"saved for backward: {human(before)} -> {human(saved_bytes(graph, graph.cut))}",
        ]
        if fitted.blocks:
            stats.notes.append(
                f"inversion: the streams of {fitted.inverted} of {fitted.blocks} blocks are rebuilt"
            )
        if fitted.on_host:
            stats.notes.append(
                f"offload: {fitted.on_host} values ({human(fitted.host_bytes)}) wait on the host; "
                f"their copies hide behind what {device.name} computes"
            )
        if fitted.regions:
            stats.notes.append(f"{fitted.regions} wide regions are computed a few rows at a time")
            stats.contract = Exact(bitwise=False)  # sums over rows are taken chunk by chunk

    def seconds(self, graph: JointGraph) -> float:
        """Predicted seconds of a step whose plan is written into its graph."""
        return total_seconds((t.node for t in schedule_of(graph).tasks), self._device(graph))

    def _device(self, graph: JointGraph) -> Device:
        return device_of(graph) if self.target == "auto" else device_named(self.target)

    @staticmethod
    def under_budget(pipeline: tuple[Pass[Any], ...], budget: Budget) -> tuple[Pass[Any], ...]:
        """Passes with their plan put under a budget; a plan is added if there is none.

        Raises:
            OptionError: the plan has a budget already.
        """

        def change(plan: Plan) -> Plan:
            require(
                plan.memory in (None, budget),
                "the memory budget is given twice, by memory= and by plan{memory=...}; give it "
                "once",
            )
            return replace(plan, memory=budget)

        return _with_every_plan(pipeline, change)

    @staticmethod
    def beside(pipeline: tuple[Pass[Any], ...], reserve_bytes: int) -> tuple[Pass[Any], ...]:
        """Passes with so many bytes reserved by their plan; a plan is added if there is none.

        Raises:
            OptionError: the plan has something else reserved already.
        """
        reserve = Budget(bytes=reserve_bytes)

        def change(plan: Plan) -> Plan:
            require(
                plan.reserve in (None, reserve),
                "memory is reserved twice, by optimizer= and by plan{reserve=...}; give it once",
            )
            return replace(plan, reserve=reserve)

        return _with_every_plan(pipeline, change)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of `reserve`."""
        return self.reserve.bytes or 0 if self.reserve is not None else 0

    def why_kept(self, graph: JointGraph, node: fx.Node) -> str:
        """Why a value of the cut is kept rather than computed again, for reports."""
        if node.op in ("placeholder", "get_attr"):
            return "in memory anyway"
        maker = node.all_input_nodes[0] if ops.is_getitem(node) else node
        if ops.is_random(maker):
            return "drawn at random, and never drawn again"
        if ops.is_effect(maker):
            return "its operator has an effect, so it runs once"
        if tag(node).placement is Placement.SAVED:
            return "a pass asks for it"
        if self.memory is not None:
            return "the fastest plan under the budget keeps it"
        if self.recompute == "none":
            return "autograd keeps it; the plan computes nothing again"
        if self.cost(graph, maker) is None:
            kind = "a product" if ops.is_contraction(maker) else "not cheap to run"
            return f"{kind}; run again under a memory budget only"
        return "no larger than what it would be computed from"

    def cost(self, graph: JointGraph, node: fx.Node) -> float | None:
        """Price of getting a value again, in saved bytes; None where it is not cheap."""
        written = tensor_bytes(node.meta["val"])
        if node.meta.get("recompute") in _ASKED_FOR:
            return self.price * _ASKED_FOR_PRICE * written
        if (offer := graph.offers.get(node)) is not None:
            return self.price * offer.passes_over_memory * written
        if ops.is_pointwise(node) or ops.is_fill(node) or _is_copy(node):
            return self.price * written
        if node.target in ops.ROWWISE:
            return self.price * _ROWWISE_WEIGHT * written
        return None


def _with_every_plan(
    pipeline: tuple[Pass[Any], ...], change: Callable[[Plan], Plan]
) -> tuple[Pass[Any], ...]:
    """Passes with every plan among them changed, or one added."""
    if not any(isinstance(p, Plan) for p in pipeline):
        pipeline = (*pipeline, Plan())
    return tuple(change(p) if isinstance(p, Plan) else p for p in pipeline)


def _is_copy(node: fx.Node) -> bool:
    return node.target in ops.COPIES
