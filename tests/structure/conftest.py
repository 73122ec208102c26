"""Small models of many kinds, and the comparison that every erasure must pass."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import gtrans
from gtrans.rewrite.erase_graph import cut


class InDouble(TorchFunctionMode):
    """Reads float32 as float64, so that a model's own casts do not hide behind rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        args, kwargs = pytree.tree_map(wide, (args, kwargs or {}))
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def quiet() -> None:
    """The same random models every time, and no traces of their capture."""
    torch.manual_seed(0)
    # Under pytest's log handler torch writes a trace of every export, which takes most of the time.
    logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Gives every parameter and statistic a random value that hides nothing behind zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan = max(1, p[0].numel()) if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / fan**0.5)
            if p.ndim == 1:
                p.add_(0.5)
        for name, b in model.named_buffers():
            if "running_var" in name:
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
            elif "running_mean" in name:
                b.copy_(torch.randn(b.shape, generator=generator) * 0.1)


@dataclass
class Result:
    """How an erased model differs from the model whose producer slices are zero."""

    plan: gtrans.PrunePlan
    model: nn.Module
    erased: nn.Module
    selection: dict[str, torch.Tensor]
    forward: float
    gradient: float


def _floats(output: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def gradients(model: nn.Module, args: Any, kwargs: Any) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    outputs = _floats(model(*args, **kwargs))
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in outputs
    )
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    return outputs


def half(plan: gtrans.PrunePlan, seed: int = 1) -> dict[str, torch.Tensor]:
    """Half of the indices of every exact class, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return {c.name: torch.randperm(c.size, generator=generator) < c.size // 2 for c in plan.exact}


def compare(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    form: Any = "auto",
    selection: Callable[[gtrans.PrunePlan], dict[str, torch.Tensor]] = half,
    train: bool = False,
) -> Result:
    """Zeroes the producer slices of a selection, erases it, and compares the two models."""
    model = model.double().train(train)
    args, kwargs = pytree.tree_map(
        lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t,
        (args, kwargs),
    )
    randomise(model)
    plan = gtrans.prune(model, *args, **kwargs)
    chosen = selection(plan)
    plan.zero(chosen)
    erased = plan.erase(chosen, form=form)
    expected, actual = gradients(model, args, kwargs), gradients(erased, args, kwargs)
    assert len(expected) == len(actual) > 0
    forward = max(
        float(((a - b).norm() / a.norm().clamp(min=1e-30)).detach())
        for a, b in zip(expected, actual, strict=True)
    )
    masks = plan.structure.masks({c.atom: chosen[c.name] for c in plan.classes if c.name in chosen})
    old = dict(model.named_parameters(remove_duplicate=False))
    largest = max(float(p.grad.norm()) for p in old.values() if p.grad is not None)
    gradient = 0.0
    for name, p in erased.named_parameters():
        reference = old[name].grad
        if reference is None or p.grad is None:
            assert reference is None, name
            assert p.grad is None or not p.grad.any(), name
            continue
        reference = cut(reference, masks[name])
        scale = max(float(reference.norm()), 1e-4 * largest)
        gradient = max(gradient, float((reference - p.grad).norm()) / scale)
    return Result(plan, model, erased, chosen, forward, gradient)


@pytest.fixture
def erasure() -> Callable[..., Result]:
    """`compare`, for tests."""

    def in_double(*args: Any, **kwargs: Any) -> Result:
        with InDouble():
            return compare(*args, **kwargs)

    return in_double


@pytest.fixture
def random_half() -> Callable[..., dict[str, torch.Tensor]]:
    """`half`, for tests."""
    return half
