"""DistributedDataParallel over two processes, inside and around an optimized model."""

from typing import Any

import pytest

torch_distributed = pytest.importorskip("torch.distributed")
if not torch_distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

pytestmark = pytest.mark.slow

CASES = "ddp"
NAMES = ("around", "inside", "around, buckets", "inside, buckets")


@pytest.mark.parametrize("name", NAMES)
def test_both_processes_have_the_gradients_of_one_on_the_joined_batch(
    outcomes: dict[str, Any], name: str
) -> None:
    one, other = outcomes[name]
    assert one["fingerprint"] == other["fingerprint"]  # all-reduced: bit for bit
    assert any(one["fingerprint"])
    assert max(one["difference"], other["difference"]) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_a_captured_graph(outcomes: dict[str, Any], name: str) -> None:
    for outcome in outcomes[name]:
        captured = [path for graph in outcome["graphs"] for path in graph]
        assert len(captured) == len(set(captured)) == len(outcome["fingerprint"])


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_each_bucket(outcomes: dict[str, Any], name: str) -> None:
    for outcome in outcomes[name]:
        assert (len(outcome["graphs"]) > 1) is ("buckets" in name)
