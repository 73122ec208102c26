"""Inversion beside saving and recomputation: what a budget makes of a reversible network."""

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import gtrans
from gtrans.analysis.cost import device_named
from gtrans.contract import Exact
from gtrans.core import Knob, Pass, Permission, Stats
from gtrans.errors import BudgetError
from gtrans.explanation import Explanation
from gtrans.ir.joint import JointGraph
from gtrans.passes.residual.reversible import Reversible
from gtrans.pipeline import Pipeline
from gtrans.plan.front import Front
from gtrans.plan.inversion import variants
from gtrans.plan.planner import Plan
from gtrans.rewrite.forward_streams import read_forward_streams, recovered_blocks
from gtrans.testing import Runner
from tests.passes.coupled import (
    Attention,
    Branch,
    Dropped,
    NormConv,
    Perceptron,
    Streams,
    require_same,
    run,
    step_of,
)

CPU = device_named("cpu")


@dataclass(frozen=True)
class ReadForward(Pass[JointGraph]):
    """Undoes the rebuilding of the blocks below a number."""

    name: ClassVar[str] = "read-forward"
    knob: ClassVar[Knob] = Knob.RESIDUAL
    contract: ClassVar[Exact] = Exact()

    blocks: int = 0

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        before = len(recovered_blocks(graph))
        read_forward_streams(graph, self.blocks)
        return Stats(before, before - len(recovered_blocks(graph)))


@pytest.mark.parametrize(
    ("branch", "shape", "dim"),
    [
        (Perceptron, (3, 8), -1),
        (Attention, (2, 5, 8), -1),
        (Dropped, (3, 8), -1),
        (NormConv, (2, 8, 4, 4), 1),
    ],
)
def test_any_number_of_last_blocks_may_read_the_forward(
    branch: Branch, shape: tuple[int, ...], dim: int
) -> None:
    torch.manual_seed(0)
    model, x = Streams(4, 2, branch, dim=dim), torch.randn(shape)
    plain = Runner(model, (x,), Pipeline((Plan(),)), torch.float64).step()
    for blocks in (0, 1, 3, 9):  # of four, the first of which may have nothing to rebuild
        torch.compiler.reset()
        passes = Pipeline((Reversible(), ReadForward(blocks), Plan()))
        runner = Runner(model, (x,), passes, torch.float64)
        found = runner.step()
        require_same(plain, found, tolerance=0.0 if blocks == 9 else 1e-10)
        stats = step_of(runner.captured[0], "read-forward").stats
        assert stats.rewritten == min(blocks, stats.matched)
        assert stats.matched >= 3


def coupled() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Streams(8, 8, Perceptron), torch.randn(128, 16)


def smallest(passes: str) -> int:
    """The smallest budget that is not refused, as the refusal of a smaller one says."""
    torch.compiler.reset()
    model, x = coupled()
    with pytest.raises(BudgetError) as refused:
        gtrans.explain(model, x, memory="1KiB", passes=passes)
    found = re.search(r"\((\d+) bytes", str(refused.value))
    assert found is not None
    return int(found[1])


def test_a_budget_that_only_inversion_reaches() -> None:
    recomputed, inverted = smallest("default"), smallest("reversible,default")
    assert inverted < recomputed
    model, x = coupled()
    torch.compiler.reset()
    explanation = gtrans.explain(model, x, memory=inverted, passes="reversible,default")
    assert explanation.peak <= inverted
    assert inverted_blocks(explanation) > 0


def inverted_blocks(explanation: Explanation) -> int:
    (captured,) = explanation.captured
    notes = "\n".join(captured.steps[-1].stats.notes)
    found = re.search(r"inversion: the streams of (\d+) of 15 blocks are rebuilt", notes)
    assert found is not None, notes
    return int(found[1])


def test_inversion_is_not_paid_for_where_there_is_room() -> None:
    model, x = coupled()
    explanation = gtrans.explain(model, x, memory=1.0, passes="reversible,default")
    (captured,) = explanation.captured
    assert step_of(captured).stats.rewritten == 16
    assert inverted_blocks(explanation) == 0
    assert captured.rewritten is not None
    assert not recovered_blocks(captured.rewritten)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.35])
def test_gradients_under_budgets(share: float) -> None:
    model, x = coupled()
    plain, found, _ = run(model, x, passes=f"reversible,plan{{memory={share}}}")
    require_same(plain, found)


def test_time_grows_with_what_is_inverted_and_peaks_fall() -> None:
    model, x = coupled()
    original = gtrans.explain(model, x, passes="none").captured[0].original
    assert original is not None
    joint, _ = Pipeline((Reversible(),)).run(original)
    assert isinstance(joint, JointGraph)
    fronts = [Front(v.joint, CPU).best() for v in variants(joint)]
    assert len(fronts) == 4
    fastest = [min(c.seconds for c in front) for front in fronts]
    assert fastest == sorted(fastest)
    lowest = [min(c.peak for c in front) for front in fronts]
    assert lowest[-1] == min(lowest)


def test_a_graph_without_couplings_has_one_variant() -> None:
    explanation = gtrans.explain(nn.Linear(4, 4), torch.randn(3, 4), passes="none")
    joint = explanation.captured[0].original
    assert joint is not None
    (variant,) = variants(joint)
    assert (variant.inverted, variant.blocks) == (0, 0)
    assert variant.joint is joint
