"""Formulas against numbers, and the sizes that fit against planning at those sizes."""

import pytest
import sympy
import torch
from torch import nn
from torch.nn import functional as F

import gtrans
from gtrans.analysis.closed_form import largest
from gtrans.analysis.cost import DEVICES, bytes_of
from gtrans.errors import OptionError
from gtrans.explanation import Explanation


class Tiny(nn.Module):
    """A transformer block with an embedding, a head and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Args: ids: [batch, time] of int64. Returns: a scalar."""
        x = self.embed(ids)
        heads = x.view(x.shape[0], x.shape[1], 2, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        x = x + self.down(F.gelu(self.up(x + y.transpose(1, 2).flatten(2))))
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def _explained(batch: int, time: int) -> Explanation:
    torch._dynamo.reset()
    ids = torch.randint(50, (batch, time))
    return gtrans.explain(Tiny(), ids, passes="plan", dynamic=True)


@pytest.fixture(scope="module")
def explained() -> Explanation:
    return _explained(6, 10)


def test_dimensions_have_names(explained: Explanation) -> None:
    assert explained.dimensions == {"B": 6, "T": 10}


def test_formulas_give_the_numbers(explained: Explanation) -> None:
    formulas = explained.formulas
    sizes = {sympy.Symbol(k, positive=True, integer=True): v for k, v in (("B", 6), ("T", 10))}
    assert formulas["saved"].subs(sizes) == explained.saved_bytes
    assert formulas["saved_before"].subs(sizes) == explained.saved_bytes_before
    assert formulas["saved"].free_symbols == set(sizes)
    workspace = explained.liveness[0].workspace().get(explained.liveness[0].peak_task, 0)
    assert formulas["peak"].subs(sizes) == explained.peak - workspace
    assert formulas["flops"].subs(sizes) > 0
    assert explained.peak_at({}) == explained.peak


def test_other_sizes_are_predicted_as_if_captured(explained: Explanation) -> None:
    other = _explained(12, 30)
    assert explained.peak_at({"B": 12, "T": 30}) == pytest.approx(other.peak, rel=0.02)
    assert explained.formulas["saved"] == other.formulas["saved"]


def test_largest(explained: Explanation) -> None:
    limit = 10 * 2**20
    found = explained.largest("B", memory="10MiB")
    assert explained.peak_at({"B": found}) <= limit < explained.peak_at({"B": found + 1})
    assert explained.largest("B", memory="t4") > found
    assert explained.fits("10MiB")
    assert not explained.fits(1000)
    with pytest.raises(OptionError, match="no size of B fits into 1000 bytes: with B=1 the step"):
        explained.largest("B", memory=1000)
    with pytest.raises(OptionError, match=r"no dynamic dimension 'N'; it has B, T\. gtrans"):
        explained.largest("N", memory="1GiB")


def test_sizes_that_are_fixed() -> None:
    explained = gtrans.explain(nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4), passes="plan")
    assert explained.dimensions == {}
    with pytest.raises(OptionError, match=r"no dynamic dimension 'B'\. gtrans\.explain"):
        explained.largest("B", memory="1GiB")


def test_largest_by_search() -> None:
    assert [largest(lambda n: n * n, limit, "B") for limit in (1, 3, 4, 99, 100)] == [
        1,
        1,
        2,
        9,
        10,
    ]


def test_amounts_of_memory() -> None:
    assert bytes_of("h100") == DEVICES["h100"].memory_bytes == 80 * 10**9
    assert bytes_of("2KiB") == bytes_of(2048) == 2048
    with pytest.raises(OptionError, match="how much memory 'cpu' has is not known; give it in by"):
        bytes_of("cpu")
    with pytest.raises(OptionError, match=r"'40%' is a share; give bytes \('80GiB'\) or a device"):
        bytes_of("40%")
