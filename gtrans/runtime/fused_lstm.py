"""The LSTM that oneDNN computes on a CPU, as one operator forward and one backward.

What eager torch calls for `nn.LSTM` in float32 and bfloat16. Torch's own operator for it has no
place in a graph: it says that it keeps nothing for its backward, and it does keep something only
while gradients are enabled, which they are not while a compiled graph runs.

    output, h, c, workspace = fused_lstm(x, W_ih, W_hh, b_ih, b_hh, h, c)
    dx, dW_ih, dW_hh, db, dh, dc = fused_lstm_backward(...)

Shapes: x: [T, B, n]; W_ih: [4d, n]; W_hh: [4d, d]; b: [4d]; h, c: [B, d]; output: [T, B, d];
workspace: bytes, about 15 numbers for each of the T B d states.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten

_LSTM = 2  # oneDNN's number of this kind of cell
_ONE_LAYER = (1, False, False)  # layers, both directions, batch first


@torch.library.custom_op("gtrans::fused_lstm", mutates_args=())
def fused_lstm_layer(
    x: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None,
    b_hh: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    reverse: bool,
    training: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer in one direction: output, last h, last c, workspace.

    Args:
        x: [T, B, n], contiguous.
        w_ih: [4d, n]; so are the others as `nn.LSTM` has them.
        w_hh: [4d, d].
        b_ih: [4d] or None.
        b_hh: [4d] or None.
        h: [B, d]; so is c.
        c: state before the first step.
        reverse: from the last step to the first.
        training: whether a backward follows.
        keep: whether the workspace is returned; the backward makes one again if it is empty.
    """
    tensors = [t.detach() for t in (x, w_ih, w_hh, *_biases(w_ih, b_ih, b_hh), h, c)]
    layers, both, first = _ONE_LAYER
    with torch.set_grad_enabled(training):  # torch asks this whether a workspace is needed
        y, h, c, workspace = aten.mkldnn_rnn_layer(
            *tensors, reverse, [], _LSTM, w_hh.shape[1], layers, b_ih is not None, both, first,
            training,
        )  # fmt: skip
    return y, h, c, workspace if keep else x.new_empty(0, dtype=torch.uint8)


