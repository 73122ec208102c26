"""Chunked linear + cross-entropy: peak and step time of language models with large vocabularies.

A Llama-like model takes 4096 tokens a step. Its plain step holds logits of [4096, V]; what people
do against that today is timed beside it, on the same backend:

    checkpoint     torch.utils.checkpoint around head and loss: the logits are computed again
    by hand        a loop over four chunks of tokens, each checkpointed
    chunked-loss   gtrans' pass, on the model as it is

Peaks are those of the step, above parameters and inputs. Targets, per vocabulary and backend: no
value of the joint graph has room for the logits, the measured peak is at least 2.5 times lower than
plain, and a step takes at most 1.15 times as long.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gtrans
from benchmarks.table import Table, verdict
from benchmarks.zoo import huggingface
from gtrans.analysis.measure import interleaved_seconds, measured_peak, paired_ratio
from gtrans.api import graphs
from gtrans.ir.sizes import numel

_LOWER, _LONGER = 2.5, 1.15
_TOKENS = 4096
_CHUNKS = 4
_MIB = 2**20

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def main(quick: bool, device: str) -> int:
    """Prints a row per vocabulary, backend and way; 0 if all targets hold."""
    table = Table(
        ["vocabulary", "backend", "way", "peak", "plain/peak", "time", "logits"],
        [12, 10, 14, 12, 12, 8, 12],
    )
    missed: list[str] = []
    worst = [float("inf"), 0.0]
    for vocabulary in (32_000,) if quick else (32_000, 128_000):
        for backend in ("eager", "inductor"):
            lower, longer, fits = _compare(table, vocabulary, backend, device, quick)
            worst = [min(worst[0], lower), max(worst[1], longer)]
            if lower < _LOWER or longer > _LONGER or not fits:
                missed.append(f"{vocabulary} {backend}")
    figure = f"peak at least {worst[0]:.2f}x lower at most {worst[1]:.2f}x the time"
    return verdict(not missed, f"{figure}; missed: {', '.join(missed) or 'none'}")


def _compare(
    table: Table, vocabulary: int, backend: str, device: str, quick: bool
) -> tuple[float, float, bool]:
    """How much lower the peak is, how much longer a step takes, and whether no logits are held."""
    torch._dynamo.reset()
    steps = {}
    optimized = None
    for way in ("plain", "chunked-loss") if quick else _LOSSES:
        loss = _LOSSES[way]
        model, batch = _model(vocabulary, loss, quick)
        model.to(device)
        if way == "chunked-loss":
            optimized = gtrans.optimize(model, passes=f"{way},default", backend=backend)
        elif backend == "inductor":
            model.compile()
        steps[way] = _step(model, *(x.to(device) for x in batch))
    peaks = {way: measured_peak(step, device=device).bytes for way, step in steps.items()}
    rounds = 2 if quick else 3
    seconds = interleaved_seconds(steps, rounds=rounds, warm_up=0, device=device)
    ratios = {way: paired_ratio(seconds[way], seconds["plain"]) for way in steps}
    assert optimized is not None
    values = [n.meta.get("val") for g in graphs(gtrans.report(optimized)) for n in g.nodes]
    largest = max(numel(v) for v in values if isinstance(v, torch.Tensor))
    fits = largest < _TOKENS * vocabulary
    for way in steps:
        held = ("none" if fits else "held") if way == "chunked-loss" else ""
        table.row(
            vocabulary, backend, way, f"{peaks[way] / _MIB:.0f} MiB",
            f"{peaks['plain'] / peaks[way]:.2f}", f"x{ratios[way]:.3f}", held,
        )  # fmt: skip
    return peaks["plain"] / peaks["chunked-loss"], ratios["chunked-loss"], fits


class _Trained(nn.Module):
    """A language model with a loss of its last hidden states."""

    def __init__(self, model: Any, loss: Loss) -> None:
        super().__init__()
        self.model = model.model
        self.head = model.lm_head
        self.loss = loss

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Args: ids, labels: [batch, length]. Returns: the mean loss of all tokens."""
        hidden = self.model(input_ids=ids, use_cache=False).last_hidden_state
        return self.loss(self.head, hidden, labels)


def _plain(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = head(hidden).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


def _checkpointed(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = checkpoint(_plain, head, hidden, labels, use_reentrant=False)
    return loss


def _by_hand(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The usual recipe: each chunk's logits are checkpointed, and the losses added up."""
    rows, targets = hidden.flatten(0, 1).chunk(_CHUNKS), labels.flatten().chunk(_CHUNKS)
    losses = [
        _checkpointed(head, h.unsqueeze(0), y) * y.numel()
        for h, y in zip(rows, targets, strict=True)
    ]
    return torch.stack(losses).sum() / labels.numel()


_LOSSES: dict[str, Loss] = {
    "plain": _plain,
    "checkpoint": _checkpointed,
    "by hand": _by_hand,
    "chunked-loss": _plain,
}


def _model(vocabulary: int, loss: Loss, quick: bool) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    width, layers = (32, 1) if quick else (256, 2)
    built, _ = huggingface(
        "llama",
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocabulary,
    )
    ids = torch.randint(vocabulary, (_TOKENS // 512, 512))
    return _Trained(built, loss), (ids, torch.randint(vocabulary, ids.shape))


def _step(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model(ids, labels).backward()
        model.zero_grad(set_to_none=True)

    return step
