"""Highway-BP: exact where it says so, and the sum over paths everywhere else."""

import copy
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gtrans
from gtrans.analysis.chains import find_chains
from gtrans.api import install
from gtrans.capture import Compiler, capture_always
from gtrans.captured import Captured
from gtrans.contract import Iterative
from gtrans.core import HELD_BACK
from gtrans.debugging.recording import Recording
from gtrans.errors import ContractError, OptionError
from gtrans.ir.check import check_joint
from gtrans.passes.wire.highway_bp import HighwayBP
from gtrans.pipeline import Gate, Pipeline
from gtrans.rewrite.batched import put_in_order
from gtrans.runtime.watch import forget
from gtrans.testing.laws import check_pass
from gtrans.testing.streams import FLAVOURS, Flavour, Stream
from tests.ir.graphs import joint_with

KINDS = st.sampled_from(FLAVOURS)


def _input(width: int = 6, batch: int = 2, *, wants_gradient: bool = True) -> torch.Tensor:
    x = torch.randn(batch, 3, width, dtype=torch.float64)
    return x.requires_grad_(wants_gradient)


def _pipeline(iterations: int, gamma: float = 0.0, min_links: int = 1) -> Pipeline:
    return Pipeline((HighwayBP(iterations, gamma, min_links),))


def _errors(recording: Recording, passes: Pipeline) -> dict[str, float]:
    """The relative error of every gradient; outputs must not differ at all."""
    found = {}
    for c in recording.compare(passes, Gate()):
        if c.kind == "gradient":
            found[c.name] = c.relative
        else:
            assert c.largest == 0.0, c
    return found


def _recorded(model: nn.Module, x: torch.Tensor) -> tuple[Recording, int]:
    """A recorded step, and the depth of the chain in its backward (0 if there is none)."""
    recording = Recording(model, (x,), {}, dtype=torch.float64)
    (captured,) = recording.captured
    assert captured.original is not None
    chains = find_chains(captured.original)
    return recording, chains[0].depth if chains else 0


class _Step:
    """One training step through some passes: outputs, gradients by name, and what was done."""

    def __init__(
        self,
        model: nn.Module,
        x: torch.Tensor,
        passes: Pipeline | str,
        cotangents: Sequence[torch.Tensor] | None = None,
    ) -> None:
        model = copy.deepcopy(model)
        compiler = Compiler(Pipeline.parse(passes), "eager", skip_failures=False)
        install(model, compiler)
        x = x.detach().clone().requires_grad_(x.requires_grad)
        with capture_always():
            self.outputs = model(x)
            torch.autograd.backward(
                self.outputs, cotangents or [torch.ones_like(o) for o in self.outputs]
            )
        self.gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        if x.grad is not None:
            self.gradients["input"] = x.grad
        self.captured: Captured = compiler.captured[0]


# ------------------------------------------------------------------------------------- exactness


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    flavour=KINDS,
    depth=st.integers(1, 8),
    width=st.sampled_from((2, 6)),
    gamma=st.sampled_from((0.0, 0.3, 1.0)),
    scalar=st.booleans(),
)
def test_exact_at_the_depth_of_the_chain(
    flavour: Flavour, depth: int, width: int, gamma: float, scalar: bool
) -> None:
    torch.manual_seed(depth)
    depth = (depth + 1) // 2 if flavour == "transformer" else depth
    model = Stream(flavour, depth, width, scalar=scalar)
    recording, links = _recorded(model, _input(width))
    assert links == model.links
    before = _errors(recording, _pipeline(links - 1, gamma))
    parameters = {n: e for n, e in before.items() if n != "x"}
    assert len(parameters) == sum(1 for p in model.parameters() if p.requires_grad) - _unused(model)
    assert max(parameters.values()) < 1e-10
    assert before["x"] > 0 or links == 1 or width == 2  # a norm of two has next to no gradient
    assert max(_errors(recording, _pipeline(links, gamma)).values()) == 0.0


def _unused(model: Stream) -> int:
    """Parameters of norms that the flavour does not call."""
    return 2 * len(model.norms) if model.flavour == "relu-after-add" else 0


@settings(max_examples=6, deadline=None, derandomize=True)
@given(flavour=KINDS, frozen=st.sets(st.integers(0, 3), max_size=3), data=st.booleans())
def test_frozen_parameters_and_inputs(flavour: Flavour, frozen: set[int], data: bool) -> None:
    torch.manual_seed(0)
    model = Stream(flavour, 4)
    for index in frozen:
        model.branches[index].requires_grad_(False)
        model.norms[index].requires_grad_(False)
    recording, links = _recorded(model, _input(wants_gradient=data))
    assert 0 < links <= model.links
    for iterations in range(links):
        errors = _errors(recording, _pipeline(iterations))
        exact = [e for n, e in errors.items() if n != "x"] if data else list(errors.values())
        if iterations == links - int(data):
            assert max(exact) < 1e-10


