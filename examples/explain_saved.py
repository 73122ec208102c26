"""What a training step keeps for its backward, which line of the model makes it, and who reads it.

    python examples/explain_saved.py

Nothing is trained and nothing is compiled: `gtrans.explain` captures one forward of a model and
tells what autograd would keep, and what is left of it under a pipeline.
"""

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

import gtrans
from gtrans.explanation import Explanation
from gtrans.ir.sizes import human


class Block(nn.Module):
    """A transformer block: attention and a GELU feed-forward, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] to the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        hidden: torch.Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return hidden


def table_of(explanation: Explanation, title: str, rows: int = 8) -> Table:
    """The largest values that are kept; what parameters hold anyway is left out."""
    table = Table(title=f"{title}: {human(explanation.saved_bytes)}", title_justify="left")
    for header in ("kept", "type", "made by", "at", "read in the backward by"):
        table.add_column(header, justify="right" if header == "kept" else "left")
    shown = [r for r in explanation.saved if r.example.kind in ("activation", "input")]
    for row in shown[:rows]:
        value = row.example
        readers = ", ".join(r.removeprefix("aten.").partition(".")[0] for r in value.readers)
        table.add_row(
            f"{row.count} x {human(row.bytes // row.count)}",
            value.shape,
            value.operator.removeprefix("aten.").partition(".")[0],
            f"line {value.location.line}",
            readers or "recomputation",
        )
    return table


def main() -> None:
    """Explains a model of two blocks without and with gtrans' default passes."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(64, 4), Block(64, 4))
    x = torch.randn(8, 32, 64)
    console = Console(width=110)
    plain = gtrans.explain(model, x, passes="plan{recompute=none}")
    console.print(table_of(plain, "As autograd would"))
    console.print(table_of(gtrans.explain(model, x), "With gtrans"))
    console.print("What is no longer kept is computed again in the backward, bit for bit the same.")


if __name__ == "__main__":
    main()
