"""Whole operators go: what is left computes what the network with zeros does, and stays whole."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gtrans
from benchmarks.pruning_parts.branches import StackedUNets, Supernet
from gtrans.analysis.erase_choice import Target
from gtrans.analysis.segments import Segment, pick_segments
from gtrans.errors import ModelError, OptionError, PlanError
from gtrans.rewrite.operator_plan import OperatorPlan
from tests.structure.conftest import gradients, randomise


class Layers(nn.Module):
    """Residual attention and feed-forward branches, the latter under a learnt scalar."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(8),
                    "mix": nn.MultiheadAttention(8, 2, batch_first=True),
                    "feed": nn.Sequential(
                        nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)
                    ),
                }
            )
            for _ in range(depth)
        )
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.enter(x)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            y = layer["norm"](x)
            x = x + layer["mix"](y, y, y, need_weights=False)[0]
            x = x + F.dropout(layer["feed"](x), 0.1, self.training)
        return self.head(x) * self.scale


class Broadcast(nn.Module):
    """A branch that is wider than what it is added to, one that is subtracted, one with sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 1), nn.Linear(4, 6), nn.Linear(4, 6)
        self.d, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.a(x) + self.b(x) - self.c(x)
        return self.head(y * (1 + torch.sigmoid(self.d(x))))


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "layers": lambda: (Layers(), torch.randn(2, 5, 3).double()),
    "stacked u-nets": lambda: (StackedUNets(), IMAGE),
    "supernet": lambda: (Supernet(), IMAGE),
}


def _plan(model: nn.Module, x: torch.Tensor) -> OperatorPlan:
    randomise(model.double().eval())
    return gtrans.prune(model, x).operators


@pytest.mark.parametrize("name", MODELS)
def test_a_thousand_random_choices_stay_whole_and_some_are_compared(name: str) -> None:
    model, x = MODELS[name]()
    plan = _plan(model, x)
    generator = torch.Generator().manual_seed(3)
    for case in range(334):
        scores = torch.rand(len(plan.all), generator=generator)
        share = 0.9 * float(torch.rand((), generator=generator))  # in reach of each of them
        chosen = pick_segments(plan._segments, scores, Target(sparsity=share))
        assert _whole(plan, chosen)
        if case % 48:
            continue
        twin = copy.deepcopy(model)
        other = gtrans.prune(twin, x).operators
        picked = [other[s.name] for s in chosen]
        other.zero(picked)
        slim = other.erase(picked)
        expected, found = gradients(twin, (x,), {}), gradients(slim, (x,), {})
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        old: dict[str, Any] = dict(twin.named_parameters())
        new: dict[str, Any] = dict(slim.named_parameters())
        leaves = other.structure.program.leaves
        gone = {leaves[w].name for s in picked for w in s.weights}
        assert not gone & new.keys()
        for key in old.keys() - new.keys() - gone:  # nobody reads what they make any more
            assert not old[key].grad.any(), key
        for key, p in new.items():
            if p.shape == old[key].shape:
                torch.testing.assert_close(p.grad, old[key].grad, rtol=1e-10, atol=1e-12)


def _whole(plan: OperatorPlan, chosen: list[Segment]) -> bool:
    """Checked in another way than by the code: paths from the input through what is left."""
    program = plan.structure.program
    removed = {n for s in chosen for n in s.nodes}
    alive: set[Any] = set()
    for node in program.graph.nodes:
        leaf = program.leaves.get(node)
        sources = [s for s in node.all_input_nodes if s not in program.tensors]
        if (leaf is not None and leaf.kind == "input") or (
            node not in removed and any(s in alive for s in sources)
        ):
            alive.add(node)
    (output,) = program.graph.find_nodes(op="output")
    joints = [n for n in alive if n.op == "call_function" and "add" in str(n.target)]
    return output in alive and all(any(s in alive for s in n.all_input_nodes) for n in joints)


def test_layers_and_levels_have_the_names_of_their_modules() -> None:
    plan = _plan(*MODELS["layers"]())
    assert [s.name for s in plan.all][:2] == [
        "layers.0.norm..mix",
        "layers.0.feed",
    ]
    assert plan["layers.2.feed"].parameters == 16 + 8 * 12 + 12 + 12 * 8 + 8
    nested = _plan(*MODELS["stacked u-nets"]())
    outer, inner = nested["nets.0"], nested["nets.0.down..up"]
    assert inner.nodes < outer.nodes
    assert "nets.0 " in str(nested)
    assert "8 operators can be erased" not in str(plan)


def test_a_concatenation_without_an_operand_needs_no_columns_for_it() -> None:
    model = StackedUNets(count=1)
    plan = _plan(model, IMAGE)
    level = plan["nets.0.down..up"]
    plan.zero([level])
    slim = plan.erase()
    assert slim.get_parameter("nets.0.leave.conv.weight").shape == (6, 6, 3, 3)
    assert not any("zeros" in str(n.target) for n in slim.graph.nodes)
    assert not any("cat" in str(n.target) for n in slim.graph.nodes)
    torch.testing.assert_close(slim(IMAGE), model(IMAGE), rtol=1e-12, atol=1e-12)
    again = gtrans.prune(slim, IMAGE)
    assert again.exact, "what is left can be pruned on"


def test_what_is_added_fits_and_what_is_not_zero_stays() -> None:
    model, x = Broadcast(), torch.randn(5, 4).double()
    plan = _plan(model, x)
    assert [s.name for s in plan.all] == ["a", "b", "c"]  # sigmoid(0) is not zero
    for names in (["a"], ["b"], ["c"], ["b", "c"], ["a", "c"]):
        twin = copy.deepcopy(model)
        other = gtrans.prune(twin, x).operators
        other.zero([other[n] for n in names])
        assert [s.name for s in other.zeros()] == names
        slim = other.erase()
        torch.testing.assert_close(slim(x), twin(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(PlanError, match=r"a, b cannot go together: .*would read nothing but zeros"):
        plan.erase([plan["a"], plan["b"]])


@pytest.mark.parametrize("method", ["h2spg", "hesso", "magnitude"])
def test_operators_are_trained_to_zero_and_training_goes_on(method: str) -> None:
    torch.manual_seed(0)
    model, x = Layers(2), torch.randn(4, 5, 3).double()
    plan = _plan(model, x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = plan.sparsifier(optimizer, sparsity=0.5, method=method, steps=8, periods=2)
    goal = torch.randn(4, 5, 2).double()

    def train(trained: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            opt.zero_grad()
            (trained(x) - goal).square().mean().backward()
            opt.step()

    train(model, optimizer, 10)
    assert sparsifier.done
    assert sparsifier.sparsity == 0.5
    assert len(plan.zeros()) == 2
    slim = plan.erase()
    torch.testing.assert_close(slim(x), model(x), rtol=1e-12, atol=1e-12)
    cut = plan.erase_optimizer(optimizer, slim)
    train(model, optimizer, 2)
    train(slim, cut, 2)
    torch.testing.assert_close(slim(x), model(x), rtol=1e-9, atol=1e-9)


def test_targets_out_of_reach_and_wrong_choices() -> None:
    plan = _plan(*MODELS["layers"]())
    left = plan.select(params=0.3)
    total = sum(p.numel() for p in plan.model.parameters())
    assert sum(p.numel() for p in plan.erase(left).parameters()) <= 0.3 * total
    with pytest.raises(PlanError, match=r"params=0\.001 cannot be reached by erasing .*: 0\.0"):
        plan.select(params=0.001)
    with pytest.raises(PlanError, match=r"flops=0 cannot be reached by erasing operators"):
        plan.select(flops=0.0)
    split = _plan(Broadcast(), torch.randn(5, 4).double())
    with pytest.raises(PlanError, match=r"asks for 3 of 3 operators, but only 2 can go together"):
        split.select(sparsity=1.0)
    with pytest.raises(OptionError, match=r"has no operator 'aa'; did you mean 'a'"):
        split["aa"]
    with pytest.raises(OptionError, match="unknown method 'magnitud'; did you mean"):
        split.select(sparsity=0.5, method="magnitud")
    with pytest.raises(ModelError, match="belongs to another plan"):
        split.erase([plan["layers.0.feed"]])
    chain = _plan(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3).double()
    )
    with pytest.raises(PlanError, match=r"no operator of Sequential can be erased"):
        chain.select(sparsity=0.5)
    with pytest.raises(PlanError, match=r"no operator of Sequential can be erased"):
        chain.sparsifier(torch.optim.SGD(chain.model.parameters()), sparsity=0.5)
