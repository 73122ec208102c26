"""Compare a rewritten training step with the untouched model, gradient by gradient."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gtrans.api import install, require_captured, require_trainable
from gtrans.capture import Compiler, capture_always
from gtrans.captured import Resident
from gtrans.comparison import (
    Comparison,
    Loss,
    compare_tensors,
    default_loss,
    longest_sum,
    rounding_scale,
)
from gtrans.contract import Contract, Exact
from gtrans.errors import BudgetError, GTransError, ModelError, VerifyError
from gtrans.explanation import Explanation
from gtrans.ir.half import Backend
from gtrans.listing import Listing, Shown
from gtrans.pipeline import Gate, Pipeline

_MOST_ROWS = 10  # of the comparisons that are printed
_OWN_DRAWS = (
    "the untouched model differs from itself when it runs twice with one seed (it seeds random "
    "numbers itself, or keeps a state), so this says nothing about the passes; model.eval() or a "
    "dropout of 0 may help"
)


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """The result of `verify`. Printing it gives a table."""

    contract: Contract
    comparisons: Sequence[Comparison]
    explanation: Explanation
    notes: Sequence[str] = ()

    @property
    def ok(self) -> bool:
        """Whether every compared tensor stays within the contract."""
        return all(c.ok for c in self.comparisons)

    @property
    def worst(self) -> Comparison:
        """The comparison with the largest relative difference."""
        return max(self.comparisons, key=lambda c: (not c.ok, c.relative))

    def gradients(self, dtype: torch.dtype) -> list[Comparison]:
        """The gradient comparisons of one dtype."""
        return [c for c in self.comparisons if c.kind == "gradient" and c.dtype is dtype]

    def require(self) -> "Verification":
        """Returns itself.

        Raises:
            VerifyError: a tensor differs by more than the contract admits.
        """
        if not self.ok:
            raise VerifyError(str(self))
        return self

    def __str__(self) -> str:
        lines = [self.headline(), *self.notes]
        lines.append(f"  {'':40} {'dtype':>9} {'relative':>9} {'largest':>9} {'bound':>9}")
        for c in self._worst_first():
            lines.append(
                f"  {c.kind + ' ' + c.name:40} {str(c.dtype)[6:]:>9} {c.relative:9.1e} "
                f"{c.largest:9.1e} {c.bound:9.1e}{'' if c.ok else '  <-- differs'}"
            )
        return "\n".join([*lines, *self._rest()])

    def headline(self) -> str:
        """The verdict and the contract."""
        wrong, count = sum(not c.ok for c in self.comparisons), len(self.comparisons)
        verdict = (
            f"{wrong} of {count} tensors differ by more than the contract"
            if wrong
            else f"all {count} tensors agree within the contract"
        )
        return f"{verdict} ({self.contract})"

    def shown(self) -> list[str | Listing]:
        """The verdict, the notes, and the comparisons that matter most."""
        rows = [
            (
                c.kind,
                c.name,
                str(c.dtype)[6:],
                f"{c.relative:.1e}",
                f"{c.largest:.1e}",
                f"{c.bound:.1e}",
                "ok" if c.ok else "differs",
            )
            for c in self._worst_first()
        ]
        columns = ("", "tensor", "dtype", ">relative", ">largest", ">bound", "verdict")
        return [self.headline(), *self.notes, Listing(columns, rows), *self._rest()]

    def _worst_first(self) -> list[Comparison]:
        wrong = [c for c in self.comparisons if not c.ok]
        return sorted(wrong or self.comparisons, key=lambda c: -c.relative)[:_MOST_ROWS]

    def _rest(self) -> list[str]:
        wrong = [c for c in self.comparisons if not c.ok]
        rest = len(wrong or self.comparisons) - _MOST_ROWS
        return [f"  ... {rest} more"] if rest > 0 else []

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for `--json`."""
        return {
            "ok": self.ok,
            "contract": str(self.contract),
            "notes": list(self.notes),
            "comparisons": [
                {
                    "name": c.name,
                    "kind": c.kind,
                    "dtype": str(c.dtype),
                    "relative": c.relative,
                    "largest": c.largest,
                    "cosine": c.cosine,
                    "bound": c.bound,
                    "ok": c.ok,
                }
                for c in self.comparisons
            ],
        }


