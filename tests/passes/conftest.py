"""Shared by the tests of passes."""

import pytest
import torch


@pytest.fixture
def seeded() -> None:
    """The same random weights and inputs each time."""
    torch.manual_seed(0)
