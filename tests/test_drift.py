"""gtrans.drift: measured, not estimated."""

import pytest
import torch

import gtrans
from gtrans.errors import ModelError
from tests.passes.coupled import Perceptron, Streams
from tests.passes.test_reversible_refusals import Residual


def test_drift_grows_towards_the_first_block_and_wide_streams_have_none() -> None:
    torch.manual_seed(0)
    model, x = Streams(8, 6, Perceptron), torch.randn(32, 16)
    report = gtrans.measured_drift(model, x)
    # The stream of the first coupling is read by nothing, so it is not rebuilt.
    assert [r.coupling for r in report.rows] == list(range(11))
    assert 0 < report.worst < 1e-6
    assert report.rows[-1].relative >= report.rows[0].relative
    assert "coupled.py:" in report.rows[0].site
    assert all(p.grad is None for p in model.parameters())
    exact = gtrans.measured_drift(model, x, passes="wide-streams{bits=16},reversible,plan")
    assert exact.worst == 0
    assert all(r.differing == 0 and r.dtype is torch.float64 for r in exact.rows)
    assert str(report).splitlines()[0].split()[:2] == ["coupling", "dtype"]


def test_models_without_couplings_are_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match=r"no stream of Residual is rebuilt .* a plain residual"):
        gtrans.measured_drift(Residual(2), torch.randn(3, 8))
