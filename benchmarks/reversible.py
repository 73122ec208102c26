"""`reversible`: peak against depth, step time against torch.compile and other libraries, gradients.

Targets: from the shallow to the deep model the peak grows by less than 5 % (new gradients apart); a
step takes at most 1.40 times that of `torch.compile`, which stores activations (Inductor on both
sides, in turns); float64 gradients agree to 1e-10 for every depth and number of streams, losses of
training in float32 to 1e-4. memcnn and revlib are measured on the same model where they are
importable: gtrans must need no more memory and no more time than either, with eager kernels as they
have.
"""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

import gtrans
from benchmarks.table import Table, verdict
from gtrans.analysis.measure import interleaved_seconds, measured_peak, paired_ratio

PLAIN, REVERSIBLE = "plan{recompute=none}", "reversible,plan"
MAX_GROWTH, MAX_TIME, MAX_GRADIENT_ERROR, MAX_LOSS_ERROR = 0.05, 1.40, 1e-10, 1e-4
MAX_PEER = 1.0
_MIB = 2**20


class Attention(nn.Module):
    """Pre-norm self-attention over [B, T, D] with two heads."""

    def __init__(self, width: int, drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.drop = nn.Linear(width, width), drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [B, T, D]. Returns: [B, T, D]."""
        split = self.qkv(self.norm(x)).unflatten(-1, (3, 2, x.shape[-1] // 2))
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed: torch.Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.dropout(self.out(mixed), self.drop)


class BatchNormed(nn.Module):
    """Batch norm over the features, widen, activate, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [B, T, D]. Returns: [B, T, D]."""
        return self.down(F.gelu(self.up(self.norm(x.transpose(1, 2)).transpose(1, 2))))


def perceptron(width: int) -> nn.Module:
    """Norm, widen, activate, narrow."""
    wide = 4 * width
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width)
    )


class RevViT(nn.Module):
    """Two streams, attention and perceptron in turn; `checkpointed` recomputes block by block."""

    def __init__(self, depth: int, width: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, width), nn.Linear(2 * width, 10)
        self.attention = nn.ModuleList(Attention(width) for _ in range(depth))
        self.mlp = nn.ModuleList(perceptron(width) for _ in range(depth))
        self.checkpointed = checkpointed

    def block(self, i: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One coupling of each stream."""
        a = a + self.attention[i](b)
        return a, b + self.mlp[i](a)

    def body(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """All blocks; both streams side by side."""
        for i in range(len(self.mlp)):
            if self.checkpointed:
                a, b = torch.utils.checkpoint.checkpoint(self.block, i, a, b, use_reentrant=False)
            else:
                a, b = self.block(i, a, b)
        return torch.cat([a, b], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [B, T, 16]. Returns: [B, 10]."""
        x = self.stem(x)
        return self.head(self.body(x, x).mean(1))


class ByLibrary(nn.Module):
    """The same network with its body made by a library for reversible networks."""

    def __init__(self, model: RevViT, library: str) -> None:
        super().__init__()
        self.stem, self.head = model.stem, model.head
        pairs = list(zip(model.attention, model.mlp, strict=True))
        if library == "memcnn":
            memcnn = importlib.import_module("memcnn")
            self.blocks: nn.Module = nn.Sequential(
                *(
                    memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g, split_dim=-1))
                    for f, g in pairs
                )
            )
        else:
            revlib = importlib.import_module("revlib")
            branches = [branch for pair in pairs for branch in pair]
            self.blocks = revlib.ReversibleSequential(*branches, split_dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [B, T, 16]. Returns: [B, 10]."""
        x = self.stem(x)
        return self.head(self.blocks(torch.cat([x, x], -1)).mean(1))


class Splits(nn.Module):
    """n streams updated in turn from the sum of the others."""

    def __init__(self, splits: int, depth: int, branches: list[Callable[[], nn.Module]]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, 8 * splits), nn.Linear(8 * splits, 3)
        made = [branches[i % len(branches)]() for i in range(depth * splits)]
        self.branches, self.splits = nn.ModuleList(made), splits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [B, T, 16]. Returns: [B, T, 3]."""
        streams = list(self.stem(x).chunk(self.splits, -1))
        for i, branch in enumerate(self.branches):
            k = i % self.splits
            others = [s for j, s in enumerate(streams) if j != k]
            streams[k] = streams[k] + branch(sum(others[1:], others[0]))
        return self.head(torch.cat(streams, -1))


def libraries() -> list[str]:
    """Those that are installed."""
    found = []
    for library in ("memcnn", "revlib"):
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not importable (pip install {library}), so it is not compared")
        else:
            found.append(library)
    return found


def variants(depth: int, width: int, device: str, peers: list[str]) -> dict[str, nn.Module]:
    """The same model run plainly, checkpointed, by gtrans and by other libraries; eager kernels."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = RevViT(depth, width).to(device)
    made: dict[str, nn.Module] = {"plain": copy.deepcopy(model)}
    checkpointed = copy.deepcopy(model)
    checkpointed.checkpointed = True
    made["checkpoint"] = checkpointed
    made["reversible"] = optimized(copy.deepcopy(model), REVERSIBLE, "eager")
    for library in peers:
        made[library] = ByLibrary(copy.deepcopy(model), library)
    return made


def optimized(model: nn.Module, passes: str, backend: str) -> nn.Module:
    """The model through gtrans, which must not fall back silently."""
    return gtrans.optimize(model, passes=passes, backend=backend, on_error="raise")


def step_of(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """A training step that leaves nothing behind."""

    def step() -> None:
        model(x).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def gradient_error(model: nn.Module) -> float:
    """Largest relative error of a float64 gradient against plain autograd, and of a buffer."""
    torch.compiler.reset()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    reference = copy.deepcopy(model.double())
    candidate = optimized(model, REVERSIBLE, "eager")
    for twin in (reference, candidate):
        torch.manual_seed(1)
        twin(x).square().sum().backward()
    (step,) = [s for s in gtrans.report(candidate).captured[0].steps if s.name == "reversible"]
    if not step.stats.rewritten:
        return float("inf")
    pairs = [
        *zip(
            (p.grad for p in reference.parameters()),
            (p.grad for p in candidate.parameters()),
            strict=True,
        ),
        *zip(reference.buffers(), candidate.buffers(), strict=True),
    ]
    return max(distance(expected, found) for expected, found in pairs)


def distance(expected: torch.Tensor | None, found: torch.Tensor | None) -> float:
    """Relative distance of two values; infinite if only one of them is there."""
    if expected is None or found is None:
        return 0.0 if expected is found else float("inf")
    if not expected.is_floating_point():  # the number of batches that a batch norm has seen
        return 0.0 if torch.equal(expected, found) else float("inf")
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def gradient_models(quick: bool) -> Iterator[tuple[str, nn.Module]]:
    """Depths, numbers of streams, and branches with dropout, batch norm and attention."""
    mixed: list[Callable[[], nn.Module]] = [
        lambda: Attention(8, 0.2),
        lambda: BatchNormed(8),
        lambda: nn.Sequential(perceptron(8), nn.Dropout(0.1)),
    ]
    for depth in (1, 3) if quick else (1, 2, 3, 5, 8):
        yield f"2 streams, depth {depth}", Splits(2, depth, mixed)
    for splits in (3,) if quick else (3, 4, 5):
        yield f"{splits} streams, depth 2", Splits(splits, 2, mixed)


def loss_error(depth: int, steps: int, device: str) -> float:
    """Largest difference of the losses of plain and reversible training in float32."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = RevViT(depth, 16).to(device)
    models = [copy.deepcopy(model), optimized(model, REVERSIBLE, "eager")]
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in models]
    x = torch.randn(64, 8, 16, generator=torch.Generator().manual_seed(0)).to(device)
    y = (x.mean((1, 2)) * 40).long().clamp(0, 9)
    apart = 0.0
    for _ in range(steps):
        losses = []
        for m, optimizer in zip(models, optimizers, strict=True):
            loss = F.cross_entropy(m(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        apart = max(apart, abs(losses[0] - losses[1]))
    return apart


def compiled_ratio(depth: int, width: int, x: torch.Tensor, rounds: int) -> float:
    """Time of a reversible step over that of torch.compile, both by Inductor."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = RevViT(depth, width).to(x.device)
    stored = copy.deepcopy(model)
    stored.compile()
    steps = {
        "torch.compile": step_of(stored, x),
        "reversible": step_of(optimized(model, REVERSIBLE, "inductor"), x),
    }
    seconds = interleaved_seconds(steps, rounds=rounds, warm_up=3, device=x.device)
    return paired_ratio(seconds["reversible"], seconds["torch.compile"])


def main(quick: bool, device: str) -> int:
    """Prints the tables; returns 0 where the targets hold."""
    warnings.simplefilter("ignore")
    depths = (4, 8) if quick else (8, 16, 32, 64)
    width, batch, length, rounds = (16, 32, 16, 5) if quick else (32, 64, 32, 7)
    x = torch.randn(batch, length, 16, device=device)
    peers = libraries()
    names = ["plain", "checkpoint", "reversible", *peers]
    print(f"Rev-ViT, width {width}, batch {batch} x {length}, float32, eager kernels, {device}")
    columns = ["depth", *(f"{n} MiB" for n in names), *(f"{n} ms" for n in names)]
    table = Table(columns, [6, *([16] * 2 * len(names))])
    peaks: dict[int, int] = {}
    owed: dict[int, int] = {}
    memory: dict[str, list[float]] = {n: [] for n in peers}
    slower: dict[str, list[float]] = {n: [] for n in peers}
    for depth in depths:
        steps = {n: step_of(m, x) for n, m in variants(depth, width, device, peers).items()}
        peak = {n: measured_peak(step, device=device).bytes for n, step in steps.items()}
        seconds = interleaved_seconds(steps, rounds=rounds, device=device)
        peaks[depth] = peak["reversible"]
        owed[depth] = sum(4 * p.numel() for p in RevViT(depth, width).parameters())
        for n in peers:
            memory[n].append(peak["reversible"] / peak[n])
            slower[n].append(paired_ratio(seconds["reversible"], seconds[n]))
        medians = [f"{1e3 * sorted(seconds[n])[rounds // 2]:.1f}" for n in names]
        table.row(depth, *(f"{peak[n] / _MIB:.2f}" for n in names), *medians)
    ok = True
    for n in peers:
        most, longest = max(memory[n]), sorted(slower[n])[len(slower[n]) // 2]
        ok &= most <= MAX_PEER and longest <= MAX_PEER
        print(f"against {n}: at most {most:.2f}x of its peak, {longest:.2f}x of its step time")
    error = 0.0
    for name, model in gradient_models(quick):
        found = gradient_error(model)
        error = max(error, found)
        print(f"float64 gradients, {name}: error {found:.1e}", flush=True)
    apart = loss_error(4, 10 if quick else 200, device)
    print(f"float32 losses apart by {apart:.1e}", flush=True)
    ratio = compiled_ratio(1 if quick else 4, width, x, 15)
    first, last = depths[0], depths[-1]
    more, due = peaks[last] - peaks[first], owed[last] - owed[first]
    growth = (more - due) / peaks[first]
    ok &= growth < MAX_GROWTH and ratio <= MAX_TIME
    ok &= error <= MAX_GRADIENT_ERROR and apart <= MAX_LOSS_ERROR
    print(f"the peak grows by {more / _MIB:.2f} MiB; new gradients are {due / _MIB:.2f} of it")
    return verdict(
        ok,
        f"peak growth {growth:+.1%} from depth {first} to {last} besides gradients (target < 5 %), "
        f"step {ratio:.2f}x of torch.compile (target <= 1.40x), gradients {error:.0e}",
    )
