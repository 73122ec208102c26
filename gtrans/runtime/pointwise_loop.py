"""A loop whose step works element by element: its backward is a scan.

    h[t] = f(h[t-1], x[t])        w[t] = e[t] + a[t+1] w[t+1],   a[t] = df/dh at step t, a diagonal

All a[t] are the gradient of f for ones, at all steps in one call; the cotangents w of all states
come out of one scan of about 2 log2 T steps, and one more call of f's backward at all steps gives
the gradients of what it reads. With several values carried, a[t] is a small matrix per element;
a complex value counts as two, its real and its imaginary part, so f need not be holomorphic.

The forward runs step by step, as it was written.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gtrans.runtime.loop import slots_of
from gtrans.runtime.solve import send_nothing, solve_backward

Step = Callable[..., Sequence[torch.Tensor]]
"""(carries, inputs) to (new carries, further results)."""


def pointwise_loop(
    step: Step,
    starts: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor | Sequence[torch.Tensor]],
    steps: int,
) -> tuple[torch.Tensor, ...]:
    """The results of all steps, those of the first step first.

    Args:
        step: element by element in its carries, which have all one shape and precision; its inputs
            may be broadcast to it.
        starts: the carries before the first step, [*s] each.
        inputs: what the steps read besides: one tensor for all of them, or one for each.
        steps: how many.
    """
    flat = [t for i in inputs for t in ((i,) if isinstance(i, torch.Tensor) else i)]
    shared = tuple(isinstance(i, torch.Tensor) for i in inputs)
    found: tuple[torch.Tensor, ...] = _PointwiseLoop.apply(  # type: ignore[no-untyped-call]
        step, steps, len(starts), shared, *starts, *flat
    )
    return found


class _PointwiseLoop(torch.autograd.Function):
    """Tensors are the starts, then the inputs slot by slot."""

    @staticmethod
    def forward(
        ctx: Any,
        step: Step,
        steps: int,
        carries: int,
        shared: tuple[bool, ...],
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        state, slots = tensors[:carries], slots_of(tensors[carries:], shared, steps)
        before: list[torch.Tensor] = []
        results: list[torch.Tensor] = []
        for t in range(steps):
            before += state
            found = step(*state, *(slot[t % len(slot)] for slot in slots))
            state = tuple(found[:carries])
            results += found
        ctx.save_for_backward(*before, *tensors[carries:])
        ctx.step, ctx.steps, ctx.carries, ctx.shared = step, steps, carries, shared
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> Any:
        steps, count, saved = ctx.steps, ctx.carries, ctx.saved_tensors
        states = [torch.stack(saved[i : steps * count : count]) for i in range(count)]
        slots = slots_of(saved[steps * count :], ctx.shared, steps)
        dims = states[0].dim()
        inputs = [s[0] if len(s) == 1 else _as_batch(torch.stack(list(s)), dims) for s in slots]
        with torch.enable_grad():
            read = [_leaf(t) for t in (*states, *inputs)]
            made = ctx.step(*read)
        width = len(given) // steps
        drives = [torch.stack(given[i::width]) for i in range(width)]
        carried = _cotangents(read[:count], made, drives)
        wanted = [t for t in read if t.requires_grad]
        found = iter(_gradients(made, [*carried, *drives[count:]], wanted))
        grads = [next(found) if t.requires_grad else None for t in read]
        starts = [None if g is None else g[0] for g in grads[:count]]
        rest = [
            part for slot, g in zip(slots, grads[count:], strict=True) for part in _parts(slot, g)
        ]
        return None, None, None, None, *starts, *rest


def _cotangents(
    states: list[torch.Tensor], made: Sequence[torch.Tensor], drives: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The cotangents of the new carries of all steps, from those that come from outside."""
    count = len(states)
    nothing = [torch.zeros_like(d) for d in drives]
    complex_ = [s.is_complex() for s in states]
    # What further results send to a state arrives one step earlier.
    local = _gradients(made, [*nothing[:count], *drives[count:]], states)
    e = [
        drive + torch.cat([sent[1:], torch.zeros_like(sent[:1])])
        for drive, sent in zip(drives[:count], local, strict=True)
    ]
    rows = []
    for i in range(count):
        for unit in (1, 1j) if complex_[i] else (1,):
            ones = [torch.full_like(n, unit) if k == i else n for k, n in enumerate(nothing)]
            rows.append(_real_parts(_gradients(made, ones, states)))
    parts = _real_parts(e)
    if len(parts) == 1:
        return [solve_backward(send_nothing, parts[0], keep=rows[0][0], sweeps=0).states]
    # keep[j, i] is what part i of the new carries sends to part j of the old ones.
    keep = torch.stack([torch.stack(row, -1) for row in rows], -1)
    w = solve_backward(send_nothing, torch.stack(parts, -1), keep=keep, sweeps=0).states
    found = iter(w.unbind(-1))
    return [torch.complex(next(found), next(found)) if one else next(found) for one in complex_]


def _real_parts(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Real values as they are, complex ones as two."""
    return [part for v in values for part in ((v.real, v.imag) if v.is_complex() else (v,))]


def _gradients(
    made: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor], read: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The gradients of what was read; zeros where nothing flows."""
    pairs = [(m, c) for m, c in zip(made, cotangents, strict=True) if m.requires_grad]
    outputs, sent = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, read, sent, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(r) if g is None else g for r, g in zip(read, found, strict=True)]


def _as_batch(stacked: torch.Tensor, dims: int) -> torch.Tensor:
    """Aligns [T, *v] with [T, *s] where v is broadcast to s."""
    missing = dims - stacked.dim()
    return stacked.reshape(len(stacked), *[1] * missing, *stacked.shape[1:])


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    leaf = tensor.detach()
    return leaf.requires_grad_() if leaf.is_floating_point() or leaf.is_complex() else leaf


def _parts(
    slot: Sequence[torch.Tensor], gradient: torch.Tensor | None
) -> Sequence[torch.Tensor | None]:
    """The gradient of a slot, for each of its tensors."""
    if gradient is None:
        return [None] * len(slot)
    if len(slot) == 1 and gradient.shape == slot[0].shape:
        return [gradient]
    return [g.reshape(slot[0].shape) for g in gradient.unbind(0)]