def verify(
    model: nn.Module,
    *inputs: Any,
    passes: str | Pipeline = "default",
    skip: Sequence[str] = (),
    backend: str = "eager",
    loss: Loss | None = None,
    seed: int = 0,
    each: bool = False,
    **keyword_inputs: Any,
) -> Verification:
    """Compares outputs, every gradient and every buffer with those of the untouched model.

    Both versions run one training step on copies of the model with the same random seed, in
    float64 and in the model's own dtype. The bound follows from the contract of the pipeline:
    1e-9 in float64 for exact passes, the reassociation bound below float64.

    Args:
        model: the model to check; it stays as it is.
        inputs: its positional inputs.
        passes: pipeline text, or a `Pipeline` of pass objects.
        skip: passes to leave out of it.
        backend: "eager" checks the rewritten graph, "inductor" what is compiled from it.
        loss: makes a scalar of the output; by default `output.loss`, or else a fixed random
            weighting of all floating outputs.
        seed: seed of the random state.
        each: compare after every pass rather than after the last, and name the first pass after
            which the step is wrong.
        keyword_inputs: its keyword inputs.

    Raises:
        ModelError: nothing to differentiate, or the model does not accept the inputs.
        CaptureError: no graph was captured, so that nothing would be compared.
        GTransError: a pass failed.
    """
    pipeline = Pipeline.parse(passes).without(skip)
    first = 1 if each and pipeline.passes else len(pipeline.passes)
    for count in range(first, len(pipeline.passes) + 1):
        part = Pipeline(pipeline.passes[:count])
        result = compare(model, inputs, keyword_inputs, part, backend=backend, loss=loss, seed=seed)
        if each and not result.ok:
            return replace(result, notes=(*result.notes, f"first wrong after {part.passes[-1]}"))
    return result


def compare(
    model: nn.Module,
    inputs: Sequence[Any],
    keyword_inputs: dict[str, Any],
    pipeline: Pipeline,
    *,
    backend: str | Backend = "eager",
    loss: Loss | None = None,
    seed: int = 0,
    gate: Gate | None = None,
    dtypes: Sequence[torch.dtype | None] = (torch.float64, None),
    until_wrong: bool = False,
    make: Callable[..., Compiler] = Compiler,
) -> Verification:
    """`verify` with a ready pipeline, a choice of rewrites, and dtypes (None: the model's own).

    Args:
        until_wrong: leave out further dtypes once one shows a difference.
        make: makes the compiler of each dtype, so that one can look at what it captures.
    """
    require_trainable(model)
    comparisons: list[Comparison] = []
    notes: list[str] = []
    explanation: Explanation | None = None
    for dtype in dtypes:
        reference = _reference(model, dtype, pipeline)
        candidate = private_copy(model, dtype)
        allowed = gate.allowed if gate is not None else None
        compiler = make(pipeline, backend, skip_failures=False, gate=Gate(allowed))
        compiler.resident = Resident.of(candidate)
        install(candidate, compiler)
        arguments = in_dtype((tuple(inputs), keyword_inputs), dtype)
        try:
            expected = training_step(reference, arguments, loss, seed)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            if dtype is torch.float64:
                notes.append(f"not compared in float64: the model fails there ({error})")
                continue
            raise ModelError(f"the model does not accept these inputs: {error}") from error
        try:
            with capture_always():
                actual = _rewritten_step(candidate, arguments, loss, seed)
        except BudgetError as error:
            if dtype is None:
                raise
            notes.append(f"not compared in {str(dtype)[6:]}: {str(error).partition(chr(10))[0]}")
            continue
        require_captured(model, compiler)
        explanation = Explanation(compiler.pipeline, compiler.captured)
        contract = explanation.contract.of_gradient
        if gate is not None:
            gate.seen = compiler.gate.seen
        size = longest_sum(model, arguments)
        floor = rounding_scale(expected)
        for name, (kind, value) in expected.items():
            found = actual[name][1]
            comparisons.append(compare_tensors(name, kind, value, found, contract, size, floor))
        if not all(c.ok for c in comparisons):
            again = training_step(_reference(model, dtype, pipeline), arguments, loss, seed)
            if not _repeats(expected, again):
                notes.append(_OWN_DRAWS)
            if until_wrong:
                break
    assert explanation is not None
    return Verification(explanation.contract, comparisons, explanation, notes)


