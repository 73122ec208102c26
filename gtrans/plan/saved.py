"""What is kept for the backward: bytes, source line and readers of every value, and why."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import fx

from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.ops import storage_of
from gtrans.ir.printer import target_name
from gtrans.ir.sizes import shape_text, tensor_bytes
from gtrans.ir.source import Location, location


@dataclass(frozen=True)
class SavedValue:
    """One value that lives from the forward to the backward.

    Attributes:
        name: node name in the joint graph.
        operator: what computed it ("aten.addmm.default").
        shape: type and sizes, ``f32[8, 64]``.
        bytes: size of its storage.
        kind: "activation", "input", "parameter", "buffer" or "host"; only the first two cost memory
            of the device.
        location: line of the user's model.
        readers: operators of the backward that read it.
        dtype: of its elements, "float32".
        why: why it is kept rather than computed again.
    """

    name: str
    operator: str
    shape: str
    bytes: int
    kind: str
    location: Location
    readers: tuple[str, ...]
    dtype: str = ""
    why: str = ""


Why = Callable[[JointGraph, fx.Node], str]


def saved_values(
    joint: JointGraph, cut: Iterable[fx.Node], why: Why | None = None
) -> list[SavedValue]:
    """Describes every storage that a cut keeps, largest first.

    Args:
        joint: the graph.
        cut: its values to keep.
        why: says of each why it is kept, as `Plan.why_kept` does.
    """
    described: dict[fx.Node, SavedValue] = {}
    for node in cut:
        owner = storage_of(node)
        if owner not in described:
            described[owner] = _describe(joint, owner, why(joint, owner) if why else "")
    return sorted(described.values(), key=lambda s: (-s.bytes, s.name))


def saved_bytes(joint: JointGraph, cut: Iterable[fx.Node]) -> int:
    """Bytes that a cut keeps alive besides parameters and buffers; shared storage counts once."""
    return sum(tensor_bytes(n.meta.get("val")) for n in saved_storages(joint, cut))


def saved_storages(joint: JointGraph, cut: Iterable[fx.Node]) -> list[fx.Node]:
    """What allocated the storages that a cut keeps alive besides parameters and buffers."""
    return [
        owner
        for owner in dict.fromkeys(map(storage_of, cut))
        if not ops.is_on_host(owner)
        and (owner.op != "placeholder" or joint.input_of(owner).kind not in ("parameter", "buffer"))
    ]


def _describe(joint: JointGraph, node: fx.Node, why: str) -> SavedValue:
    kind = "host" if ops.is_on_host(node) else "activation"
    kind = joint.input_of(node).kind if node.op == "placeholder" else kind
    name = joint.input_of(node).name if node.op == "placeholder" else node.name
    return SavedValue(
        name=name,
        operator=target_name(node) if node.op == "call_function" else node.op,
        shape=shape_text(node.meta.get("val")),
        bytes=tensor_bytes(node.meta.get("val")),
        kind=kind,
        location=location(node),
        readers=tuple(dict.fromkeys(target_name(n) for n in joint.backward_readers(node))),
        dtype=str(getattr(node.meta.get("val"), "dtype", "")).removeprefix("torch."),
        why=why,
    )
