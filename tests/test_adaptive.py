"""adapt measures each value on a batch; gradients are measured; allow admits by contract."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import gtrans
from gtrans.contract import Unbiased
from gtrans.errors import ContractError, OptionError
from gtrans.passes.residual.compress import Compress
from gtrans.pipeline import Pipeline


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(functional.gelu(self.up(x)))
        return y


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Perceptron(), Perceptron(), nn.Linear(16, 4))


def test_adapt_keeps_the_average_and_round_trips() -> None:
    net, x = model(), torch.randn(64, 16)
    pipeline = gtrans.adapt(net, x, bits=4.0, passes="compress{min_numel=1},default")
    coder = pipeline.passes[0]
    assert isinstance(coder, Compress)
    assert coder.widths is not None
    assert {b for _, b in coder.widths.bits} <= {2, 4, 8}
    assert len(coder.widths.bits) >= 3
    assert Pipeline.parse(str(pipeline)) == pipeline
    torch._dynamo.reset()
    found = gtrans.explain(net, x, passes=pipeline)
    torch._dynamo.reset()
    uniform = gtrans.explain(net, x, passes="compress{min_numel=1,bits=4},default")
    assert found.saved_bytes <= uniform.saved_bytes * 1.02


def test_adapt_needs_something_to_adapt() -> None:
    with pytest.raises(OptionError, match="there is no 'compress' in"):
        gtrans.adapt(model(), torch.randn(4, 16), passes="few-bit,default")


def test_the_error_of_a_gradient_is_measured() -> None:
    net, x = model(), torch.randn(64, 16)
    found = gtrans.gradient_error(net, x, passes="compress{min_numel=1,bits=2},default")
    assert 0.5 < found.cosine < 1
    assert 0.01 < found.relative < 1
    assert found.worst in dict(net.named_parameters())
    assert str(found).startswith("cosine 0.")
    torch._dynamo.reset()
    assert gtrans.gradient_error(net, x).relative < 1e-5


def test_allow_admits_by_contract() -> None:
    net, x = model(), torch.randn(512, 16)
    found = gtrans.explain(net, x, allow="unbiased")
    assert isinstance(found.contract, Unbiased)
    torch._dynamo.reset()
    assert found.saved_bytes < gtrans.explain(net, x, allow="exact").saved_bytes
    torch._dynamo.reset()
    close = gtrans.explain(net, x, allow="close")
    assert "close" in str(close.contract)
    torch._dynamo.reset()
    assert gtrans.gradient_error(net, x, passes=close.pipeline).relative < 0.1
    with pytest.raises(ContractError, match="weaker than the admitted 'close'"):
        gtrans.explain(net, x, passes="compress,default", allow="close")
