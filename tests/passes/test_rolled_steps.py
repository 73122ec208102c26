"""What the steps of a loop may hold for them to run as a batch, and once more in the backward."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gtrans
from tests.passes.stepping import step_of

SWEPT = "parallel-feedforward{min_steps=2,tolerance=0.0}"
PASSES = [
    SWEPT,
    "highway-recurrence{min_steps=2,iterations=9,only_where_faster=false}",
    "ode-adjoint{min_steps=2}",
]


class Blocks(nn.Module):
    """Four residual blocks of some kind, with one set of weights or with four.

    Args:
        kind: what a block does before it adds.
        tied: whether all blocks are one.
    """

    def __init__(self, kind: str, tied: bool) -> None:
        super().__init__()
        self.kind, self.tied = kind, tied
        self.linear = nn.ModuleList(nn.Linear(8, 8) for _ in range(1 if tied else 4))
        self.norm = nn.ModuleList(
            nn.RMSNorm(8) if kind == "rms norm" else nn.BatchNorm1d(8) for _ in self.linear
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(4):
            at = 0 if self.tied else i
            y = self.linear[at](x)
            if self.kind == "batch norm":
                y = self.norm[at](y)
            elif self.kind == "rms norm":
                y = self.norm[at](y.sin())
            elif self.kind == "random slopes":
                y = F.rrelu(y, 0.1, 0.9, self.training)
            else:
                q = y.reshape(-1, 4, 2, 4).transpose(1, 2)
                drop = 0.5 if self.kind == "random attention" else 0.0
                y = F.scaled_dot_product_attention(q, q, q, dropout_p=drop, is_causal=True)
                y = y.transpose(1, 2).reshape(x.shape)
            x = x + torch.tanh(y)
        return x


def _rewrites(model: nn.Module, x: torch.Tensor, passes: str) -> bool:
    """Whether a rewritten model has the outputs, gradients and buffers of the plain one."""
    torch.compiler.reset()
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    expected, gradients = step_of(plain, x)
    gtrans.optimize(model, passes=passes, backend="eager", on_error="raise")
    torch.manual_seed(1)
    out, found = step_of(model, x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    return "matched 1, rewrote 1" in str(gtrans.report(model))


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("kind", ["attention", "rms norm", "batch norm"])
def test_steps_with_a_kernel_of_their_own(kind: str, passes: str) -> None:
    torch.manual_seed(0)
    model = Blocks(kind, tied=True).double().train(kind != "batch norm")
    assert _rewrites(model, torch.randn(12, 8, dtype=torch.float64), passes)


@pytest.mark.parametrize("kind", ["attention", "rms norm", "batch norm"])
def test_blocks_with_weights_of_their_own(kind: str) -> None:
    torch.manual_seed(0)
    model = Blocks(kind, tied=False).double().train(kind != "batch norm")
    assert _rewrites(model, torch.randn(12, 8, dtype=torch.float64), SWEPT)


def test_what_is_frozen_stays_without_a_gradient() -> None:
    torch.manual_seed(0)
    model = Blocks("attention", tied=False).double()
    model.linear[1].weight.requires_grad_(False)
    model.linear[2].requires_grad_(False)
    assert _rewrites(model, torch.randn(12, 8, dtype=torch.float64), SWEPT)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("batch norm", "its step writes to what it reads (aten.native_batch_norm.default)"),
        ("random slopes", "its step draws random numbers (aten."),
        ("random attention", "its step draws random numbers (aten."),
    ],
)
def test_steps_that_may_run_once_only(kind: str, reason: str, passes: str) -> None:
    torch.manual_seed(0)
    model, x = Blocks(kind, tied=True).double(), torch.randn(12, 8, dtype=torch.float64)
    assert not _rewrites(model, x, passes)
    assert reason in str(gtrans.report(model))


def test_running_statistics_of_a_stack_are_written_once() -> None:
    torch.manual_seed(0)
    model, x = Blocks("batch norm", tied=False).double(), torch.randn(12, 8, dtype=torch.float64)
    assert not _rewrites(model, x, SWEPT)


@pytest.mark.parametrize("passes", [*PASSES, "cut-carry{min_steps=2,every=4}"])
@pytest.mark.parametrize("kind", ["attention", "rms norm"])
def test_sizes_that_change_are_captured_once(kind: str, passes: str) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Blocks(kind, tied=True).double()
    plain = copy.deepcopy(model)
    gtrans.optimize(model, passes=passes, backend="eager", on_error="raise", dynamic=True)
    for rows in (12, 8, 20):
        x = torch.randn(rows, 8, dtype=torch.float64)
        plain.zero_grad()
        model.zero_grad()
        expected, gradients = step_of(plain, x)
        out, found = step_of(model, x)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)
    assert len(gtrans.report(model).captured) == 1


def test_a_graph_that_dynamo_captures_once_more_is_counted_once() -> None:
    class Embedded(nn.Module):
        """Dynamo begins again, with constants for what it took for symbols."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gate = nn.Embedding(9, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            e = self.embed(x)
            z, h = torch.sigmoid(self.gate(e)), torch.zeros_like(e[:, 0])
            for t in range(x.shape[1]):
                h = (1 - z[:, t]) * h + z[:, t] * e[:, t]
            return h

    torch.compiler.reset()
    model = gtrans.optimize(Embedded(), backend="eager", dynamic=True)
    model(torch.randint(9, (4, 5))).sum().backward()
    assert len(gtrans.report(model).captured) == 1
