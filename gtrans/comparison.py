"""How far two versions of a training step may lie apart, and how far they do."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gtrans.contract import Contract, Exact
from gtrans.errors import ModelError

Loss = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """One tensor of the step in both versions.

    Attributes:
        name: "encoder.weight", "output 0", "input 1" or "buffer running_mean".
        kind: "output", "gradient" or "buffer".
        dtype: working dtype of the run.
        largest: largest absolute difference of an element.
        relative: norm of the difference over the norm of the reference.
        cosine: cosine between the two; 1.0 where both are zero.
        bound: the relative difference that the contract admits; infinite where it states none.
    """

    name: str
    kind: str
    dtype: torch.dtype
    largest: float
    relative: float
    cosine: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the difference stays within what the contract admits (NaN never does)."""
        return self.relative <= self.bound


def default_loss(output: Any, seed: int = 0) -> torch.Tensor:
    """`output.loss` where there is one, else a fixed random weighting of all floating outputs.

    Raises:
        ModelError: no output depends on a parameter.
    """
    given = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(given, torch.Tensor) and given.requires_grad:
        return given
    tensors = [
        t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    if not tensors:
        raise ModelError("no output of the model depends on a trainable parameter")
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=tensors[0].dtype, device=tensors[0].device)
    for t in tensors:
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        weights = (weights / math.sqrt(max(1, t.numel()))).to(t.dtype).to(t.device)
        total = total + (t * weights).sum()
    return total


def compare_tensors(
    name: str,
    kind: str,
    expected: torch.Tensor | None,
    actual: torch.Tensor | None,
    contract: Contract,
    terms: int,
    floor: float,
) -> Comparison:
    """Compares one tensor of a step with what it should be.

    Args:
        name: what to call it.
        kind: "output", "gradient" or "buffer".
        expected: the reference; None where autograd gives no gradient, which equals zero.
        actual: what the rewritten step computed.
        contract: what it may differ by.
        terms: how many terms its longest sum has, see `longest_sum`.
        floor: gradients smaller than this are measured by it, see `rounding_scale`.
    """
    if expected is None and actual is None:
        return Comparison(name, kind, torch.float32, 0.0, 0.0, 1.0, 0.0)
    # A compiled step gives zeros where autograd gives no gradient at all; both mean the same.
    a = torch.zeros_like(actual) if expected is None and actual is not None else expected
    b = torch.zeros_like(expected) if actual is None and expected is not None else actual
    assert a is not None
    assert b is not None
    dtype = a.dtype
    if a.shape != b.shape or a.dtype != b.dtype:
        return Comparison(name, kind, dtype, math.inf, math.inf, 0.0, 0.0)
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, a - b)
    norm = _finite_norm(a)
    error = float(difference.norm())
    scale = max(norm, floor) if kind == "gradient" else norm
    relative = error / scale if scale > 0 else (0.0 if error == 0 else math.inf)
    other = float(b.norm())
    cosine = float((a * b).sum()) / (norm * other) if norm > 0 and other > 0 else 1.0
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    bound = _bound(kind, dtype, contract, terms)
    return Comparison(name.strip(), kind, dtype, largest, relative, cosine, bound)


def _finite_norm(value: torch.Tensor) -> float:
    return float(torch.where(value.isfinite(), value, 0.0).double().norm())


def rounding_scale(values: dict[str, tuple[str, torch.Tensor | None]]) -> float:
    """What small gradients are measured by: a hundredth of the largest.

    Some gradients are zero but for rounding (of a bias before a norm, of the bias of attention's
    keys); their own size says nothing about how large an error in them is. A smaller share would
    ask for less than the last digit of the terms that they are sums of.
    """
    norms = [_finite_norm(v) for kind, v in values.values() if kind == "gradient" and v is not None]
    return 1e-2 * max(norms, default=0.0)


def _bound(kind: str, dtype: torch.dtype, contract: Contract, terms: int) -> float:
    if kind == "gradient" and not isinstance(contract, Exact):
        return getattr(contract, "rtol", math.inf)
    if dtype is torch.float64:
        return 1e-9
    if not dtype.is_floating_point:
        return 0.0
    return 64 * torch.finfo(dtype).eps * math.sqrt(terms)


def longest_sum(model: nn.Module, arguments: Any) -> int:
    """How many terms one sum of the step may have: elements of an input, a side of a weight."""
    tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor)]
    sizes = [t.numel() for t in tensors]
    sizes += [max(p.shape, default=1) for p in model.parameters()]
    return max(sizes, default=1)
