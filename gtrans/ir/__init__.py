"""The graph IR: typed views of torch.fx graphs. No second node type, nothing is copied."""

from gtrans.ir.forward import ForwardGraph
from gtrans.ir.joint import JointGraph, Region, Side

__all__ = ["ForwardGraph", "JointGraph", "Region", "Side"]
