"""What every test needs: a torchvision that imports, and no compiled code left by other tests."""

from collections.abc import Iterator

import pytest
import torch

# torchvision's wheel is built for CUDA; without it these operators are missing and import fails.
_LIBRARY = torch.library.Library("torchvision", "DEF")
_LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Forgets what Dynamo compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
