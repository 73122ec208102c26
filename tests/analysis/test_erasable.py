"""Which classes small models have, which contracts, and why the rest is frozen."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gtrans.analysis.erasable import ErasableClass, Structure, find_structure
from gtrans.ir.program import export_program


class Model(nn.Module):
    """Layers by name and a function of them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


def _structure(model: nn.Module, *inputs: torch.Tensor) -> Structure:
    return find_structure(export_program(model.eval(), inputs, {}))


def _members(c: ErasableClass) -> set[str]:
    return {str(m) for m in c.members}


def test_rows_biases_and_the_columns_that_read_them() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    (c,) = _structure(model, torch.randn(2, 4)).classes
    assert (c.name, c.size, c.exact, c.parameters) == ("0.weight[0]", 6, True, 4 + 1 + 3)
    assert _members(c) == {"0.weight[0]", "0.bias[0]", "2.weight[1] (cut only)"}


def test_a_residual_stream_is_one_class() -> None:
    model = Model(
        lambda m, x: m.out(m.enter(x) + m.b(torch.tanh(m.a(m.enter(x))))),
        **{"enter": nn.Linear(3, 8), "a": nn.Linear(8, 5), "b": nn.Linear(5, 8)},
        out=nn.Linear(8, 2),
    )
    stream, hidden = _structure(model, torch.randn(2, 3)).classes
    assert _members(stream) == {
        *("enter.weight[0]", "enter.bias[0]", "a.weight[1] (cut only)", "b.weight[0]"),
        *("b.bias[0]", "out.weight[1] (cut only)"),
    }
    assert hidden.size == 5


def test_zero_to_zero_is_computed_not_listed() -> None:
    for function, exact in [
        (torch.relu, True),
        (F.mish, True),
        (torch.erf, True),
        (torch.sigmoid, False),
        (torch.cos, False),
        (torch.exp, False),
        (lambda x: x + 1, False),
        (lambda x: 3 * x, True),
        (lambda x: 2**x, False),
        (lambda x: x**2, True),
        (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), True),
        (lambda x: x.masked_fill(x > 1, 5.0), False),
        (lambda x: torch.rand_like(x), False),
    ]:
        model = Model(lambda m, x, f=function: m.b(f(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
        found = {c.name: c for c in _structure(model, torch.randn(2, 3)).classes}
        assert found["a.weight[0]"].exact is exact if "a.weight[0]" in found else not exact


def test_a_sum_over_live_values_names_itself() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    (c,) = _structure(model, torch.randn(2, 3)).classes
    assert c.reason.startswith("linear (linear.py:")
    assert c.reason.endswith("sums values that are not zero")


def test_packed_projections_share_heads_but_not_the_number_three() -> None:
    def run(m: Any, x: torch.Tensor) -> Any:
        q, k, v = m.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return m.out(y.transpose(1, 2).reshape(2, 5, 8))

    model = Model(run, qkv=nn.Linear(6, 24), out=nn.Linear(8, 6))
    structure = _structure(model, torch.randn(2, 5, 6))
    assert [(c.name, c.size, c.exact) for c in structure.classes] == [("qkv.weight[0].1", 2, True)]
    reasons = {(f.reason, f.size) for f in structure.frozen}
    assert ("unbind", 3) in reasons
    assert ("sets the scale of attention", 4) in reasons


def test_shared_key_heads_go_with_their_query_heads() -> None:
    def run(m: Any, x: torch.Tensor) -> Any:
        q = m.q(x).view(2, 5, 6, 4).transpose(1, 2)
        k, v = (f(x).view(2, 5, 2, 4).transpose(1, 2) for f in (m.k, m.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)
        return m.out(y.transpose(1, 2).flatten(2))

    model = Model(
        run, q=nn.Linear(6, 24), k=nn.Linear(6, 8), v=nn.Linear(6, 8), out=nn.Linear(24, 6)
    )
    found = {
        (c.size, c.exact, len(c.producers)) for c in _structure(model, torch.randn(2, 5, 6)).classes
    }
    assert (2, True, 6) in found  # a key head and its queries
    assert (3, False, 2) in found  # one query head of each group: uniform attention stays alive


def test_concatenation_keeps_its_parts_apart() -> None:
    model = Model(
        lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], 1)),
        **{"a": nn.Linear(3, 4), "b": nn.Linear(3, 5), "out": nn.Linear(9, 2)},
    )
    a, b = _structure(model, torch.randn(2, 3)).classes
    assert (a.size, b.size) == (4, 5)
    out = next(m for m in b.members if m.name == "out.weight")
    assert out.labels.tolist() == [-1] * 4 + [0, 1, 2, 3, 4]


def test_an_operator_without_a_rule_freezes_with_its_name() -> None:
    model = Model(lambda m, x: m.b(torch.linalg.inv(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    structure = _structure(model, torch.randn(4, 4))
    assert not structure.classes
    assert any("no rule" in f.reason for f in structure.frozen)
    assert sum(structure.analysis.unknown.values()) == 1


def test_a_write_into_a_view_concerns_what_it_covers() -> None:
    def run(m: Any, x: torch.Tensor) -> Any:
        y = m.a(x)
        y[:, :2] += 1
        return m.b(y)

    model = Model(run, a=nn.Linear(3, 6), b=nn.Linear(6, 2))
    structure = _structure(model, torch.randn(2, 3))
    assert {(c.size, c.exact) for c in structure.classes} == {(2, False), (4, True)}


def test_a_write_into_a_view_beside_written_buffers_freezes_all_that_shares_the_memory() -> None:
    def run(m: Any, x: torch.Tensor) -> Any:
        y = m.a(m.norm(x))
        y[:, :2] += 1
        return m.b(y)

    model = Model(run, norm=nn.BatchNorm1d(3), a=nn.Linear(3, 6), b=nn.Linear(6, 2))
    structure = find_structure(export_program(model.train(), (torch.randn(2, 3),), {}))
    assert not [c for c in structure.classes if c.exact]


def test_an_in_place_activation_is_understood() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    (c,) = _structure(model, torch.randn(2, 3)).classes
    assert c.exact


def test_tied_weights_are_counted_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.embed(x))

    structure = _structure(Tied(), torch.tensor([[1, 2]]))
    (c,) = structure.classes
    assert structure.parameters({}) == 28
    assert c.parameters == 7
    assert c.exact
    assert {m.name for m in c.producers} == {"embed.weight", "head.weight"}


def test_operations_are_counted_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, groups=2)
    )
    structure = _structure(model, torch.randn(2, 3, 5, 5))
    assert structure.flops({}) == 2 * (2 * 8 * 25 * 3 * 9 + 2 * 4 * 25 * 4 * 9)
