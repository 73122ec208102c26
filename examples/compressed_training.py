"""Train a small transformer with its residuals in two bits, and look at what that does.

    python examples/compressed_training.py

Prints what is kept for the backward, the error of one gradient, and the losses of the same training
with exact residuals, with the same bits everywhere, and with bits where they matter.
"""

import copy
import sys

import torch
from torch import nn
from torch.nn import functional

import gtrans
from gtrans import Pipeline


class Block(nn.Module):
    """A feed-forward block behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, width]. Returns: the same shape."""
        y: torch.Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return y


def main() -> None:
    """Trains three copies of one model on the same batches."""
    torch.manual_seed(0)
    width = 64
    model = nn.Sequential(*[Block(width) for _ in range(4)], nn.Linear(width, 1))
    inputs = torch.randn(1024, width)
    targets = (inputs[:, :8].square().sum(1, keepdim=True) - 8) / 4

    print(gtrans.explain(model, inputs, passes="compress{bits=2},default"))
    print("\ngradient:", gtrans.gradient_error(model, inputs, passes="compress{bits=2},default"))

    pipelines: dict[str, str | Pipeline] = {
        "exact": "default",
        "2 bits": "compress{bits=2},default",
        "3 bits, adapted": gtrans.adapt(model, inputs, bits=3.0),
    }
    print(f"\n{'':18}{'kept':>12}{'first loss':>14}{'last loss':>14}")
    for name, passes in pipelines.items():
        twin = gtrans.optimize(copy.deepcopy(model), passes=passes, backend="eager")
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3)
        losses = []
        for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 60):
            loss = functional.mse_loss(twin(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        kept = gtrans.report(twin).saved_bytes
        print(f"{name:18}{kept / 2**20:>8.2f} MiB{losses[0]:>14.4f}{losses[-1]:>14.4f}")


if __name__ == "__main__":
    main()
