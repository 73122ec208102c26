"""pareprop: the pieces of a backward, and the backend that runs them side by side."""

import re
from typing import Any

import pytest
import torch
from torch import nn

import gtrans
from gtrans.backends.streams import Streams as StreamsBackend
from gtrans.capture import Compiler, compiled_call
from gtrans.ir.joint import JointGraph, tag
from gtrans.passes.schedule.pareprop import TOO_EARLY
from gtrans.pipeline import Pipeline
from gtrans.testing import Runner
from tests.passes.coupled import Attention, Dropped, Perceptron, Streams, step_of
from tests.passes.test_reversible_links import Stages, Tapped

pytestmark = pytest.mark.usefixtures("seeded")

PAREPROP = "reversible,plan,pareprop"


def planned(model: nn.Module, *inputs: Any, passes: str = PAREPROP) -> tuple[JointGraph, Any]:
    runner = Runner(model, inputs, Pipeline.parse(passes))
    runner.step()
    (captured,) = runner.captured
    assert captured.rewritten is not None
    return captured.rewritten, step_of(captured, "pareprop").stats


def gradients(
    model: nn.Module, x: torch.Tensor, passes: str, backend: Any
) -> dict[str, torch.Tensor]:
    torch.compiler.reset()
    compiler = Compiler(Pipeline.parse(passes), backend, skip_failures=False)
    call = compiled_call(model, compiler)
    found = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(1)
        output = call(x)
        output.square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), f"{name} differs from step to step"
    return found[0]


@pytest.mark.parametrize("lanes", ["sequential", "threads"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradients_are_bitwise_those_of_one_lane(depth: int, lanes: str) -> None:
    model, x = Streams(8, depth, Perceptron), torch.randn(4, 16)
    expected = gradients(model, x, "reversible,plan", "eager")
    found = gradients(model, x, PAREPROP, StreamsBackend(lanes=lanes))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("look_ahead", [1, 2, 3])
@pytest.mark.parametrize(
    "model",
    [
        lambda: (Streams(4, 3, Attention, 3), torch.randn(2, 5, 12)),
        lambda: (Streams(4, 5, Dropped), torch.randn(4, 8)),
        lambda: (Tapped(4, 4, Perceptron), torch.randn(3, 8)),
        lambda: (Stages(2), torch.randn(2, 8, 6, 6)),
    ],
)
def test_other_models_on_threads(model: Any, look_ahead: int) -> None:
    built, x = model()
    expected = gradients(built, x, "reversible,plan", "eager")
    passes = f"reversible,plan,pareprop{{look_ahead={look_ahead}}}"
    found = gradients(built, x, passes, StreamsBackend(lanes="threads"))
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("depth", [1, 3])
def test_every_coupling_is_a_block(depth: int) -> None:
    joint, stats = planned(Streams(4, depth, Perceptron), torch.randn(3, 8))
    units = {unit for n in joint.nodes if n.op != "output" and (unit := tag(n).unit)}
    blocks = {u.block for u in units if u.kind == "recover"}
    assert stats.matched == stats.rewritten == len(blocks)
    assert blocks == set(range(len(blocks)))
    assert {u.block for u in units if u.kind == "grads"} >= blocks


def test_recovery_of_a_block_reads_no_gradient_and_no_later_block() -> None:
    joint, _ = planned(Streams(4, 3, Perceptron), torch.randn(3, 8))
    for node in joint.nodes:
        unit = None if node.op == "output" else tag(node).unit
        for source in node.all_input_nodes if unit else []:
            other = tag(source).unit
            if unit and other:
                assert other.block <= unit.block
                assert not (unit.kind == "recover" and other.kind == "grads")


def test_models_without_couplings_are_left_alone() -> None:
    _, stats = planned(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4))
    assert (stats.matched, stats.rewritten) == (0, 0)


def test_before_the_plan_it_refuses() -> None:
    _, stats = planned(
        Streams(4, 2, Perceptron), torch.randn(3, 8), passes="reversible,pareprop,plan"
    )
    assert stats.skipped == {TOO_EARLY: stats.matched}


def test_an_error_on_one_thread_reaches_the_caller() -> None:
    class Breaks(StreamsBackend):
        def _piece(self, half: Any) -> Any:
            def fail(arguments: list[Any]) -> Any:
                raise ArithmeticError("broken piece")

            return fail

    model, x = Streams(4, 3, Perceptron), torch.randn(3, 8)
    with pytest.raises(ArithmeticError, match="broken piece"):
        gradients(model, x, PAREPROP, Breaks(lanes="threads"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lane": "threads"}, "backend 'streams' has no option 'lane'; did you mean 'lanes'?"),
        ({"pieces": "triton"}, "option 'pieces' of backend 'streams': 'triton'; known: eager, ind"),
    ],
)
def test_bad_options_of_the_backend_are_refused(options: Any, message: str) -> None:
    model = Streams(4, 1, Perceptron)
    with pytest.raises(gtrans.errors.OptionError, match=re.escape(message)):
        gtrans.optimize(model, passes=PAREPROP, backend="streams", options=options)
    with pytest.raises(gtrans.errors.OptionError, match="'streams' has no modes"):
        gtrans.optimize(model, passes=PAREPROP, backend="streams", mode="max-autotune")


def test_a_bad_option_is_refused() -> None:
    with pytest.raises(gtrans.errors.OptionError, match="look_ahead must be at least 1, got 0"):
        Pipeline.parse("pareprop{look_ahead=0}")


@pytest.mark.inductor
def test_pieces_compiled_by_inductor() -> None:
    model, x = Streams(4, 1, Perceptron), torch.randn(3, 8)
    expected = gradients(model, x, "reversible,plan", "eager")
    found = gradients(model, x, PAREPROP, StreamsBackend("inductor"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("look_ahead", [1, 2])
def test_on_a_gpu_gradients_are_bitwise_those_of_one_lane(look_ahead: int) -> None:
    """Many steps, with the allocator under load, because a race shows only now and then."""
    model, x = Streams(256, 5, Perceptron).cuda(), torch.randn(512, 512, device="cuda")
    expected = gradients(model, x, "reversible,plan", "eager")
    passes = f"reversible,plan,pareprop{{look_ahead={look_ahead}}}"
    for _ in range(10):
        found = gradients(model, x, passes, StreamsBackend())
        for name, value in expected.items():
            assert torch.equal(value, found[name]), name


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_step_can_be_captured_into_a_cuda_graph() -> None:
    model, x = Streams(64, 3, Perceptron).cuda(), torch.randn(32, 128, device="cuda")
    expected = gradients(model, x, "reversible,plan", "eager")
    compiler = Compiler(Pipeline.parse(PAREPROP), StreamsBackend(), skip_failures=False)
    call = compiled_call(model, compiler)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=False)
            call(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(x).square().sum().backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name])
