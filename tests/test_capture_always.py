"""`verify` and `explain` never stop to capture, however often they see the same model."""

import pytest
import torch
from torch import nn

from gtrans.api import explain
from gtrans.capture import Compiler, usable_backend
from gtrans.errors import CaptureError
from gtrans.pipeline import Pipeline
from gtrans.registry import load_backend
from gtrans.verification import verify


class Small(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x))


def test_verify_compares_a_captured_step_every_time() -> None:
    limit = torch._dynamo.config.recompile_limit
    model, x = Small(), torch.randn(2, 4)

    captured = [len(verify(model, x).explanation.captured) for _ in range(limit + 1)]

    assert captured == [1] * (limit + 1)
    assert torch._dynamo.config.recompile_limit == limit


def test_explain_captures_every_time() -> None:
    limit = torch._dynamo.config.recompile_limit
    model, x = Small(), torch.randn(2, 4)

    captured = [len(explain(model, x).captured) for _ in range(limit + 2)]

    assert captured == [1] * (limit + 2)


def test_a_model_that_is_never_captured_does_not_pass() -> None:
    class Excluded(Small):
        @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    with pytest.raises(CaptureError, match="nothing of Excluded's training step was captured"):
        verify(Excluded(), torch.randn(2, 4))


def test_a_compiler_takes_a_backend_as_well_as_its_name() -> None:
    eager = load_backend("eager")

    assert usable_backend(eager) is eager
    assert Compiler(Pipeline(), eager)._lowering is eager


def test_models_whose_class_is_torchs_own_are_captured() -> None:
    for model in (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)):
        verification = verify(model, torch.randn(2, 4))

        assert verification.ok
        assert len(verification.explanation.training) == 1
        assert len(explain(model, torch.randn(2, 4)).training) == 1
