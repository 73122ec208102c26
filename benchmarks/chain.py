"""Chains: backward of recurrences and of deep models in sweeps, forward of recurrences in sweeps.

Targets, all against other code in the same run:
- the hoisted backward of a recurrence is at least twice as fast as autograd's for a small cell, and
  at least 0.98 times as fast for every size;
- Highway-BP is faster than the hoisted one at T = 1024, d = 32, with a gradient whose cosine to the
  true one is at least 0.99 on a model that was trained;
- with five sweeps it is at least 1.7 times as fast as autograd's backward for a GRU and an LSTM of
  the published sizes (T = 256 and 1024, d = 64) at batch 1; larger batches are shown;
- the longest row of products in the backward of a deep GPT and of a ResNet of 54 blocks shrinks.
The map of the parallel forward has no target: it shows where sweeps pay.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import gtrans
from benchmarks.table import Table, verdict
from benchmarks.zoo import huggingface
from gtrans.analysis.critical_path import backward_critical_path
from gtrans.passes.rule.hoist_recurrence import HoistRecurrence
from gtrans.runtime.recurrence import METHODS, Recurrence, recurrent_network

_HOISTED, _NEVER_SLOWER, _COSINE, _OVER_AUTOGRAD = 2.0, 0.98, 0.99, 1.7
_SWEEPS = 5


def main(quick: bool, device: str) -> int:
    """Prints the tables; 0 if all targets hold."""
    ok, figures = True, []
    for part in (_backward, _trained, _paths):
        good, figure = part(quick, device)
        ok &= good
        figures.append(figure)
    _forward(quick, device)
    return verdict(ok, "; ".join(figures))


def fastest(candidates: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """The least milliseconds of each of some functions, run in turns."""
    best = [float("inf")] * len(candidates)
    for _ in range(rounds):
        for i, run in enumerate(candidates):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


class Recurrent:
    """A recurrent layer with inputs, and its backward by torch and by the rules of gtrans."""

    def __init__(self, kind: str, steps: int, batch: int, width: int, device: str) -> None:
        torch.manual_seed(0)
        layer = {"gru": nn.GRU, "lstm": nn.LSTM}[kind](width, width).to(device)
        self.kind, self.layer = kind, layer
        self.x = torch.randn(steps, batch, width, device=device, requires_grad=True)
        start = torch.zeros(1, batch, width, device=device)
        self.hx = (start, start) if kind == "lstm" else start
        self.cotangent = torch.randn(steps, batch, width, device=device)

    def states(self, **options: Any) -> torch.Tensor:
        """The outputs by gtrans' operator; without options by torch's."""
        if not options:
            out: torch.Tensor = self.layer(self.x, self.hx)[0]
            return out
        weights = list(self.layer.parameters())
        return recurrent_network(
            self.kind, self.x, self.hx, weights, True, 1, False, False, **options
        )[0]

    def backward(self, **options: Any) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The backward of a forward that ran before."""
        out, wanted = self.states(**options), [self.x, *self.layer.parameters()]

        def run() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(out, wanted, self.cotangent, retain_graph=True)

        return run


