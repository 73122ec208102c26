"""Sizes of values in bytes and elements, as numbers and as sympy expressions."""

from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


def hint(size: int | torch.SymInt, otherwise: int = 64) -> int:
    """A number for a size: itself, or the value it was traced with.

    Args:
        size: a plain or symbolic size.
        otherwise: what to answer for a data-dependent size, which has no traced value.
    """
    if isinstance(size, int):
        return size
    traced = getattr(size.node, "hint", None)
    return int(traced) if traced is not None else otherwise


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """The size as a sympy expression of the dynamic dimensions."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def numel(val: torch.Tensor) -> int:
    """Number of elements of a (fake) tensor, by traced sizes."""
    count = 1
    for size in val.shape:
        count *= hint(size)
    return count


def tensor_bytes(val: Any) -> int:
    """Bytes of a value's elements: tensors, and tuples of tensors; 0 for anything else."""
    if isinstance(val, torch.Tensor):
        return numel(val) * val.element_size()
    if isinstance(val, (tuple, list)):
        return sum(tensor_bytes(v) for v in val)
    return 0


def tensor_bytes_expression(val: torch.Tensor) -> sympy.Expr:
    """Bytes of a tensor's elements as a sympy expression."""
    product: sympy.Expr = sympy.Integer(val.element_size())
    for size in val.shape:
        product *= expression(size)
    return product


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two (fake) tensors provably have the same sizes; adds no guard."""
    return len(a.shape) == len(b.shape) and all(
        statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True)
    )


def human(count: float) -> str:
    """Formats bytes: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def shape_text(val: Any) -> str:
    """Formats a value's type: ``f32[8, s0, 64]``."""
    if isinstance(val, torch.Tensor):
        sizes = ", ".join(str(s) for s in val.shape)
        return f"{_SHORT.get(val.dtype, str(val.dtype).removeprefix('torch.'))}[{sizes}]"
    if isinstance(val, (tuple, list)):
        return "(" + ", ".join(shape_text(v) for v in val) + ")"
    return "" if val is None else f"{type(val).__name__} {val}"


_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}
