"""narrow-integers: indices cross to the backward in the narrowest type that holds them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gtrans.testing as kit
from gtrans.capture import Compiler, compiled_call
from gtrans.captured import Captured
from gtrans.contract import Exact
from gtrans.core import Stats
from gtrans.errors import OptionError
from gtrans.ir.printer import node_to_code
from gtrans.passes.residual.narrow_integers import NarrowIntegers
from gtrans.pipeline import Pipeline
from gtrans.testing.laws import gradient_keeps_the_contract
from tests.ir.graphs import Written, joint_of, joint_with

Function = Callable[[torch.Tensor], torch.Tensor]


def run(function: Function, width: int = 4, min_numel: int = 1) -> Stats:
    graph = joint_of(Written(function, width), torch.randn(2, width))
    _, (step,) = Pipeline((NarrowIntegers(min_numel),)).run(graph)
    return step.stats


def pooled(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x.view(1, 2, 2, 2), 2).expand(1, 2, 2, 2).reshape(2, 4)


def test_the_backward_reads_the_widened_copy() -> None:
    before = joint_with(pooled)
    after, _ = Pipeline.parse("narrow-integers{min_numel=1},plan").run(before)
    made = [node_to_code(n) for n in after.calls(torch.ops.aten._to_copy.default)]
    assert made == [
        "_to_copy_default = aten._to_copy.default(max_pool2d_with_indices[1], dtype=torch.uint8)"
        "  # u8[1, 2, 1, 1]  <- narrow-integers",
        "_to_copy_default_1 = aten._to_copy.default(_to_copy_default, dtype=torch.int64)"
        "  # i64[1, 2, 1, 1]  <- plan",
    ]
    (backward,) = after.calls(torch.ops.aten.max_pool2d_with_indices_backward.default)
    assert str(backward.args[-1]) == "_to_copy_default_1"


class Counted(nn.Module):
    """One operator with indices between two products, over `size` places."""

    def __init__(self, function: Function, size: int) -> None:
        super().__init__()
        self.first = nn.Linear(2, size)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.first(x)).square().sum()


def kept(function: Function, size: int, passes: str) -> tuple[int, Captured]:
    runner = kit.Runner(Counted(function, size), (torch.randn(4, 2),), Pipeline.parse(passes))
    found = runner.step()
    return found.saved_bytes, runner.captured[0]


OPERATORS: dict[str, Function] = {
    "max": lambda x: x.max(-1)[0],
    "min": lambda x: x.min(-1)[0],
    "median": lambda x: x.median(-1)[0],
    "nanmedian": lambda x: x.nanmedian(-1)[0],
    "mode": lambda x: x.mode(-1)[0],
    "kthvalue": lambda x: x.kthvalue(2, -1)[0],
    "topk": lambda x: x.topk(3)[0],
    "sort": lambda x: x.sort(-1)[0],
    "stable sort": lambda x: x.sort(stable=True)[0],
    "cummax": lambda x: x.cummax(-1)[0],
    "cummin": lambda x: x.cummin(-1)[0],
    "argmax": lambda x: x.gather(-1, x.argmax(-1, keepdim=True)),
    "argmin of all": lambda x: x.flatten().gather(0, x.argmin().view(1)),
    "argsort": lambda x: x.gather(-1, x.argsort(-1)),
    "max_pool1d": lambda x: F.max_pool1d(x[None], 2, 1),
    "max_pool2d": lambda x: F.max_pool2d(x.view(1, 4, -1, 2), 2, 1),
    "max_pool3d": lambda x: F.max_pool3d(x.view(1, 2, 2, -1, 2), 2, 1),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x.view(1, 4, -1, 2), 2),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x.view(1, 2, 2, -1, 2), 2),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_with_a_bound_is_narrowed_and_its_gradient_keeps_every_bit(
    name: str,
) -> None:
    model, x = Counted(OPERATORS[name], 8), (torch.randn(4, 2),)
    laws = [gradient_keeps_the_contract]
    assert kit.check_pass(NarrowIntegers(1), model, x, laws=laws) == 1


@pytest.mark.parametrize(
    ("size", "bytes_each"), [(2, 1), (256, 1), (257, 2), (2**15, 2), (2**15 + 1, 4)]
)
def test_the_type_is_the_narrowest_that_holds_the_bound(size: int, bytes_each: int) -> None:
    passes = "narrow-integers{min_numel=1},plan"
    plain, _ = kept(OPERATORS["max"], size, "plan")
    narrow, record = kept(OPERATORS["max"], size, passes)
    assert plain - narrow == 4 * (8 - bytes_each)
    assert record.contract == Exact()


def test_indices_at_the_edge_of_the_type_survive() -> None:
    size = 256
    x = torch.zeros(1, size)
    x[0, -1] = 1.0
    model = Counted(lambda y: y.max(-1)[0], size)
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.copy_(x[0])
    found = kit.Runner(
        model, (torch.ones(1, 2),), Pipeline.parse("narrow-integers{min_numel=1},plan")
    )
    bias = found.step().gradients["first.bias"]
    assert bias is not None
    assert bias.nonzero().flatten().tolist() == [size - 1]


# ------------------------------------------------------------------------------------- reasons


class Looked(nn.Module):
    """Token numbers come in as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.table(tokens)
        return rows


def test_inputs_stay_as_they_are() -> None:
    graph = joint_of(Looked(), torch.tensor([1, 2, 3]))
    _, (step,) = Pipeline((NarrowIntegers(1),)).run(graph)
    assert step.stats.skipped == {"an input of the model, in memory anyway": 1}


@pytest.mark.parametrize(
    ("function", "min_numel", "reason"),
    [
        (lambda x: x.sort(-1)[0], 9, "fewer elements than min_numel"),
        (lambda x: x.gather(-1, x.detach().to(torch.int64) % 4), 1, "its operator states no bound"),
    ],
)
def test_each_reason_to_leave_a_value_alone(
    function: Function, min_numel: int, reason: str
) -> None:
    assert run(function, min_numel=min_numel).skipped == {reason: 1}


def test_a_symbolic_size_is_no_bound() -> None:
    compiler = Compiler(Pipeline((NarrowIntegers(1),)), "eager", skip_failures=False)
    call = compiled_call(Written(lambda x: x.sort(0)[0]), compiler, dynamic=True)
    call(torch.randn(5, 4))
    assert compiler.captured[0].steps[0].stats.skipped == {"its bound is a symbolic size": 1}


def test_a_type_that_is_narrow_enough_stays() -> None:
    graph = joint_of(Counted(OPERATORS["max"], 2**15 + 1), torch.randn(2, 2))
    (index,) = NarrowIntegers(1).sites(graph)
    with index.meta["val"].fake_mode:
        index.meta["val"] = index.meta["val"].to(torch.int32)
    assert NarrowIntegers(1).refuse(graph, index) == "already as narrow as its bound"


def test_min_numel_must_be_positive() -> None:
    with pytest.raises(OptionError, match="narrow-integers: min_numel must be at least 1, got 0"):
        Pipeline.parse("narrow-integers{min_numel=0}")