def test_the_gate_of_a_recurrence_is_a_way_past_the_cell() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(4, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)[0]
            return y[:, -1]

    torch.manual_seed(0)
    steps = 7
    recording, links = _recorded(Gated(), torch.randn(2, steps, 4))
    assert links == steps - 1  # the first state is a constant
    worst = [max(_errors(recording, _pipeline(k)).values()) for k in range(links + 1)]
    assert worst[0] > worst[2] > worst[4] > 1e-10
    assert worst[links] < 1e-10


def test_points_near_the_loss_are_exact_before_the_others() -> None:
    torch.manual_seed(0)
    recording, _ = _recorded(Stream("pre-norm", 6), _input())
    for iterations in range(6):
        errors = _errors(recording, _pipeline(iterations))
        exact = [errors[f"branches.{i}.2.weight"] == 0.0 for i in range(6)]
        assert exact == [i >= 5 - iterations for i in range(6)]


# ------------------------------------------------------------------------------ the sum over paths


Branch = Callable[[torch.Tensor], torch.Tensor]
Join = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _maps(model: Stream, index: int) -> tuple[Branch, Join]:
    """A block as a branch g(x) and the operator r(x, g(x)) that joins it with the stream."""
    norm, branch = model.norms[index], model.branches[index]
    if model.flavour == "relu-after-add":
        return branch, lambda x, z: torch.relu(x + z)
    if model.flavour == "post-norm":
        return branch, lambda x, z: norm(x + z)
    return (lambda x: branch(norm(x))), torch.add


