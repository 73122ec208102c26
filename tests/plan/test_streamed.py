"""Regions taken by rows: the same gradients, and never all rows in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gtrans
import gtrans.testing as kit
from gtrans.analysis.cost import DEVICES
from gtrans.analysis.liveness import simulate
from gtrans.analysis.measure import measured_peak
from gtrans.analysis.row_regions import region_around
from gtrans.analysis.schedule import schedule_of
from gtrans.contract import Contract, Exact
from gtrans.core import Knob, Pass, Permission, Stats
from gtrans.errors import BudgetError
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Side, runs_in
from gtrans.pipeline import Pipeline
from gtrans.plan.front import Front
from gtrans.plan.planner import Plan
from gtrans.plan.rebuild import Candidate
from gtrans.plan.rewritten import Way
from gtrans.plan.streamed import Streamed, streamed_plans, streaming, worth_streaming
from gtrans.rewrite.by_rows import compute_by_rows
from tests.ir.graphs import joint_of

ROWS, WIDTH, HIDDEN = 24, 4, 32


class FeedForward(nn.Module):
    """Blocks whose hidden values are much wider than what is between them."""

    def __init__(
        self, kind: str = "gelu", width: int = WIDTH, hidden: int = HIDDEN, depth: int = 2
    ) -> None:
        super().__init__()
        self.kind = kind
        packed = 2 if kind == "packed" else 1
        self.up = nn.ModuleList(nn.Linear(width, packed * hidden) for _ in range(depth))
        self.gate = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, gate, down in zip(self.up, self.gate, self.down, strict=True):
            h = up(x)
            if self.kind == "gated":
                h = F.silu(gate(x)) * h
            elif self.kind == "packed":
                a, b = h.chunk(2, -1)
                h = F.silu(a) * b
            elif self.kind == "dropout":
                h = F.dropout(F.gelu(h), 0.5)
            elif self.kind == "softmax":
                h = torch.softmax(h, -1)
            else:
                h = F.gelu(h)
            x = x + down(h)
        return x.square().mean()


@dataclass(frozen=True)
class AllByRows(Pass[JointGraph]):
    """Takes by rows whatever can be, after a plan."""

    name: ClassVar[str] = "all-by-rows"
    knob: ClassVar[Knob] = Knob.SCHEDULE
    contract: ClassVar[Contract] = Exact(bitwise=False)
    chunks: int = 5

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        stats, gone = Stats(), set[str]()
        for node in graph.nodes:
            if node.name in gone or not wide(node):
                continue
            region = region_around(graph, node)
            if region is not None:
                stats.matched += 1
                stats.rewritten += 1
                gone |= {n.name for n in region.nodes}
                compute_by_rows(graph, region, self.chunks)
        return stats


def wide(node: torch.fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.numel() >= ROWS * HIDDEN


def inputs() -> torch.Tensor:
    return torch.randn(3, ROWS // 3, WIDTH)


KINDS = ("gelu", "gated", "packed", "softmax")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_the_same_and_no_value_has_all_rows(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = FeedForward(kind).to(dtype), inputs().to(dtype)
    expected = kit.Runner(model, (x,)).step()
    runner = kit.Runner(model, (x,), Pipeline((Plan(), AllByRows())))
    found = runner.step()
    # Forward and backward of each block; a last chunk of 4 rows behind four of 5.
    assert runner.captured[0].steps[-1].stats.rewritten >= 4
    bound = 1e-12 if dtype is torch.float64 else 4e-2
    for name, value in {**expected.outputs, **expected.gradients}.items():
        other = {**found.outputs, **found.gradients}[name]
        torch.testing.assert_close(other, value, rtol=bound, atol=bound, msg=name)
    graph = runner.captured[0].rewritten
    assert graph is not None
    assert graph.cut is not None
    saved = set(graph.cut)
    late = [n for n in graph.nodes if wide(n) and runs_in(n) is Side.BACKWARD]
    assert [n for n in late if n not in saved and not ops.is_view(n)] == []


class Head(nn.Module):
    """A product with many outputs, and a loss of class numbers."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, HIDDEN)
        self.reduction = reduction

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        labels = torch.arange(ROWS) % HIDDEN
        z = self.head(torch.tanh(x)).view(-1, HIDDEN)
        return F.cross_entropy(z, labels, ignore_index=3, reduction=self.reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_are_taken_by_rows_in_the_backward(reduction: str) -> None:
    torch.manual_seed(0)
    model, x = Head(reduction).double(), inputs().double()
    joint = joint_of(model, x)
    lowest = Front(joint, DEVICES["cpu"]).best()[-1]
    least = min(s.peak for s in streamed_plans(joint, lowest, DEVICES["cpu"]))
    expected = torch.autograd.grad(model(x), list(model.parameters()))
    gtrans.optimize(model, memory=least, backend="eager", on_error="raise")
    found = torch.autograd.grad(model(x), list(model.parameters()))
    torch.testing.assert_close(found, expected)
    (graph,) = [c.rewritten for c in gtrans.report(model).captured]
    assert graph is not None
    assert [n for n in graph.nodes if wide(n) and runs_in(n) is Side.BACKWARD] == []


def test_what_draws_random_numbers_is_left_whole() -> None:
    torch.manual_seed(0)
    graph, _ = Pipeline((Plan(),)).run(joint_of(FeedForward("dropout", depth=1), inputs()))
    assert isinstance(graph, JointGraph)
    (draw,) = graph.calls(torch.ops.aten.native_dropout.default)
    assert region_around(graph, draw.all_input_nodes[0]) is None


def test_a_value_that_leaves_its_region_is_no_region() -> None:
    class Leaky(FeedForward):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = F.gelu(self.up[0](x))
            return self.down[0](h).sum() + h.mean(1).sum()

    graph, _ = Pipeline((Plan(),)).run(joint_of(Leaky(), inputs()))
    assert isinstance(graph, JointGraph)
    gelus = graph.calls(torch.ops.aten.gelu.default)
    assert all(region_around(graph, n) is None for n in gelus if runs_in(n) is Side.FORWARD)


def front_of(kind: str) -> tuple[JointGraph, Front]:
    torch.manual_seed(0)
    joint = joint_of(FeedForward(kind, depth=3, hidden=64), inputs())
    return joint, Front(joint, DEVICES["cpu"])


def test_streamed_plans_have_a_lower_peak_at_nearly_the_time() -> None:
    joint, front = front_of("gated")
    best = front.best()
    lowest = best[-1].peak
    for candidate in best:
        before = candidate.peak
        for plan in streamed_plans(joint, candidate, DEVICES["cpu"]):
            assert plan.peak < before
            assert plan.seconds >= candidate.seconds
            assert simulate(schedule_of(plan.written_copy(joint))).peak == plan.peak
            before = plan.peak
        lowest = min(lowest, before)
    assert lowest < 0.95 * best[-1].peak


def test_a_faster_plan_is_taken_only_if_it_fits() -> None:
    _, front = front_of("gelu")
    way, best = streaming(front), front.best()
    assert way.fastest(best[0].peak, best[0].seconds) is None
    assert way.fastest(1, float("inf")) is None
    rooms = [int(share * best[-1].peak) for share in (1.2, 1.0, 0.95)]
    found = [way.fastest(room, float("inf")) for room in rooms]
    plans = [f for f in found if f is not None]
    assert len(plans) == len(rooms)
    assert all(f.peak <= room for f, room in zip(plans, rooms, strict=True))
    assert [f.seconds for f in plans] == sorted(f.seconds for f in plans)


def test_no_plan_is_rewritten_twice_nor_where_that_cannot_help() -> None:
    joint, front = front_of("gelu")
    tried = worth_streaming(front)
    rewritten: list[Candidate] = []

    def plans(candidate: Candidate) -> Iterator[Streamed]:
        rewritten.append(candidate)
        yield from streamed_plans(joint, candidate, DEVICES["cpu"])

    way = Way(front, tried, ("temporary", "recomputed"), plans)
    peaks = {id(c): [s.peak for s in streamed_plans(joint, c, DEVICES["cpu"])] for c in tried}
    assert all(way.floor(c) <= min(peaks[id(c)], default=c.peak) for c in tried)
    least = min(min(p, default=2**60) for p in peaks.values())
    assert way.lowest(min(way.floor(c) for c in tried)) is None
    assert rewritten == []
    assert way.fastest(least - 1, float("inf")) is None
    lowest = way.lowest(2**60)
    assert lowest is not None
    assert lowest.peak == least
    assert way.lowest(least) is None
    assert len(rewritten) == len({id(c) for c in rewritten})


def test_a_budget_that_nothing_but_streaming_keeps_is_kept() -> None:
    torch.manual_seed(0)
    model, x = FeedForward("gated", width=16, hidden=256, depth=3), torch.randn(4, 64, 16)
    joint = joint_of(model, x)
    front = Front(joint, DEVICES["cpu"])
    lowest, tried = front.best()[-1], worth_streaming(front)
    least = min(s.peak for c in tried for s in streamed_plans(joint, c, DEVICES["cpu"]))
    with pytest.raises(BudgetError, match=f"smallest peak that can be reached is .*{least} bytes"):
        gtrans.explain(model, x, memory="1KiB")
    budget = (least + lowest.peak) // 2
    gtrans.optimize(model, memory=budget, backend="eager", on_error="raise")

    def step() -> None:
        model(x).backward()
        model.zero_grad(set_to_none=True)

    peak = measured_peak(step).bytes + x.nbytes + sum(p.nbytes for p in model.parameters())
    assert peak <= budget < lowest.peak
    assert "wide regions are computed a few rows at a time" in str(gtrans.report(model))


def test_a_plan_by_rows_need_not_be_one_of_the_leanest() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(32, 128), nn.Linear(128, 32), nn.LayerNorm(32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                h = self.up(x)
                h = 0.5 * h * (1 + torch.tanh(h + 0.04 * h**3))
                x = self.norm(x + self.down(h))
            return x.square().mean()

    by_rows = 0
    for share in (0.5, 0.45, 0.4, 0.35):
        try:
            passes = f"plan{{memory={share},target=h100}}"
            explanation = gtrans.explain(Tied(), torch.randn(256, 32), passes=passes)
        except BudgetError:
            continue
        assert explanation.budget is not None
        assert explanation.peak <= explanation.budget
        by_rows += "wide regions are computed a few rows at a time" in str(explanation)
    assert by_rows
