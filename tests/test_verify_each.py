"""`verify(..., each=True)` names the first pass after which the step is wrong."""

import itertools

import torch
from torch import nn

import gtrans
from gtrans.passes.residual.bit_masks import BitMasks
from gtrans.passes.residual.relu_mask import ReluMask
from tests.wrong_passes import Scaled


def test_the_first_wrong_pass_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    x = torch.randn(6, 8)
    passes = gtrans.Pipeline((ReluMask(min_numel=1), Scaled(), BitMasks(min_numel=1)))
    result = gtrans.verify(model, x, passes=passes, each=True)
    assert not result.ok
    assert result.notes[-1] == "first wrong after scaled"
    assert "first wrong after scaled" in str(result)


def test_a_right_pipeline_is_compared_to_its_end() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(6, 8)
    result = gtrans.verify(model, x, each=True)
    assert result.ok
    assert not result.notes


def test_a_model_that_differs_from_itself_is_told_from_a_wrong_pass() -> None:
    numbers = itertools.count()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own
    def uncontrolled() -> torch.Tensor:
        return torch.full((), float(next(numbers)))

    class Uncontrolled(nn.Module):
        """Draws from something that no seed controls."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x * uncontrolled())
            return y

    found = gtrans.verify(Uncontrolled(), torch.randn(2, 4), passes="plan")
    assert not found.ok
    assert "the untouched model differs from itself" in str(found)

    wrong = gtrans.Pipeline((Scaled(),))
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    found = gtrans.verify(plain, torch.randn(2, 4), passes=wrong)
    assert not found.ok
    assert "differs from itself" not in str(found)
