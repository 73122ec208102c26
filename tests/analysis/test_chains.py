"""Where chains of gradient sums are found, and where they end."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from gtrans.analysis.chains import END_OF_STREAM, find_chains
from gtrans.analysis.critical_path import backward_critical_path
from gtrans.debugging.recording import Recording
from gtrans.ir.joint import JointGraph
from gtrans.passes.wire.highway_bp import HighwayBP
from gtrans.pipeline import Pipeline
from gtrans.testing.streams import FLAVOURS, Flavour, Stream

aten = torch.ops.aten


def _joint(model: nn.Module, x: torch.Tensor) -> JointGraph:
    (captured,) = Recording(model, (x,), {}).captured
    assert captured.original is not None
    return captured.original


def _sequence(width: int = 6) -> torch.Tensor:
    return torch.randn(2, 3, width, requires_grad=True)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_one_chain_with_a_link_for_each_branch(flavour: Flavour) -> None:
    model = Stream(flavour, 3)
    (chain,) = find_chains(_joint(model, _sequence()))
    assert chain.depth == model.links
    assert chain.end == END_OF_STREAM
    levels = [link.level for link in chain.links]
    assert levels == sorted(levels)
    assert sum(link.through for link in chain.links) == model.links
    # The tap on the last point lies before the first link, and so belongs to the head.
    assert sum(link.local for link in chain.links) == (2 if flavour == "taps" else 0)


class _Stages(nn.Module):
    """Two stages of pre-activation blocks with a strided convolution as shortcut in between."""

    def __init__(self) -> None:
        super().__init__()
        widths = [4, 4, 4, 6, 6, 6, 6]
        self.first = nn.ModuleList(nn.Conv2d(a, a, 3, padding=1) for a in widths[:3])
        self.down, self.shortcut = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, 2)
        self.second = nn.ModuleList(nn.Conv2d(a, a, 3, padding=1) for a in widths[3:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.first:
            x = x + conv(torch.relu(x))
        x = self.shortcut(x) + self.down(torch.relu(x))
        for conv in self.second:
            x = x + conv(torch.relu(x))
        return x


def test_a_strided_shortcut_cuts_the_chain() -> None:
    chains = find_chains(_joint(_Stages(), torch.randn(1, 4, 6, 6, requires_grad=True)))
    assert [c.depth for c in chains] == [4, 3]
    late, early = chains
    assert max(late.points) < min(early.points)


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


def test_no_stream_no_chain() -> None:
    assert find_chains(_joint(_Plain(), torch.randn(2, 4, requires_grad=True))) == []


def test_a_long_skip_is_one_more_cone_that_reads_the_stream() -> None:
    class Skips(Stream):
        def __init__(self) -> None:
            super().__init__("pre-norm", 4)
            self.extra = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            middle = self._block(1, self._block(0, x))
            deep = self._block(3, self._block(2, middle))
            return (self.last(deep + self.extra(x)),)

    (chain,) = find_chains(_joint(Skips(), _sequence()))
    assert chain.depth == 4
    assert [link.local for link in chain.links] == [False] * len(chain.links)


# ------------------------------------------------------------------------- what cannot be copied


def _with_call_in_the_fourth_cone(joint: JointGraph, target: Any, *rest: Any) -> JointGraph:
    changed = joint.copy()
    node = changed.calls(aten.gelu_backward.default)[3]
    users = list(node.users)
    changed.replace_uses(node, changed.insert_after(node, target, node, *rest), users)
    return changed


@pytest.mark.parametrize(
    ("target", "rest", "message"),
    [
        (aten.bernoulli.p, (0.5,), "the cone draws random numbers (aten.bernoulli.p)"),
        (aten.relu_.default, (), "the cone has an effect (aten.relu_.default)"),
        (torch.relu, (), "the cone calls what is no plain operator"),
    ],
)
def test_a_chain_is_cut_at_a_cone_that_must_not_run_twice(
    target: Any, rest: tuple[Any, ...], message: str
) -> None:
    joint = _joint(Stream("pre-norm", 8), _sequence())
    changed = _with_call_in_the_fourth_cone(joint, target, *rest)
    chains = sorted(find_chains(changed), key=lambda c: c.head)
    assert [c.depth for c in chains] == [3, 4]
    assert chains[0].end.startswith(message)
    assert chains[1].end == END_OF_STREAM
    assert chains[1].head is not chains[0].points[-1]  # the sum behind the cone that stays


# ---------------------------------------------------------------------------------- critical path


def test_critical_path_of_a_deep_model_before_and_after() -> None:
    joint = _joint(Stream("pre-norm", 24, 4), _sequence(4))
    before = backward_critical_path(joint)
    assert len(before) == 2 * 24 + 1  # two products a block, and the last layer
    rewritten, (step,) = Pipeline((HighwayBP(3, gamma=0.0, batch="never"),)).run(joint)
    assert isinstance(rewritten, JointGraph)
    assert step.stats.rewritten == 1
    batched, _ = Pipeline((HighwayBP(3, gamma=0.0, batch="always"),)).run(joint)
    assert isinstance(batched, JointGraph)
    assert len(backward_critical_path(batched)) == 2 * (3 + 1) + 1
    after = backward_critical_path(rewritten)
    assert len(after) == 2 * (3 + 1) + 1
    assert all(a < b for a, b in pairwise(after))
    more = len(rewritten.calls(aten.mm.default)) - len(joint.calls(aten.mm.default))
    assert more == 2 * 3 * (24 - 3)  # k (n - k) branches of two products run once more


def test_critical_path_counts_what_it_is_told_to() -> None:
    joint = _joint(Stream("pre-norm", 2), _sequence())
    norms = backward_critical_path(
        joint, lambda n: n.target is aten.native_layer_norm_backward.default
    )
    assert [n.target for n in norms] == [aten.native_layer_norm_backward.default] * 2
    assert backward_critical_path(joint, lambda n: False) == ()
