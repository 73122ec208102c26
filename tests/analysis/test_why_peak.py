"""The table of what is alive at the peak."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import gtrans
from gtrans.errors import ModelError
from gtrans.explanation import Explanation
from gtrans.pipeline import Pipeline
from gtrans.why_peak import why_peak

Build = Callable[[str], tuple[nn.Module, tuple[Any, ...]]]


@pytest.mark.parametrize("name", ["conv", "gpt"])
def test_rows_add_up_and_name_lines_of_the_model(build: Build, name: str) -> None:
    model, inputs = build(name)
    explanation = gtrans.explain(model, *inputs, passes="plan{recompute=none}")
    why = why_peak(explanation)
    assert why.peak == explanation.peak
    assert sum(r.bytes for r in why.rows) + why.held_bytes + why.workspace_bytes == why.peak
    assert why.workspace_bytes >= 0
    assert why.half == "backward"
    (constant,) = [r for r in why.rows if r.role == "constant"]
    assert constant.bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *inputs))
    saved = [r for r in why.rows if r.role == "saved"]
    assert saved
    assert all(r.location.file.endswith("conftest.py") for r in saved)
    assert "conftest.py" in str(why)
    assert why.to_dict()["rows"][0]["bytes"] == why.rows[0].bytes


def test_equal_layers_are_one_row(build: Build) -> None:
    model, inputs = build("gpt")
    why = why_peak(gtrans.explain(model, *inputs, passes="plan{recompute=none}"))
    assert {r.count for r in why.rows if "gelu" in r.operator and r.role == "saved"} == {3}


def test_refuses_an_explanation_without_training() -> None:
    with pytest.raises(ModelError, match="no training graph was captured"):
        why_peak(Explanation(Pipeline(), []))