def _path_sums(model: Stream, x: torch.Tensor, iterations: int, gamma: float) -> list[Any]:
    """The cotangent of every branch: all paths from the output with at most k branches."""
    past, through, joins = [], [], []
    for index in range(len(model.branches)):
        g, r = _maps(model, index)
        z = g(x)
        jacobian: Any = torch.autograd.functional.jacobian
        dr_dx, dr_dz = (j.reshape(x.numel(), -1) for j in jacobian(r, (x, z)))
        dg_dx = jacobian(g, x).reshape(x.numel(), -1)
        past.append((1 - gamma) * dr_dx)
        through.append(dr_dz @ dg_dx + gamma * dr_dx)
        joins.append(dr_dz)
        x = r(x, z)
    found = []
    top = model.last.weight.sum(0).repeat(x.numel() // x.shape[-1])  # type: ignore[operator]
    for index in range(len(model.branches)):
        total = torch.zeros_like(top)
        later = range(index + 1, len(model.branches))
        for path in product((0, 1), repeat=len(later)):
            if sum(path) <= iterations:
                w = top
                for block, inside in reversed(list(zip(later, path, strict=True))):
                    w = w @ (through if inside else past)[block]
                total = total + w
        found.append((total @ joins[index]).reshape(x.shape).sum((0, 1)))
    return found


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("flavour", ["pre-norm", "relu-after-add", "post-norm"])
def test_every_iterate_is_the_sum_over_paths(flavour: Flavour, gamma: float) -> None:
    torch.manual_seed(1)
    model = Stream(flavour, 4, 4).double()
    x = _input(4, batch=1)
    for iterations in range(4):
        step = _Step(model, x, _pipeline(iterations, gamma))
        expected = _path_sums(model, x.detach(), iterations, gamma)
        for index, value in enumerate(expected):
            found = step.gradients[f"branches.{index}.2.bias"]
            torch.testing.assert_close(found, value.detach(), rtol=1e-10, atol=1e-12)


def test_no_sweep_gives_every_block_the_gradient_at_the_end_of_the_stream() -> None:
    model = Stream("pre-norm", 5).double()
    gradients = _Step(model, _input(), _pipeline(0)).gradients
    end = gradients["branches.4.2.bias"]
    assert all(torch.equal(gradients[f"branches.{i}.2.bias"], end) for i in range(5))


# --------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_linear_in_the_cotangent(flavour: Flavour) -> None:
    torch.manual_seed(2)
    model, x = Stream(flavour, 3).double(), _input()
    passes = _pipeline(1, 0.2)
    shapes = [o.shape for o in model(x)]
    a, b = ([torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(2))
    both = [2 * m - 3 * n for m, n in zip(a, b, strict=True)]
    of_a, of_b, of_both = (_Step(model, x, passes, c).gradients for c in (a, b, both))
    for name, value in of_both.items():
        torch.testing.assert_close(value, 2 * of_a[name] - 3 * of_b[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("flavour", ["taps", "post-norm"])
def test_all_laws(flavour: Flavour) -> None:
    check_pass(HighwayBP(1, min_links=1), Stream(flavour, 3), (_input().float().detach(),))


@pytest.mark.parametrize("order", ["default,highway-bp{iterations=1}", "{},default"])
def test_together_with_the_default_passes(order: str) -> None:
    torch.manual_seed(3)
    model, x = Stream("relu-after-add", 6).double(), _input()
    alone = _Step(model, x, "highway-bp{iterations=1}")
    passes = order.replace("{},", "highway-bp{iterations=1},")
    together = _Step(model, x, passes)
    assert torch.equal(alone.outputs[0], together.outputs[0])
    for name, value in alone.gradients.items():
        torch.testing.assert_close(together.gradients[name], value, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------- refusals, options, contracts


def _stats(model: nn.Module, x: torch.Tensor, passes: Pipeline | str) -> Any:
    return _Step(model, x, passes).captured.steps[0]


def test_short_chains_are_left_alone() -> None:
    step = _stats(Stream("pre-norm", 3).double(), _input(), "highway-bp{iterations=1}")
    reason = "fewer blocks in a row than min_links; the stream ends"
    assert dict(step.stats.skipped) == {reason: 1}
    assert step.stats.rewritten == 0


def test_as_many_sweeps_as_blocks_change_nothing() -> None:
    step = _stats(Stream("pre-norm", 4).double(), _input(), "highway-bp{iterations=4}")
    reason = "as many sweeps as blocks: the plain backward is the same"
    assert dict(step.stats.skipped) == {reason: 1}
    assert step.op_changes == {}


def test_a_rewrite_that_is_held_back() -> None:
    torch.manual_seed(0)
    recording, _ = _recorded(Stream("pre-norm", 4), _input())
    original = recording.captured[0].original
    assert original is not None
    _, (step,) = _pipeline(1).run(original, gate=Gate(allowed=()))
    assert dict(step.stats.skipped) == {HELD_BACK: 1}


def test_the_contract_of_a_step_knows_the_depth() -> None:
    step = _stats(Stream("pre-norm", 5).double(), _input(), "highway-bp{iterations=2}")
    assert step.contract == Iterative(iterations=2, exact_at=5)
    assert str(step.contract) == "iterative (2 sweeps, exact at 5)"
    assert str(HighwayBP(2).contract) == "iterative (2 sweeps, exact at the depth of the model)"
    (note,) = step.stats.notes
    assert note.startswith("5 blocks from add_")
    assert note.endswith("in 2 sweeps (the stream ends), 7 runs of a block in batches")


def test_nothing_weaker_than_exact_is_admitted_unless_asked_for() -> None:
    message = r"pass 'highway-bp' is iterative .*weaker than the admitted 'exact'"
    with pytest.raises(ContractError, match=message):
        gtrans.optimize(Stream("pre-norm", 4), passes="highway-bp", allow="exact", backend="eager")


def test_options() -> None:
    text = "highway-bp{iterations=3,gamma=0.2,min_links=6}"
    assert str(Pipeline.parse(text)) == text
    with pytest.raises(OptionError, match="iterations must be at least 0, got -1"):
        HighwayBP(iterations=-1)
    with pytest.raises(OptionError, match=r"gamma must be between 0 and 1, got 1\.5"):
        HighwayBP(gamma=1.5)
    with pytest.raises(OptionError, match="min_links must be at least 1, got 0"):
        HighwayBP(min_links=0)


# ------------------------------------------------------------------------------------ damping


class _Cancelling(nn.Module):
    """Residual blocks that undo a part of their input, as trained ones do: J = -0.4 I + noise."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        with torch.no_grad():
            for block in self.blocks:
                noise = 0.1 * torch.randn(width, width) / width**0.5
                block.get_parameter("weight").copy_(noise - 0.4 * torch.eye(width))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for block in self.blocks:
            x = x + block(x)
        return (x.square().sum(),)


def test_measured_damping_tames_blocks_that_undo_their_residual() -> None:
    torch.manual_seed(0)
    recording, links = _recorded(_Cancelling(16, 8), _input(8, wants_gradient=False))
    assert links == 15

    def worst(iterations: int, gamma: float | None) -> float:
        passes = Pipeline((HighwayBP(iterations, gamma, 1),))
        return max(_errors(recording, passes).values())

    assert worst(6, 0.0) > 10
    measured = [worst(k, None) for k in (1, 3, 6)]
    assert measured == sorted(measured, reverse=True)
    assert measured[-1] < 0.05
    assert worst(links, None) < 1e-10


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_measured_damping_is_exact_at_the_depth(flavour: Flavour) -> None:
    torch.manual_seed(0)
    recording, links = _recorded(Stream(flavour, 4), _input())
    passes = Pipeline((HighwayBP(links - 1, None, 1),))
    errors = _errors(recording, passes)
    assert max(e for n, e in errors.items() if n != "x") < 1e-10


def test_sweeps_far_from_settled_warn(caplog: pytest.LogCaptureFixture) -> None:
    forget()
    torch.manual_seed(0)
    with caplog.at_level("WARNING", "gtrans"):
        _Step(_Cancelling(16, 8).double(), _input(8), "highway-bp{iterations=4,gamma=0.0}")
        _Step(_Cancelling(16, 8).double(), _input(8), "highway-bp{iterations=8,gamma=auto}")
    (record,) = caplog.records
    assert "gtrans: sweep 4 over the stream at" in record.message
    forget()


# ------------------------------------------------------------------------------------ batches


def _notes(step: _Step) -> str:
    return " ".join(step.captured.steps[0].stats.notes)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("gamma", [0.0, None])
def test_batches_compute_what_one_block_after_another_does(
    flavour: Flavour, gamma: float | None
) -> None:
    torch.manual_seed(0)
    model, x = Stream(flavour, 6).double(), _input()
    one_by_one = _Step(model, x, Pipeline((HighwayBP(3, gamma, 1, "never"),)))
    together = _Step(model, x, Pipeline((HighwayBP(3, gamma, 1, "always"),)))
    assert "in batches" in _notes(together)
    assert "in batches" not in _notes(one_by_one)
    for name, expected in one_by_one.gradients.items():
        torch.testing.assert_close(together.gradients[name], expected, rtol=1e-12, atol=1e-12)


def test_a_sweep_over_blocks_alike_has_one_product_for_each_of_a_block() -> None:
    torch.manual_seed(0)
    depth, sweeps = 12, 2
    model, x = Stream("pre-norm", depth).double(), _input(wants_gradient=False)
    step = _Step(model, x, Pipeline((HighwayBP(sweeps, 0.0, 1, "always"),)))
    rewritten = step.captured.rewritten
    assert rewritten is not None
    batches = rewritten.calls(torch.ops.aten.bmm.default)
    assert len(batches) == 2 * sweeps
    assert [n.meta["val"].shape[0] for n in batches] == [depth - 2, depth - 2, depth - 3, depth - 3]


def test_batches_are_for_products_that_leave_processors_idle() -> None:
    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(6))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            for block in self.blocks:
                x = x + torch.tanh(block(x))
            return (x.sum(),)

    passes = "highway-bp{iterations=2,gamma=0.0}"
    assert "in batches" in _notes(_Step(Wide(8), torch.randn(2, 8), passes))
    assert "in batches" not in _notes(_Step(Wide(512), torch.randn(512, 512), passes))


def test_blocks_that_differ_do_not_run_as_one() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(6, 7 + i), nn.Tanh(), nn.Linear(7 + i, 6)) for i in range(5)
            )

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            for block in self.blocks:
                x = x + block(x)
            return (x.sum(),)

    step = _Step(Mixed(), torch.randn(2, 6), Pipeline((HighwayBP(2, 0.0, 1, "always"),)))
    assert "in batches" not in _notes(step)


@pytest.mark.parametrize("how", ["attention", "windows"])
def test_blocks_whose_operators_torch_would_loop_over_run_one_by_one(how: str) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            for block in self.blocks:
                y = block(x).unflatten(-1, (2, 4)).transpose(-2, -3)
                if how == "attention":
                    y = nn.functional.scaled_dot_product_attention(y, y, y)
                else:
                    y = torch.tanh(y.unfold(-1, 2, 2).flatten(-2))
                x = x + y.transpose(-2, -3).flatten(-2)
            return (x.sum(),)

    x, alone = torch.randn(2, 6, 8), Pipeline((HighwayBP(2, 0.0, 1, "never"),))
    model = Blocks()
    step = _Step(model, x, Pipeline((HighwayBP(2, 0.0, 1, "always"),)))
    assert ("in batches" in _notes(step)) == (how == "attention")  # it has a rule of gtrans
    for name, expected in _Step(model, x, alone).gradients.items():
        torch.testing.assert_close(step.gradients[name], expected)


def test_nodes_are_put_behind_what_they_read_and_no_others_move() -> None:
    joint = joint_with(torch.tanh)
    before = [n.name for n in joint.nodes]
    put_in_order(joint)
    assert [n.name for n in joint.nodes] == before
    (y,) = joint.calls(torch.ops.aten.tanh.default)
    late = joint.insert_before(joint.output, torch.ops.aten.mul.Tensor, y, 2)
    early = joint.insert_after(y, torch.ops.aten.neg.default, y)
    early.replace_input_with(y, late)
    put_in_order(joint)
    check_joint(joint)
    assert late < early
    assert [n.name for n in joint.nodes if n not in (late, early)] == before
