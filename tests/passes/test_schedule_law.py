"""The law of schedules: a pass that edits more than the order is caught."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import gtrans.testing as kit
from gtrans.contract import Contract, Exact
from gtrans.core import Knob, Pass, Permission, Stats
from gtrans.errors import VerifyError
from gtrans.ir.joint import JointGraph
from gtrans.testing import laws

aten = torch.ops.aten


@dataclass(frozen=True)
class Doubles(Pass[JointGraph]):
    """Calls itself a schedule, and adds a node whose value is the same."""

    name: ClassVar[str] = "doubles"
    knob: ClassVar[Knob] = Knob.SCHEDULE

    @property
    def contract(self) -> Contract:
        return Exact()

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        (site,) = graph.calls(aten.threshold_backward.default)
        users = list(site.users)
        graph.replace_uses(site, graph.insert_after(site, aten.mul.Tensor, site, 1.0), users)
        return Stats(1, 1)


def test_a_node_too_many_is_no_schedule() -> None:
    model, inputs = kit.ModelSpec(layers=("relu",)).build()
    with pytest.raises(VerifyError, match="pass 'doubles' edits more than the order"):
        kit.check_pass(Doubles(), model, inputs, laws=[laws.a_schedule_is_a_permutation])
