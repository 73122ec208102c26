"""The plan of a pruning: what can be erased, choosing, sparsifying in training, erasing.

Made by `gtrans.prune`; see there.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Unpack

import torch
from torch import nn

from gtrans.analysis.erasable import ErasableClass, Frozen, Structure
from gtrans.analysis.erase_choice import (
    IndexChoice,
    Selection,
    Target,
    TargetOptions,
    as_masks,
    choose,
    kept,
)
from gtrans.analysis.erase_formulas import Formulas, formulas
from gtrans.analysis.unit_scores import METHODS, score
from gtrans.errors import OptionError, PlanError, did_you_mean
from gtrans.ir.sizes import human
from gtrans.rewrite.erase_graph import GraphErasure, cut
from gtrans.rewrite.erase_modules import ModuleErasure
from gtrans.rewrite.erase_optimizer import cut_optimizer
from gtrans.rewrite.fit_attributes import Inexpressible
from gtrans.rewrite.fit_config import fit_config
from gtrans.rewrite.operator_plan import OperatorPlan
from gtrans.rewrite.plan_model import parameters_of, with_tensors_of
from gtrans.runtime.sparsifier import Sparsifier, SparsifierOptions

log = logging.getLogger("gtrans")

Form = Literal["auto", "module", "graph"]
Norm = Literal["keep", "restart"]


SHARES = tuple(tenth / 10 for tenth in range(10))
"""The sparsities of `PrunePlan.pareto`."""


@dataclass(frozen=True)
class Trade:
    """What a sparsity leaves of a model."""

    sparsity: float
    parameters: int
    flops: int
    bytes: int


@dataclass
class PrunePlan:
    """What of a model can be erased, and the means to do it. Printing it gives a table.

    Attributes:
        model: the model it was made for; nothing but `zero` and a sparsifier changes it.
        structure: its analysis.
        args: positional inputs that it was captured with.
        kwargs: keyword inputs.
    """

    model: nn.Module
    structure: Structure
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def classes(self) -> list[ErasableClass]:
        """All erasable classes."""
        return self.structure.classes

    @property
    def exact(self) -> list[ErasableClass]:
        """The classes whose zeros can go without a trace."""
        return [c for c in self.classes if c.exact]

    @property
    def frozen(self) -> list[Frozen]:
        """What cannot be erased, and why."""
        return self.structure.frozen

    @cached_property
    def operators(self) -> OperatorPlan:
        """What can be erased as a whole: branches, layers, candidates of a supernet."""
        return OperatorPlan(self.model, self.structure)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.structure.parameters({})

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward on the captured inputs (products only)."""
        return self.structure.flops({})

    def left(self, selection: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Parameters, their bytes and the operations that a selection would leave."""
        counts = kept(self.classes, self._checked(selection))
        return {
            "parameters": self.structure.parameters(counts),
            "bytes": self.structure.parameter_bytes(counts),
            "flops": self.structure.flops(counts),
        }

    def formulas(self) -> Formulas:
        """Parameters and operations as expressions in the sizes of classes and inputs."""
        return formulas(self.structure)

    # ------------------------------------------------------------------ choosing

    def pareto(self, shares: Sequence[float] = SHARES, **options: Any) -> list[Trade]:
        """What is left at several sparsities, as far as they can be reached.

        Args:
            shares: sparsities, in rising order.
            options: as for `select`, without a target.

        Raises:
            OptionError: see `select`.
            PlanError: nothing can be erased.
        """
        self._admitted(options.get("contract", "exact"))
        found: list[Trade] = []
        for share in shares:
            try:
                left = self.left(self.select(sparsity=share, **options))
            except PlanError:
                break  # beyond the largest that can be reached
            found.append(Trade(share, left["parameters"], left["flops"], left["bytes"]))
        return found

    def select(
        self,
        *,
        method: str = "magnitude",
        scope: Literal["global", "local", "isomorphic"] = "global",
        multiple_of: int = 1,
        contract: Literal["exact", "approximate"] = "exact",
        seed: int = 0,
        **target: Unpack[TargetOptions],
    ) -> Selection:
        """The indices to erase for a target, by their scores on the model as it is.

        Args:
            method: how indices are scored: see `gtrans.analysis.unit_scores`.
            scope: "global" compares all indices; "local" takes the same share of every class, so
                that equal layers stay equal; "isomorphic" compares equal classes only.
            multiple_of: sizes that are left are multiples of this.
            contract: which classes may be touched.
            seed: of the method "random".
            target: `sparsity`, `params` or `flops`, see `TargetOptions`.

        Raises:
            OptionError: not one target, or an unknown method.
            PlanError: nothing can be erased, or the target cannot be reached.
            ModelError: the method needs gradients and there are none.
        """
        if method not in METHODS:
            raise OptionError(f"unknown method {method!r}{did_you_mean(method, METHODS)}")
        classes = self._admitted(contract)
        scores = score(classes, self._tensors(self.model), method, seed)
        if method == "isomorphic":
            scope = "isomorphic"
        goal = Target(**target)
        return choose(self.structure, classes, scores, goal, multiple_of=multiple_of, scope=scope)

    def zeros(self, model: nn.Module | None = None) -> Selection:
        """The indices of exact classes whose producer slices are zero now."""
        tensors = self._tensors(model or self.model)
        return {c.name: c.zeros(tensors) for c in self.exact}

    def zero(self, selection: Mapping[str, torch.Tensor]) -> None:
        """Sets the producer slices of a selection to zero, in the model itself."""
        tensors = self._tensors(self.model)
        chosen = self._checked(selection)
        with torch.no_grad():
            for c in self.classes:
                for m in c.producers if c.name in chosen else ():
                    hit = (m.labels >= 0) & chosen[c.name][m.labels.clamp(min=0)]
                    where = hit.nonzero().flatten().to(tensors[m.name].device)
                    tensors[m.name].index_fill_(m.dim, where, 0)

    def sparsifier(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        method: str = "hesso",
        multiple_of: int = 1,
        contract: Literal["exact", "approximate"] = "exact",
        **options: Unpack[SparsifierOptions],
    ) -> Sparsifier:
        """Zeroes slices while the model trains; it follows the optimizer's steps by itself.

        Args:
            optimizer: any torch optimizer that holds the model's parameters.
            method: "hesso" (the default), "hesso-cric", "dhspg", or a scoring method with the
                schedule of "hesso".
            multiple_of: sizes that are left are multiples of this.
            contract: which classes may be touched.
            options: a target and a schedule, see `SparsifierOptions`.

        Raises:
            OptionError: an option is out of range.
            PlanError: nothing can be erased, or the target cannot be reached.
            ModelError: the optimizer holds the parameters of another model.
        """
        classes = self._admitted(contract)
        scope = "isomorphic" if method == "isomorphic" else "global"
        choice = IndexChoice(self.structure, classes, multiple_of, scope)
        tensors = self._tensors(self.model)
        return Sparsifier.of(choice, classes, tensors, optimizer, method, options)

    # ------------------------------------------------------------------ erasing

    def erase(
        self,
        selection: Mapping[str, torch.Tensor] | None = None,
        *,
        form: Form = "auto",
        norm: Norm = "keep",
        model: nn.Module | None = None,
    ) -> nn.Module:
        """A smaller model; the original stays as it is.

        Args:
            selection: what to erase; by default what is zero (see `zeros`).
            form: "module" gives a model of the same class, "graph" a `GraphModule` for the
                captured input shapes; "auto" the former where the class can express it.
            norm: "keep" lets norms and means over erased axes divide by the old size, which is
                exact; "restart" lets them start anew with stock modules.
            model: another model with the same parameters, such as a loaded checkpoint.

        Raises:
            ModelError: the model is not the one the plan was made for, or has been erased.
            PlanError: form="module" and the model's class cannot express the result.
        """
        target = self.model if model is None else model
        structure = with_tensors_of(target, self.structure)
        chosen = self._checked(self.zeros(target) if selection is None else selection)
        if not any(bool(gone.any()) for gone in chosen.values()):
            return copy.deepcopy(target)
        graph = GraphErasure(structure, as_masks(self.classes, chosen), norm == "keep")
        module = graph.build(type(target).__name__)
        if form == "graph":
            return module
        try:
            return ModuleErasure(graph, module).build(target, self.args, self.kwargs)
        except Inexpressible as error:
            if form == "module":
                raise PlanError(
                    f"{type(target).__name__} cannot express this erasure: {error}; take "
                    "form='graph', or leave out the classes concerned "
                    "(gtrans.prune(..., same_class=True) finds them)"
                ) from error
            log.warning(
                "%s cannot express this erasure (%s), so it becomes a GraphModule",
                type(target).__name__,
                error,
            )
            return module

    def config_for(self, erased: nn.Module) -> Any:
        """The model's config with the sizes of an erased model of the same class.

        With it as the erased model's `config`, what `save_pretrained` writes can be read by
        `from_pretrained`. The config of the model itself stays as it is.

        Raises:
            PlanError: no setting of the config describes the erased model.
        """
        try:
            return fit_config(self.model, erased, self.args, self.kwargs)
        except Inexpressible as error:
            raise PlanError(
                f"the config of {type(self.model).__name__} cannot describe the erased model: "
                f"{error}"
            ) from error

    def erase_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        erased: nn.Module,
        selection: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.optim.Optimizer:
        """An optimizer for the erased model with the old one's options and state, cut alike.

        Raises:
            ModelError: the optimizer or the erased model does not belong to this plan.
        """
        chosen = self._checked(self.zeros() if selection is None else selection)
        masks = self.structure.masks(as_masks(self.classes, chosen))
        return cut_optimizer(optimizer, self._tensors(self.model), erased, masks)

    def cut(
        self,
        tensors: Mapping[str, torch.Tensor],
        selection: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Cuts tensors that belong to parameters by name: an EMA, a state_dict, master weights."""
        chosen = self._checked(self.zeros() if selection is None else selection)
        masks = self.structure.masks(as_masks(self.classes, chosen))
        return {name: cut(t, masks[name]) if name in masks else t for name, t in tensors.items()}

    # ------------------------------------------------------------------ showing

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for `--json`."""
        return {
            "parameters": self.parameters,
            "flops": self.flops,
            "classes": [
                {
                    "name": c.name,
                    "size": c.size,
                    "contract": "exact" if c.exact else "approximate",
                    "reason": c.reason,
                    "parameters_per_index": c.parameters,
                    "flops_per_index": self._flops_per_index(c),
                    "members": [
                        {"name": m.name, "dim": m.dim, "producer": m.producer} for m in c.members
                    ],
                }
                for c in self.classes
            ],
            "frozen": [
                {"reason": f.reason, "size": f.size, "members": list(f.members)}
                for f in self.frozen
            ],
        }

    def __str__(self) -> str:
        rows = [f"  {'class':44} {'size':>6} {'params/index':>13} {'FLOP/index':>11}  contract"]
        for c in self.classes:
            contract = "exact" if c.exact else f"approximate: {c.reason}"
            rows.append(
                f"  {c.name:44} {c.size:6} {c.parameters:13,} "
                f"{self._flops_per_index(c):11,}  {contract}"
            )
        smallest = {c.atom: 1 for c in self.exact}
        least = self.structure.parameters(smallest) / max(1, self.parameters)
        size = human(self.structure.parameter_bytes({}))
        return "\n".join(
            [
                f"{type(self.model).__name__}: {self.parameters:,} parameters ({size}), "
                f"{self.flops:,} FLOP a forward",
                f"erasable   {len(self.exact)} exact and {len(self.classes) - len(self.exact)} "
                f"approximate classes with {sum(c.size for c in self.classes):,} indices; exact "
                f"ones alone can go down to {least:.1%} of the parameters",
                *rows,
                *(["frozen"] if self.frozen else []),
                *(_frozen_row(f) for f in self.frozen),
                *(f"not a tensor, not captured: {r}" for r in self.structure.program.left_out),
            ]
        )

    # ------------------------------------------------------------------ private

    def _flops_per_index(self, c: ErasableClass) -> int:
        return self.flops - self.structure.flops({c.atom: c.size - 1})

    def _admitted(self, contract: str) -> list[ErasableClass]:
        if contract not in ("exact", "approximate"):
            raise OptionError(f"contract must be 'exact' or 'approximate', got {contract!r}")
        admitted = self.exact if contract == "exact" else self.classes
        if not admitted:
            reasons = "\n".join(map(_frozen_row, self.frozen)) or "  it has no parameters"
            hint = "; contract='approximate' admits others" if self.classes else ""
            raise PlanError(
                f"nothing of {type(self.model).__name__} can be erased{hint}:\n{reasons}"
            )
        return admitted

    def _tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return parameters_of(model, self.structure)

    def _checked(self, selection: Mapping[str, torch.Tensor]) -> Selection:
        known = {c.name: c for c in self.classes}
        for name, gone in selection.items():
            if name not in known:
                raise OptionError(f"the plan has no class {name!r}{did_you_mean(name, known)}")
            if gone.dtype is not torch.bool or tuple(gone.shape) != (known[name].size,):
                raise OptionError(
                    f"the selection of {name!r} must be {known[name].size} booleans, got "
                    f"{tuple(gone.shape)} of {gone.dtype}"
                )
            if bool(gone.all()):
                raise OptionError(f"the selection of {name!r} erases every index; one must stay")
        return dict(selection)


def _frozen_row(f: Frozen) -> str:
    more = f" and {len(f.members) - 2} more" if len(f.members) > 2 else ""
    return f"  {', '.join(f.members[:2])}{more} ({f.size}): {f.reason}"
