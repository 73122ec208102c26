"""What a user sees of a plan: tables, targets, errors, and models that go on living."""

import copy
import io
import json
from typing import Any

import pytest
import torch
from torch import nn

import gtrans
from gtrans.errors import CaptureError, ModelError, OptionError, PlanError
from gtrans.runtime.norms import LongerLayerNorm, layer_norm_of_longer, rms_norm_of_longer


class Block(nn.Module):
    """A pre-norm residual block with a head attribute that erasure must find."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.enter, self.norm = nn.Linear(3, width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.enter(x)
        n, t, _ = h.shape
        q, k, v = self.qkv(self.norm(h)).view(n, t, 3, self.num_heads, self.head_dim).unbind(2)
        y = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        y = y.transpose(1, 2).reshape(n, t, self.num_heads * self.head_dim)
        return self.head(h + self.out(y))


X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def plan() -> gtrans.PrunePlan:
    return gtrans.prune(Block().double().eval(), X.double())


def test_the_table_names_classes_and_reasons(plan: gtrans.PrunePlan) -> None:
    text = str(plan)
    assert text.startswith("Block: 1,218 parameters")
    assert "enter.weight[0]" in text
    assert "exact" in text
    assert "(4): sets the scale of attention" in text
    assert "head.weight[0], head.bias[0] (2): output" in text
    data = plan.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert [c["name"] for c in data["classes"]] == [c.name for c in plan.classes]
    assert data["classes"][0]["flops_per_index"] > 0


def test_the_same_class_with_attributes_set(plan: gtrans.PrunePlan) -> None:
    chosen = plan.select(sparsity=0.5, scope="local")
    plan.zero(chosen)
    slim = plan.erase(form="module")
    assert isinstance(slim, Block)
    assert (slim.num_heads, slim.head_dim, slim.enter.out_features) == (2, 4, 8)
    assert slim.qkv.weight.shape == (3 * 2 * 4, 8)
    assert isinstance(slim.norm, LongerLayerNorm)
    assert slim.norm.divisor == 16
    torch.testing.assert_close(slim(X.double()), plan.model(X.double()), rtol=1e-12, atol=1e-12)
    # Another batch and length work too: nothing of the example is baked in.
    other = torch.randn(3, 7, 3).double()
    torch.testing.assert_close(slim(other), plan.model(other), rtol=1e-12, atol=1e-12)


# torch's own pytree warns when a specification of an output is copied.
def test_erased_models_are_copied_and_saved(plan: gtrans.PrunePlan) -> None:
    chosen = plan.select(sparsity=0.5, scope="local")
    for form in ("module", "graph"):
        slim = plan.erase(chosen, form=form)
        expected = slim(X.double())
        assert slim.state_dict().keys() == plan.model.state_dict().keys()
        assert torch.equal(copy.deepcopy(slim)(X.double()), expected)
        if form == "module":
            file = io.BytesIO()
            torch.save(slim, file)
            file.seek(0)
            assert torch.equal(torch.load(file, weights_only=False)(X.double()), expected)
        twin = plan.erase(plan.select(sparsity=0.5, scope="local", method="magnitude"), form=form)
        twin.load_state_dict(slim.state_dict())
        assert torch.equal(twin(X.double()), expected)


def test_norms_that_start_anew_are_stock_modules(plan: gtrans.PrunePlan) -> None:
    chosen = plan.select(sparsity=0.5, scope="local")
    slim = plan.erase(chosen, form="module", norm="restart")
    assert type(slim.norm) is nn.LayerNorm
    assert slim.norm.normalized_shape == (8,)


def test_norms_of_longer_vectors() -> None:
    x = torch.randn(4, 6).double()
    longer = torch.cat([x, torch.zeros(4, 3).double()], 1)
    weight, bias = torch.randn(9).double(), torch.randn(9).double()
    expected = nn.functional.layer_norm(longer, (9,), weight, bias, 1e-5)[:, :6]
    found = layer_norm_of_longer(x, 1, 9, weight[:6], bias[:6], 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected = nn.functional.rms_norm(longer, (9,), weight, 1e-5)[:, :6]
    found = rms_norm_of_longer(x, 1, 9, weight[:6], 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["magnitude", "isomorphic", "random", "taylor", "hessian"])
def test_targets_are_reached(plan: gtrans.PrunePlan, method: str) -> None:
    plan.model(X.double()).square().sum().backward()
    total = sum(c.size for c in plan.exact)
    chosen = plan.select(sparsity=0.3, method=method)
    assert sum(int(g.sum()) for g in chosen.values()) == int(0.3 * total)
    for name in ("params", "flops"):
        options: dict[str, Any] = {name: 0.5, "method": method}
        left = plan.left(plan.select(**options))
        whole = {"params": plan.parameters, "flops": plan.flops}[name]
        share = left["parameters" if name == "params" else name] / whole
        assert share <= 0.5
        # One index less would miss it.
        biggest = max(c.parameters for c in plan.exact) / plan.parameters
        assert share > 0.5 - 1.5 * biggest


def test_sizes_are_multiples(plan: gtrans.PrunePlan) -> None:
    chosen = plan.select(sparsity=0.4, multiple_of=4)
    for c in plan.exact:
        assert int((~chosen[c.name]).sum()) % 4 == 0


def test_unreachable_targets_say_what_can_be_reached(plan: gtrans.PrunePlan) -> None:
    with pytest.raises(PlanError, match=r"largest reachable sparsity is 0\.9"):
        plan.select(sparsity=1.0)
    with pytest.raises(PlanError, match=r"params=0\.001 cannot be reached.*ask for params=0\.\d+"):
        plan.select(params=0.001)
    with pytest.raises(PlanError, match="ask for flops=") as caught:
        plan.select(flops=0.001)
    smallest = float(str(caught.value).partition("ask for flops=")[2].split()[0])
    assert plan.left(plan.select(flops=smallest))["flops"] <= smallest * plan.flops


def test_formulas_give_the_numbers_at_every_size(plan: gtrans.PrunePlan) -> None:
    found = plan.formulas()
    assert set(found.meaning.values()) >= {"enter.weight[0]", "x.shape[0]", "x.shape[1]"}
    symbol = {text: s for s, text in found.meaning.items()}
    for share in (0.0, 0.3, 0.7):
        chosen = plan.select(sparsity=share)
        sizes = dict(found.sizes)
        for name, gone in chosen.items():
            sizes[symbol[name]] = int((~gone).sum())
        left = plan.left(chosen)
        assert found.parameters.subs(sizes) == left["parameters"]
        assert found.flops.subs(sizes) == left["flops"]
    other = gtrans.prune(plan.model, torch.randn(3, 9, 3).double())
    assert found.flops.subs({**found.sizes, symbol["x.shape[0]"]: 3, symbol["x.shape[1]"]: 9}) == (
        other.flops
    )
    assert str(found).startswith("parameters = ")


def test_trades_fall_and_end_where_nothing_more_can_go(plan: gtrans.PrunePlan) -> None:
    found = plan.pareto((0.0, 0.5, 0.9, 1.0))
    assert [t.sparsity for t in found] == [0.0, 0.5, 0.9]
    assert found[0].parameters == plan.parameters
    assert found[0].flops > found[1].flops > found[2].flops


def test_bad_options(plan: gtrans.PrunePlan) -> None:
    with pytest.raises(OptionError, match="exactly one of sparsity"):
        plan.select()
    with pytest.raises(OptionError, match="exactly one of sparsity"):
        plan.select(sparsity=0.5, params=0.5)
    with pytest.raises(OptionError, match=r"between 0 and 1, got 1\.5"):
        plan.select(sparsity=1.5)
    with pytest.raises(OptionError, match="did you mean 'magnitude'"):
        plan.select(sparsity=0.5, method="magnitud")
    with pytest.raises(OptionError, match="multiple_of must be at least 1"):
        plan.select(sparsity=0.5, multiple_of=0)
    with pytest.raises(OptionError, match="contract must be"):
        plan.select(sparsity=0.5, contract="any")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="'taylor' needs gradients"):
        plan.select(sparsity=0.5, method="taylor")
    c = plan.classes[0]
    with pytest.raises(OptionError, match="erases every index"):
        plan.erase({c.name: torch.ones(c.size, dtype=torch.bool)})
    with pytest.raises(OptionError, match="must be 16 booleans"):
        plan.erase({c.name: torch.ones(3, dtype=torch.bool)})
    with pytest.raises(OptionError, match=r"has no class 'enter\.weight'; did you mean"):
        plan.erase({"enter.weight": torch.ones(3, dtype=torch.bool)})


def test_another_model_and_a_second_erasure(plan: gtrans.PrunePlan) -> None:
    chosen = plan.select(sparsity=0.5)
    with pytest.raises(ModelError, match=r"it has no 'enter\.weight'.*another model"):
        plan.erase(chosen, model=nn.Linear(3, 2))
    slim = plan.erase(chosen)
    with pytest.raises(ModelError, match="has been erased already"):
        plan.erase(chosen, model=slim)
    twin = Block().double().eval()
    assert plan.erase(chosen, model=twin).state_dict().keys() == slim.state_dict().keys()


def test_nothing_to_erase_gives_the_reasons() -> None:
    plan = gtrans.prune(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(PlanError, match=r"nothing of Linear can be erased:\n.*: output"):
        plan.select(sparsity=0.5)
    with pytest.raises(PlanError, match="nothing of Linear"):
        plan.sparsifier(torch.optim.SGD(plan.model.parameters(), lr=0.1), sparsity=0.5)
    live = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    approximate = gtrans.prune(live, torch.randn(1, 3))
    with pytest.raises(PlanError, match="contract='approximate' admits others"):
        approximate.select(sparsity=0.5)
    chosen = approximate.select(sparsity=0.5, contract="approximate")
    assert approximate.erase(chosen).state_dict()["0.bias"].shape == (2,)


def test_what_cannot_be_pruned_at_all() -> None:
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module, got function"):
        gtrans.prune(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="has no parameters"):
        gtrans.prune(nn.ReLU(), torch.randn(1))

    class Choosy(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x) if x.sum().item() > 0 else x

    with pytest.raises(CaptureError, match=r"forward of Choosy cannot be captured as one graph"):
        gtrans.prune(Choosy(3, 3), torch.randn(2, 3))


class Fixed(nn.Module):
    """The number of heads is written into the code: its class cannot have fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.a(x).view(x.shape[0], 2, 4).softmax(-1).flatten(1)
        return self.c(torch.relu(self.b(y)))


def test_what_a_class_cannot_express(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(3, 4)
    plan = gtrans.prune(Fixed(), x)
    heads = next(c for c in plan.classes if c.size == 2)
    chosen = {heads.name: torch.tensor([True, False])}
    with pytest.raises(PlanError, match=r"Fixed cannot express this erasure: .* take form='graph'"):
        plan.erase(chosen, form="module")
    assert isinstance(plan.erase(chosen), torch.fx.GraphModule)
    assert "Fixed cannot express this erasure" in caplog.text
    same = gtrans.prune(Fixed(), x, same_class=True)
    assert [c.name for c in same.classes] == ["b.weight[0]"]
    assert "the model's class cannot express it" in str(same)


def test_other_tensors_are_cut_alike(plan: gtrans.PrunePlan) -> None:
    chosen = plan.select(sparsity=0.5)
    slim = plan.erase(chosen)
    average: dict[str, Any] = {k: v.clone() for k, v in plan.model.state_dict().items()}
    cut = plan.cut({**average, "step": torch.tensor(3)}, chosen)
    assert cut.pop("step") == 3
    slim.load_state_dict(cut)
