"""Whether a model is the one that a plan was made for, and its tensors as they are now."""

from dataclasses import replace

import torch
from torch import nn

from gtrans.analysis.erasable import Structure
from gtrans.errors import ModelError


def parameters_of(model: nn.Module, structure: Structure) -> dict[str, nn.Parameter]:
    """The parameters by path; tied ones under all their names.

    Raises:
        ModelError: the model has other parameters than the plan.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, node in structure.program.parameters().items():
        shape = tuple(axis.size for axis in structure.analysis.axes(node))
        found = tuple(parameters[name].shape) if name in parameters else None
        if found != shape:
            has = f"{found} for" if found is not None else "no"
            raise ModelError(
                f"this plan is not for this {type(model).__name__}: it has {has} {name!r}, the "
                f"plan {shape}. Either it is another model or it has been erased already; "
                "make a new plan with gtrans.prune(model, ...)"
            )
    return parameters


def with_tensors_of(model: nn.Module, structure: Structure) -> Structure:
    """The structure with the tensors that a model has now.

    Raises:
        ModelError: the model has other parameters than the plan.
    """
    state: dict[str, torch.Tensor] = dict(parameters_of(model, structure))
    state.update(model.named_buffers(remove_duplicate=False))
    program = structure.program
    tensors = {n: state.get(program.leaves[n].name, t) for n, t in program.tensors.items()}
    analysis = replace(structure.analysis, program=replace(program, tensors=tensors))
    return replace(structure, analysis=analysis)
