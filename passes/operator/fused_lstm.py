"""Keep an LSTM as the fused operator that eager torch calls for it on a CPU.

    lstm(x, (h, c), weights)   -->   for each layer and direction: fused_lstm, one oneDNN kernel
    backward: every step's           backward: fused_lstm_backward, one oneDNN kernel

Shapes: x: [T, B, n]; h, c: [layers * directions, B, d].
Saves: the compilation of T steps, and most of their time: between two and four times on two cores,
    `python -m benchmarks chain`. Values are those of eager torch to the bit.
Costs: a workspace of about 15 numbers for each of the T B d states is kept for the backward.
Contract: exact to the bit, of what eager torch computes.
Needs: float32 or bfloat16 on a CPU with oneDNN; no packed sequence, no projection, no autocast.
Called in by itself behind all other forward passes, unless a pass reads the steps of layers.
Source: gtrans; torch's `mkldnn_rnn_layer`, which autograd differentiates but a compiler cannot.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from gtrans.contract import Contract, Exact
from gtrans.core import GraphKind, Knob, SitePass
from gtrans.ir.forward import ForwardGraph
from gtrans.rewrite.recurrences import not_fused_site
from gtrans.runtime.fused_lstm import fused_lstm


@dataclass(frozen=True)
class FusedLstm(SitePass[ForwardGraph]):
    """Compute an LSTM by one operator forward and one backward, as eager torch does on a CPU."""

    name: ClassVar[str] = "fused-lstm"
    knob: ClassVar[Knob] = Knob.OPERATOR
    works_on: ClassVar[GraphKind] = ForwardGraph
    contract: ClassVar[Contract] = Exact()

    def sites(self, graph: ForwardGraph) -> Iterable[fx.Node]:
        """Every LSTM layer that no other pass has taken."""
        return graph.calls(torch.lstm)

    def refuse(self, graph: ForwardGraph, site: fx.Node) -> str | None:
        """Refuses what eager torch does step by step as well."""
        return not_fused_site(site)

    def rewrite(self, graph: ForwardGraph, site: fx.Node) -> None:
        """Calls the operator."""
        graph.replace(site, graph.insert_before(site, fused_lstm, *site.args))
