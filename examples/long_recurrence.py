"""A GRU over 1024 steps: its backward as autograd has it, hoisted, and in a few sweeps."""

import copy
import sys
import time

import torch
from torch import nn

import gtrans

STEPS, WIDTH = int(sys.argv[1]) if len(sys.argv) > 1 else 1024, 32


class Reader(nn.Module):
    """Reads a sequence and says how it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(4, WIDTH, batch_first=True), nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.layer(x)[0]
        return self.head(states).square().mean()


def backward(model: nn.Module, x: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The fastest of three backwards in milliseconds, and the gradient."""
    best = float("inf")
    for _ in range(4):
        model.zero_grad()
        loss = model(x)
        start = time.perf_counter()
        loss.backward()
        best = min(best, 1e3 * (time.perf_counter() - start))
    return best, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


torch.manual_seed(0)
x, reader = torch.randn(1, STEPS, 4), Reader()
plain, exact = backward(copy.deepcopy(reader), x)
print(f"{'autograd':38} {plain:6.1f} ms")
for passes in (
    "hoist-recurrence",
    "highway-recurrence{iterations=0}",
    "highway-recurrence{iterations=3}",
    "highway-recurrence{iterations=5}",
):
    model = gtrans.optimize(copy.deepcopy(reader), passes=passes, backend="eager")
    milliseconds, found = backward(model, x)
    cosine = torch.cosine_similarity(found, exact, 0)
    print(f"{passes:38} {milliseconds:6.1f} ms   cosine {cosine:.6f}")