def cosine(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Of all gradients as one vector."""
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, exact))
    return float(F.cosine_similarity(a, b, 0))


def _backward(quick: bool, device: str) -> tuple[bool, str]:
    print(
        "milliseconds of the backward, random weights; cosine of the gradient with five sweeps\n"
        "(fused: oneDNN's LSTM, which eager torch calls on a CPU; (): the pass leaves it alone)"
    )
    table = Table(
        ["cell", "T", "B", "d", "fused", "autograd", "hoisted", "0", "3", "5", "10", "cosine"],
        [6, 6, 5, 5, 8, 10, 9, 8, 8, 8, 8, 9],
    )
    sizes = [(256, 1, 32), (256, 1, 64), (256, 8, 64), (256, 32, 128)]
    sizes += [] if quick else [(1024, 1, 32), (1024, 1, 64), (1024, 8, 64), (256, 64, 256)]
    small, slowest, over_autograd = [], float("inf"), []
    for kind in ("gru", "lstm"):
        for steps, batch, width in sizes:
            case = Recurrent(kind, steps, batch, width, device)
            with torch.backends.mkldnn.flags(enabled=False):
                runs = [case.backward(), case.backward(rule="loop")]
            runs += [case.backward(rule="sweeps", count=k) for k in (0, 3, _SWEEPS, 10)]
            times = fastest(runs, 8 if batch == 1 and not quick else 3)
            near = cosine(runs[4](), runs[1]())
            fused = "-"
            if kind == "lstm" and device == "cpu":
                fused = f"{fastest([case.backward()], 3)[0]:.1f}"
            shown = [f"{t:.1f}" for t in times]
            gain = times[0] / times[1]
            if batch * width > HoistRecurrence().max_state:
                shown[1], gain = f"({shown[1]})", 1.0
            table.row(kind, steps, batch, width, fused, *shown, f"{near:.4f}")
            slowest = min(slowest, gain)
            if batch * width <= 64:
                small.append(gain)
            if batch == 1:
                over_autograd.append(times[0] / times[4])
    ok = min(small) >= _HOISTED and slowest >= _NEVER_SLOWER
    ok &= min(over_autograd) >= _OVER_AUTOGRAD
    return ok, (
        f"hoisted backward of small cells {min(small):.1f}x of autograd's (target {_HOISTED:g}x), "
        f"of any size at least {slowest:.2f}x (target {_NEVER_SLOWER}x); five sweeps at batch 1 "
        f"at least {min(over_autograd):.1f}x (target {_OVER_AUTOGRAD}x)"
    )


def _trained(quick: bool, device: str) -> tuple[bool, str]:
    """A GRU that reads digits pixel by pixel, trained with the exact gradient."""
    side = 16 if quick else 32
    pixels, labels = digits(side, device)
    torch.manual_seed(0)
    model = Reader(32).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    steps = 30 if quick else 200
    for step in range(steps):
        chosen = torch.arange(16, device=device) + 16 * step
        chosen %= len(labels)
        loss = model.loss(pixels[chosen], labels[chosen], rule="loop")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"GRU over {side * side} pixels, d = 32, batch 1, after {steps} steps: loss {loss:.2f}")
    table = Table(["backward", "ms", "cosine"], [12, 9, 9])
    wanted = list(model.parameters())

    def backward(**options: Any) -> Callable[[], tuple[torch.Tensor, ...]]:
        out = model.loss(pixels[:1], labels[:1], **options)
        return lambda: torch.autograd.grad(out, wanted, retain_graph=True)

    many = {k: model.loss(pixels[:16], labels[:16], rule="sweeps", count=k) for k in (1, 3, 5, 10)}
    exact = torch.autograd.grad(model.loss(pixels[:16], labels[:16], rule="loop"), wanted)
    near = {k: cosine(torch.autograd.grad(loss, wanted), exact) for k, loss in many.items()}
    names = ["hoisted", *(f"{k} sweeps" for k in near)]
    runs = [backward(rule="loop"), *(backward(rule="sweeps", count=k) for k in near)]
    times = fastest(runs, 4 if quick else 10)
    for name, ms, value in zip(names, times, [1.0, *near.values()], strict=True):
        table.row(name, f"{ms:.1f}", f"{value:.4f}")
    good = [(ms, k) for ms, k in zip(times[1:], near, strict=True) if near[k] >= _COSINE]
    best, k = min(good, default=(float("inf"), 0))
    return best < times[0], (
        f"T = {side * side}, d = 32, trained: {k} sweeps (cosine {near.get(k, 0.0):.4f}) take "
        f"{best:.1f} ms, hoisted {times[0]:.1f} ms"
    )


class Reader(nn.Module):
    """A GRU over a sequence of numbers, and a class at its end."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(1, width), nn.Linear(width, classes)
        with torch.no_grad():  # remember by default: z near one
            self.layer.get_parameter("bias_ih_l0")[width : 2 * width] += 2

    def loss(self, x: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        """Cross-entropy of [B, T] numbers."""
        start = x.new_zeros(1, len(x), self.layer.hidden_size)
        states = recurrent_network(
            "gru", x.t().unsqueeze(-1), start, list(self.layer.parameters()), True, 1, False,
            False, **options,
        )[0]  # fmt: skip
        return F.cross_entropy(self.head(states[-1]), labels)


def digits(side: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits of scikit-learn as sequences of side * side numbers, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    larger = F.interpolate(images, size=(side, side))
    return larger.flatten(1).to(device), torch.tensor(data.target).to(device)


def _paths(quick: bool, device: str) -> tuple[bool, str]:
    sweeps = 3
    print(f"longest row of products in the backward, before and after {sweeps} sweeps")
    table = Table(["model", "blocks", "before", "after"], [10, 8, 8, 8])
    layers, blocks = (8, 18) if quick else (24, 54)
    gpt, batch = huggingface("gpt2", n_layer=layers, n_embd=16, n_head=2, vocab_size=50)
    found: list[str] = []
    ok = True
    cases: list[tuple[str, int, nn.Module, dict[str, Any]]] = [
        ("GPT", layers, gpt, batch),
        ("ResNet", blocks, PreActivation(blocks), {"x": torch.randn(2, 3, 8, 8)}),
    ]
    for name, depth, model, inputs in cases:
        text = f"highway-bp{{iterations={sweeps}}}"
        before, after = _longest(model, inputs, "none"), _longest(model, inputs, text)
        table.row(name, depth, before, after)
        found.append(f"{name} of {depth} {before} to {after}")
        ok &= after < before
    return ok, "products in a row: " + ", ".join(found)


def _longest(model: nn.Module, inputs: dict[str, Any], passes: str) -> int:
    explained = gtrans.explain(model, passes=passes, **inputs)
    rewritten = [c.rewritten for c in explained.captured if c.rewritten is not None]
    return sum(len(backward_critical_path(graph)) for graph in rewritten)


class PreActivation(nn.Module):
    """A ResNet with the activation before each convolution; three stages, as for CIFAR-10."""

    def __init__(self, blocks: int, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList()
        for stage in range(3):
            before = width * max(1, 2 ** (stage - 1)) if stage else width
            for i in range(blocks // 3):
                wide = width * 2**stage
                self.blocks.append(_Block(before if i == 0 else wide, wide))
        self.last = nn.Linear(width * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [batch, 3, height, width]. Returns: [batch, 10]."""
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.last(x.mean((2, 3)))
        return out


class _Block(nn.Module):
    def __init__(self, before: int, wide: int) -> None:
        super().__init__()
        stride = 1 if before == wide else 2
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(wide)
        self.conv1 = nn.Conv2d(before, wide, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(before, wide, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        out: torch.Tensor = self.short(x) + self.conv2(torch.relu(self.norm2(y)))
        return out


def _forward(quick: bool, device: str) -> None:
    print("milliseconds (sweeps) of the forward of a GRU, tolerance 1e-4; x: no gain over the loop")
    methods = [m for m in METHODS if m not in ("picard", "jacobi-gs")]
    table = Table(["T", "B", "d", *methods], [6, 4, 5, *[17] * len(methods)])
    sizes = [(t, b, d) for t in (256, 1024, 4096) for b in (1, 8) for d in (8, 32)]
    for steps, batch, width in sizes[:4] if quick else sizes:
        case = Recurrent("gru", steps, batch, width, device)
        w_ih, w_hh, b_ih, b_hh = (p.detach() for p in case.layer.parameters())
        start = torch.zeros(batch, width, device=device)
        chain = Recurrence("gru", F.linear(case.x.detach(), w_ih, b_ih), start, w_hh, b_hh)
        cells, loop = [], 0.0
        for method in methods:
            if method == "newton" and (steps * batch * width**2 > 1 << 23):
                cells.append("too large")
                continue
            solve = partial(chain.solve, method, 1e-4, 0, 64)
            sweeps = solve().sweeps
            (ms,) = fastest([solve], 1 if quick else 3)
            loop = loop or ms
            cells.append(f"{ms:.1f} ({sweeps}){' x' if ms >= loop and cells else ''}")
        table.row(steps, batch, width, *cells)
