"""Pulls slices to the origin while a model trains, and projects those that turn away: DHSPG.

    x the slice before the optimizer's step, -r v the step, with r its learning rate
    x <- (1 - s) (x - r v), s = r λ/‖x‖   λ chosen so that ‖x‖ shrinks and the step still descends
    x <- 0 where it no longer points to where it came from: x_new · x < ε ‖x‖²

v is what the optimizer did, whatever it is, so momentum and Adam count as they are. To see it costs
a copy of the slices and some passes over them, so s is looked at every few steps and kept between.
Source: arXiv:2303.06862, where s is computed at every step and nothing bounds it from below: there
what is still long at the end is cut off.
"""

from collections.abc import Mapping

import torch
from torch import nn

from gtrans.analysis.erasable import ErasableClass
from gtrans.analysis.slice_sums import Term, slice_sums

TERMS: tuple[Term, ...] = (
    lambda old, moved: old * old,
    lambda old, moved: old * moved,
    lambda old, moved: moved * moved,
)


def pull_strength(
    dot: torch.Tensor,
    norm: torch.Tensor,
    speed: torch.Tensor,
    base: float,
    amplify: float = 2.0,
    limit: float = 10.0,
) -> torch.Tensor:
    """λ of DHSPG for each index: `base`, or more where the plain step would grow the norm.

    The step is -(v + λ x/‖x‖). For x · v < 0 it shrinks ‖x‖ above λ_min = -x·v/‖x‖ and stays a
    descent direction below λ_max = -‖v‖²‖x‖/(x·v).

    Args:
        dot: x · v.
        norm: ‖x‖.
        speed: ‖v‖².
        base: λ where the plain step shrinks the norm by itself.
        amplify: how far above λ_min to go.
        limit: never more than this times `base`, unless λ_max demands the middle.
    """
    growing = dot < 0
    safe = torch.where(growing, dot, -1.0)
    lowest, highest = -safe / norm, -speed * norm / safe
    wanted = (amplify * lowest).clamp(min=base, max=base * limit)
    wanted = torch.where(wanted >= highest, (lowest + highest) / 2, wanted)
    return torch.where(growing, wanted, base)


class PulledClass:
    """The slices of a class that are on their way to the origin, as they are before a step.

    Args:
        cls: the class.
        tensors: the model's parameters by path.
        active: which of its indices are pulled, booleans [size].
    """

    def __init__(
        self, cls: ErasableClass, tensors: Mapping[str, nn.Parameter], active: torch.Tensor
    ) -> None:
        self.cls, self.active = cls, active
        self._held = [
            _Held(torch.atleast_1d(tensors[m.name].detach()), m.dim, m.labels, active)
            for m in (cls.producers if bool(active.any()) else ())
            if tensors[m.name].requires_grad  # what is frozen goes nowhere by itself
        ]

    def look(
        self, rate: float, base: float, half_space: float, least: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Looks after the step at what it did.

        Args:
            rate: the learning rate.
            base: λ where the plain step shrinks the norm by itself.
            half_space: ε.
            least: what s is at least.

        Returns:
            s for each index, float64 [size], 0 for what is not pulled; and which turn away.
        """
        square, along, speed = self._sums()
        norm = square.sqrt().clamp(min=1e-12)
        strength = pull_strength(-along / rate, norm, speed / rate**2, base)
        share = torch.where(self.active, (rate * strength / norm).clamp(least, 1.0), 0.0)
        inside = (1 - share) * (square + along) >= half_space * norm * norm
        return share, self.active & ~(inside & (share < 1))

    def _sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each index x · x, x · d and d · d, with d what the step has added to x."""
        total = torch.zeros(3, self.cls.size, dtype=torch.float64)
        for held in self._held:
            hit = held.labels >= 0
            total.index_add_(1, held.labels[hit], held.sums().cpu()[:, hit])
        square, along, speed = total
        return square, along, speed


class _Held:
    """The pulled slices of one parameter: along dimension 0 their rows, else all of it.

    Args:
        parameter: detached, with at least one dimension.
        dim: the dimension.
        labels: the index of the class of each index of the dimension, -1 for none.
        active: which indices of the class are pulled.
    """

    def __init__(
        self, parameter: torch.Tensor, dim: int, labels: torch.Tensor, active: torch.Tensor
    ) -> None:
        hit = (labels >= 0) & active[labels.clamp(min=0)]
        self.parameter, self.dim = parameter, dim
        self.rows: torch.Tensor | None = None
        self.labels = torch.where(hit, labels, -1)
        if dim == 0:
            self.rows, self.labels = hit.nonzero().flatten().to(parameter.device), labels[hit]
            self.old = parameter.index_select(0, self.rows)
        else:
            self.old = parameter.clone()

    def sums(self) -> torch.Tensor:
        """The terms of `PulledClass._sums` for each of `labels`."""

        def read(piece: slice) -> tuple[torch.Tensor, torch.Tensor]:
            old = self.old[piece]
            if self.rows is None:
                return old, self.parameter[piece] - old
            return old, self.parameter.index_select(0, self.rows[piece]) - old

        return slice_sums(TERMS, self.dim, self.old, read)
