"""One region of a training graph as an optic: what goes in, what comes out, what is handed over.

    fwd: x -> (y, r)            x ---> [ forward  ] ---> y
                                            | r
    bwd: (r, dy) -> dx         dx <--- [ backward ] <--- dy

A region is a module of the user's model, or the autograd operator of one node.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html import escape
from typing import Any

from torch import fx

from gtrans.errors import OptionError, did_you_mean
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Side, runs_in, tag
from gtrans.ir.printer import target_name
from gtrans.ir.sizes import human, shape_text, tensor_bytes
from gtrans.ir.source import location

_WIRES = 5
_WIDTH, _LEFT, _BOX, _TOP, _LINE, _GAP = 1060, 330, 400, 108, 16, 150
_STYLE = """
text { font: 12px ui-monospace, Menlo, Consolas, monospace; fill: #1f2937 }
.page { fill: white } .title { font-size: 15px; font-weight: bold } .head { font-weight: bold }
.dim { fill: #6b7280 } .forward { fill: #dbeafe; stroke: #60a5fa }
.backward { fill: #fee2e2; stroke: #f87171 }
.wire { fill: none; stroke: #6b7280; stroke-width: 1.5 }
.residual { fill: none; stroke: #d97706; stroke-width: 2 } .bytes { fill: #b45309 }
@media (prefers-color-scheme: dark) { text { fill: #e5e7eb } .dim { fill: #9ca3af }
.page { fill: #111827 } .forward { fill: #1e3a5f } .backward { fill: #5b2328 }
.bytes { fill: #fbbf24 } }
"""


@dataclass(frozen=True)
class Optic:
    """A region of a joint graph and its wires.

    Attributes:
        name: of the region.
        forward: its nodes that run in the forward.
        backward: its nodes that run in the backward, those that a plan runs again included.
        x: activations and inputs that its forward reads.
        parameters: parameters and buffers that either half reads.
        y: what others read of its forward.
        r: the residual: what its backward reads of the forward half, of this region or of others.
        dy: what its backward reads of other backward nodes.
        dx: what others read of its backward.
        gradients: what it computes of the parameters' gradients.
    """

    name: str
    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    x: tuple[fx.Node, ...]
    parameters: tuple[fx.Node, ...]
    y: tuple[fx.Node, ...]
    r: tuple[fx.Node, ...]
    dy: tuple[fx.Node, ...]
    dx: tuple[fx.Node, ...]
    gradients: tuple[fx.Node, ...]

    @property
    def residual_bytes(self) -> int:
        """Bytes of the residual, besides parameters."""
        return sum(tensor_bytes(n.meta.get("val")) for n in self.r)

    @property
    def wires(self) -> dict[str, tuple[fx.Node, ...]]:
        """All that goes in and out, by its letter."""
        return {
            "x": self.x,
            "parameters": self.parameters,
            "y": self.y,
            "r": self.r,
            "dy": self.dy,
            "dx": self.dx,
            "gradients": self.gradients,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for `--json`."""
        wires = {
            wire: [{"name": n.name, "shape": shape_text(n.meta.get("val"))} for n in nodes]
            for wire, nodes in self.wires.items()
        }
        halves = {"forward": len(self.forward), "backward": len(self.backward)}
        return {
            "region": self.name,
            "nodes": halves,
            "residual_bytes": self.residual_bytes,
            "wires": wires,
        }

    def _repr_svg_(self) -> str:
        return optic_svg(self)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.forward)} nodes forward, {len(self.backward)} backward"]
        for wire, nodes in self.wires.items():
            values = ", ".join(f"{n.name} {shape_text(n.meta.get('val'))}" for n in nodes)
            size = f" [{human(self.residual_bytes)}]" if wire == "r" else ""
            lines.append(f"  {wire:10} {values or 'nothing'}{size}")
        return "\n".join(lines)


def optic_of(joint: JointGraph, name: str) -> Optic:
    """The optic of a module, of modules that fit a pattern (``h.*.mlp``), or of a node.

    Raises:
        OptionError: nothing of the graph has this name.
    """
    forward, backward = _members(joint, name)
    inside = {*forward, *backward}
    fixed = {
        n for n in joint.primals if joint.input_of(n).kind in ("parameter", "buffer", "symbol")
    }
    read_forward = _outside(joint, forward, inside)
    read_backward = _outside(joint, backward, set(backward))
    results = {g for g in joint.gradients if g is not None}
    returned = {o for o in joint.forward_outputs if isinstance(o, fx.Node)}
    return Optic(
        name=name,
        forward=tuple(forward),
        backward=tuple(backward),
        x=tuple(n for n in read_forward if n not in fixed),
        parameters=tuple(
            sorted({n for n in (*read_forward, *read_backward) if n in fixed and _is_tensor(n)})
        ),
        y=tuple(n for n in forward if n in returned or _read_elsewhere(n, inside, Side.FORWARD)),
        r=tuple(
            n
            for n in read_backward
            if runs_in(n) is Side.FORWARD and n not in fixed and _is_tensor(n)
        ),
        dy=tuple(n for n in read_backward if runs_in(n) is Side.BACKWARD and n not in inside),
        dx=tuple(n for n in backward if _read_elsewhere(n, inside, Side.BACKWARD)),
        gradients=tuple(n for n in backward if n in results),
    )


def first_optic(joints: Iterable[JointGraph], name: str) -> Optic:
    """The optic in the first of several graphs that has it.

    Raises:
        OptionError: none has it, or there is no graph.
    """
    missing = OptionError(f"no graph with a backward was captured, so there is no {name!r} in it")
    for joint in joints:
        try:
            return optic_of(joint, name)
        except OptionError as error:
            missing = error
    raise missing


def _members(joint: JointGraph, name: str) -> tuple[list[fx.Node], list[fx.Node]]:
    calls = [n for n in joint.nodes if n.op == "call_function" and not ops.is_symbol(n)]
    modules = {n: location(n).module for n in calls}
    chosen = [n for n, module in modules.items() if _within(module, name)]
    chosen = chosen or [n for n in calls if n.name == name]
    if not chosen:
        known = {module for module in modules.values() if module}
        raise OptionError(f"no module or node of this graph is called {name!r}{_near(name, known)}")
    regions = {tag(n).region for n in chosen if tag(n).side is Side.FORWARD} - {None}
    every = {*chosen, *(n for n in calls if tag(n).region in regions)}
    read = {s for n in every if runs_in(n) is Side.BACKWARD for s in ops.tensor_inputs(n)}
    for node in calls:
        inputs = [n for n in ops.tensor_inputs(node) if n.op != "placeholder"]
        # A sum of cotangents belongs to no module: to the region that makes or reads its terms.
        summed = tag(node).accumulates and any(n in every for n in inputs)
        made = tag(node).region is None and bool(tag(node).made_by) and bool(inputs)
        if (summed and every.issuperset(set(inputs) - read)) or (made and every.issuperset(inputs)):
            every.add(node)
    members = [n for n in calls if n in every]
    forward = [n for n in members if runs_in(n) is Side.FORWARD]
    return forward, [n for n in members if runs_in(n) is Side.BACKWARD]


def _near(name: str, known: set[str]) -> str:
    shown = sorted(known)
    return did_you_mean(name, known if len(known) < 12 else shown[:12])


def _within(module: str, name: str) -> bool:
    """Whether a module is the named one or inside of it; the name may be a pattern."""
    depth = name.count(".") + 1
    head = ".".join(module.split(".")[:depth])
    return bool(module) and fnmatchcase(head, name)


def _outside(joint: JointGraph, nodes: Iterable[fx.Node], inside: set[fx.Node]) -> list[fx.Node]:
    """What nodes read that is none of them: tuples by their parts, in graph order."""
    found = {s for n in nodes for s in ops.tensor_inputs(n) if s not in inside}
    return sorted(found)


def _read_elsewhere(node: fx.Node, inside: set[fx.Node], side: Side) -> bool:
    users = [u for u in node.users if u.op != "output"]
    return any(u not in inside and runs_in(u) is side for u in users)


def _is_tensor(node: fx.Node) -> bool:
    return tensor_bytes(node.meta.get("val")) > 0


# ---------------------------------------------------------------------------- the picture


def optic_svg(optic: Optic) -> str:
    """Draws the circuit: the forward above, the backward below it, the residual between them."""
    first, second = _operators(optic.forward), _operators(optic.backward)
    top = _TOP + _LINE * max(0, len(_shown(optic.parameters)) - 1)
    height = _box_height(first, optic.x, optic.y)
    below = top + height + _GAP
    height_below = _box_height(second, optic.dy, optic.dx)
    bottom = below + height_below + 40 + _LINE * len(_shown(optic.gradients))
    summary = f"residual {human(optic.residual_bytes)} in {len(optic.r)} values"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom}" '
        f'width="{_WIDTH}" height="{bottom}" role="img">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto" markerUnits="userSpaceOnUse">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#6b7280"/></marker></defs>',
        f'<rect class="page" width="{_WIDTH}" height="{bottom}"/>',
        _text(20, 26, optic.name, "title"),
        _text(20, 46, summary, "dim"),
        *_down(top - 34, top, optic.parameters, "wire", "parameters", above=True),
        *_box("forward", top, height, first),
        *_side(top, height, optic.x, "x", inward=True, left=True),
        *_side(top, height, optic.y, "y", inward=False, left=False),
        *_residual(top + height, below, optic.r),
        *_box("backward", below, height_below, second),
        *_side(below, height_below, optic.dx, "dx", inward=False, left=True),
        *_side(below, height_below, optic.dy, "dy", inward=True, left=False),
    ]
    if optic.gradients:
        start = below + height_below
        out += _down(start, start + 24, optic.gradients, "wire", "gradients", above=False)
    return "\n".join([*out, "</svg>"]) + "\n"


def _box_height(lines: Sequence[str], *sides: Sequence[fx.Node]) -> int:
    wires = max(len(_shown(side)) for side in sides)
    return max(_LINE * (len(lines) + 2), 40 * wires + 20)


def _operators(nodes: Sequence[fx.Node]) -> list[str]:
    """The operators of a half in the order in which they first run, those that run again marked."""
    counts: Counter[str] = Counter()
    for n in nodes:
        if not (ops.is_getitem(n) or ops.is_view(n)):
            name = target_name(n)
            name = name.split(".")[-2] if name.count(".") > 1 else name
            again = tag(n).side is Side.FORWARD and runs_in(n) is Side.BACKWARD
            counts[f"~ {name}, again" if again else name] += 1
    lines = [name if n == 1 else f"{n} x {name}" for name, n in counts.items()]
    return [*lines[:13], f"and {len(lines) - 13} more"] if len(lines) > 14 else lines


def _shown(nodes: Sequence[fx.Node]) -> list[str]:
    labels = [f"{n.name} {shape_text(n.meta.get('val'))}" for n in nodes]
    rest = [f"and {len(labels) - _WIRES} more"] if len(labels) > _WIRES else []
    return labels[:_WIRES] + rest


def _box(side: str, top: int, height: int, lines: Sequence[str]) -> Iterator[str]:
    yield (f'<rect class="{side}" rx="6" x="{_LEFT}" y="{top}" width="{_BOX}" height="{height}"/>')
    yield _text(_LEFT + 12, top + 20, side, "head")
    for number, line in enumerate(lines, start=1):
        yield _text(_LEFT + 12, top + 22 + _LINE * number, line[:52], "")


def _side(
    top: int, height: int, nodes: Sequence[fx.Node], name: str, *, inward: bool, left: bool
) -> Iterator[str]:
    labels = _shown(nodes)
    for number, label in enumerate(labels):
        y = top + height * (number + 1) / (len(labels) + 1)
        near, far = (_LEFT, 20) if left else (_LEFT + _BOX, _WIDTH - 20)
        start, end = (far, near) if inward else (near, far)
        yield f'<path class="wire" marker-end="url(#tip)" d="M{start} {y:.0f} H{end}"/>'
        at = 24 if left else _LEFT + _BOX + 14
        yield _text(at, y - 5, f"{name}: {label}"[:41], "")


def _residual(top: int, bottom: int, nodes: Sequence[fx.Node]) -> Iterator[str]:
    labels = _shown(nodes)
    sizes = [human(tensor_bytes(n.meta.get("val"))) for n in nodes[:_WIRES]]
    for number, label in enumerate(labels):
        x = _LEFT + _BOX * (number + 1) / (len(labels) + 1)
        y = top + 22 + (bottom - top - 40) * number / max(1, len(labels) - 1)
        yield f'<path class="residual" marker-end="url(#tip)" d="M{x:.0f} {top} V{bottom}"/>'
        size = f"{sizes[number]} " if number < len(sizes) else ""
        yield _text(_LEFT + _BOX + 14, y, f"r: {size}{label}"[:42], "bytes")
        lead = f"M{x:.0f} {y - 4:.0f} H{_LEFT + _BOX + 10}"
        yield f'<path class="wire" stroke-dasharray="2 4" d="{lead}"/>'


def _down(
    start: int, end: int, nodes: Sequence[fx.Node], style: str, name: str, *, above: bool
) -> Iterator[str]:
    labels = _shown(nodes)
    if not labels:
        return
    x = _LEFT + 60
    yield f'<path class="{style}" marker-end="url(#tip)" d="M{x} {start} V{end}"/>'
    first = start - _LINE * (len(labels) - 1) if above else end - 4
    for number, label in enumerate(labels):
        yield _text(x + 12, first + _LINE * number + (6 if above else 0), f"{name}: {label}", "dim")


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{style}">{escape(text)}</text>'
