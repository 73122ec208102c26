"""Compare a rewritten training step with the untouched model, gradient by gradient."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gtrans.api import install, require_captured, require_trainable
from gtrans.capture import Compiler, Resident, capture_always
from gtrans.contract import Contract, Exact
from gtrans.errors import BudgetError, ModelError, VerifyError
from gtrans.explanation import Explanation
from gtrans.pipeline import Gate, Pipeline

Loss = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """One tensor of the step in both versions.

    Attributes:
        name: "encoder.weight", "output 0", "input 1" or "buffer running_mean".
        kind: "output", "gradient" or "buffer".
        dtype: working dtype of the run.
        largest: largest absolute difference of an element.
        relative: norm of the difference over the norm of the reference.
        cosine: cosine between the two; 1.0 where both are zero.
        bound: the relative difference that the contract admits; infinite where it states none.
    """

    name: str
    kind: str
    dtype: torch.dtype
    largest: float
    relative: float
    cosine: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the difference stays within what the contract admits (NaN never does)."""
        return self.relative <= self.bound


@dataclass(frozen=True)
class Verification:
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
        wrong = [c for c in self.comparisons if not c.ok]
        shown = sorted(wrong or self.comparisons, key=lambda c: -c.relative)[:10]
        verdict = (
            f"{len(wrong)} of {len(self.comparisons)} tensors differ by more than the contract"
            if wrong
            else f"all {len(self.comparisons)} tensors agree within the contract"
        )
        lines = [f"{verdict} ({self.contract})", *self.notes]
        lines.append(f"  {'':40} {'dtype':>9} {'relative':>9} {'largest':>9} {'bound':>9}")
        for c in shown:
            lines.append(
                f"  {c.kind + ' ' + c.name:40} {str(c.dtype)[6:]:>9} {c.relative:9.1e} "
                f"{c.largest:9.1e} {c.bound:9.1e}{'' if c.ok else '  <-- differs'}"
            )
        if len(self.comparisons) > len(shown):
            lines.append(f"  ... {len(self.comparisons) - len(shown)} more")
        return "\n".join(lines)

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
    backend: str = "eager",
    loss: Loss | None = None,
    seed: int = 0,
    gate: Gate | None = None,
    dtypes: Sequence[torch.dtype | None] = (torch.float64, None),
) -> Verification:
    """`verify` with a ready pipeline, a choice of rewrites, and dtypes (None: the model's own)."""
    require_trainable(model)
    comparisons: list[Comparison] = []
    notes: list[str] = []
    explanation: Explanation | None = None
    for dtype in dtypes:
        reference = private_copy(model, dtype)
        candidate = private_copy(model, dtype)
        allowed = gate.allowed if gate is not None else None
        compiler = Compiler(pipeline, backend, skip_failures=False, gate=Gate(allowed))
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
                actual = training_step(candidate, arguments, loss, seed)
        except BudgetError as error:
            if dtype is None:
                raise
            notes.append(f"not compared in {str(dtype)[6:]}: {str(error).partition(chr(10))[0]}")
            continue
        require_captured(model, compiler)
        explanation = Explanation(compiler.pipeline, compiler.captured)
        if gate is not None:
            gate.seen = compiler.gate.seen
        size = longest_sum(model, arguments)
        floor = rounding_scale(expected)
        for name, (kind, value) in expected.items():
            found = actual[name][1]
            comparisons.append(
                compare_tensors(name, kind, value, found, explanation.contract, size, floor)
            )
    assert explanation is not None
    return Verification(explanation.contract, comparisons, explanation, notes)


def default_loss(output: Any, seed: int = 0) -> torch.Tensor:
    """`output.loss` where there is one, else a fixed random weighting of all floating outputs.

    Raises:
        ModelError: no output depends on a parameter.
    """
    given = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(given, torch.Tensor) and given.requires_grad:
        return given
    tensors = [
        t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    if not tensors:
        raise ModelError("no output of the model depends on a trainable parameter")
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=tensors[0].dtype, device=tensors[0].device)
    for t in tensors:
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        weights = (weights / math.sqrt(max(1, t.numel()))).to(t.dtype).to(t.device)
        total = total + (t * weights).sum()
    return total


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


def compare_tensors(
    name: str,
    kind: str,
    expected: torch.Tensor | None,
    actual: torch.Tensor | None,
    contract: Contract,
    terms: int,
    floor: float,
) -> Comparison:
    """Compares one tensor of a step with what it should be.

    Args:
        name: what to call it.
        kind: "output", "gradient" or "buffer".
        expected: the reference; None where autograd gives no gradient, which equals zero.
        actual: what the rewritten step computed.
        contract: what it may differ by.
        terms: how many terms its longest sum has, see `longest_sum`.
        floor: gradients smaller than this are measured by it, see `rounding_scale`.
    """
    if expected is None and actual is None:
        return Comparison(name, kind, torch.float32, 0.0, 0.0, 1.0, 0.0)
    # A compiled step gives zeros where autograd gives no gradient at all; both mean the same.
    a = torch.zeros_like(actual) if expected is None and actual is not None else expected
    b = torch.zeros_like(expected) if actual is None and expected is not None else actual
    assert a is not None
    assert b is not None
    dtype = a.dtype
    if a.shape != b.shape or a.dtype != b.dtype:
        return Comparison(name, kind, dtype, math.inf, math.inf, 0.0, 0.0)
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, a - b)
    norm = _finite_norm(a)
    error = float(difference.norm())
    scale = max(norm, floor) if kind == "gradient" else norm
    relative = error / scale if scale > 0 else (0.0 if error == 0 else math.inf)
    other = float(b.norm())
    cosine = float((a * b).sum()) / (norm * other) if norm > 0 and other > 0 else 1.0
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    bound = _bound(kind, dtype, contract, terms)
    return Comparison(name.strip(), kind, dtype, largest, relative, cosine, bound)


def _finite_norm(value: torch.Tensor) -> float:
    return float(torch.where(value.isfinite(), value, 0.0).double().norm())


def rounding_scale(values: dict[str, tuple[str, torch.Tensor | None]]) -> float:
    """What small gradients are measured by: a thousandth of the largest.

    Some gradients are zero but for rounding (of a bias before a norm, of the bias of attention's
    keys); their own size says nothing about how large an error in them is.
    """
    norms = [_finite_norm(v) for kind, v in values.values() if kind == "gradient" and v is not None]
    return 1e-3 * max(norms, default=0.0)


def _bound(kind: str, dtype: torch.dtype, contract: Contract, terms: int) -> float:
    if kind == "gradient" and not isinstance(contract, Exact):
        return getattr(contract, "rtol", math.inf)
    if dtype is torch.float64:
        return 1e-9
    if not dtype.is_floating_point:
        return 0.0
    return 64 * torch.finfo(dtype).eps * math.sqrt(terms)


def longest_sum(model: nn.Module, arguments: Any) -> int:
    """How many terms one sum of the step may have: elements of an input, a side of a weight."""
    tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor)]
    sizes = [t.numel() for t in tensors]
    sizes += [max(p.shape, default=1) for p in model.parameters()]
    return max(sizes, default=1)
