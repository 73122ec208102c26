"""How far the gradient of a rewritten step is from the exact one, on a batch of the user's."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gtrans.capture import Compiler, capture_always, compiled_call
from gtrans.comparison import Loss
from gtrans.pipeline import Pipeline
from gtrans.verification import in_dtype, private_copy, training_step


@dataclass(frozen=True)
class GradientError:
    """The gradient of all parameters as one vector, compared with the untouched model's.

    Attributes:
        cosine: between the two; a mean over draws, if rounding is random.
        relative: norm of the difference over the norm of the exact one, likewise.
        worst: the parameter with the largest relative error of its own.
        worst_relative: that error.
        draws: how many draws were averaged.
    """

    cosine: float
    relative: float
    worst: str
    worst_relative: float
    draws: int

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine:.4f}, relative error {self.relative:.4f} "
            f"(largest: {self.worst_relative:.4f} of {self.worst}); {self.draws} draws"
        )


def gradient_error(
    model: nn.Module,
    *inputs: Any,
    passes: str | Pipeline = "default",
    loss: Loss | None = None,
    draws: int = 3,
    seed: int = 0,
    **keyword_inputs: Any,
) -> GradientError:
    """Runs the step of a copy with and without the passes, on the eager backend, and compares.

    Args:
        model: the model; it stays as it is.
        inputs: its positional inputs.
        passes: pipeline text, or a `Pipeline`.
        loss: makes a scalar of the output; see `gtrans.verify`.
        draws: seeds to average over, for passes that round at random.
        seed: the first one.
        keyword_inputs: its keyword inputs.

    Raises:
        ModelError: nothing to differentiate.
        GTransError: a pass failed.
    """
    pipeline = Pipeline.parse(passes)
    reference, candidate = private_copy(model, None), private_copy(model, None)
    compiler = Compiler(pipeline, "eager", skip_failures=False)
    call: Any = compiled_call(candidate, compiler)
    candidate._compiled_call_impl = call
    arguments = in_dtype((tuple(inputs), keyword_inputs), None)
    cosines, errors = [], []
    squares: dict[str, float] = {}
    for number in range(seed, seed + draws):
        exact = _gradients(reference, arguments, loss, number)
        with capture_always():
            found = _gradients(candidate, arguments, loss, number)
        pairs = {n: (g.double(), found[n].double()) for n, g in exact.items() if n in found}
        inner = sum(float((a * b).sum()) for a, b in pairs.values())
        norm, other = (math.sqrt(sum(float(p[i].square().sum()) for p in pairs.values()))
                       for i in (0, 1))  # fmt: skip
        apart = {n: float((a - b).square().sum()) for n, (a, b) in pairs.items()}
        cosines.append(inner / (norm * other) if norm and other else 1.0)
        errors.append(math.sqrt(sum(apart.values())) / norm if norm else 0.0)
        for name, (a, _) in pairs.items():
            # Gradients that are zero but for rounding are measured by the size of the others.
            scale = max(float(a.norm()), 1e-3 * norm)
            error = math.sqrt(apart[name]) / scale if scale else 0.0
            squares[name] = squares.get(name, 0.0) + error**2 / draws
    worst = max(squares, key=squares.__getitem__, default="")
    return GradientError(
        cosine=sum(cosines) / draws,
        relative=sum(errors) / draws,
        worst=worst,
        worst_relative=math.sqrt(squares.get(worst, 0.0)),
        draws=draws,
    )


def _gradients(
    model: nn.Module, arguments: Any, loss: Loss | None, seed: int
) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    found = training_step(model, arguments, loss, seed)
    return {n: v.clone() for n, (kind, v) in found.items() if kind == "gradient" and v is not None}
