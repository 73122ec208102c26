"""Pulls slices to the origin while a model trains, and projects those that turn away: DHSPG.

    x the slice before the optimizer's step, -r v the step, with r its learning rate
    x <- x - r v - r λ x / ‖x‖            λ chosen so that ‖x‖ shrinks and the step still descends
    x <- 0 where it no longer points to where it came from: x_new · x < ε ‖x‖²

v is what the optimizer did, whatever it is, so momentum and Adam count as they are.
Source: arXiv:2303.06862.
"""

from collections.abc import Mapping

import torch
from torch import nn

from gtrans.analysis.erasable import ErasableClass
from gtrans.analysis.slice_sums import Term, pieces, slice_sums

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
    """The slices of a class that are on their way to the origin.

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
        ]

    def pull(self, rate: float, base: float, half_space: float) -> torch.Tensor:
        """Pulls after an optimizer's step; returns which indices turn away and are to be zero."""
        square, along, speed = self._sums()
        norm = square.sqrt().clamp(min=1e-12)
        strength = pull_strength(-along / rate, norm, speed / rate**2, base)
        share = torch.where(self.active, rate * strength / norm, 0.0)
        for held in self._held:
            held.subtract(share)
        inside = (1 - share) * square + along >= half_space * norm * norm
        return self.active & ~inside

    def note(self) -> None:
        """Notes the slices as they are now, before the next step."""
        for held in self._held:
            held.note()

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
        if dim == 0:
            self.rows = hit.nonzero().flatten().to(parameter.device)
        self.labels = labels[hit] if dim == 0 else torch.where(hit, labels, -1)
        whole = slice(0, len(self.rows) if self.rows is not None else len(parameter))
        self.old = self._at(whole).clone()

    def sums(self) -> torch.Tensor:
        """The terms of `PulledClass._sums` for each of `labels`."""

        def read(piece: slice) -> tuple[torch.Tensor, torch.Tensor]:
            old = self.old[piece]
            return old, self._at(piece) - old

        return slice_sums(TERMS, self.dim, self.old, read)

    def subtract(self, share: torch.Tensor) -> None:
        """Takes a share of what they were from the slices."""
        shape = [-1 if d == self.dim else 1 for d in range(self.old.ndim)]
        factor = torch.where(self.labels >= 0, share[self.labels.clamp(min=0)], 0.0)
        factor = factor.to(self.old.device, self.old.dtype).reshape(shape)
        for piece in pieces(self.old):
            step = self.old[piece] * (factor[piece] if self.dim == 0 else factor)
            if self.rows is None:
                self.parameter[piece].sub_(step)
            else:
                self.parameter.index_add_(0, self.rows[piece], step, alpha=-1)

    def note(self) -> None:
        """Notes the slices as they are now."""
        for piece in pieces(self.old):
            self.old[piece] = self._at(piece)

    def _at(self, piece: slice) -> torch.Tensor:
        if self.rows is None:
            return self.parameter[piece]
        return self.parameter.index_select(0, self.rows[piece])
