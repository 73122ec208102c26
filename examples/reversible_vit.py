"""A small Rev-ViT on handwritten digits: memory against depth, with and without `reversible`."""

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn

import gtrans

D, HEADS, BATCH, DEPTHS, STEPS = 32, 4, 256, (1, 2, 4, 8), 40
PLAIN, REVERSIBLE = "plan{recompute=none}", "reversible,plan"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, D // HEADS))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class RevViT(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patches, self.position = nn.Linear(4, D), nn.Parameter(torch.randn(16, D) / 10)
        self.attention = nn.ModuleList(Attention() for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
            for _ in range(depth)
        )
        self.head = nn.Linear(2 * D, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tiles = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        a = b = self.patches(tiles) + self.position
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            a = a + attention(b)
            b = b + mlp(a)
        return self.head(torch.cat([a, b], -1).mean(1))


def train(passes: str, depth: int, x: torch.Tensor, y: torch.Tensor) -> tuple[list[float], float]:
    torch.manual_seed(0)
    model = gtrans.optimize(RevViT(depth), passes=passes, backend="eager")
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for step in range(STEPS):
        now = torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)
        loss = F.cross_entropy(model(x[now]), y[now])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.profiler.profile(profile_memory=True) as profile:
        F.cross_entropy(model(x[:BATCH]), y[:BATCH]).backward()
    events = profile.profiler.kineto_results.events()
    alive = torch.tensor([e.nbytes() for e in events if e.name() == "[memory]"]).cumsum(0)
    return losses, alive.max().item() / 2**20


def main() -> None:
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    peaks: list[tuple[float, float]] = []
    print("blocks   plain MiB   reversible MiB   last loss   largest difference of the losses")
    for depth in DEPTHS:
        (plain, high), (rebuilt, low) = (train(p, depth, x, y) for p in (PLAIN, REVERSIBLE))
        peaks.append((high, low))
        apart = max(abs(a - b) for a, b in zip(plain, rebuilt, strict=True))
        print(f"{depth:6} {high:11.2f} {low:16.2f} {rebuilt[-1]:11.4f} {apart:12.1e}")
    pyplot.plot(DEPTHS, peaks, "o-", label=[PLAIN, REVERSIBLE])
    pyplot.gca().set(xlabel="blocks", ylabel="peak of a training step, MiB", ylim=(0, None))
    pyplot.legend()
    pyplot.savefig("reversible_vit.png", dpi=120)


main()
