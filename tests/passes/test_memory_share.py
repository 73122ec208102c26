"""memory-share keeps norms' inputs in 16 bits, and refuses where the plan does as well."""

import copy

import pytest
import torch
from torch import nn

import gtrans
from gtrans.core import Stats
from gtrans.errors import OptionError
from gtrans.explanation import Explanation
from gtrans.passes.residual.memory_share import MemoryShare


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = norm, nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: torch.Tensor = self.inner(self.norm(x))
        return x + y.float()


def model_of(kind: str) -> nn.Module:
    made: list[nn.Module] = []
    for _ in range(3):
        norm = nn.LayerNorm(16) if kind == "layer" else nn.LayerNorm(16, elementwise_affine=False)
        made.append(Block(norm))
    return nn.Sequential(*made)


def explained(model: nn.Module, passes: str) -> Explanation:
    torch._dynamo.reset()
    return gtrans.explain(model, torch.randn(4, 8, 16), passes=passes)


def stats_of(explanation: Explanation) -> Stats:
    (stats,) = [step.stats for _, step in explanation.steps() if step.name == "memory-share"]
    return stats


@pytest.mark.parametrize("kind", ["layer", "without parameters"])
def test_half_of_the_bytes_of_norms_under_autocast(kind: str) -> None:
    torch.manual_seed(0)
    model, x = model_of(kind), torch.randn(4, 8, 16)
    found = explained(model, "memory-share{min_numel=1},default")
    plain = explained(model, "default")
    assert stats_of(found).rewritten >= 2
    assert found.saved_bytes < plain.saved_bytes
    twin = copy.deepcopy(model)
    gtrans.optimize(
        model, passes="memory-share{min_numel=1},default", backend="eager", on_error="raise"
    )
    outputs = [m(x) for m in (model, twin)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert float((a.grad - b.grad).norm()) <= 0.05 * float(b.grad.norm())


def test_refused_in_one_dtype() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    assert dict(stats_of(explained(model, "memory-share{min_numel=1},default")).skipped) == {
        "its output is read in the dtype of its input: the plan keeps one of the two and computes "
        "the other, which is as many bytes, and exact": 1
    }
    (reason,) = stats_of(explained(model, "memory-share,default")).skipped
    assert reason == "fewer elements than min_numel"


def test_options() -> None:
    with pytest.raises(OptionError, match="memory-share: min_numel must be at least 1, got 0"):
        MemoryShare(min_numel=0)
