"""fused-lstm: the layer that eager torch calls, forward and backward, to the bit."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import gtrans
from gtrans.analysis.cost import Device, node_flops, node_seconds
from gtrans.explanation import Explanation
from gtrans.ir import ops
from gtrans.ir.sizes import tensor_bytes
from gtrans.runtime.fused_lstm import fused_lstm_layer, workspace_bytes

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)
FUSED = torch.ops.gtrans.fused_lstm.default
BACKWARD = torch.ops.gtrans.fused_lstm_backward.default


class Model(nn.Module):
    """A layer whose output and last states are all read."""

    def __init__(self, first: bool = False, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6) if first else nn.Identity()
        self.layer = nn.LSTM(6, 5, **options)

    def forward(self, x: torch.Tensor) -> Any:
        y, (h, c) = self.layer(self.first(x))
        return y.square().sum() + h.sum() * c.sum(), y


def both(model: nn.Module, *inputs: Any, **options: Any) -> Explanation:
    """Checks that eager torch gives the same bits; returns the report."""
    torch.compiler.reset()
    mine = gtrans.optimize(copy.deepcopy(model), **{"backend": "eager", **options})
    for runner in (model, mine):
        torch.manual_seed(0)
        runner(*inputs)[0].backward()
    pairs = zip(model.named_parameters(), mine.parameters(), strict=True)
    for (name, a), b in pairs:
        assert a.grad is not None
        assert b.grad is not None
        # Inductor rounds what reads the layer otherwise, and so what it gets back.
        near = 1e-6 if options.get("backend") == "inductor" else 0.0
        torch.testing.assert_close(b.grad, a.grad, rtol=near, atol=near, msg=name)
    with torch.no_grad():
        assert torch.equal(model.eval()(*inputs)[1], mine.eval()(*inputs)[1])
    return gtrans.report(mine)


def count(report: Explanation, target: Any) -> int:
    graph = report.captured[0].rewritten
    assert graph is not None
    return len(graph.calls(target))


@pytest.mark.parametrize("first", [False, True], ids=["of the input", "behind a layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True, "batch_first": True}]
)
def test_layers_are_those_of_eager_torch(
    first: bool, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model = Model(first, **options).to(dtype)
    report = both(model, torch.randn(7, 3, 6).to(dtype))
    cells = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    assert (count(report, FUSED), count(report, BACKWARD)) == (cells, cells)
    assert "fused-lstm" in str(report)


@pytest.mark.inductor
def test_inductor_keeps_them_too() -> None:
    both(Model(num_layers=2, bidirectional=True), torch.randn(7, 3, 6), backend="inductor")


def test_sizes_may_change() -> None:
    model = Model(True, batch_first=True)
    torch.compiler.reset()
    mine = gtrans.optimize(copy.deepcopy(model), backend="eager", dynamic=True)
    for batch, steps in ((2, 5), (3, 9), (4, 4)):
        x = torch.randn(batch, steps, 6)
        for runner in (model, mine):
            runner.zero_grad()
            runner(x)[0].backward()
        for a, b in zip(model.parameters(), mine.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, of the switch below
def test_what_torch_does_step_by_step_is_left_to_it() -> None:
    x = torch.randn(7, 3, 6)
    wide = both(Model().double(), x.double())
    assert "oneDNN has no layer of float64 here" in str(wide)
    assert "it projects its states" in str(explained(Model(proj_size=3), x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "it runs under autocast" in str(explained(Model(), x))
    with torch.backends.mkldnn.flags(enabled=False):
        assert "oneDNN is switched off" in str(explained(Model(), x))
    assert "fused-lstm" not in str(explained(nn.Linear(6, 6), x))


def explained(model: nn.Module, x: torch.Tensor) -> Explanation:
    torch.compiler.reset()
    return gtrans.explain(model, x)


def test_dropout_between_layers_is_drawn_as_eager_torch_draws_it() -> None:
    both(Model(num_layers=2, dropout=0.5), torch.randn(7, 3, 6))


@pytest.mark.parametrize("passes", ["hoist-recurrent-wgrad", "cut-carry{every=3,min_steps=1}"])
def test_passes_that_are_asked_for_by_name_get_the_steps(passes: str) -> None:
    torch.compiler.reset()
    model = Model()
    mine = gtrans.optimize(model, passes=passes, backend="eager")
    mine(torch.randn(7, 3, 6))[0].backward()
    assert count(gtrans.report(mine), FUSED) == 0
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_hoisting_leaves_a_faster_layer_alone() -> None:
    report = str(both(Model(), torch.randn(7, 3, 6), passes="hoist-recurrence"))
    assert "torch runs this layer as one fused operator, which is faster" in report


def test_products_and_the_workspace_are_counted() -> None:
    report = explained(Model(), torch.randn(7, 3, 6))
    graph = report.captured[0].rewritten
    assert graph is not None
    (layer,), (backward,) = graph.calls(FUSED), graph.calls(BACKWARD)
    flops = 2 * 7 * 3 * 20 * (6 + 5)
    assert (node_flops(layer), node_flops(backward)) == (flops, 2 * flops)
    slow = Device("slow", 1e30, 1e30, 1e30, launch_s=1.0)
    assert node_seconds(layer, slow) == pytest.approx(7.0)
    workspace = ops.parts(layer)[3]
    size = workspace_bytes(7, 3, 6, 5, torch.float32)
    assert tensor_bytes(workspace.meta["val"]) == size > 4 * 7 * 3 * 5
    assert report.captured[0].saved_bytes > size


def test_a_workspace_that_was_not_kept_is_made_again() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(6, 5)
    x, state = torch.randn(7, 3, 6, requires_grad=True), torch.randn(3, 5)
    given = [x, *layer.parameters(), state, state]
    results = []
    for keep in (True, False):
        y, *_, workspace = fused_lstm_layer(*given, False, True, keep)
        assert bool(workspace.numel()) == keep
        results.append((y, *torch.autograd.grad(y.square().sum(), given[:5])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
