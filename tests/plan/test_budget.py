"""Budgets are kept, by measurement; plans are exact, monotone in the budget, or refused."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gtrans
from gtrans.analysis.measure import measured_peak
from gtrans.errors import BudgetError, OptionError
from gtrans.memory import Budget
from gtrans.pipeline import Pipeline
from gtrans.plan.planner import Plan

Build = Callable[[str], tuple[nn.Module, tuple[Any, ...]]]
GRID = (1.0, 0.8, 0.6, 0.4)


def _resident(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *inputs))


def _measured(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    def step() -> None:
        model(*inputs).backward()
        model.zero_grad(set_to_none=True)

    return measured_peak(step).bytes + _resident(model, inputs)


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt"])
def test_measured_peak_stays_under_every_accepted_budget(build: Build, name: str) -> None:
    peaks, accepted = [], 0
    for share in GRID:
        torch._dynamo.reset()
        model, inputs = build(name)
        gtrans.optimize(model, memory=share, backend="eager")
        try:
            measured = _measured(model, inputs)
        except BudgetError:
            break
        explanation = gtrans.report(model)
        accepted += 1
        peaks.append(explanation.peak)
        assert explanation.budget is not None
        assert measured <= explanation.budget
        assert explanation.peak == pytest.approx(measured, rel=0.05)
    assert accepted >= {"mlp": 3, "conv": 1, "gpt": 3}[name]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(("name", "share"), [("mlp", 0.6), ("conv", 0.9), ("gpt", 0.5)])
def test_gradients_are_the_same(build: Build, name: str, share: float) -> None:
    model, inputs = build(name)
    passes = f"relu-mask,norm-output,dropout-output,plan{{memory={share}}}"
    gtrans.verify(model, *inputs, passes=passes).require()


def test_random_draws_are_never_repeated(build: Build) -> None:
    model, inputs = build("gpt")
    explained = gtrans.explain(model, *inputs, passes="plan", memory=0.5).captured[0]
    assert explained.original is not None
    assert explained.rewritten is not None
    draws = torch.ops.aten.native_dropout.default
    assert len(explained.rewritten.calls(draws)) == len(explained.original.calls(draws)) > 0


def test_time_and_peak_are_monotone_in_the_budget(build: Build) -> None:
    model, inputs = build("gpt")
    rows = []
    for share in (1.0, 0.8, 0.65, 0.5):
        explanation = gtrans.explain(model, *inputs, memory=share)
        note = explanation.captured[0].steps[-1].stats.notes[1]
        slowdown = re.search(r"predicted time x([\d.]+)", note)
        assert slowdown is not None
        rows.append((explanation.peak, float(slowdown[1])))
    assert [p for p, _ in rows] == sorted((p for p, _ in rows), reverse=True)
    assert [s for _, s in rows] == sorted(s for _, s in rows)
    assert rows[-1][0] < rows[0][0]


def test_plans_are_deterministic(build: Build) -> None:
    model, inputs = build("gpt")
    cuts = []
    for _ in range(2):
        rewritten = gtrans.explain(model, *inputs, memory=0.6).captured[0].rewritten
        assert rewritten is not None
        cuts.append(str(rewritten.graph))
    assert cuts[0] == cuts[1]


@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_refuses_what_cannot_be_reached(build: Build, on_error: Any) -> None:
    model, inputs = build("gpt")
    gtrans.optimize(model, memory="100KiB", backend="eager", on_error=on_error)
    with pytest.raises(BudgetError) as caught:
        model(*inputs)
    text = str(caught.value)
    assert re.search(
        r"no plan keeps this step under 100\.0 KiB: the smallest peak that can be reached is "
        r"[\d.]+ KiB \(\d+ bytes, 0\.\d\d of the plain [\d.]+ KiB\), at \w+ \(conftest\.py:\d+",
        text,
    )
    assert "of parameters, buffers and inputs" in text
    way_out = re.search(r"Ask for memory='(\d+KiB)' or more", text)
    assert way_out is not None
    torch._dynamo.reset()
    explanation = gtrans.explain(model, *inputs, memory=way_out[1])
    assert explanation.budget is not None
    assert explanation.peak <= explanation.budget


def test_option_texts(build: Build) -> None:
    for text in ("plan{memory=6GiB}", "plan{memory=0.4}", "plan{memory=1000B,target=h100}"):
        assert str(Pipeline.parse(text)) == text
    assert Pipeline.parse("plan{memory=40%}") == Pipeline((Plan(memory=Budget(fraction=0.4)),))
    model, inputs = build("mlp")
    with pytest.raises(OptionError, match="cannot read the memory budget '6 gigs'"):
        gtrans.optimize(model, memory="6 gigs")
    with pytest.raises(OptionError, match="unknown device 'h10'; did you mean 'h100'"):
        Plan(target="h10")
    with pytest.raises(OptionError, match=r"given twice, by memory= and by plan\{memory=...\}"):
        gtrans.explain(model, *inputs, passes="plan{memory=0.5}", memory=0.4)


def test_explanation_prints_the_peaks(build: Build) -> None:
    model, inputs = build("gpt")
    explanation = gtrans.explain(model, *inputs, memory=0.6)
    assert re.search(
        r"peak       [\d.]+ KiB as autograd would -> [\d.]+ KiB predicted, budget [\d.]+ KiB",
        str(explanation),
    )
    flat = explanation.to_dict()
    assert flat["peak_bytes"] <= flat["budget_bytes"] < flat["plain_peak_bytes"]


def test_bytes_count_parameters_and_gradients(build: Build) -> None:
    model, inputs = build("gpt")
    explanation = gtrans.explain(model, *inputs, passes="plan{recompute=none}")
    assert explanation.plain_peak == explanation.peak
    gtrans.optimize(model, passes="plan{recompute=none}", backend="eager")
    assert explanation.peak == pytest.approx(_measured(model, inputs), rel=0.01)


class Broken(nn.Module):
    """Two graphs with a break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.second = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.first:
            x = torch.nn.functional.gelu(layer(x))
        torch._dynamo.graph_break()
        for layer in self.second:
            x = torch.nn.functional.gelu(layer(x))
        return x.square().mean()


