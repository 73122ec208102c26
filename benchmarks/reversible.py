"""`reversible`: measured peak and step time against depth, float64 gradients, training curves.

Target: the peak grows by less than 5 % from the shallow to the deep model (parameters and gradients
apart), gradients agree to 1e-10 in float64, losses to 1e-4 over the steps, and a step takes at most
1.40 times that of the same kernels without recomputation.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import gtrans

PLAIN, REVERSIBLE = "plan{recompute=none}", "reversible,plan"
MAX_GROWTH, MAX_TIME, MAX_GRADIENT_ERROR, MAX_LOSS_ERROR = 0.05, 1.40, 1e-10, 1e-4


class Attention(nn.Module):
    """Pre-norm self-attention over [B, T, D] with two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [B, T, D]. Returns: [B, T, D]."""
        split = self.qkv(self.norm(x)).unflatten(-1, (3, 2, x.shape[-1] // 2))
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed: torch.Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(mixed)


class RevViT(nn.Module):
    """Two streams, attention and perceptron in turn; `checkpointed` recomputes block by block."""

    def __init__(self, depth: int, width: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, width), nn.Linear(2 * width, 10)
        self.attention = nn.ModuleList(Attention(width) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
            for _ in range(depth)
        )
        self.checkpointed = checkpointed

    def block(self, i: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One coupling of each stream."""
        a = a + self.attention[i](b)
        return a, b + self.mlp[i](a)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [B, T, 16]. Returns: [B, 10]."""
        a = b = self.stem(x)
        for i in range(len(self.mlp)):
            if self.checkpointed:
                a, b = torch.utils.checkpoint.checkpoint(self.block, i, a, b, use_reentrant=False)
            else:
                a, b = self.block(i, a, b)
        return self.head(torch.cat([a, b], -1).mean(1))


Call = Callable[[torch.Tensor], torch.Tensor]


def variants(depth: int, width: int, device: str) -> dict[str, nn.Module]:
    """The same model as gtrans runs it plain and reversible, and checkpointed by torch."""
    made: dict[str, nn.Module] = {}
    for name in ("plain", "checkpoint", "reversible"):
        torch.manual_seed(0)
        model = RevViT(depth, width, name == "checkpoint").to(device)
        if name != "checkpoint":
            passes = PLAIN if name == "plain" else REVERSIBLE
            gtrans.optimize(model, passes=passes, backend="eager", on_error="raise")
        made[name] = model
    return made


def peak_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Most bytes alive at once during a step, over those before it; gradients exist already."""
    model(x).square().mean().backward()
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x).square().mean().backward()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        model(x).square().mean().backward()
    events = profile.profiler.kineto_results.events()
    alive = [e.nbytes() for e in events if e.name() == "[memory]"]
    return int(torch.tensor(alive).cumsum(0).max())


def step_seconds(models: dict[str, nn.Module], x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median time of a step of each model, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            _wait(x)
            start = time.perf_counter()
            model(x).square().mean().backward()
            _wait(x)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def gradient_error(depth: int, device: str) -> float:
    """Largest relative error of a float64 gradient against plain autograd."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16, dtype=torch.float64, device=device)
    model = RevViT(depth, 8).double().to(device)
    model(x).square().sum().backward()
    reference = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    gtrans.optimize(model, passes=REVERSIBLE, backend="eager", on_error="raise")
    model(x).square().sum().backward()
    pairs = zip(reference, model.parameters(), strict=True)
    return max(float((p.grad - g).norm() / g.norm()) for g, p in pairs if p.grad is not None)


def loss_error(depth: int, steps: int, device: str) -> float:
    """Largest difference of the losses of plain and reversible training in float32."""
    models = variants(depth, 16, device)
    optimizers = {n: torch.optim.AdamW(m.parameters(), 1e-3) for n, m in models.items()}
    generator, apart = torch.Generator().manual_seed(0), 0.0
    x = torch.randn(64, 8, 16, generator=generator).to(device)
    y = (x.mean((1, 2)) * 40).long().clamp(0, 9)
    for _ in range(steps):
        losses = {}
        for name in ("plain", "reversible"):
            loss = F.cross_entropy(models[name](x), y)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            losses[name] = loss.item()
        apart = max(apart, abs(losses["plain"] - losses["reversible"]))
    return apart


def main(quick: bool, device: str) -> int:
    """Prints the table; returns 0 where the target holds."""
    depths = (4, 8) if quick else (8, 16, 32, 64)
    width, batch, length, rounds = (16, 32, 16, 5) if quick else (32, 64, 32, 7)
    x = torch.randn(batch, length, 16, device=device)
    print(f"Rev-ViT, width {width}, batch {batch} x {length}, float32, eager kernels, {device}")
    print("depth    peak MiB: plain checkpoint reversible    step ms: plain checkpoint reversible")
    peaks: dict[int, int] = {}
    gradients: dict[int, int] = {}
    slower: list[float] = []
    for depth in depths:
        torch.compiler.reset()
        models = variants(depth, width, device)
        peak = {name: peak_bytes(m, x) for name, m in models.items()}
        seconds = step_seconds(models, x, rounds)
        peaks[depth] = peak["reversible"]
        gradients[depth] = sum(4 * p.numel() for p in models["reversible"].parameters())
        slower.append(seconds["reversible"] / seconds["plain"])
        memory = " ".join(f"{peak[n] / 2**20:10.2f}" for n in models)
        speed = " ".join(f"{1e3 * seconds[n]:10.1f}" for n in models)
        print(f"{depth:5} {memory:>42} {speed:>42}")
    torch.compiler.reset()
    error = gradient_error(2 if quick else 5, device)
    apart = loss_error(1, 10 if quick else 200, device)
    for library in ("memcnn", "revlib"):
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed, so it is not compared")
    first, last = depths[0], depths[-1]
    more, owed = peaks[last] - peaks[first], gradients[last] - gradients[first]
    growth = (more - owed) / peaks[first]
    print(f"the peak grows by {more / 2**20:.2f} MiB; their gradients {owed / 2**20:.2f}")
    slowest = statistics.median(slower)
    print(f"float64 gradient error {error:.1e}, float32 losses apart by {apart:.1e}")
    print(
        f"peak growth {growth:+.1%} from depth {first} to {last} besides gradients (target < 5 %), "
        f"step {slowest:.2f}x of plain (target <= 1.40x)"
    )
    fits = growth < MAX_GROWTH and slowest <= MAX_TIME
    return 0 if fits and error <= MAX_GRADIENT_ERROR and apart <= MAX_LOSS_ERROR else 1


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()
