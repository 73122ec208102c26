"""Marker operators: they name a forward value and find its cotangent again in the joint graph.

    y  = tap(x, aux, key)                     forward: a copy of x
    dx = tap_backward(dy, aux, key)           backward: a copy of dy

Joint graphs have no edge between a value and its cotangent. A pass that edits wires marks the
value in the forward graph; after tracing, the two markers with equal keys are that pair. `aux`
carries a tensor that the edit needs (a feedback matrix): constants of a joint graph must be inputs
of the model. The plan erases all markers, so that none ever runs.
"""

import torch


@torch.library.custom_op("gtrans::tap", mutates_args=())
def tap(x: torch.Tensor, aux: torch.Tensor | None, key: str) -> torch.Tensor:
    """Marks a value.

    Args:
        x: the value, of any shape.
        aux: a tensor that an edit of the wire may read; it gets no gradient.
        key: names the pair.
    """
    return x.clone()


@torch.library.custom_op("gtrans::tap_backward", mutates_args=())
def tap_backward(dy: torch.Tensor, aux: torch.Tensor | None, key: str) -> torch.Tensor:
    """Marks the cotangent of a value that `tap` marked."""
    return dy.clone()


@tap.register_fake
def _(x: torch.Tensor, aux: torch.Tensor | None, key: str) -> torch.Tensor:
    return torch.empty_like(x)


@tap_backward.register_fake
def _(dy: torch.Tensor, aux: torch.Tensor | None, key: str) -> torch.Tensor:
    return torch.empty_like(dy)


def _remember(ctx: object, inputs: tuple[object, ...], output: object) -> None:
    ctx.aux, ctx.key = inputs[1], inputs[2]  # type: ignore[attr-defined]  # torch's context object


def _backward(ctx: object, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return tap_backward(dy, ctx.aux, ctx.key), None, None  # type: ignore[attr-defined]


tap.register_autograd(_backward, setup_context=_remember)

TAP = torch.ops.gtrans.tap.default
TAP_BACKWARD = torch.ops.gtrans.tap_backward.default
