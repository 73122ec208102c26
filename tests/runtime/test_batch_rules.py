"""Batches of operators that torch has no rule for, against one call after another."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.func import vjp, vmap
from torch.nn import functional as F

from gtrans.runtime.batch_rules import batched_form, quiet_loops, with_rules

aten = torch.ops.aten

ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
RMS_NORM_BACKWARD = aten._fused_rms_norm_backward.default

COUNT, SEQUENCES, HEADS, LENGTH, WIDTH = 3, 2, 4, 5, 8
MASKS = [
    None,
    (LENGTH, LENGTH),
    (1, 1, LENGTH, LENGTH),
    (SEQUENCES, HEADS, LENGTH, LENGTH),
]


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _one_by_one(
    function: Callable[..., Any], dims: tuple[int | None, ...], args: list[torch.Tensor]
) -> list[torch.Tensor]:
    def element(i: int) -> list[torch.Tensor]:
        pairs = zip(args, dims, strict=True)
        given = [t if d is None else t.select(d, i).contiguous() for t, d in pairs]
        return list(function(*given))

    rows = [element(i) for i in range(COUNT)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@settings(max_examples=25)
@given(
    batched=st.lists(st.booleans(), min_size=4, max_size=4).filter(any),
    mask=st.sampled_from(MASKS),
    causal=st.booleans(),
    last=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
def test_attention_and_its_gradient(
    batched: list[bool], mask: tuple[int, ...] | None, causal: bool, last: bool, scale: float | None
) -> None:
    torch.manual_seed(0)
    dim = 4 if last else 0
    shape = (SEQUENCES, HEADS, LENGTH, WIDTH)
    dims: list[int | None] = [dim if b else None for b in batched[:3]]
    args = [
        _draw(*shape) if d is None else _draw(COUNT, *shape).movedim(0, d).contiguous()
        for d in dims
    ]
    if mask is not None:
        dims.append(0 if batched[3] else None)
        args.append(_draw(COUNT, *mask) if batched[3] else _draw(*mask))
    causal = causal and mask is None
    if not any(d is not None for d in dims):
        return

    def attend(op: Callable[..., Any], *read: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = read[:3]
        m = read[3] if len(read) > 3 else None
        out, lse = op(q, k, v, 0.0, causal, attn_mask=m, scale=scale)
        back = aten_or_form(ATTENTION_BACKWARD, op)
        grads = back(out.sin(), q, k, v, out, lse, 0.0, causal, attn_mask=m, scale=scale)
        return out, lse, *grads

    def aten_or_form(backward: Any, op: Callable[..., Any]) -> Any:
        return backward if op is ATTENTION else batched_form(backward)

    expected = _one_by_one(lambda *a: attend(ATTENTION, *a), tuple(dims), args)
    found = vmap(lambda *a: attend(batched_form(ATTENTION), *a), in_dims=tuple(dims))(*args)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_attention_has_its_gradient_in_a_batch() -> None:
    torch.manual_seed(0)
    args = [_draw(COUNT, SEQUENCES, HEADS, LENGTH, WIDTH) for _ in range(3)]
    form = batched_form(ATTENTION)
    found: Any = vjp(vmap(lambda *a: form(*a)[0]), *args)
    out, pull = found
    leaves = [a.clone().requires_grad_() for a in args]
    expected = torch.stack([ATTENTION(*a)[0] for a in zip(*leaves, strict=True)])
    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(expected, leaves, out.cos())
    for a, b in zip(pull(out.cos()), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_attention_without_a_batch_is_torchs() -> None:
    torch.manual_seed(0)
    args = [_draw(SEQUENCES, HEADS, LENGTH, WIDTH).requires_grad_() for _ in range(3)]
    out = batched_form(ATTENTION)(*args)[0]
    assert torch.equal(out, ATTENTION(*args)[0])
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out.sum(), args))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_gradient_of_an_rms_norm(dtype: torch.dtype, weighted: bool) -> None:
    torch.manual_seed(0)
    x, dy = (_draw(COUNT, 4, WIDTH).to(dtype) for _ in range(2))
    weight = _draw(COUNT, WIDTH).to(dtype) if weighted else None

    def by_torch(dy: Any, *read: Any) -> tuple[Any, ...]:
        leaves = [t.detach().requires_grad_() for t in read]
        y = F.rms_norm(leaves[0], [WIDTH], leaves[1] if weighted else None, 1e-6)
        return torch.autograd.grad(y, leaves, dy)

    def by_form(dy: Any, x: Any, w: Any = None) -> tuple[Any, ...]:
        wide = x if dtype is torch.float64 else x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        found = batched_form(RMS_NORM_BACKWARD)(dy, x, [WIDTH], rstd, w, [True, weighted])
        return tuple(found[: 1 + weighted])

    args = [dy, x] if weight is None else [dy, x, weight]
    expected = _one_by_one(by_torch, (0,) * len(args), args)
    found = vmap(by_form)(*args)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_an_rms_norm_leaves_out_what_nobody_wants() -> None:
    x, rstd = _draw(4, WIDTH), _draw(4, 1)
    form = batched_form(RMS_NORM_BACKWARD)
    assert form(x, x, [WIDTH], rstd, None, [True, False])[1] is None
    assert form(x, x, [WIDTH], rstd, x[0], [False, True])[0] is None


def test_a_view_of_what_is_stacked() -> None:
    def flat(x: torch.Tensor) -> torch.Tensor:
        viewed: torch.Tensor = aten.view.default(x, [6])
        return viewed

    x = torch.arange(24.0).reshape(4, 3, 2).transpose(1, 2)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        vmap(flat)(x)
    assert torch.equal(vmap(with_rules(fx.symbolic_trace(flat)))(x), x.reshape(4, 6))


def test_a_copy_of_a_module_with_rules() -> None:
    module = fx.symbolic_trace(lambda x: (ATTENTION(x, x, x)[0], x.sin()))
    before = module.code
    copied = with_rules(module)
    assert module.code == before
    assert ATTENTION not in {n.target for n in copied.graph.nodes}
    x = _draw(SEQUENCES, HEADS, LENGTH, WIDTH)
    for a, b in zip(copied(x), module(x), strict=True):
        assert torch.equal(a, b)


def test_loops_over_a_batch_are_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    x = _draw(COUNT, SEQUENCES, HEADS, LENGTH, WIDTH)
    looped = vmap(lambda x: ATTENTION(x, x, x)[0])

    def warned() -> bool:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            looped(x)
        said = [*map(str, caught), capfd.readouterr().err]
        return any("batching rule" in line for line in said)

    with quiet_loops():
        assert not warned()
    assert warned()
