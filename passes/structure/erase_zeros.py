"""Erases what is zero: units, channels, heads and features that contribute nothing.

    linear(gelu(linear(x, W1, b1)), W2)       linear(gelu(linear(x, W1[k], b1[k])), W2[:, k])
    rows of W1 and b1 that are zero    -->    k: the other rows

Zeros arise by pruning, by a group-sparse regulariser, or in layers grown wider than needed. Where
the zeros of an index provably vanish before anything sums over it, all slices of the index go.

Shapes: any; the model's inputs and outputs keep theirs.
Saves: parameters, their gradients and optimizer state, and the operations on them.
Contract: exact up to rounding, as sums run over fewer terms.
Source: zero-invariant groups of arXiv:2107.07467; the proof is `gtrans.analysis.zeros`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gtrans.analysis.axes import Axis
from gtrans.analysis.erasable import ErasableClass, find_structure
from gtrans.contract import Contract, Exact
from gtrans.core import HELD_BACK, GraphKind, Knob, Pass, Permission, Stats
from gtrans.ir.program import Program
from gtrans.rewrite.erase_graph import GraphErasure


@dataclass(frozen=True)
class EraseZeros(Pass[Program]):
    """Erases units, channels and heads whose parameters are zero."""

    name: ClassVar[str] = "erase-zeros"
    knob: ClassVar[Knob] = Knob.PARAMETERS
    works_on: ClassVar[GraphKind] = Program
    contract: ClassVar[Contract] = Exact(bitwise=False)

    def run(self, program: Program, permitted: Permission) -> Stats:
        """Erases the zero indices of every class that may lose them."""
        structure = find_structure(program)
        tensors = {program.leaves[n].name: t for n, t in program.tensors.items()}
        stats = Stats(matched=len(structure.classes))
        erased: dict[Axis, torch.Tensor] = {}
        for c in structure.classes:
            zeros = c.zeros(tensors)
            reason = _reason_against(c, zeros)
            if not reason and not permitted(c.name):
                reason = HELD_BACK
            if reason:
                stats.skipped[reason] += 1
                continue
            erased[c.atom] = zeros
            stats.notes.append(f"{c.name}: {int(zeros.sum())} of {c.size} indices erased")
        stats.rewritten = len(erased)
        if erased:
            GraphErasure(structure, erased).apply()
        return stats


def _reason_against(c: ErasableClass, zeros: torch.Tensor) -> str:
    if not bool(zeros.any()):
        return "no index of it is zero in everything that produces it"
    return "" if c.exact else f"zeros would not vanish: {c.reason}"
