"""Values that are put together by assignment to slices prune like those that are joined."""

import pytest
import torch
from torch import nn

import gtrans


class Loop(nn.Module):
    """A decaying sum over time, written step by step into a tensor."""

    def __init__(self, empty: bool) -> None:
        super().__init__()
        self.empty = empty
        self.key, self.gate = nn.Linear(5, 8), nn.Linear(5, 8)
        self.decay = nn.Parameter(torch.randn(8))
        self.out = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key, gate = self.key(x), self.gate(x).sigmoid()
        found = torch.empty_like(key) if self.empty else torch.zeros(key.shape, dtype=key.dtype)
        state = torch.zeros_like(key[:, 0])
        for t in range(x.shape[1]):
            state = state * self.decay.sigmoid() + key[:, t]
            found[:, t] = state
        result: torch.Tensor = self.out(found * gate)
        return result


class Halves(nn.Module):
    """Two values beside each other in one tensor, and a third over the start of it."""

    def __init__(self, rest: float) -> None:
        super().__init__()
        self.rest = rest
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 6)
        self.out = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.full((x.shape[0], 12), self.rest, dtype=x.dtype)
        joined[:, :4] = self.left(x).relu()
        joined[:, 4:10] = self.right(x).relu()
        result: torch.Tensor = self.out(joined)
        return result


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (Loop(empty=False), [8]),
        (Loop(empty=True), [8]),
        (Halves(0.0), [4, 6]),
        (Halves(1.0), [4, 6]),
    ],
    ids=["zeros", "empty", "halves", "halves of ones"],
)
def test_what_is_assigned_to_slices_can_be_erased(model: nn.Module, sizes: list[int]) -> None:
    torch.manual_seed(0)
    model, x = model.double(), torch.randn(3, 4, 5).double()
    x = x if isinstance(model, Loop) else x[:, 0]
    plan = gtrans.prune(model, x)
    assert sorted(c.size for c in plan.exact) == sizes
    gone = {c.name: torch.arange(c.size) % 2 == 0 for c in plan.exact}
    plan.zero(gone)
    expected = model(x)
    slim = plan.erase(gone)
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(slim(x), expected, rtol=1e-12, atol=1e-12)


def test_a_value_under_an_assignment_stays_where_it_shows() -> None:
    class Under(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x).exp()  # not zero where its unit is
            h[:, 0] = self.b(x[:, 0])
            result: torch.Tensor = self.out(h)
            return result

    plan = gtrans.prune(Under().double(), torch.randn(3, 4, 5).double())
    assert [c.size for c in plan.classes] == [8]
    assert not plan.exact
