"""late-recompute: a permutation of the backward that keeps values for a shorter time."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gtrans
import gtrans.testing as kit
from gtrans.analysis.measure import measured_peak
from gtrans.capture import Compiler
from gtrans.core import HELD_BACK
from gtrans.errors import GraphError, OptionError
from gtrans.ir.joint import JointGraph
from gtrans.ir.printer import node_to_code
from gtrans.passes.schedule.late_recompute import KEEPS_MORE, LateRecompute
from gtrans.pipeline import Gate, Pipeline
from gtrans.plan.planner import Plan
from tests.ir.graphs import joint_of

Loss = Callable[[torch.Tensor], torch.Tensor]


class Middle(nn.Module):
    """Several layers, and a loss of a value in the middle, taken at the end of the forward."""

    def __init__(self, loss: Loss, width: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.loss = loss
        self.below = nn.Linear(width, width, bias=False)
        self.above = nn.Sequential(
            *[m for _ in range(depth) for m in (nn.Linear(width, width, bias=False), nn.Tanh())]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.sin(self.below(x))
        y = self.above(h)
        loss: torch.Tensor = y.square().mean() + self.loss(h).mean()
        return loss


def order(graph: JointGraph) -> list[str]:
    return [n.name for n in graph.nodes]


def planned(plan: Plan, loss: Loss, width: int = 16) -> JointGraph:
    """A planned graph whose tensors are larger than what is too small to count."""
    graph, _ = Pipeline((plan,)).run(joint_of(Middle(loss, width), torch.randn(16, width)))
    assert isinstance(graph, JointGraph)
    return graph


KEEP = Plan(recompute="none")


AGAIN = Plan()


def test_recomputation_for_a_loss_in_the_middle_waits_for_its_reader() -> None:
    before = planned(AGAIN, torch.square)
    after, (step,) = Pipeline((LateRecompute(),)).run(before)
    assert isinstance(after, JointGraph)
    names = order(after)
    lines = [node_to_code(n).partition("  #")[0] for n in after.nodes]
    start = names.index("mm_6")
    assert lines[start + 1 : start + 7] == [
        "pow_tensor_scalar = aten.pow.Tensor_Scalar(sin_default, 1.0)",
        "mul_scalar = aten.mul.Scalar(pow_tensor_scalar, 2.0)",
        "expand = aten.expand.default(tangents_1, [16, 16])",
        "div = aten.div.Scalar(expand, 256)",
        "mul_1 = aten.mul.Tensor(div, mul_scalar)",
        "add_1 = aten.add.Tensor(mul_1, mm_6)",
    ]
    assert order(before).index("mul_1") < order(before).index("mm_3")
    assert (step.stats.matched, step.stats.rewritten) == (6, 6)
    assert step.op_changes == {}
    assert sorted(names) == sorted(order(before))
    assert after.cut is not None
    assert before.cut is not None
    assert [n.name for n in after.cut] == [n.name for n in before.cut]


def test_what_would_keep_its_inputs_alive_instead_stays() -> None:
    before = planned(KEEP, torch.square)  # mul_1 = mul(div, mul): mul is saved, and as large
    after, (step,) = Pipeline((LateRecompute(),)).run(before)
    assert step.stats.skipped[KEEPS_MORE] == 2
    names = [n.name for n in after.nodes]
    assert names.index("mul_1") < names.index("mm_3")


def test_held_back_nodes_stay() -> None:
    before = planned(AGAIN, torch.square)
    after, (step,) = Pipeline((LateRecompute(),)).run(before, gate=Gate(()))
    assert [n.name for n in after.nodes] == order(before)
    assert step.stats.rewritten == 0
    assert step.stats.skipped[HELD_BACK] >= 1


def test_random_draws_and_tuples_stay() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.nn.functional.dropout(self.first(x), 0.5).sum()
            return y

    graph = joint_of(Noisy(), torch.randn(16, 16))
    draws = [n for n in graph.nodes if "native_dropout" in n.name]
    after, _ = Pipeline((LateRecompute(),)).run(graph)
    places = [n.name for n in after.nodes]
    assert all(places.index(n.name) == order(graph).index(n.name) for n in draws)


def test_the_peak_falls_by_what_waits() -> None:
    torch.manual_seed(0)
    width, count = 8, 4096
    x = torch.randn(count, width)
    peaks = []
    for passes in ("plan", "plan,late-recompute"):
        model = Middle(torch.square, width, depth=3)
        gtrans.optimize(model, passes=passes, backend="eager", on_error="raise")

        def step(model: nn.Module = model) -> None:
            model(x).backward()
            model.zero_grad(set_to_none=True)

        peaks.append(measured_peak(step).bytes)
    assert peaks[1] <= peaks[0] - 4 * count * width


@pytest.mark.parametrize("passes", ["plan,late-recompute", "late-recompute"])
def test_laws(passes: str) -> None:
    model = Middle(torch.square)
    assert kit.check_pass(passes, model, (torch.randn(3, 4),)) >= 1


def test_a_plan_is_made_before_the_order_is_chosen() -> None:
    compiler = Compiler(Pipeline.parse("relu-mask,late-recompute"), "eager")
    assert str(compiler.pipeline) == "relu-mask,plan,late-recompute"


def test_a_node_cannot_pass_what_it_needs_or_its_readers() -> None:
    graph = planned(KEEP, torch.square)
    (add,) = [n for n in graph.nodes if n.name == "add_1"]
    first = min(add.all_input_nodes)
    with pytest.raises(GraphError, match=f"cannot move {first.name} .* before .*: it needs or is"):
        graph.move_before(first, max(add.users))
    with pytest.raises(GraphError, match="cannot move add_1"):
        graph.move_before(add, first)


def test_it_has_no_options() -> None:
    with pytest.raises(OptionError, match="pass 'late-recompute' has no option 'min_numel'"):
        Pipeline.parse("late-recompute{min_numel=1}")
