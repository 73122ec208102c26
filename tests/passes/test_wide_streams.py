"""wide-streams: the same function, and gradients that `reversible` gives back to the bit."""

import re
from typing import Any

import pytest
import torch
from torch import nn

import gtrans
from gtrans.contract import Close, Exact
from gtrans.passes.operator.wide_streams import MADE, WIDE
from gtrans.pipeline import Pipeline
from gtrans.testing import ModelSpec, Record, Runner
from tests.passes.coupled import Attention, Dropped, Perceptron, Streams, step_of
from tests.passes.test_reversible_links import LINKS, Linked

pytestmark = pytest.mark.usefixtures("seeded")


class Autocast(nn.Module):
    """Branches in bfloat16; the streams are what the stem makes, widened to float32."""

    def __init__(self, inner: Streams) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            streams = [s.float() for s in self.inner.stem(x).chunk(self.inner.splits, -1)]
            for i, branch in enumerate(self.inner.branches):
                self.inner.update(streams, i % self.inner.splits, branch)
            return self.inner.head(torch.cat(streams, -1)).float()


def kept_and_rebuilt(
    model: nn.Module, *inputs: Any, wide: str = "wide-streams", dtype: torch.dtype | None = None
) -> tuple[Record, Record, Runner]:
    """A step with wide streams and everything kept, and one whose streams are rebuilt."""
    kept = Runner(model, inputs, Pipeline.parse(f"{wide},plan{{recompute=none}}"), dtype)
    rebuilt = Runner(model, inputs, Pipeline.parse(f"{wide},reversible,plan"), dtype)
    return kept.step(), rebuilt.step(), rebuilt


def require_bitwise(kept: Record, rebuilt: Record) -> None:
    for name, value in (*kept.outputs.items(), *kept.gradients.items()):
        found = {**rebuilt.outputs, **rebuilt.gradients}[name]
        assert value is not None
        assert found is not None
        assert torch.equal(value, found), name


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("branch", [Perceptron, Attention, Dropped])
def test_bfloat16_branches_get_the_same_bits(branch: Any, splits: int) -> None:
    model = Autocast(Streams(8, 3, branch, splits))
    kept, rebuilt, runner = kept_and_rebuilt(model, torch.randn(4, 6, 8 * splits))
    require_bitwise(kept, rebuilt)
    (captured,) = runner.captured
    assert step_of(captured, "wide-streams").stats.rewritten == 3 * splits
    assert step_of(captured).stats.rewritten == 3 * splits


def test_the_cast_to_the_branches_absorbs_what_rebuilt_streams_are_off_by() -> None:
    model, x = Autocast(Streams(16, 8, Perceptron)), torch.randn(256, 32)
    off = gtrans.measured_drift(model, x, passes="wide-streams,reversible,plan")
    assert off.worst < 1e-14
    require_bitwise(*kept_and_rebuilt(model, x)[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_grid_every_branch_gets_the_same_bits(dtype: torch.dtype) -> None:
    model, x = Streams(8, 5, Perceptron), torch.randn(4, 16)
    wide = "wide-streams{bits=16}"
    kept, rebuilt, runner = kept_and_rebuilt(model, x, wide=wide, dtype=dtype)
    require_bitwise(kept, rebuilt)
    (captured,) = runner.captured
    assert step_of(captured).contract == Exact(bitwise=True)
    assert isinstance(step_of(captured, "wide-streams").contract, Close)


def test_streams_in_bfloat16_become_admissible() -> None:
    model, x = Streams(16, 6, Perceptron), torch.randn(32, 32)
    kept, rebuilt, runner = kept_and_rebuilt(model, x, dtype=torch.bfloat16)
    require_bitwise(kept, rebuilt)
    assert step_of(runner.captured[0]).stats.rewritten == 12
    assert runner.captured[0].saved_bytes < runner.captured[0].saved_bytes_before / 4


@pytest.mark.parametrize("link", [name for name in LINKS if name != "shift"])
def test_links_are_widened_too(link: str) -> None:
    model = Linked(4, 3, Perceptron)
    model.link = link
    x = torch.randn(3, 8)
    plain = Runner(model, (x,), None).step()
    kept, rebuilt, runner = kept_and_rebuilt(model, x)
    require_bitwise(kept, rebuilt)
    assert step_of(runner.captured[0]).stats.rewritten == 6
    for name, value in plain.gradients.items():
        torch.testing.assert_close(kept.gradients[name], value, rtol=1e-4, atol=1e-5)


def test_what_looks_like_a_coupling_beside_wide_streams_is_left_alone() -> None:
    spec = ModelSpec("vector", ("solver", "scale", "spiking", "scale"), width=8)
    model, inputs = spec.build()
    runner = Runner(model, inputs, Pipeline.parse("wide-streams,wide-streams"))
    runner.step()
    first, second = (s.stats for s in runner.captured[0].steps if s.name == "wide-streams")
    assert first.rewritten > 0
    assert second.rewritten == 0
    assert second.skipped[MADE] > 0


def test_wide_streams_are_left_alone() -> None:
    model, x = Streams(4, 2, Perceptron), torch.randn(3, 8)
    runner = Runner(model, (x,), Pipeline.parse("wide-streams"), torch.float64)
    runner.step()
    assert step_of(runner.captured[0], "wide-streams").stats.skipped == {WIDE: 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("bits=50", "bits must be between 0 and 40, got 50"),
        ("dtype=float32,bits=8", "a grid needs streams in float64"),
    ],
)
def test_bad_options_are_refused(options: str, message: str) -> None:
    with pytest.raises(gtrans.errors.OptionError, match=re.escape(message)):
        Pipeline.parse(f"wide-streams{{{options}}}")
