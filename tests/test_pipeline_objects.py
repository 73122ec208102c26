"""A pipeline made of pass objects goes wherever pipeline text goes."""

import torch
from torch import nn

import gtrans
from gtrans.passes.residual.relu_mask import ReluMask


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU())


def test_objects_do_what_their_text_does() -> None:
    x = torch.randn(64, 64)
    objects = gtrans.Pipeline((ReluMask(min_numel=1),))
    text = "relu-mask{min-numel=1}"
    assert gtrans.Pipeline.parse(objects) is objects
    by_object = gtrans.explain(model(), x, passes=objects)
    by_text = gtrans.explain(model(), x, passes=text)
    assert by_object.saved_bytes == by_text.saved_bytes < by_object.saved_bytes_before
    assert gtrans.verify(model(), x, passes=objects).ok
    optimized = gtrans.optimize(model(), passes=objects, backend="eager")
    optimized(x).sum().backward()
    assert gtrans.report(optimized).saved_bytes == by_text.saved_bytes
