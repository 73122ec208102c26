"""How redundant each index of each erasable class is. Low scores go first.

With x_g the producer slices of an index, v_g their gradients and n_g how many elements they have:

    magnitude   ‖x_g‖² / n_g over its mean in the class          (arXiv:2301.12900, with p = 2)
    taylor      |x_g · v_g| over its mean in the class           (arXiv:1906.10771, per group)
    hessian     Σ x² v² over its mean in the class               (optimal brain damage, v² for H)
    hesso       0.2 of each of ‖x_g‖, ‖x_g‖/n_g, cos(x_g, v_g) + 1, |x_g · v_g|, ½ (x_g · v_g)²,
                each over its 2-norm across all indices          (arXiv:2409.09085)
    h2spg       -½ (cos(x_g, v_g) + n_g / ‖x_g‖), each over its 2-norm across all indices
                                                                 (arXiv:2303.06862)
    dhspg       the same with 1 in place of n_g
    random      a fixed draw

As ‖x_g‖ grows like √n_g, n_g / ‖x_g‖ is largest for large groups: the published score erases a
residual stream before a hidden unit. 1 / ‖x_g‖ spares what much hangs on, as hesso does by ‖x_g‖.

An index whose slices are zero already costs nothing: it goes first by every score over all classes,
and does not weigh in the 2-norms. A reciprocal takes ‖x_g‖ as at least a hundredth of its mean in
the class, so that one index near zero does not drown what tells the others apart.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from gtrans.analysis.erasable import ErasableClass
from gtrans.analysis.slice_sums import Term, slice_sums
from gtrans.errors import ModelError

Scores = dict[str, torch.Tensor]
"""For each class by name, one score per index."""

Tensors = Mapping[str, nn.Parameter]


_TERMS: dict[str, Term] = {
    "square": lambda x, v: x * x,
    "dot": lambda x, v: x * v,
    "gradient": lambda x, v: v * v,
    "fisher": lambda x, v: (x * v).square(),
}


class Moments:
    """Sums over the producer slices of every index of one class.

    Args:
        cls: the class.
        tensors: parameters by path.
        terms: which sums are made, of "square" (of x), "dot" (x · v), "gradient" (v · v) and
            "fisher" (x² · v²); the others cannot be read.

    Attributes:
        count: how many elements each index has, float64 [size].
    """

    def __init__(
        self, cls: ErasableClass, tensors: Tensors, terms: Sequence[str] = tuple(_TERMS)
    ) -> None:
        total = torch.zeros(len(terms), cls.size, dtype=torch.float64)
        self.count = torch.zeros(cls.size, dtype=torch.float64)
        seen: set[tuple[int, int, bytes]] = set()
        for member in cls.producers:
            x = torch.atleast_1d(tensors[member.name].detach())
            key = (x.data_ptr(), member.dim, member.labels.numpy().tobytes())
            if key in seen:
                continue  # a tied parameter counts once
            seen.add(key)
            hit = member.labels >= 0
            where = member.labels[hit]
            sums = _member_sums(x, tensors[member.name].grad, member.dim, terms)
            total.index_add_(1, where, sums.cpu()[:, hit])
            each = x.numel() // max(1, x.shape[member.dim])
            self.count.index_add_(0, where, torch.full(where.shape, each, dtype=torch.float64))
        self._sums: dict[str, torch.Tensor] = dict(zip(terms, total, strict=True))

    def __getitem__(self, term: str) -> torch.Tensor:
        """A sum for every index, float64 [size]."""
        return self._sums[term]

    @property
    def norm(self) -> torch.Tensor:
        """2-norm of each index' slices."""
        return self["square"].sqrt()

    @property
    def cosine(self) -> torch.Tensor:
        """Cosine between slices and their gradients; 0 where one of them is zero."""
        length = self.norm * self["gradient"].sqrt()
        return torch.where(length > 0, self["dot"] / length.clamp(min=1e-300), 0.0)


def _member_sums(
    x: torch.Tensor, gradient: torch.Tensor | None, dim: int, terms: Sequence[str]
) -> torch.Tensor:
    """Sums of one parameter for each index of a dimension; a missing gradient is zero."""
    total = torch.zeros(len(terms), x.shape[dim], dtype=torch.float64, device=x.device)
    v = x if gradient is None else torch.atleast_1d(gradient.detach().to_dense())
    made = [i for i, term in enumerate(terms) if gradient is not None or term == "square"]
    wanted = [_TERMS[terms[i]] for i in made]
    total[made] = slice_sums(wanted, dim, x, lambda piece: (x[piece], v[piece]))
    return total


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
    found = {c.name: Moments(c, tensors, _NEEDED[method]) for c in classes}
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
    result = {name: torch.zeros_like(m.count) for name, m in found.items()}
    for weight, criterion in criteria:
        values = {name: torch.where(m.norm > 0, criterion(m), 0.0) for name, m in found.items()}
        length = torch.cat(list(values.values())).norm().clamp(min=1e-300)
        for name, value in values.items():
            result[name] += weight * value / length
    for name, m in found.items():
        # Each term is at most its weight, and the weights sum to at most one.
        result[name][m.norm == 0] = -2.0
    return result


def _reciprocal(m: Moments) -> torch.Tensor:
    """1 / ‖x_g‖ for every index, bounded by a hundred times that of the mean."""
    return 1 / m.norm.clamp(min=float(m.norm.mean()) / 100 + 1e-300)


_PER_CLASS: dict[str, Callable[[Moments], torch.Tensor]] = {
    "magnitude": lambda m: m["square"] / m.count,
    "isomorphic": lambda m: m["square"] / m.count,
    "taylor": lambda m: m["dot"].abs(),
    "hessian": lambda m: m["fisher"],
}
_ACROSS: dict[str, list[tuple[float, Callable[[Moments], torch.Tensor]]]] = {
    "hesso": [
        (0.2, lambda m: m.norm),
        (0.2, lambda m: m.norm / m.count),
        (0.2, lambda m: m.cosine + 1),
        (0.2, lambda m: m["dot"].abs()),
        (0.2, lambda m: m["dot"].square() / 2),
    ],
    "dhspg": [
        (-0.5, lambda m: m.cosine),
        (-0.5, _reciprocal),
    ],
    "h2spg": [
        (-0.5, lambda m: m.cosine),
        (-0.5, lambda m: m.count * _reciprocal(m)),
    ],
}
_ACROSS["hesso-cric"] = _ACROSS["hesso"]
_NEEDED: dict[str, tuple[str, ...]] = {
    "magnitude": ("square",),
    "isomorphic": ("square",),
    "taylor": ("dot",),
    "hessian": ("fisher",),
    **dict.fromkeys(_ACROSS, ("square", "dot", "gradient")),
}
METHODS = (*_PER_CLASS, *_ACROSS, "random")
NEEDS_GRADIENT = frozenset({"taylor", "hessian", *_ACROSS})
