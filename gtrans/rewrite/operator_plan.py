"""What of a model can be erased as a whole operator or layer. Made by `PrunePlan.operators`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import fx, nn

from gtrans.analysis.erasable import Structure
from gtrans.analysis.erase_choice import Selection, Target, TargetOptions
from gtrans.analysis.segments import Segment, Segments, pick_segments
from gtrans.analysis.unit_scores import METHODS, score
from gtrans.errors import ModelError, OptionError, PlanError, did_you_mean
from gtrans.rewrite.erase_operators import erase_segments
from gtrans.rewrite.erase_optimizer import cut_optimizer
from gtrans.rewrite.plan_model import parameters_of, with_tensors_of
from gtrans.runtime.sparsifier import Sparsifier, SparsifierOptions


@dataclass
class OperatorPlan:
    """The operators that can go, and the means to do it. Printing it gives a table.

    Attributes:
        model: the model; nothing but `zero` and a sparsifier changes it.
        structure: its analysis.
    """

    model: nn.Module
    structure: Structure

    def __post_init__(self) -> None:
        self._segments = Segments(self.structure)

    @property
    def all(self) -> list[Segment]:
        """Every operator that can go by itself, in the order of the forward; some are nested."""
        return self._segments.all

    def __getitem__(self, name: str) -> Segment:
        known = {s.name: s for s in self.all}
        if name not in known:
            raise OptionError(f"the plan has no operator {name!r}{did_you_mean(name, known)}")
        return known[name]

    def __str__(self) -> str:
        rows = [f"  {s.name:56} {s.parameters:12,} {s.flops:14,}" for s in self.all]
        head = f"  {'operator':56} {'parameters':>12} {'FLOP':>14}"
        count = f"{type(self.model).__name__}: {len(self.all)} operators can be erased"
        return "\n".join([count, *([head] if rows else []), *rows])

    def select(
        self,
        *,
        method: str = "magnitude",
        seed: int = 0,
        **target: Unpack[TargetOptions],
    ) -> list[Segment]:
        """The operators to erase for a target, by their scores on the model as it is.

        Args:
            method: how operators are scored: see `gtrans.analysis.unit_scores`.
            seed: of the method "random".
            target: `sparsity`, `params` or `flops`, see `TargetOptions`.

        Raises:
            OptionError: not one target, or an unknown method.
            PlanError: nothing can be erased, or the target cannot be reached.
            ModelError: the method needs gradients and there are none.
        """
        if method not in METHODS:
            raise OptionError(f"unknown method {method!r}{did_you_mean(method, METHODS)}")
        self._require_some()
        found = score([self._segments.as_class()], self._tensors(), method, seed)
        return pick_segments(self._segments, found["operators"], Target(**target))

    def zeros(self) -> list[Segment]:
        """The operators all of whose parameters are zero now, without those inside others."""
        tensors = self._tensors()
        names = {w: leaf.name for w, leaf in self.structure.program.leaves.items()}
        zero = [s for s in self.all if not any(bool(tensors[names[w]].any()) for w in s.weights)]
        return _outermost(zero)

    def zero(self, chosen: Sequence[Segment]) -> None:
        """Sets the parameters of operators to zero, in the model itself."""
        tensors, leaves = self._tensors(), self.structure.program.leaves
        with torch.no_grad():
            for s in self._checked(chosen):
                for w in s.weights:
                    tensors[leaves[w].name].zero_()

    def sparsifier(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        method: str = "h2spg",
        **options: Unpack[SparsifierOptions],
    ) -> Sparsifier:
        """Trains operators to zero; like `PrunePlan.sparsifier`, for whole operators.

        Args:
            optimizer: any torch optimizer that holds the model's parameters.
            method: "h2spg" pulls whole operators to the origin; the methods of
                `PrunePlan.sparsifier` let them decay.
            options: a target and a schedule, see `SparsifierOptions`.
        """
        self._require_some()
        choice, classes = _OperatorChoice(self._segments), [self._segments.as_class()]
        return Sparsifier.of(choice, classes, self._tensors(), optimizer, method, options)

    def erase(self, chosen: Sequence[Segment] | None = None) -> fx.GraphModule:
        """The model without operators, for the captured input shapes; the original stays.

        Args:
            chosen: what to erase; by default what is zero (see `zeros`).

        Raises:
            ModelError: the model is not the one the plan was made for.
            PlanError: what is left would not be a whole.
        """
        return self._erased(chosen)[0]

    def erase_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        erased: nn.Module,
        chosen: Sequence[Segment] | None = None,
    ) -> torch.optim.Optimizer:
        """An optimizer for the erased model with the old one's options and state, cut alike.

        Raises:
            ModelError: the optimizer or the erased model does not belong to this plan.
        """
        masks = self._erased(chosen)[1]
        return cut_optimizer(optimizer, self._tensors(), erased, masks)

    # ------------------------------------------------------------------ private

    def _erased(
        self, chosen: Sequence[Segment] | None
    ) -> tuple[fx.GraphModule, dict[str, list[torch.Tensor]]]:
        structure = with_tensors_of(self.model, self.structure)
        picked = self._checked(self.zeros() if chosen is None else chosen)
        segments = Segments(structure)
        return erase_segments(segments, picked, type(self.model).__name__)

    def _checked(self, chosen: Sequence[Segment]) -> list[Segment]:
        if strangers := [s for s in chosen if s not in self.all]:
            raise ModelError(f"the operator {strangers[0].name!r} belongs to another plan")
        picked = _outermost(chosen)
        if problem := self._segments.problem(picked):
            raise PlanError(
                f"{', '.join(s.name for s in picked[:4])} cannot go together: {problem}; let "
                "`select` choose, which keeps the model whole"
            )
        return picked

    def _require_some(self) -> None:
        if not self.all:
            raise PlanError(
                f"no operator of {type(self.model).__name__} can be erased: none is an operand of "
                "an addition or a concatenation that is zero with its parameters"
            )

    def _tensors(self) -> dict[str, nn.Parameter]:
        return parameters_of(self.model, self.structure)


@dataclass(frozen=True)
class _OperatorChoice:
    """Chooses operators for a sparsifier."""

    segments: Segments

    def choose(
        self, scores: Mapping[str, torch.Tensor], target: Target, chosen: Selection
    ) -> Selection:
        """Flags the operators to erase, those inside others included."""
        everything = self.segments.all
        start = _outermost(
            [s for s, gone in zip(everything, chosen["operators"], strict=True) if gone]
        )
        picked = pick_segments(self.segments, scores["operators"], target, start)
        flags = [any(s.nodes <= p.nodes for p in picked) for s in everything]
        return {"operators": torch.tensor(flags)}


def _outermost(chosen: Sequence[Segment]) -> list[Segment]:
    return [s for s in chosen if not any(s.nodes < other.nodes for other in chosen)]
