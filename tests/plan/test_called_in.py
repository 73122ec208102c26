"""Forward passes that a plan under a budget calls in: the loss of a wide head, in chunks."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gtrans
from gtrans.analysis.cost import node_bytes, node_flops
from gtrans.analysis.measure import measured_peak
from gtrans.errors import BudgetError
from gtrans.explanation import Explanation

ROWS, WIDTH, CLASSES = 512, 16, 2048


class Head(nn.Module):
    """An embedding, a layer, and a head with far more classes than the layer is wide."""

    def __init__(self, logits_too: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)
        self.logits_too = logits_too

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> object:
        """Args: ids, labels: [batch, length]. Returns: the loss, with the logits if asked for."""
        z = self.head(torch.tanh(self.layer(self.embed(ids))))
        loss = F.cross_entropy(z.view(-1, CLASSES), labels.view(-1))
        return (loss, z) if self.logits_too else loss


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    ids, labels = torch.randint(CLASSES, (2, 4, ROWS // 4))
    labels[0, :7] = -100
    return ids, labels


def _calls(explanation: Explanation) -> list[str]:
    steps = [s for _, s in explanation.steps() if s.name == "chunked-loss"]
    return [note for s in steps for note in s.stats.notes]


def test_it_is_called_in_where_nothing_faster_fits(batch: tuple[torch.Tensor, ...]) -> None:
    model = Head()
    plain = gtrans.explain(model, *batch, passes="none").peak
    shares = (1.0, 0.6, 0.35)
    found = [gtrans.explain(model, *batch, memory=int(s * plain)) for s in shares]
    assert _calls(found[0]) == []  # the plain step fits
    assert _calls(found[-1]) == ["called in by the plan: nothing faster fits the budget"]
    assert "called in by the plan" in str(found[-1])
    assert "chunked-loss: matched 1, rewrote 1" in str(found[-1])
    assert str(found[-1].contract).startswith("exact")
    assert all(e.peak <= s * plain for e, s in zip(found, shares, strict=True))
    assert all(a.peak >= b.peak for a, b in pairwise(found))
    by_name = gtrans.explain(model, *batch, passes="chunked-loss,default", memory=int(0.6 * plain))
    assert len([s for _, s in by_name.steps() if s.name == "chunked-loss"]) == 1
    with pytest.raises(BudgetError):
        gtrans.explain(model, *batch, memory=int(0.02 * plain))


def test_the_step_is_right_and_keeps_its_budget(batch: tuple[torch.Tensor, ...]) -> None:
    model = Head()
    model(*batch).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    plain = gtrans.explain(model, *batch, passes="none").peak
    model.zero_grad(set_to_none=True)
    gtrans.optimize(model, memory=int(0.35 * plain), backend="eager")

    def step() -> None:
        model(*batch).backward()

    resident = sum(t.nbytes for t in (*model.parameters(), *batch))
    assert measured_peak(step, warm_up=0).bytes + resident <= 0.35 * plain
    for a, p in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)
    assert _calls(gtrans.report(model)) != []
    with torch.no_grad():
        assert torch.isfinite(model(*batch))


def test_it_is_not_called_in_where_the_logits_are_wanted(batch: tuple[torch.Tensor, ...]) -> None:
    explanation = gtrans.explain(Head(logits_too=True), *batch, memory=0.95)
    assert _calls(explanation) == []
    with pytest.raises(BudgetError):
        gtrans.explain(Head(logits_too=True), *batch, memory=0.3)


def test_its_price(batch: tuple[torch.Tensor, ...]) -> None:
    explanation = gtrans.explain(Head(), *batch, passes="chunked-loss,plan")
    graph = explanation.captured[0].rewritten
    assert graph is not None
    (loss,) = graph.calls(torch.ops.gtrans.linear_cross_entropy.default)
    assert node_flops(loss) == 3 * 2 * ROWS * WIDTH * CLASSES
    assert node_bytes(loss) > 8 * 4 * ROWS * CLASSES
