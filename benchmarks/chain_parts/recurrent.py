"""A recurrent layer and its backward by torch, by torch's compiler and by the rules of gtrans."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gtrans.runtime.recurrence import recurrent_network

CHUNK = 8
"""Steps that torch's compiler unrolls into one graph; 128 took it 212 s, and hours for 1024."""


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


def cosine(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Of all gradients as one vector."""
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, exact))
    return float(F.cosine_similarity(a, b, 0))


class Recurrent:
    """A recurrent layer with inputs."""

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
        return self._of(self.states(**options))

    def compiled(self) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The backward of torch's layer as Inductor compiles it, some steps at a time."""
        torch.compiler.reset()
        run = torch.compile(lambda x, hx: self.layer(x, hx))
        hx, outputs = self.hx, []
        for part in self.x.split(CHUNK):
            y, hx = run(part, hx)
            outputs.append(y)
        return self._of(torch.cat(outputs))

    def _of(self, out: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        wanted = [self.x, *self.layer.parameters()]

        def run() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(out, wanted, self.cotangent, retain_graph=True)

        return run