def _reference(model: nn.Module, dtype: torch.dtype | None, pipeline: Pipeline) -> nn.Module:
    """A copy to compare with: untouched, but for passes that change the forward on purpose."""
    twin = private_copy(model, dtype)
    if pipeline.changing.passes:
        install(twin, Compiler(pipeline.changing, "eager", skip_failures=False))
    return twin


def _repeats(
    first: dict[str, tuple[str, torch.Tensor | None]],
    second: dict[str, tuple[str, torch.Tensor | None]],
) -> bool:
    """Whether two steps give the same, up to the order of sums."""
    floor = rounding_scale(first)
    terms = max((a.numel() for _, a in first.values() if a is not None), default=1)
    return all(
        compare_tensors(name, kind, a, second[name][1], Exact(bitwise=False), terms, floor).ok
        for name, (kind, a) in first.items()
    )


def _rewritten_step(
    model: nn.Module, arguments: Any, loss: Loss | None, seed: int
) -> dict[str, tuple[str, torch.Tensor | None]]:
    """`training_step` of a model that runs as it was written.

    Raises:
        VerifyError: what the passes made of it does not run.
    """
    try:
        return training_step(model, arguments, loss, seed)
    except GTransError:
        raise
    except Exception as error:  # whatever the operators of a wrong graph raise
        raise VerifyError(
            f"the rewritten step cannot be run: {type(error).__name__}: {error}\n"
            "  gtrans reduce finds the pass, and the few nodes that it takes"
        ) from error


def private_copy(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a model without gradients, in another dtype unless that is None."""
    twin = copy.deepcopy(model)
    twin.zero_grad(set_to_none=True)
    return twin if dtype is None else twin.to(dtype)


def in_dtype(arguments: Any, dtype: torch.dtype | None) -> Any:
    """Copies of all tensors among the arguments; floating ones in the dtype unless it is None."""

    def convert(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        twin = value.detach().clone()
        if dtype is not None and twin.is_floating_point():
            twin = twin.to(dtype)
        return twin.requires_grad_(value.requires_grad)

    return pytree.tree_map(convert, arguments)


def training_step(
    model: nn.Module, arguments: Any, loss: Loss | None, seed: int
) -> dict[str, tuple[str, torch.Tensor | None]]:
    """Runs one step and collects outputs, gradients and buffers by name."""
    arguments = in_dtype(arguments, None)
    positional, keywords = arguments
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        output = model(*positional, **keywords)
        scalar = loss(output) if loss is not None else default_loss(output, seed)
        scalar.backward()
    found: dict[str, tuple[str, torch.Tensor | None]] = {}
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    for i, t in enumerate(leaves):
        found[f"{i}"] = ("output", t.detach())
    for name, p in model.named_parameters():
        if p.requires_grad:
            found[name] = ("gradient", p.grad)
    for i, t in enumerate(pytree.tree_leaves(arguments)):
        if isinstance(t, torch.Tensor) and t.requires_grad:
            found[f"input {i}"] = ("gradient", t.grad)
    for name, b in model.named_buffers():
        found[f"{name} "] = ("buffer", b.detach())
    return found
