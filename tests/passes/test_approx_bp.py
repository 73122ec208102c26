"""approx-bp has the paper's constants, and is refused where it would not save anything."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import gtrans
from gtrans.analysis.derivative_tables import (
    Samples,
    given_table,
    nearest_table,
    sample,
    stochastic_table,
)
from gtrans.contract import Close
from gtrans.core import Stats
from gtrans.errors import OptionError
from gtrans.explanation import Explanation
from gtrans.passes.residual.approx_bp import HINGES, ApproxBP
from gtrans.testing import check_pass


class Feedforward(nn.Module):
    def __init__(self, act: object) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.down.requires_grad_(False)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.act(self.up(x)))  # type: ignore[operator]
        return y


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


def samples_of(act: object) -> Samples:
    def derivative(x: torch.Tensor) -> torch.Tensor:
        at = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(act(at).sum(), at)  # type: ignore[operator]
        return found

    return sample(derivative)


def explained(model: nn.Module) -> Explanation:
    return gtrans.explain(model, torch.randn(4, 8), passes="approx-bp{min_numel=1},default")


def stats_of(explanation: Explanation) -> Stats:
    (stats,) = [step.stats for _, step in explanation.steps() if step.name == "approx-bp"]
    return stats


@pytest.mark.parametrize("constants", ["published", "symmetric"])
@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_the_hinges_meet_both_ends(constants: str, name: str) -> None:
    hinges = HINGES[constants][name]
    slack = 1e-14 if constants == "published" else 1e-5
    assert sum(hinges.slopes) == pytest.approx(1, abs=slack)
    moment = sum(a * c for a, c in zip(hinges.slopes, hinges.corners, strict=True))
    assert moment == pytest.approx(0, abs=slack)


def test_its_error_is_the_known_one_and_few_bit_does_better() -> None:
    for act, name, known in ((functional.gelu, "gelu", 0.0580), (functional.silu, "silu", 0.0842)):
        samples = samples_of(act)
        hinges = HINGES["published"][name]
        found = given_table(samples, hinges.corners, hinges.levels)
        assert found.mean_square == pytest.approx(known, abs=5e-5)
        assert 2 * found.largest <= ApproxBP().contract.rtol  # type: ignore[attr-defined]
        assert nearest_table(samples, 2, "normal").mean_square < found.mean_square / 7
        assert stochastic_table(samples, 2).mean_square < found.mean_square / 2


def test_codes_are_those_of_the_hinges_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, x = Feedforward(functional.gelu), torch.randn(4, 8)
    gtrans.optimize(model, passes="approx-bp{min_numel=1}", backend="eager", on_error="raise")
    model(x).sum().backward()
    hinges = HINGES["published"]["gelu"]
    at = model.up(x).detach()
    levels = torch.tensor(hinges.levels)[torch.bucketize(at, torch.tensor(hinges.corners))]
    expected = (model.down.weight.sum(0) * levels).sum(0)
    assert model.up.bias.grad is not None
    torch.testing.assert_close(model.up.bias.grad, expected)


def test_either_form_of_gelu_and_silu_is_recognised_and_nothing_else() -> None:
    for act in (
        functional.gelu,
        functional.silu,
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda x: x * torch.sigmoid(x),
    ):
        assert stats_of(explained(Feedforward(act))).rewritten == 1
    reason = "the paper has constants for GELU and SiLU only; few-bit takes any activation"
    for act in (functional.mish, torch.tanh):
        assert dict(stats_of(explained(Feedforward(act))).skipped) == {reason: 1}


def test_refused_on_gated_activations_because_nothing_would_be_saved() -> None:
    (reason,) = stats_of(explained(SwiGLU())).skipped
    assert reason.startswith("x stays saved for aten.m")
    assert reason.endswith("; nothing would be saved")


def test_laws_and_options() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Feedforward(functional.gelu))
    assert check_pass(ApproxBP(min_numel=1), model, [torch.randn(4, 8)]) == 1
    assert ApproxBP().contract == Close(rtol=1.2)
    with pytest.raises(OptionError, match="approx-bp: min_numel must be at least 1, got 0"):
        ApproxBP(min_numel=0)
