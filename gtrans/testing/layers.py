"""The layers that random models are made of: each keeps the shape of its input.

Because every layer keeps the shape, any layer of a model can be left out and the rest still fits:
that is what lets hypothesis shrink a failing model to the few layers that matter.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Maker = Callable[[int], nn.Module]
"""Makes a layer for values with the given number of features."""


class Function(nn.Module):
    """A layer without parameters."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.function(x)
        return y


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.inner(x)
        return y


class Coupling(nn.Module):
    """Two additive streams along a dimension; an odd last feature passes by."""

    def __init__(self, first: nn.Module, second: nn.Module, size: int, dim: int) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.size = size
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rest = x.shape[self.dim] - 2 * self.size
        a, b, c = torch.split(x, [self.size, self.size, rest], self.dim)
        a = a + self.first(b)
        b = b + self.second(a)
        return torch.cat([a, b, c], self.dim)


class BeforeFrozen(nn.Module):
    """An activation whose output nothing keeps: the product that reads it is not trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.down.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(F.gelu(self.up(x)))
        return y


class Perceptron(nn.Module):
    """Widen, activate, narrow."""

    def __init__(self, width: int, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width, bias=False)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.activation(self.up(x)))
        return y


class Gate(nn.Module):
    """x * sigmoid(linear(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x * torch.sigmoid(self.gate(x))
        return y


class Centre(nn.Module):
    """Subtracts a running mean, which it updates: a buffer that the forward overwrites."""

    mean: torch.Tensor
    calls: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x - self.mean) * torch.exp(-self.mean)
        self.calls.add_(1)
        self.mean.mul_(0.9).add_(x.detach().flatten(0, -2).mean(0), alpha=0.1)
        return y


class Twice(nn.Module):
    """One layer used two times, so that its gradients add up."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(torch.tanh(self.inner(x)))
        return y


class Along(nn.Module):
    """Runs a layer that wants features first ([B, D, T]) on values with features last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x if x.dim() == 2 else x.transpose(1, 2))
        return y if x.dim() == 2 else y.transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with one or two heads over [B, T, D].

    Args:
        width: D.
        kind: "fused" or "causal" (one kernel), or "written" (softmax by hand).
    """

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.heads = 2 if width % 2 == 0 else 1
        self.kind = kind
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(x).view(split).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "written":
            scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
            mixed = torch.softmax(scores, -1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "causal")
        y: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return y


class Loop(nn.Module):
    """h_t = tanh(A x_t + B h_(t-1)), written as a Python loop over time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inward = nn.Linear(width, width)
        self.across = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        states = []
        for step in x.unbind(1):
            state = torch.tanh(self.inward(step) + self.across(state))
            states.append(state)
        return torch.stack(states, 1)


