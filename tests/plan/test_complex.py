"""Complex values are planned like any other: views into real ones, and constants."""

import pytest
import torch
from torch import nn

import gtrans
from gtrans.ir import ops


class StateSpace(nn.Module):
    """A long convolution whose kernel is a sum of damped oscillations."""

    def __init__(self, channels: int = 3, states: int = 4) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.rand(channels, states))
        self.frequency = nn.Parameter(torch.rand(channels, states))
        self.out = nn.Parameter(torch.randn(channels, states, 2))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Args: u: [batch, channels, time]. Returns: the same shape."""
        time = u.shape[-1]
        a = -torch.exp(self.decay) + 1j * self.frequency
        c = torch.view_as_complex(self.out) * (torch.exp(a) - 1.0) / a
        powers = torch.exp(a.unsqueeze(-1) * torch.arange(time))
        kernel = 2 * torch.einsum("hn,hnl->hl", c, powers).real
        product = torch.fft.rfft(u, n=2 * time) * torch.fft.rfft(kernel, n=2 * time)
        convolved: torch.Tensor = torch.fft.irfft(product, n=2 * time)[..., :time]
        return convolved.tanh()


class Recurrence(nn.Module):
    """A loop over time with a complex state, of which the real part is read."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.rand(width))
        self.within = nn.Parameter(torch.randn(width, width, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, time, width]. Returns: the same shape."""
        turn = torch.polar(torch.full_like(self.angle, 0.9), self.angle)
        within = torch.view_as_complex(self.within)
        state = torch.zeros_like(x[:, 0], dtype=torch.complex64)
        outputs = []
        for step in x.unbind(1):
            state = turn * state + step.to(torch.complex64) @ within.mH
            outputs.append(torch.view_as_real(state).square().sum(-1) + state.conj().imag)
        return torch.stack(outputs, 1)


@pytest.mark.parametrize("passes", ["default", "plan{memory=1.0}"])
@pytest.mark.parametrize(("model", "shape"), [(StateSpace(), (2, 3, 8)), (Recurrence(), (2, 5, 4))])
def test_gradients_are_the_same(model: nn.Module, shape: tuple[int, ...], passes: str) -> None:
    gtrans.verify(model, torch.randn(shape), passes=passes).require()


def test_a_view_of_a_number_allocates() -> None:
    graph = torch.fx.Graph()
    number = graph.call_function(torch.ops.aten._conj.default, (1j,))
    number.meta["val"] = torch.ones((), dtype=torch.complex128)
    view = graph.call_function(torch.ops.aten.view_as_real.default, (number,))
    assert not ops.is_view(number)
    assert ops.storage_of(view) is number
