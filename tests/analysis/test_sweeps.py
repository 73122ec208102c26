"""The a-priori bound on sweeps, and norms measured on a real step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gtrans.analysis.sweeps import left_out, sweeps_for
from gtrans.runtime.solve import solve_backward
from gtrans.sweep_plan import plan_sweeps


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 6), st.floats(0.01, 1.5), st.integers(0, 11))
def test_the_bound_holds(depth: int, width: int, norm: float, sweeps: int) -> None:
    torch.manual_seed(depth * 7 + width)
    blocks = torch.randn(depth, width, width, dtype=torch.float64)
    rho = norm * torch.rand(depth, dtype=torch.float64)
    blocks *= (rho / torch.linalg.matrix_norm(blocks, 2)).view(-1, 1, 1)
    drive = torch.zeros(depth, width, dtype=torch.float64)
    drive[-1] = torch.randn(width, dtype=torch.float64)

    def pull(w: torch.Tensor, part: slice) -> torch.Tensor:
        return (blocks[part] @ w.unsqueeze(-1)).squeeze(-1)

    exact = solve_backward(pull, drive, keep=1.0).states[0]
    found = solve_backward(pull, drive, keep=1.0, sweeps=sweeps).states[0]
    bound = left_out(rho[1:].tolist(), sweeps) * float(drive.norm())
    assert float((found - exact).norm()) <= bound * (1 + 1e-9) + 1e-12


def test_sweeps_grow_with_the_sum_of_norms_not_with_the_depth() -> None:
    assert left_out([0.5] * 4, 4) == 0.0
    assert left_out([2.0, 3.0], 0) == pytest.approx(2 + 3 + 6)
    few = [sweeps_for([1.0 / depth] * depth, 1e-3) for depth in (8, 32, 128)]
    assert max(few) - min(few) <= 1
    assert sweeps_for([0.5] * 24, 0.1) > sweeps_for([0.1] * 24, 0.1)
    assert sweeps_for([], 0.1) == 0


class Blocks(nn.Module):
    """Residual blocks with one product of known norm each."""

    def __init__(self, norm: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(9))
        for block in self.blocks:
            weight = torch.linalg.qr(torch.randn(6, 6))[0]
            block.get_parameter("weight").data.copy_(norm * weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.sum()


def test_norms_of_a_model_are_measured() -> None:
    torch.manual_seed(0)
    (plan,) = plan_sweeps(Blocks(0.1), torch.randn(4, 6), error=0.05)
    assert plan.depth == 8
    assert all(math.isclose(n, 0.1, rel_tol=1e-4) for n in plan.norms)
    assert plan.iterations == sweeps_for([0.1] * 8, 0.05) < 8
    assert "8 blocks, sum of norms 0.80" in str(plan)
    (steep,) = plan_sweeps(Blocks(2.0), torch.randn(4, 6), error=0.05)
    assert "the plain backward is no deeper" in str(steep)