class Iterated(nn.Module):
    """A state that one function of the input is applied to again and again.

    Args:
        width: D.
        step: (state, what the input became, product) to state; it settles, integrates, or spikes.
    """

    def __init__(self, width: int, step: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.inward = nn.Linear(width, width)
        self.across = nn.Linear(width, width, bias=False)
        nn.init.uniform_(self.across.weight, -0.4 / width, 0.4 / width)
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        drive = self.inward(x)
        state = torch.zeros_like(drive)
        for _ in range(8):
            state = self.step(state, drive, self.across)
        return state


def _settling(z: torch.Tensor, x: torch.Tensor, product: nn.Module) -> torch.Tensor:
    return torch.tanh(product(z) + x)


def _integrating(y: torch.Tensor, x: torch.Tensor, product: nn.Module) -> torch.Tensor:
    middle = y + 0.1 * torch.tanh(product(y) + x)
    return y + 0.2 * torch.tanh(product(middle) + x)


def _spiking(v: torch.Tensor, x: torch.Tensor, product: nn.Module) -> torch.Tensor:
    v = 0.5 * v + product(v) + x
    soft = torch.sigmoid(4 * (v - 0.5))
    spike = ((v > 0.5).to(v.dtype) - soft).detach() + soft
    return v - 0.5 * spike


class Recurrent(nn.Module):
    """nn.GRU over [B, T, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.gru(x)[0]
        return states


def _swap(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1) if x.shape[-1] > 1 else (x, x[..., :0])
    return torch.cat([b.tanh(), a], -1)


def _flip_flop(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, -1).contiguous().view(-1).view(x.transpose(0, -1).shape).transpose(0, -1)


def _relu_in_place(x: torch.Tensor) -> torch.Tensor:
    return F.relu_(x * 1.5)


def _masked(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0.1, x, 0.5 * x).masked_fill(x > 2, 2.0)


def _both_activations(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x) + F.gelu(x)


def _max_pool(x: torch.Tensor) -> torch.Tensor:
    pooled = F.max_pool2d(x, 2, ceil_mode=True)
    return F.interpolate(pooled, size=x.shape[2:], mode="nearest")


def _function(function: Callable[[torch.Tensor], torch.Tensor]) -> Maker:
    return lambda width: Function(function)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu_in_place": _relu_in_place,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "softplus": F.softplus,
    "mish": F.mish,
}

ANY_SHAPE: dict[str, Maker] = {
    **{name: _function(function) for name, function in ACTIVATIONS.items()},
    "dropout": lambda width: nn.Dropout(0.3),
    "scale": _function(lambda x: 1.5 * x + 0.1),
    "sine": _function(torch.sin),
    "masked": _function(_masked),
    "both_activations": _function(_both_activations),
    "round": _function(lambda x: x + 0.1 * torch.round(x)),
}
"""Layers for values of any shape."""

FEATURES_LAST: dict[str, Maker] = {
    **ANY_SHAPE,
    "linear": lambda width: nn.Linear(width, width),
    "linear_without_bias": lambda width: nn.Linear(width, width, bias=False),
    "relu_perceptron": lambda width: Perceptron(width, F.relu),
    "gelu_perceptron": lambda width: Perceptron(width, F.gelu),
    "gelu_before_frozen": BeforeFrozen,
    "gate": Gate,
    "layer_norm": nn.LayerNorm,
    "rms_norm": nn.RMSNorm,
    "batch_norm": lambda width: Along(nn.BatchNorm1d(width)),
    "softmax": _function(lambda x: torch.softmax(x, -1)),
    "log_softmax": _function(lambda x: torch.log_softmax(x, -1)),
    "swap_halves": _function(_swap),
    "flip_flop": _function(_flip_flop),
    "centre": Centre,
    "equilibrium": lambda width: Iterated(width, _settling),
    "solver": lambda width: Iterated(width, _integrating),
    "spiking": lambda width: Iterated(width, _spiking),
    "linear_twice": lambda width: Twice(nn.Linear(width, width)),
}
"""Layers for values [B, ..., D]."""

SEQUENCE: dict[str, Maker] = {
    **FEATURES_LAST,
    "attention": lambda width: Attention(width, "fused"),
    "causal_attention": lambda width: Attention(width, "causal"),
    "written_attention": lambda width: Attention(width, "written"),
    "conv1d": lambda width: Along(nn.Conv1d(width, width, 3, padding=1)),
    "loop": Loop,
    "gru": Recurrent,
    "cumulative_sum": _function(lambda x: x.cumsum(1)),
}
"""Layers for values [B, T, D]."""

IMAGE: dict[str, Maker] = {
    **ANY_SHAPE,
    "conv2d": lambda width: nn.Conv2d(width, width, 3, padding=1),
    "depthwise_conv2d": lambda width: nn.Conv2d(width, width, 3, padding=1, groups=width),
    "pointwise_conv2d": lambda width: nn.Conv2d(width, width, 1, bias=False),
    "batch_norm2d": nn.BatchNorm2d,
    "group_norm": lambda width: nn.GroupNorm(2 if width % 2 == 0 else 1, width),
    "max_pool": _function(_max_pool),
    "average_pool": _function(lambda x: F.avg_pool2d(x, 3, 1, 1)),
    "dropout2d": lambda width: nn.Dropout2d(0.3),
    "conv2d_twice": lambda width: Twice(nn.Conv2d(width, width, 3, padding=1)),
}
"""Layers for values [B, D, H, W]."""
