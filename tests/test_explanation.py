"""What an explanation says about what is kept, and about what was not done."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gtrans
from gtrans.core import HELD_BACK, Refusal, Stats
from gtrans.explanation import unfolded
from gtrans.ir.source import Location, common_path
from gtrans.pipeline import Gate, Pipeline, Step
from gtrans.seeing.missed import NO_SITE, missed_rows
from tests.ir.graphs import joint_with

Build = Callable[[str], tuple[nn.Module, tuple[Any, ...]]]


def test_each_kept_value_has_bytes_dtype_reason_and_line(build: Build) -> None:
    model, inputs = build("gpt")
    explanation = gtrans.explain(model, *inputs)
    assert sum(r.bytes for r in explanation.saved if not r.in_memory_anyway) == (
        explanation.saved_bytes
    )
    for row in explanation.saved:
        value = row.example
        assert value.why
        assert value.dtype in ("float32", "int64", "bool", "uint8")
        assert value.readers
        if value.kind == "activation":
            assert value.location.line > 0


@pytest.mark.parametrize(
    ("passes", "operator", "why"),
    [
        ("plan", "aten.addmm", "a product; run again under a memory budget only"),
        ("plan", "aten.bernoulli", "drawn at random, and never drawn again"),
        ("plan", "aten.add.Tensor", "no larger than what it would be computed from"),
        ("plan{recompute=none}", "aten.gelu", "autograd keeps it; the plan computes nothing again"),
        ("plan{memory=1.0}", "aten.add.Tensor", "the fastest plan under the budget keeps it"),
    ],
)
def test_why_a_value_is_kept(build: Build, passes: str, operator: str, why: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.down(F.gelu(self.up(x))) + x
            noise = torch.bernoulli(torch.full_like(x, 0.5))
            return F.softmax(self.up(x), dim=1).pow(2).mean() + (x * noise).sin().mean()

    explanation = gtrans.explain(Net(), torch.randn(64, 8), passes=passes)
    reasons = {v.operator: v.why for v in explanation.values}
    assert {r for o, r in reasons.items() if o.startswith(operator)} == {why}


def test_equal_layers_are_folded_to_a_pattern_of_modules(build: Build) -> None:
    model, inputs = build("gpt")
    explanation = gtrans.explain(model, *inputs, passes="plan{recompute=none}")
    gelu = next(r for r in explanation.saved if r.example.operator == "aten.gelu.default")
    assert (gelu.count, gelu.modules) == (3, "blocks.*")
    single = unfolded(explanation.values)
    assert len(single) == len(explanation.values)
    assert {r.modules for r in single if r.example.operator == "aten.gelu.default"} == {
        "blocks.0",
        "blocks.1",
        "blocks.2",
    }
    assert [r.bytes for r in single] == sorted((r.bytes for r in single), reverse=True)


@pytest.mark.parametrize(
    ("paths", "pattern"),
    [
        ([], ""),
        (["a.b"], "a.b"),
        (["h.0.mlp", "h.1.mlp"], "h.*.mlp"),
        (["h.0.mlp", "h.0.mlp.act"], "h.0.mlp.*"),
        (["enc.0", "dec.1.x"], "*.*"),
    ],
)
def test_common_path(paths: list[str], pattern: str) -> None:
    assert common_path(paths) == pattern


def test_missed_names_the_reason_the_modules_and_the_line(build: Build) -> None:
    model, inputs = build("gpt")
    missed = gtrans.explain(model, *inputs, passes="reversible,relu-mask,plan").missed
    [plain, other] = [r for r in missed if r.text == "reversible"]
    assert "a plain residual y = x + f(x) is not a coupling" in plain.reason
    assert (plain.count, other.count) == (3, 3)
    assert plain.location.line != other.location.line
    assert plain.modules == "blocks.*"
    assert plain.location.file.endswith("conftest.py")
    assert f"conftest.py:{plain.location.line}" in str(plain)
    assert len(plain.sites) == plain.count
    [relu] = [r for r in missed if r.text == "relu-mask"]
    assert (relu.count, relu.reason) == (0, NO_SITE)
    assert str(relu) == f"relu-mask: {NO_SITE}"


def test_what_a_limit_holds_back_is_missed_too() -> None:
    _, steps = Pipeline.parse("plan").run(joint_with(F.gelu), gate=Gate(()))
    [row] = missed_rows(enumerate(steps))
    assert (row.count, row.reason) == (1, HELD_BACK)


def test_refusals_without_a_place_and_failures_are_listed() -> None:
    contract = Pipeline.parse("plan").contract
    here = Refusal("small", "relu_1", Location("/a/model.py", 3, "forward", module="h.0"))
    there = Refusal("small", "relu_2", Location("/a/model.py", 3, "forward", module="h.1"))
    stats = Stats(matched=4, refused=[here, there])
    stats.skipped.update({"small": 3, "large": 1})
    failed = Step("cut", contract, error="PassError: no")

    rows = missed_rows([(0, Step("p", contract, stats)), (1, failed)])

    assert [str(r) for r in rows] == [
        "p: 2 x small (h.*, model.py:3, in forward)",
        "p: 1 x small",
        "p: 1 x large",
        "cut: failed and was left out: PassError: no",
    ]
    assert rows[0].to_dict()["pass"] == "p"
    assert rows[0].to_dict()["sites"] == ["relu_1", "relu_2"]
