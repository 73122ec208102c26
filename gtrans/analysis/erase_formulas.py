"""Parameters and operations as formulas in the sizes of the classes and of the inputs.

    parameters = n1·(3 + 2·n2 + 1) + ...        flops = 2·x0·x1·n1·(...) + ...

A size that can shrink is a symbol `n1, n2, ...` in the order of the classes; a dimension of the
first tensor input is `x0, x1, ...`, of the next ones `y0, ...`, `z0, ...`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch

from gtrans.analysis.axes import Axis, atoms
from gtrans.analysis.erasable import Structure

_LETTERS = "xyzuvw"


@dataclass(frozen=True)
class Formulas:
    """What a model costs, as expressions.

    Attributes:
        parameters: number of parameters.
        flops: operations of the products of one forward.
        sizes: the number that each symbol stands for now.
        meaning: the class or input dimension behind each symbol.
    """

    parameters: sympy.Expr
    flops: sympy.Expr
    sizes: Mapping[sympy.Symbol, int]
    meaning: Mapping[sympy.Symbol, str]

    def __str__(self) -> str:
        rows = [f"  {s} = {self.sizes[s]}: {text}" for s, text in self.meaning.items()]
        return "\n".join([f"parameters = {self.parameters}", f"flops = {self.flops}", *rows])


def formulas(structure: Structure) -> Formulas:
    """The formulas of a structure; at the present sizes they give its numbers."""
    symbols: dict[Axis, sympy.Symbol] = {}
    meaning: dict[sympy.Symbol, str] = {}
    sizes: dict[sympy.Symbol, int] = {}

    def name(atom: Axis, text: str, what: str) -> None:
        if atom not in symbols:
            symbol = sympy.Symbol(text, positive=True, integer=True)
            symbols[atom], meaning[symbol], sizes[symbol] = symbol, what, atom.size

    for number, c in enumerate(structure.classes, 1):
        name(c.atom, f"n{number}", c.name)
    program = structure.program
    inputs = [
        node
        for node, leaf in program.leaves.items()
        if leaf.kind == "input" and isinstance(node.meta.get("val"), torch.Tensor)
    ]
    for letter, node in zip(_LETTERS, inputs, strict=False):
        for dim, axis in enumerate(structure.analysis.axes(node)):
            # Only whole dimensions have a name that a reader knows.
            if len(found := atoms(axis)) == 1 and axis.size > 1:
                name(found[0], f"{letter}{dim}", f"{program.leaves[node].name}.shape[{dim}]")
    kept = cast("Mapping[Axis, int]", symbols)  # sizes are only added and multiplied
    parameters: Any = sympy.factor_terms(sympy.expand(sympy.sympify(structure.parameters(kept))))
    flops: Any = sympy.factor_terms(sympy.expand(sympy.sympify(structure.flops(kept))))
    used = parameters.free_symbols | flops.free_symbols
    meaning = {s: text for s, text in meaning.items() if s in used}
    return Formulas(parameters, flops, {s: sizes[s] for s in meaning}, meaning)
