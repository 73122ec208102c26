"""Bytes and operations of a step as expressions of its dynamic dimensions, and the sizes that fit.

A captured graph whose sizes are symbolic says how every value grows. For other sizes than those it
was captured with, the same schedule is simulated again with each storage at its new size:

    peak(B, T, ...) = constants + max_i sum of bytes(v)(B, T, ...) over v alive at i, + workspace(i)

Workspace is known for the captured sizes only; it is taken to grow with what its kernel writes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import sympy
import torch
from torch import fx

from gtrans.analysis.cost import flops_expression
from gtrans.analysis.liveness import Liveness
from gtrans.errors import OptionError
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import hint, tensor_bytes_expression

Sizes = Mapping[str, int]

_AXIS = re.compile(r"(?P<argument>.+)\.size\(\)\.(?P<axis>\d+)")
# What the axes of an argument are called, by its number of dimensions.
_LETTERS = {1: "B", 2: "BT", 3: "BTD", 4: "BCHW", 5: "BCLHW"}


class ClosedForm:
    """One graph's step as a function of its dynamic dimensions.

    Args:
        joint: the graph, with its plan written into it.
        liveness: its memory at the captured sizes.
    """

    def __init__(self, joint: JointGraph, liveness: Liveness) -> None:
        self._symbols = _named(joint)
        self._liveness = liveness
        storages = list(liveness.storages())
        self._spans = [(s.born, s.last) for s in storages]
        self._bytes = [self._expression(s.value) for s in storages]
        self._extra = self._workspace_per_byte()
        self._functions: dict[sympy.Expr, Callable[..., Any]] = {}

    @property
    def dimensions(self) -> dict[str, int]:
        """The dynamic dimensions and the sizes that they were captured with."""
        return {str(name): traced for name, traced in self._symbols.values()}

    def saved(self, values: Iterable[fx.Node]) -> sympy.Expr:
        """Bytes of some values together."""
        return sympy.expand(sum((self._expression(n.meta["val"]) for n in values), sympy.S.Zero))

    def flops(self) -> sympy.Expr:
        """Floating-point operations of the step."""
        tasks = self._liveness.schedule.tasks
        total = sum((flops_expression(t.node) for t in tasks), sympy.S.Zero)
        return sympy.expand(self._renamed(total))

    def at_peak(self) -> sympy.Expr:
        """Bytes of what is alive where the step peaks at the captured sizes, without workspace."""
        at = self._liveness.peak_task
        alive = [b for b, (born, last) in zip(self._bytes, self._spans, strict=True)
                 if born <= at <= last]  # fmt: skip
        return sympy.expand(sum(alive, sympy.S.Zero))

    def peak(self, sizes: Sizes) -> int:
        """The simulated peak at other sizes; dimensions that are left out stay as captured."""
        values = {**self.dimensions, **sizes}
        end = len(self._liveness.schedule.tasks)
        changes = [0.0] * (end + 2)
        for size, (born, last) in zip(self._bytes, self._spans, strict=True):
            count = self._number(size, values)
            changes[born] += count
            changes[last + 1] -= count
        held = list(accumulate(changes))[:end]
        for number, (expression, factor) in self._extra.items():
            held[number] += factor * self._number(expression, values)
        return round(max(held, default=0))

    def _expression(self, value: Any) -> sympy.Expr:
        if not isinstance(value, torch.Tensor):
            return sympy.S.Zero
        return self._renamed(tensor_bytes_expression(value))

    def _renamed(self, expression: sympy.Expr) -> sympy.Expr:
        names = {symbol: name for symbol, (name, _) in self._symbols.items()}
        return sympy.sympify(expression).xreplace(names)

    def _number(self, expression: sympy.Expr, sizes: Sizes) -> float:
        if expression.is_number:
            return float(expression)
        if expression not in self._functions:
            names = sorted(expression.free_symbols, key=str)
            function = sympy.lambdify(names, expression, "math")
            self._functions[expression] = lambda sizes: function(*(sizes[str(n)] for n in names))
        return float(self._functions[expression](sizes))

    def _workspace_per_byte(self) -> dict[int, tuple[sympy.Expr, float]]:
        """Per task with a workspace: the bytes it writes, and its workspace per such byte."""
        found = {}
        for number, extra in self._liveness.workspace().items():
            written = [b for b, (born, _) in zip(self._bytes, self._spans, strict=True)
                       if born == number]  # fmt: skip
            total = sum(written, sympy.S.Zero)
            now = self._number_now(total)
            found[number] = (total, extra / now) if now else (sympy.S.One, float(extra))
        return found

    def _number_now(self, expression: sympy.Expr) -> float:
        return float(expression.subs(dict(self._symbols.values())))


def largest(peak: Callable[[int], int], limit: int, dimension: str) -> int:
    """The largest size whose peak stays within a limit.

    Args:
        peak: bytes for a size; must not fall where the size grows.
        limit: bytes.
        dimension: what is being sized, for the message.

    Raises:
        OptionError: not even the size 1 fits.
    """
    if peak(1) > limit:
        raise OptionError(
            f"no size of {dimension} fits into {limit} bytes: with {dimension}=1 the step peaks at "
            f"{peak(1)} bytes; make the model or another dimension smaller, or give a budget"
        )
    high = 2
    while peak(high) <= limit and high < 1 << 40:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= limit else (low, middle)
    return low


def _named(joint: JointGraph) -> dict[sympy.Symbol, tuple[sympy.Symbol, int]]:
    """A readable name and the captured size of every dynamic dimension of the inputs."""
    ranks = {
        info.name: len(node.meta["val"].shape)
        for info, node in zip(joint.signature.inputs, joint.primals, strict=True)
        if isinstance(node.meta.get("val"), torch.Tensor)
    }
    found: dict[sympy.Symbol, tuple[sympy.Symbol, int]] = {}
    for info, node in zip(joint.signature.inputs, joint.primals, strict=True):
        val = node.meta.get("val")
        if not isinstance(val, torch.SymInt) or not isinstance(val.node.expr, sympy.Symbol):
            continue
        name = _name(info.name, ranks)
        taken = {str(n) for n, _ in found.values()}
        number = 2
        while (unique := name if name not in taken else f"{name}{number}") in taken:
            number += 1
        found[val.node.expr] = sympy.Symbol(unique, positive=True, integer=True), hint(val)
    return found


def _name(source: str, ranks: Mapping[str, int]) -> str:
    match = _AXIS.fullmatch(source)
    if match is None:
        return re.sub(r"\W+", "_", source)
    argument, axis = match["argument"], int(match["axis"])
    letters = _LETTERS.get(ranks.get(argument, 0), "")
    return letters[axis] if axis < len(letters) else re.sub(r"\W+", "_", f"{argument}_{axis}")
