"""FLOPs against torch's own counter, expressions against numbers, and the roofline."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import gtrans
from gtrans.analysis.cost import (
    DEVICES,
    Device,
    bytes_expression,
    device_named,
    device_of,
    flops_expression,
    measured_cpu,
    node_bytes,
    node_flops,
    node_seconds,
    total_seconds,
)
from gtrans.errors import OptionError
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph

Build = Callable[[str], tuple[nn.Module, tuple[Any, ...]]]


def _joint(model: nn.Module, *inputs: Any) -> JointGraph:
    original = gtrans.explain(model, *inputs, passes="none").captured[0].original
    assert original is not None
    return original


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt"])
def test_products_count_as_torch_counts_them(build: Build, name: str) -> None:
    model, inputs = build(name)
    with FlopCounterMode(display=False) as counter:
        model(*inputs).backward()
    joint = _joint(model, *inputs)
    products = [n for n in joint.nodes if ops.is_contraction(n)]
    attention = [n for n in products if "attention" in str(n.target)]
    flops = {n: node_flops(n) for n in products}
    # torch has no count for the CPU's attention kernel: of 3 layers, batch 4, 2 heads of 8.
    assert sum(flops[n] for n in attention) == len(attention) // 2 * 14 * 4 * 2 * 32 * 32 * 8
    assert sum(flops[n] for n in set(products) - set(attention)) == counter.get_total_flops()


def test_transposed_and_grouped_convolutions() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2), nn.Flatten())
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    joint = _joint(model, x)
    assert sum(node_flops(n) for n in joint.nodes if ops.is_contraction(n)) == (
        counter.get_total_flops()
    )
    grouped = _joint(nn.Conv2d(6, 6, 3, groups=3), torch.randn(2, 6, 10, 10))
    (forward,) = grouped.calls(torch.ops.aten.convolution.default)
    assert node_flops(forward) == 2 * (2 * 6 * 8 * 8) * (2 * 9)


def test_expressions_give_the_numbers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.second(torch.nn.functional.gelu(self.first(x)))
            return y.square().mean()

    x = torch.randn(37, 8)
    torch._dynamo.mark_dynamic(x, 0)
    joint = _joint(Net(), x)
    for node in joint.nodes:
        if node.op != "call_function" or ops.is_symbol(node):
            continue
        for number, formula in (
            (node_flops(node), flops_expression(node)),
            (node_bytes(node), bytes_expression(node)),
        ):
            assert formula.subs(dict.fromkeys(formula.free_symbols, 37)) == number
    mm = next(n for n in joint.nodes if n.target is torch.ops.aten.addmm.default)
    (batch,) = flops_expression(mm).free_symbols
    assert flops_expression(mm) == 2 * 8 * 24 * batch


def test_views_cost_nothing_and_rooflines_have_two_sides() -> None:
    joint = _joint(nn.Linear(256, 256), torch.randn(256, 256))
    slow_memory = Device("a", bytes_per_s=1e6, flops_per_s=1e15, half_flops_per_s=1e15, launch_s=0)
    slow_products = Device("b", bytes_per_s=1e15, flops_per_s=1e6, half_flops_per_s=1e6, launch_s=0)
    mm = next(n for n in joint.nodes if ops.is_contraction(n))
    view = next(n for n in joint.nodes if ops.is_view(n))
    assert node_seconds(view, slow_memory) == node_bytes(view) == node_flops(view) == 0
    assert node_seconds(mm, slow_memory) == pytest.approx(node_bytes(mm) / 1e6)
    assert node_seconds(mm, slow_products) == pytest.approx(node_flops(mm) / 1e6)
    nodes = [mm, view, mm]
    assert total_seconds(nodes, slow_memory) == 2 * node_seconds(mm, slow_memory)


def test_kinds_of_kernels_are_slower_than_the_roofline_by_their_own_factors() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            mixed = F.scaled_dot_product_attention(y, y, y)
            return self.head(F.max_pool2d(mixed, 2).mean((2, 3)))

    nodes = _joint(Net(), torch.randn(2, 3, 8, 8)).nodes
    plain = Device("a", 1e9, 1e9, 1e9, launch_s=0)
    slower = Device("b", 1e9, 1e9, 1e9, 0, 0, channels=9, attention=5, scattered=7)
    ratios = {
        str(n.target): node_seconds(n, slower) / seconds
        for n in nodes
        if (seconds := node_seconds(n, plain))
    }
    assert ratios["aten.convolution.default"] == 3
    assert ratios["aten.convolution_backward.default"] == 3
    assert ratios["aten._scaled_dot_product_flash_attention_for_cpu.default"] == 5
    assert ratios["aten.max_pool2d_with_indices.default"] == pytest.approx(7)
    assert ratios["aten.addmm.default"] == 1


def test_devices_have_names() -> None:
    assert device_named("h100").bytes_per_s == 3.35e12
    with pytest.raises(OptionError, match="unknown device 'h1000'; did you mean 'h100'"):
        device_named("h1000")
    assert device_of(_joint(nn.Linear(4, 4), torch.randn(2, 4))) is DEVICES["cpu"]
    assert measured_cpu() is measured_cpu()
    device = measured_cpu().device
    assert device.flops_per_s > 1e8
    assert all(1 <= f <= 16 for f in (device.scattered, device.attention))


def test_a_calibration_while_torch_traces_runs_real_kernels() -> None:
    measured_cpu.cache_clear()
    with FakeTensorMode():
        traced = measured_cpu().device
    measured_cpu.cache_clear()
    plain = measured_cpu().device
    assert traced.launch_s < 5 * plain.launch_s
    assert traced.flops_per_s < 5 * plain.flops_per_s
