"""Shared by all tests."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=25, print_blob=True
)
hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def _without_torchvision_kernels() -> torch.library.Library:
    """Declares the two operators that torchvision looks up when it is imported.

    The wheel of torchvision on the package index has kernels for another build of torch, and
    transformers and timm import it; its kernels are not needed for the models here.
    """
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_torchvision = _without_torchvision_kernels()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Dynamo reuses what it compiled for another test with the same code; not here."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
