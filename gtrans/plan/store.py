"""Plans that were found before, on disk.

A front is the same for every budget, and for the same graph, device and version of gtrans it is the
same plan by plan, so it is looked up before it is searched for. The key is a hash of everything
that the search reads: operators, arguments, shapes, strides, placements, offers, costs and
workspaces, and of the planner's own source.

    <folder of gtrans.analysis.kept>/plans/<hash>.json
"""

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

import gtrans.analysis
import gtrans.plan
from gtrans.analysis import kept
from gtrans.ir.joint import JointGraph, tag
from gtrans.ir.printer import target_name
from gtrans.plan.rebuild import Candidate, Choice

_KIND = "plans"


def key_of(joint: JointGraph, costs: Iterable[Mapping[fx.Node, float]]) -> str:
    """A hash of what decides the front of a graph.

    Args:
        joint: the graph.
        costs: numbers per node that the search reads besides, such as seconds.
    """
    number = {n: i for i, n in enumerate(joint.graph.nodes)}
    digest = hashlib.sha256(f"{torch.__version__} {_sources()}".encode())

    def text(argument: Any) -> str:
        return repr(fx.map_arg(argument, lambda n: f"%{number[n]}"))

    for node in joint.graph.nodes:
        digest.update(f"{node.op} {target_name(node)} {text((node.args, node.kwargs))} ".encode())
        digest.update(f"{_value(node.meta.get('val'))} {_place(node)}\n".encode())
    for value, offer in joint.offers.items():
        digest.update(f"{number[value]} {offer.made_by} {text(offer.inputs)}\n".encode())
    digest.update(repr(joint.signature).encode())
    for values in costs:
        digest.update(repr([(number[n], v) for n, v in values.items()]).encode())
    return digest.hexdigest()


def load(joint: JointGraph, key: str) -> list[Candidate] | None:
    """The candidates that were saved under a key; None if there are none that can be read."""
    rows = kept.load(_KIND, key)
    nodes = joint.nodes

    def named(numbers: list[int]) -> frozenset[fx.Node]:
        return frozenset(nodes[i] for i in numbers)

    def candidate(row: dict[str, Any]) -> Candidate:
        hold = None if row["hold"] is None else named(row["hold"])
        dropped = frozenset((nodes[i], position) for i, position in row["dropped"])
        choice = Choice(named(row["save"]), hold, row["window"], dropped)
        return Candidate(row["label"], choice, row["peak"], row["seconds"], row["cost"])

    try:
        return [candidate(row) for row in rows] if rows else None
    except (KeyError, IndexError, TypeError):
        return None  # written by something else: search again, and write it anew


def save(joint: JointGraph, key: str, candidates: Iterable[Candidate]) -> None:
    """Saves candidates under a key."""
    number = {n: i for i, n in enumerate(joint.graph.nodes)}
    rows = [
        {
            "label": c.label,
            "save": sorted(number[n] for n in c.choice.save),
            "hold": None if c.choice.hold is None else sorted(number[n] for n in c.choice.hold),
            "window": c.choice.window,
            "dropped": sorted([number[n], position] for n, position in c.choice.dropped),
            "peak": c.peak,
            "seconds": c.seconds,
            "cost": c.cost,
        }
        for c in candidates
    ]
    kept.save(_KIND, key, rows)


@cache
def _sources() -> str:
    """A hash of the code that plans, so that no plan outlives it."""
    digest = hashlib.sha256()
    for package in (gtrans.plan, gtrans.analysis):
        for file in sorted(Path(package.__path__[0]).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _value(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        return f"{val.dtype} {tuple(val.shape)} {val.stride()} {val.device}"
    if isinstance(val, (tuple, list)):
        return ";".join(map(_value, val))
    return type(val).__name__ if val is None else str(val)


def _place(node: fx.Node) -> str:
    if node.op == "output":
        return ""
    known = tag(node)
    return f"{known.side.value} {known.placement.value}"
