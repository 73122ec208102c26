"""The plan, as a pass."""

import pytest
import torch
import torch.nn.functional as F

import gtrans.testing as kit
from gtrans.core import HELD_BACK
from gtrans.errors import OptionError, PlanError
from gtrans.ir.joint import JointGraph, Placement, tag
from gtrans.pipeline import Gate, Pipeline
from gtrans.plan.planner import Plan
from gtrans.plan.realise import realise
from tests.ir.graphs import joint_with

aten = torch.ops.aten


def test_cheap_operators_run_again_right_before_their_first_reader() -> None:
    joint, (step,) = Pipeline((Plan(),)).run(joint_with(F.gelu))
    assert step.stats.rewritten == 1
    again = [n for n in joint.nodes if n.target is aten.gelu.default and n.meta["gtrans"].made_by]
    (gelu,) = again
    assert tag(gelu).placement is Placement.REBUILT
    assert gelu.next in gelu.users


def test_without_recomputation_everything_that_is_read_is_kept() -> None:
    joint, (step,) = Pipeline((Plan(recompute="none"),)).run(joint_with(F.gelu))
    assert step.stats.rewritten == 0
    assert isinstance(joint, JointGraph)
    assert aten.gelu.default in {n.target for n in joint.cut or ()}


def test_products_are_never_run_again() -> None:
    model, inputs = kit.ModelSpec(layers=("linear", "gelu", "linear", "gelu")).build()
    runner = kit.Runner(model, inputs, Pipeline.parse("plan"))
    runner.step()
    (captured,) = runner.captured
    assert captured.original is not None
    assert captured.rewritten is not None
    products = (aten.mm.default, aten.addmm.default)
    assert len(captured.rewritten.calls(*products)) == len(captured.original.calls(*products))


def test_a_price_nobody_would_pay_keeps_what_autograd_keeps() -> None:
    _, (step,) = Pipeline((Plan(price=1e6),)).run(joint_with(F.gelu))
    assert step.stats.rewritten == 0


def test_a_plan_that_is_held_back_keeps_what_autograd_keeps() -> None:
    _, (step,) = Pipeline((Plan(),)).run(joint_with(F.gelu), gate=Gate(()))
    assert step.stats.rewritten == 0
    assert step.stats.skipped[HELD_BACK] == 1


def test_an_offer_is_taken_where_it_is_cheaper() -> None:
    joint = joint_with(lambda x: torch.tanh(x) * torch.sin(x))
    (y,) = joint.calls(aten.tanh.default)
    (sin,) = [n for n in joint.calls(aten.sin.default) if joint.is_forward(n)]
    x = sin.args[0]
    joint.offer(y, torch.tanh, x, passes_over_memory=0.1)
    planned, _ = Pipeline((Plan(),)).run(joint)
    assert y.name not in {n.name for n in getattr(planned, "cut", ())}


def test_a_cut_that_does_not_separate_is_refused() -> None:
    joint = joint_with(F.gelu)
    with pytest.raises(PlanError, match="cannot be computed again, and the plan does not keep it"):
        realise(joint, ())


def test_the_price_must_be_positive() -> None:
    with pytest.raises(OptionError, match="plan: price must be positive, got 0"):
        Plan(price=0)
