"""pool-places: max pools keep places in windows, and their input for nothing."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gtrans.testing as kit
from gtrans.contract import Contract, Exact
from gtrans.errors import OptionError
from gtrans.passes.residual.pool_places import PoolPlaces
from gtrans.pipeline import Pipeline
from gtrans.testing.laws import gradient_keeps_the_contract
from tests.ir.graphs import Written, joint_of

Function = Callable[[torch.Tensor], torch.Tensor]
aten = torch.ops.aten

SHAPES: dict[str, tuple[Function, tuple[int, ...]]] = {
    "3x3 overlapping": (lambda x: F.max_pool2d(x, 3, 2, 1), (2, 8, 9, 9)),
    "2x2, odd channels": (lambda x: F.max_pool2d(x, 2), (1, 3, 6, 4)),
    "dilated, rounded up": (lambda x: F.max_pool2d(x, 2, 3, 1, 2, ceil_mode=True), (1, 8, 9, 7)),
    "one image without a batch": (lambda x: F.max_pool2d(x, (3, 2)), (8, 9, 4)),
    "of a sequence": (lambda x: F.max_pool1d(x, 3), (2, 8, 12)),
    "of a volume": (lambda x: F.max_pool3d(x, 2), (1, 8, 4, 4, 4)),
}


class Pooled(nn.Module):
    """A convolution of width one, an activation, a pool and a sum of squares."""

    def __init__(self, function: Function, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function((x * self.scale).relu()).square().sum()


@pytest.mark.parametrize("name", SHAPES)
def test_the_gradient_keeps_every_bit(name: str) -> None:
    function, shape = SHAPES[name]
    model, x = Pooled(function, shape), (torch.randn(shape),)
    assert kit.check_pass(PoolPlaces(1), model, x, laws=[gradient_keeps_the_contract]) == 1


def test_channels_last_keeps_its_input_and_its_bits() -> None:
    shape = (2, 8, 6, 6)
    model = Pooled(lambda x: F.max_pool2d(x, 2), shape)
    model.scale.data = model.scale.data.contiguous(memory_format=torch.channels_last)
    x = (torch.randn(shape).contiguous(memory_format=torch.channels_last),)
    assert kit.check_pass(PoolPlaces(1), model, x, laws=[gradient_keeps_the_contract]) == 1


class Stem(nn.Module):
    """Convolution, batch norm, ReLU, pool, convolution: how residual networks begin."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool2d(F.relu(self.norm(self.first(x))), 3, 2, 1)
        return self.second(y).square().mean()


def kept(passes: str) -> tuple[int, Contract]:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 16, 16)
    runner = kit.Runner(Stem(), (x,), Pipeline.parse(passes))
    return runner.step().saved_bytes, runner.captured[0].contract


def test_a_window_keeps_four_bits_in_place_of_eight_bytes() -> None:
    plain, _ = kept("default")
    places, contract = kept("pool-places{min_numel=1},default")
    windows = 2 * 8 * 8 * 8
    assert plain - places == windows * 8 - windows // 2
    assert isinstance(contract, Exact)


def after_relu(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x.view(1, 2, 2, 4).relu(), 3, 1, 1).view(2, 8)


def test_a_relu_in_front_is_kept_for_nothing() -> None:
    graph = joint_of(Written(after_relu, 8), torch.randn(2, 8))
    after, _ = Pipeline.parse("pool-places{min_numel=1}").run(graph)
    (relu,) = after.calls(aten.relu.default)
    assert after.backward_readers(relu) == []


def read_twice(x: torch.Tensor) -> torch.Tensor:
    y = x.view(1, 2, 2, 4).relu()
    return F.max_pool2d(y, 3, 1, 1).view(2, 8) * y.sum()


def test_a_relu_that_something_else_reads_stays_behind() -> None:
    graph = joint_of(Written(read_twice, 8), torch.randn(2, 8))
    after, _ = Pipeline.parse("pool-places{min_numel=1}").run(graph)
    (pool,) = after.calls(aten.max_pool2d_with_indices_backward.default)
    (relu,) = after.calls(aten.threshold_backward.default)
    assert pool < relu


def large_windows(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x.view(1, 2, 1, 8).expand(1, 2, 300, 8), (300, 1)).reshape(2, 8)


# ------------------------------------------------------------------------------------- reasons


@pytest.mark.parametrize(
    ("function", "min_numel", "reason"),
    [
        (lambda x: F.max_pool1d(x, 3, 1, 1), 17, "fewer elements than min_numel"),
        (large_windows, 1, "its windows have more than 256 places"),
    ],
)
def test_each_reason_to_leave_a_pool_alone(function: Function, min_numel: int, reason: str) -> None:
    graph = joint_of(Written(function, 8), torch.randn(2, 8))
    _, (step,) = Pipeline((PoolPlaces(min_numel),)).run(graph)
    assert step.stats.skipped == {reason: 1}


def test_min_numel_must_be_positive() -> None:
    with pytest.raises(OptionError, match="pool-places: min_numel must be at least 1, got 0"):
        Pipeline.parse("pool-places{min_numel=0}")