@torch.library.custom_op("gtrans::fused_lstm_backward", mutates_args=())
def fused_lstm_backward(
    dy: torch.Tensor,
    dh: torch.Tensor,
    dc: torch.Tensor,
    x: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None,
    b_hh: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    output: torch.Tensor,
    last_h: torch.Tensor,
    last_c: torch.Tensor,
    workspace: torch.Tensor,
    reverse: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """The gradients of x, both weights, either bias (they have one gradient), h and c."""
    if not workspace.numel():  # its size was not known when the graph was made
        args = (x, w_ih, w_hh, b_ih, b_hh, h, c, reverse, True, True)
        output, last_h, last_c, workspace = fused_lstm_layer(*args)
    layers, both, first = _ONE_LAYER
    tensors = x, w_ih, w_hh, *_biases(w_ih, b_ih, b_hh), h, c, output, last_h, last_c
    dx, dw_ih, dw_hh, db, _, dh, dc = aten.mkldnn_rnn_layer_backward(
        *tensors, dy.contiguous(), dh.contiguous(), dc.contiguous(), reverse, _LSTM,
        w_hh.shape[1], layers, b_ih is not None, True, both, [], first, workspace,
    )  # fmt: skip
    dh, dc = dh.view(h.shape), dc.view(c.shape)
    dx, dw_ih, dw_hh, db, dh, dc = (g.to(x.dtype) for g in (dx, dw_ih, dw_hh, db, dh, dc))
    return dx, dw_ih, dw_hh, db, dh, dc


def _biases(
    w_ih: torch.Tensor, b_ih: torch.Tensor | None, b_hh: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if b_ih is None or b_hh is None:
        nothing = w_ih.new_zeros(len(w_ih))
        return nothing, nothing
    return b_ih, b_hh


@cache
def workspace_bytes(steps: int, batch: int, inputs: int, width: int, dtype: torch.dtype) -> int:
    """What a layer keeps for its backward: oneDNN does not say, so a layer of zeros runs once."""
    with _disable_current_modes():
        x = torch.zeros(steps, batch, inputs, dtype=dtype)
        w_ih, w_hh = x.new_zeros(4 * width, inputs), x.new_zeros(4 * width, width)
        state = x.new_zeros(batch, width)
        args = x, w_ih, w_hh, None, None, state, state, False, True, True
        size: int = fused_lstm_layer(*args)[3].numel()
        return size


@fused_lstm_layer.register_fake
def _(
    x: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None,
    b_hh: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    reverse: bool,
    training: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = *x.shape, w_hh.shape[1]
    size = workspace_bytes(*sizes, x.dtype) if keep else 0
    workspace = x.new_empty(size, dtype=torch.uint8)
    return x.new_empty(*sizes[:2], sizes[3]), h.new_empty(h.shape), c.new_empty(c.shape), workspace


@fused_lstm_backward.register_fake
def _(
    dy: torch.Tensor,
    dh: torch.Tensor,
    dc: torch.Tensor,
    x: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None,
    b_hh: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    shapes = x.shape, w_ih.shape, w_hh.shape, w_ih.shape[:1], h.shape, c.shape
    return tuple(x.new_empty(shape) for shape in shapes)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.reverse, _, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, dy: torch.Tensor, dh: torch.Tensor, dc: torch.Tensor, _: Any) -> Any:
    dx, dw_ih, dw_hh, db, dh, dc = fused_lstm_backward(dy, dh, dc, *ctx.saved_tensors, ctx.reverse)
    has_bias = ctx.saved_tensors[3] is not None
    biases = (db, db) if has_bias else (None, None)
    return dx, dw_ih, dw_hh, *biases, dh, dc, None, None, None


fused_lstm_layer.register_autograd(_backward, setup_context=_remember)


def fused_lstm(
    input: torch.Tensor,
    hx: Any,
    weights: list[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `torch.lstm` returns for the same arguments, to the bit, where it calls oneDNN."""
    training = torch.is_grad_enabled()
    x = (input.transpose(0, 1) if batch_first else input).contiguous()
    h, c = (state.contiguous() for state in hx)
    sizes = *x.shape, h.shape[2]
    keep = training and all(isinstance(n, int) for n in sizes)  # else its size is not known
    each, directions = 4 if has_biases else 2, 2 if bidirectional else 1
    last_h, last_c = [], []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            w_ih, w_hh, *biases = weights[i * each : (i + 1) * each]
            b_ih, b_hh = biases or (None, None)
            args = x, w_ih, w_hh, b_ih, b_hh, h[i], c[i], direction > 0, training, keep
            output, new_h, new_c, _ = fused_lstm_layer(*args)
            outputs.append(output)
            last_h.append(new_h)
            last_c.append(new_c)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < num_layers - 1:
            x = torch.dropout(x, dropout, True)
    y = x.transpose(0, 1) if batch_first else x
    return y, torch.stack(last_h), torch.stack(last_c)


def not_fused(input: torch.Tensor, hx: Any, weights: Sequence[torch.Tensor]) -> str | None:
    """Why torch does not call oneDNN for an LSTM, or None if it does.

    Args:
        input: of the layer; so are hx, both states, and the weights.
        hx: h and c before the first step.
        weights: of all layers.
    """
    tensors = [input, *hx, *weights]
    if any(t.device.type != "cpu" for t in tensors):
        return "it is not on a CPU"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "oneDNN is switched off"
    if torch.is_autocast_enabled("cpu"):
        return "it runs under autocast"
    half = torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if input.dtype != torch.float32 and (input.dtype, True) != half:
        return f"oneDNN has no layer of {str(input.dtype).removeprefix('torch.')} here"
    if hx[0].shape[2] != hx[1].shape[2]:
        return "it projects its states"
    if any(t.dtype != input.dtype for t in tensors):
        return "its values differ in type"
    if 0 in input.shape:
        return "its input is empty"
    return None
