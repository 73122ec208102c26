"""Structured pruning of any model: find what can go, train it to zero, erase it.

    plan = gtrans.prune(model, x)               which classes there are, and why the rest stays
    plan.sparsifier(optimizer, sparsity=0.5)    zeros arise while training goes on
    slim = plan.erase()                         a smaller model that computes the same

A class is erased index by index: rows of one weight, the matching biases and norm entries, the
columns of whatever reads them.

Shapes: any; the model's inputs and outputs keep theirs.
Saves: parameters, their gradients and optimizer state, and the operations on them.
Contract: classes marked exact, once zero, can go with outputs and kept gradients equal up to
    rounding; the proof is the zero analysis of `gtrans.analysis.zeros`. The others only run.
Source: arXiv:2312.09411 (zero-invariant groups, erasure), arXiv:2301.12900 (dependency groups);
    the axis analysis and the proof are gtrans'.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gtrans.analysis.erasable import ErasableClass, Frozen, find_structure
from gtrans.errors import ModelError, PlanError
from gtrans.ir.program import export_program
from gtrans.rewrite.prune_plan import PrunePlan

__all__ = ["PrunePlan", "prune"]


def prune(
    model: nn.Module, *inputs: Any, same_class: bool = False, **keyword_inputs: Any
) -> PrunePlan:
    """Finds what of a model can be erased. The model is not changed.

    Args:
        model: any model whose forward can be captured as one graph (`torch.export`).
        inputs: positional inputs to capture it with.
        same_class: leave out classes that the model's own class could not express once they are
            smaller, so that `erase` gives a model of the same class. Costs a few forwards a class.
        keyword_inputs: keyword inputs.

    Raises:
        ModelError: not a module, or it has no parameters.
        CaptureError: the forward cannot be captured as one graph.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not any(True for _ in model.parameters()):
        raise ModelError(f"{type(model).__name__} has no parameters, so there is nothing to prune")
    program = export_program(model, inputs, keyword_inputs)
    plan = PrunePlan(model, find_structure(program), inputs, keyword_inputs)
    return _within_class(plan) if same_class else plan


def _within_class(plan: PrunePlan) -> PrunePlan:
    """Freezes the classes that the model's own class cannot express at half their size."""
    # One attribute may stand for two classes, so every two must be cut apart in some trial.
    bits = range(max(1, (len(plan.classes) - 1).bit_length()))
    trials = [
        [c for i, c in enumerate(plan.classes) if (i >> bit) % 2 == side]
        for bit in bits
        for side in (0, 1)
    ]
    if not any(_why_not(plan, trial) for trial in trials):
        return plan
    reasons = {c.name: _why_not(plan, [c]) for c in plan.classes}
    frozen = [
        Frozen(f"the model's class cannot express it: {reason}", c.size, (c.name,))
        for c in plan.classes
        if (reason := reasons[c.name])
    ]
    classes = [c for c in plan.classes if not reasons[c.name]]
    structure = replace(plan.structure, classes=classes, frozen=[*plan.frozen, *frozen])
    return replace(plan, structure=structure)


def _why_not(plan: PrunePlan, classes: Sequence[ErasableClass]) -> str:
    half = {c.name: torch.arange(c.size) < c.size // 2 for c in classes}
    try:
        plan.erase(half, form="module")
    except PlanError as error:
        return str(error.__cause__)
    return ""