# Dynamo looks at the gradient of what goes from one graph to the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("share", [1.0, 0.8])
def test_graph_breaks_share_one_budget(share: float) -> None:
    torch.manual_seed(0)
    model, inputs = Broken(), (torch.randn(256, 32),)
    gtrans.optimize(model, memory=share, backend="eager")
    measured = _measured(model, inputs)
    explanation = gtrans.report(model)
    assert len(explanation.training) == 2
    assert explanation.budget is not None
    assert measured <= explanation.budget


def test_no_budget_for_a_held_back_plan(build: Build) -> None:
    model, inputs = build("mlp")
    (plan,) = Pipeline.parse("plan{memory=0.5}").passes
    original = gtrans.explain(model, *inputs, passes="none").captured[0].original
    assert original is not None
    stats = plan.run(original.copy(), lambda site: False)
    assert stats.skipped == {"held back by the rewrite limit": 1}


def test_a_budget_is_kept_where_sizes_change(build: Build) -> None:
    """One plan for all batches, made for the traced one; it saves less and is exact."""
    model, (x, *rest) = build("mlp")
    batches = [x, x.repeat(2, *(1 for _ in x.shape[1:]))]
    for batch in batches:
        torch._dynamo.mark_dynamic(batch, 0)
    expected = [_gradients(model, (batch, *rest)) for batch in batches]
    gtrans.optimize(model, memory=0.7, backend="eager", on_error="raise")
    for batch, wanted in zip(batches, expected, strict=True):
        for grad, other in zip(_gradients(model, (batch, *rest)), wanted, strict=True):
            torch.testing.assert_close(grad, other)
    (record,) = gtrans.report(model).training  # the second batch has the same graph
    assert record.rewritten is not None
    assert any(isinstance(n.meta.get("val"), torch.SymInt) for n in record.rewritten.nodes)
    explanation = gtrans.report(model)
    assert explanation.budget is not None
    assert explanation.peak <= explanation.budget < explanation.plain_peak


def _gradients(model: nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(*inputs).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]
