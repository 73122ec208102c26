"""With two exact copies the formulas are autograd's; with noisy ones they are affine in each."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from gtrans.runtime.norm_gradient import NormShape, affine, denormalised, gradients, normalised

EPS = 1e-5
Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

KINDS: dict[str, tuple[NormShape, tuple[int, ...], bool, Norm]] = {
    "layer": (NormShape(False, 1), (16,), True, lambda x, w, b: functional.layer_norm(
        x, (16,), w, b, EPS)),
    "layer of two": (NormShape(False, 2), (4, 16), True, lambda x, w, b: functional.layer_norm(
        x, (4, 16), w, b, EPS)),
    "rms": (NormShape(False, 1), (16,), False, lambda x, w, b: functional.rms_norm(
        x, (16,), w, EPS)),
    "batch": (NormShape(True, 0), (3,), True, lambda x, w, b: functional.batch_norm(
        x, None, None, w, b, True, 0.1, EPS)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_exact_copies_give_the_gradient_of_autograd(kind: str) -> None:
    torch.manual_seed(0)
    shape, size, centred, norm = KINDS[kind]
    x = torch.randn(2, 3, 4, 16, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dy = torch.randn_like(x)
    y = norm(x, w, b)
    y.backward(dy)
    dims = shape.shared(x)
    keep = not shape.channels
    mean = x.detach().mean(dims, keepdim=keep) if centred else None
    centre = x.detach() - (0 if mean is None else shape.along(mean, x))
    rstd = ((centre**2).mean(dims, keepdim=keep) + EPS).rsqrt()
    z = normalised(shape, x.detach(), mean, rstd)
    weight, bias = w.detach(), b.detach() if centred else None
    torch.testing.assert_close(affine(shape, x.dtype, z, weight, bias), y)
    torch.testing.assert_close(denormalised(shape, x.dtype, z, mean, rstd), x.detach())
    dx, dw, db = gradients(shape, x.dtype, dy, z, z, rstd, weight, centred)
    assert x.grad is not None
    torch.testing.assert_close(dx, x.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dw, w.grad, rtol=1e-10, atol=1e-10)
    if centred:
        torch.testing.assert_close(db, b.grad, rtol=1e-10, atol=1e-10)
    e = torch.randn_like(z)
    for first, second in ((1, 0), (0, 1)):
        ends = [
            gradients(shape, x.dtype, dy, z + s * first * e, z + s * second * e, rstd, weight, True)
            for s in (-1, 1)
        ]
        middle = gradients(shape, x.dtype, dy, z, z, rstd, weight, True)
        for low, high, exact in zip(*ends, middle, strict=True):
            torch.testing.assert_close((low + high) / 2, exact, rtol=1e-9, atol=1e-9)
