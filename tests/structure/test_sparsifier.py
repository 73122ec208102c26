"""The sparsifier reaches its target exactly, holds zeros, and training goes on afterwards."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gtrans
from gtrans.analysis.unit_scores import METHODS, Moments, score
from gtrans.errors import ModelError, OptionError, PlanError
from gtrans.runtime.half_space import pull_strength
from gtrans.runtime.sparsifier import Schedule


def _model() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 12), nn.GELU()),
        nn.Linear(12, 3),
    ).double()


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).double()
Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(1)).double()

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "foreach-adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
}


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_target_is_reached_exactly_and_stays(method: str, optimizer: str) -> None:
    torch.manual_seed(0)
    model = _model()
    plan = gtrans.prune(model, X)
    opt = OPTIMIZERS[optimizer](model.parameters())
    sparsifier = plan.sparsifier(opt, sparsity=0.5, method=method, start=2, steps=10, periods=3)
    _train(model, opt, 2)
    assert sparsifier.sparsity == 0
    _train(model, opt, 10)
    assert sparsifier.done
    assert sparsifier.sparsity == 0.5
    assert sum(int(z.sum()) for z in plan.zeros().values()) == 16
    _train(model, opt, 5)
    zeros = plan.zeros()
    assert sum(int(z.sum()) for z in zeros.values()) == 16
    slim = plan.erase()
    model.eval(), slim.eval()
    torch.testing.assert_close(slim(X), model(X), rtol=1e-12, atol=1e-12)
    assert str(sparsifier) == f"{method} sparsifier, done, 50.0% of the indices are zero"


def test_progress_never_goes_back() -> None:
    torch.manual_seed(0)
    model = _model()
    plan = gtrans.prune(model, X)
    opt = OPTIMIZERS["adamw"](model.parameters())
    sparsifier = plan.sparsifier(opt, params=0.3, steps=12, periods=4, multiple_of=2)
    seen = []
    for _ in range(14):
        _train(model, opt, 1)
        seen.append(sparsifier.sparsity)
    assert seen == sorted(seen)
    assert len(set(seen)) == 5
    left = plan.left(plan.zeros())
    assert left["parameters"] <= 0.3 * plan.parameters
    assert all(int((~z).sum()) % 2 == 0 for z in plan.zeros().values())


def test_training_goes_on_where_it_was() -> None:
    """A step of the erased model with its cut state is the step of the zeroed model, cut."""
    for name in ("sgd", "adamw"):
        torch.manual_seed(0)
        model = _model()
        plan = gtrans.prune(model, X)
        opt = OPTIMIZERS[name](model.parameters())
        plan.sparsifier(opt, sparsity=0.5, steps=6, periods=2)
        _train(model, opt, 8)
        chosen = plan.zeros()
        slim = plan.erase()
        slim_opt = plan.erase_optimizer(opt, slim)
        _train(model, opt, 3)
        _train(slim, slim_opt, 3)
        for key, value in plan.cut(model.state_dict(), chosen).items():
            torch.testing.assert_close(slim.state_dict()[key], value, rtol=1e-9, atol=1e-11)


def test_it_works_under_a_compiled_step() -> None:
    torch.manual_seed(0)
    model = _model()
    plan = gtrans.prune(model, X)
    model.compile(backend="aot_eager")
    opt = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = plan.sparsifier(opt, sparsity=0.25, steps=4, periods=2)
    _train(model, opt, 5)
    assert sparsifier.sparsity == 0.25


@pytest.mark.parametrize("method", ["hesso", "hesso-cric", "dhspg"])
@pytest.mark.parametrize("stop", [3, 7, 12])
def test_it_resumes_as_if_nothing_had_happened(method: str, stop: int) -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = _model()
        plan = gtrans.prune(model, X)
        opt = OPTIMIZERS["adamw"](model.parameters())
        made = plan.sparsifier(opt, sparsity=0.5, method=method, start=1, steps=14, periods=2)
        return model, opt, made

    torch.manual_seed(0)
    model, opt, sparsifier = begin()
    _train(model, opt, stop)
    kept = copy.deepcopy([model.state_dict(), opt.state_dict(), sparsifier.state_dict()])
    live = sparsifier.state_dict()
    _train(model, opt, 17 - stop)
    twin, twin_opt, resumed = begin()
    twin.load_state_dict(kept[0])
    twin_opt.load_state_dict(kept[1])
    resumed.load_state_dict(live)  # what was read before must not change under the training
    _train(twin, twin_opt, 17 - stop)
    assert resumed.done
    assert resumed.sparsity == 0.5
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name


def test_the_state_of_another_plan_is_refused() -> None:
    model = _model()
    plan = gtrans.prune(model, X)
    state = plan.sparsifier(OPTIMIZERS["adamw"](model.parameters()), sparsity=0.5).state_dict()
    other = gtrans.prune(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), X[:, :3].float()
    )
    foreign = other.sparsifier(torch.optim.SGD(other.model.parameters(), lr=0.1), sparsity=0.5)
    with pytest.raises(ModelError, match="other classes"):
        foreign.load_state_dict(state)


def test_errors_come_before_training() -> None:
    model = _model()
    plan = gtrans.prune(model, X)
    opt = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(PlanError, match="largest reachable sparsity"):
        plan.sparsifier(opt, sparsity=1.0)
    with pytest.raises(OptionError, match="unknown method 'hess'; did you mean"):
        plan.sparsifier(opt, sparsity=0.5, method="hess")
    with pytest.raises(OptionError, match="periods must lie between 1 and steps=4"):
        plan.sparsifier(opt, sparsity=0.5, steps=4, periods=9)
    with pytest.raises(OptionError, match="start must be at least 0"):
        plan.sparsifier(opt, sparsity=0.5, start=-1)
    mistyped: dict[str, Any] = {"sparsty": 0.5}
    with pytest.raises(OptionError, match="unknown option 'sparsty'; did you mean 'sparsity'"):
        plan.sparsifier(opt, **mistyped)
    with pytest.raises(OptionError, match="half_space must lie in"):
        plan.sparsifier(opt, sparsity=0.5, half_space=1.0)
    stranger = OPTIMIZERS["sgd"](_model().parameters())
    with pytest.raises(ModelError, match=r"does not hold '0\.weight'"):
        plan.sparsifier(stranger, sparsity=0.5)
    with pytest.raises(ModelError, match="not of this plan's model"):
        plan.erase_optimizer(stranger, plan.erase())
    chosen = plan.select(sparsity=0.5)
    with pytest.raises(ModelError, match="pass the selection that the model was erased with"):
        plan.erase_optimizer(opt, plan.erase(chosen))


@given(steps=st.integers(1, 40), periods=st.integers(1, 40))
def test_every_period_decays_to_exactly_zero(steps: int, periods: int) -> None:
    schedule = Schedule(0, steps, min(steps, periods))
    value, last = 1.0, -1
    for step in range(steps):
        number, t, length = schedule.period(step)
        if number != last:
            assert last < 0 or value == 0.0
            assert t == 0
            value, last = 1.0, number
        value *= (length - t - 1) / (length - t)
    assert value == 0.0
    assert last == schedule.periods - 1


@given(seed=st.integers(0, 99), base=st.floats(1e-4, 1.0))
def test_a_pulled_step_shrinks_and_descends(seed: int, base: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, 5, generator=generator).double()
    dot, norm, speed = x @ v, x.norm(), v @ v
    strength = float(pull_strength(dot[None], norm[None], speed[None], base, limit=1e9)[0])
    step = -(v + strength * x / norm)
    if dot < 0:
        assert float(step @ v) < 0
        assert float(step @ x) < 0
    else:
        assert strength == base


def test_scores_follow_their_formulas_and_ignore_the_order_of_units() -> None:
    torch.manual_seed(0)
    first = nn.Linear(3, 4)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3).double()
    plan = gtrans.prune(model, x)
    model(x).square().sum().backward()
    (c,) = plan.classes
    tensors: dict[str, Any] = dict(model.named_parameters())
    assert first.weight.grad is not None
    assert first.bias.grad is not None
    rows = torch.cat([first.weight, first.bias[:, None]], 1).detach()
    grads = torch.cat([first.weight.grad, first.bias.grad[:, None]], 1)
    found = Moments(c, tensors)
    torch.testing.assert_close(found["square"], rows.square().sum(1))
    torch.testing.assert_close(found["dot"], (rows * grads).sum(1))
    torch.testing.assert_close(found["fisher"], (rows * grads).square().sum(1))
    assert found.count.tolist() == [4.0] * 4
    for method in METHODS:
        if method == "random":
            continue
        before = score([c], tensors, method)[c.name]
        order = torch.tensor([2, 0, 3, 1])
        twin = {k: nn.Parameter(v.detach().clone()) for k, v in tensors.items()}
        for name in ("0.weight", "0.bias"):
            twin[name] = nn.Parameter(tensors[name].detach()[order])
            twin[name].grad = tensors[name].grad[order]
        twin["2.weight"].grad = tensors["2.weight"].grad
        torch.testing.assert_close(score([c], twin, method)[c.name], before[order])


@pytest.mark.parametrize("method", ["hesso", "dhspg", "h2spg"])
@pytest.mark.parametrize("size", [0.0, 1e-12])
def test_a_unit_of_zeros_goes_first_and_leaves_the_order_of_the_others(
    method: str, size: float
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    tensors: dict[str, Any] = dict(model.named_parameters())
    x = torch.randn(5, 3).double()
    (c,) = gtrans.prune(model, x).classes
    model(x).square().sum().backward()
    for name in ("0.weight", "0.bias"):  # small changes of the others must show in their scores
        tensors[name].data[5] = size
        tensors[name].data[2] = tensors[name].data[3] * 1.05
        tensors[name].grad[2] = tensors[name].grad[3]
    found = score([c], tensors, method)[c.name]
    if size == 0:
        assert found.argmin() == 5
        assert found[5] < -1
    else:
        assert found.isfinite().all()
    larger_goes_later = found[2] - found[3]
    assert larger_goes_later > 1e-4
