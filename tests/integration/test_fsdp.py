"""FSDP2 (`fully_shard`) over two processes, applied before and after `optimize`."""

from typing import Any

import pytest

torch_distributed = pytest.importorskip("torch.distributed")
if not torch_distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

pytestmark = pytest.mark.slow

CASES = "fsdp"
BY_BLOCKS = ("blocks, then shard", "shard, then blocks")
WHOLE = ("whole, then shard", "shard, then whole")
BLOCK = [f"{layer}.{kind}" for layer in ("down", "norm", "up") for kind in ("bias", "weight")]


@pytest.mark.parametrize("name", BY_BLOCKS + WHOLE)
def test_both_processes_have_the_gradients_of_one_on_the_joined_batch(
    outcomes: dict[str, Any], name: str
) -> None:
    one, other = outcomes[name]
    assert one["fingerprint"] == other["fingerprint"]  # both gather the same shards
    assert any(one["fingerprint"])
    assert max(one["difference"], other["difference"]) < 1e-12


@pytest.mark.parametrize("name", BY_BLOCKS)
def test_each_optimized_block_is_captured_whole(outcomes: dict[str, Any], name: str) -> None:
    for outcome in outcomes[name]:
        assert outcome["graphs"] == [BLOCK, BLOCK]


@pytest.mark.parametrize("name", WHOLE)
def test_of_a_whole_model_the_sharded_blocks_are_captured(
    outcomes: dict[str, Any], name: str
) -> None:
    """Both blocks run through one graph; the loop that calls them stays plain Python."""
    for outcome in outcomes[name]:
        assert outcome["graphs"] == [BLOCK]
