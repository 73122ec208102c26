"""How redundant each index of each erasable class is. Low scores go first.

With x_g the producer slices of an index, v_g their gradients and n_g how many elements they have:

    magnitude   ‖x_g‖² / n_g over its mean in the class          (arXiv:2301.12900, with p = 2)
    taylor      |x_g · v_g| over its mean in the class           (arXiv:1906.10771, per group)
    hessian     Σ x² v² over its mean in the class               (optimal brain damage, v² for H)
    hesso       0.2 of each of ‖x_g‖, ‖x_g‖/n_g, cos(x_g, v_g) + 1, |x_g · v_g|, ½ (x_g · v_g)²,
                each over its 2-norm across all indices          (arXiv:2409.09085)
    dhspg       -½ (cos(x_g, v_g) + n_g / ‖x_g‖), each over its 2-norm across all indices
                                                                 (arXiv:2303.06862)
    random      a fixed draw
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gtrans.analysis.erasable import ErasableClass
from gtrans.errors import ModelError

Scores = dict[str, torch.Tensor]
"""For each class by name, one score per index."""

Tensors = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Moments:
    """Sums over the producer slices of every index of one class, as float64 vectors."""

    square: torch.Tensor
    dot: torch.Tensor
    gradient: torch.Tensor
    fisher: torch.Tensor
    count: torch.Tensor

    @property
    def norm(self) -> torch.Tensor:
        """2-norm of each index' slices."""
        return self.square.sqrt()

    @property
    def cosine(self) -> torch.Tensor:
        """Cosine between slices and their gradients; 0 where one of them is zero."""
        length = self.norm * self.gradient.sqrt()
        return torch.where(length > 0, self.dot / length.clamp(min=1e-300), 0.0)


def moments(cls: ErasableClass, tensors: Tensors) -> Moments:
    """The sums that all scores are made of."""
    total = torch.zeros(5, cls.size, dtype=torch.float64)
    seen: set[tuple[int, int, bytes]] = set()
    for member in cls.producers:
        x = torch.atleast_1d(tensors[member.name].detach())
        key = (x.data_ptr(), member.dim, member.labels.numpy().tobytes())
        if key in seen:
            continue  # a tied parameter counts once
        seen.add(key)
        v = tensors[member.name].grad
        v = torch.zeros_like(x) if v is None else torch.atleast_1d(v.detach().to_dense())
        others = [d for d in range(x.ndim) if d != member.dim]
        ones = torch.ones_like(x)
        parts = [x * x, x * v, v * v, x * x * v * v, ones]
        sums = [p.sum(others) if others else p for p in parts]
        hit = member.labels >= 0
        stacked = torch.stack(sums).double().cpu()[:, hit]
        total.index_add_(1, member.labels[hit], stacked)
    return Moments(*total)


def score(classes: Sequence[ErasableClass], tensors: Tensors, method: str, seed: int = 0) -> Scores:
    """Scores every index of the given classes.

    Raises:
        ModelError: the method needs gradients and no parameter has one.
    """
    if method in NEEDS_GRADIENT and not any(
        tensors[m.name].grad is not None for c in classes for m in c.producers
    ):
        raise ModelError(
            f"method {method!r} needs gradients and no parameter of the classes has one; "
            "call loss.backward() before, or take method='magnitude'"
        )
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return {c.name: torch.rand(c.size, generator=generator) for c in classes}
    found = {c.name: moments(c, tensors) for c in classes}
    if method in _PER_CLASS:
        return {
            name: (value := _PER_CLASS[method](m)) / value.mean().clamp(min=1e-300)
            for name, m in found.items()
        }
    return _across(found, _ACROSS[method])


def _across(
    found: Mapping[str, Moments],
    criteria: Sequence[tuple[float, Callable[[Moments], torch.Tensor]]],
) -> Scores:
    result = {name: torch.zeros_like(m.square) for name, m in found.items()}
    for weight, criterion in criteria:
        values = {name: criterion(m) for name, m in found.items()}
        length = torch.cat(list(values.values())).norm().clamp(min=1e-300)
        for name, value in values.items():
            result[name] += weight * value / length
    return result


_PER_CLASS: dict[str, Callable[[Moments], torch.Tensor]] = {
    "magnitude": lambda m: m.square / m.count,
    "isomorphic": lambda m: m.square / m.count,
    "taylor": lambda m: m.dot.abs(),
    "hessian": lambda m: m.fisher,
}
_ACROSS: dict[str, list[tuple[float, Callable[[Moments], torch.Tensor]]]] = {
    "hesso": [
        (0.2, lambda m: m.norm),
        (0.2, lambda m: m.norm / m.count),
        (0.2, lambda m: m.cosine + 1),
        (0.2, lambda m: m.dot.abs()),
        (0.2, lambda m: m.dot.square() / 2),
    ],
    "dhspg": [
        (-0.5, lambda m: m.cosine),
        (-0.5, lambda m: m.count / m.norm.clamp(min=1e-12)),
    ],
}
_ACROSS["hesso-cric"] = _ACROSS["hesso"]
METHODS = (*_PER_CLASS, *_ACROSS, "random")
NEEDS_GRADIENT = frozenset({"taylor", "hessian", *_ACROSS})
