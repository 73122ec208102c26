"""A joint graph as an SVG picture: forward down the left, backward up the right.

Each row holds one piece of the forward and, across from it, the backward of the same piece. What
the backward needs from the forward crosses the middle. Small graphs are drawn operator by operator;
larger ones are folded, first to modules, then to modules nearer to the root, until they fit a page.
No GraphViz is needed, so a picture looks the same on every machine.
"""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from html import escape

from torch import fx

from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Side, runs_in, tag
from gtrans.ir.printer import short_operator, target_name
from gtrans.ir.sizes import human, shape_text, tensor_bytes
from gtrans.ir.source import location
from gtrans.seeing.folding import fold

MOST_ROWS = 48

_BOX, _GAP, _MARGIN = 300, 240, 110
_LINE, _PAD, _SPACE, _TOP = 14, 7, 16, 96
_LEFT = _MARGIN
_RIGHT = _MARGIN + _BOX + _GAP
_WIDTH = _RIGHT + _BOX + _MARGIN
_CHARACTERS = 46

_STYLE = """
text { font: 11px ui-monospace, Menlo, Consolas, monospace; fill: #1f2937 }
.title { font-size: 15px; font-weight: bold } .head { font-weight: bold } .dim { fill: #6b7280 }
.forward { fill: #dbeafe; stroke: #60a5fa } .backward { fill: #fee2e2; stroke: #f87171 }
.flow { fill: none; stroke: #9ca3af } .kept { fill: none; stroke: #d97706; stroke-opacity: 0.8 }
.rebuilt { fill: none; stroke: #d97706; stroke-dasharray: 4 4; stroke-opacity: 0.8 }
.bytes { fill: #b45309 } .halo { stroke: white; stroke-width: 4px; stroke-linejoin: round }
"""


@dataclass
class _Box:
    """A piece of one side of the graph, and where it stands."""

    side: Side
    title: str
    nodes: list[fx.Node] = field(default_factory=list)
    row: int = 0
    top: float = 0.0

    @property
    def left(self) -> float:
        return _LEFT if self.side is Side.FORWARD else _RIGHT

    @property
    def lines(self) -> list[str]:
        """What is written in the box below its title."""
        if len(self.nodes) == 1:
            node = self.nodes[0]
            return [shape_text(node.meta.get("val"))]
        telling = [n for n in self.nodes if not ops.is_view(n)] or self.nodes
        counts = Counter(_short(n) for n in telling)
        text = ", ".join(op if n == 1 else f"{n} {op}" for op, n in counts.most_common())
        return [text]

    @property
    def height(self) -> float:
        return _LINE * (1 + len(self.lines)) + 2 * _PAD

    @property
    def middle(self) -> float:
        return self.top + self.height / 2


@dataclass
class _Edge:
    """What flows from one box to another."""

    source: _Box
    target: _Box
    values: list[fx.Node] = field(default_factory=list)
    rebuilt: bool = True

    @property
    def bytes(self) -> int:
        return sum(tensor_bytes(v.meta.get("val")) for v in self.values)

    @property
    def tooltip(self) -> str:
        lines = [f"{v.name} {shape_text(v.meta.get('val'))}" for v in self.values[:12]]
        rest = [f"... {len(self.values) - 12} more"] if len(self.values) > 12 else []
        return "\n".join([*lines, *rest])


def to_svg(joint: JointGraph, *, title: str = "joint graph", most_rows: int = MOST_ROWS) -> str:
    """Draws a joint graph.

    Args:
        joint: the graph; if it has a plan, only what is kept crosses the middle.
        title: written above the picture.
        most_rows: fold until no more rows than these are left, as far as modules go.
    """
    boxes, folded = _boxes(joint, most_rows)
    of = {node: box for box in boxes for node in box.nodes}
    bottom = _place(joint, boxes, of)
    flows, residuals = _flows(joint, of), _residuals(joint, of)
    kept = {v for e in residuals for v in e.values}
    total = sum(tensor_bytes(v.meta.get("val")) for v in kept)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{bottom:.0f}" '
        f'viewBox="0 0 {_WIDTH} {bottom:.0f}">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto-start-reverse" markerUnits="userSpaceOnUse">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#6b7280"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{bottom:.0f}" fill="white"/>',
        _text(_LEFT, 26, title, "title"),
        _text(_LEFT, 44, _summary(joint, folded, len(kept), total), "dim"),
        _text(_LEFT, 80, "forward, downwards", "head"),
        _text(_RIGHT, 80, "backward, upwards", "head"),
        _text(_LEFT + _BOX + 70, 66, "kept for the backward", "bytes"),
        _text(_LEFT + _BOX + 70, 80, "(dashed: recomputes)", "dim"),
    ]
    out += [_flow(e) for e in flows]
    out += _crossings(residuals)
    out += [_drawn(box) for box in boxes]
    out += _labels(residuals)
    return "\n".join([*out, "</svg>"]) + "\n"


def _summary(joint: JointGraph, folded: str, kept: int, total: int) -> str:
    plan = "" if joint.cut is not None else " (before the plan: whatever is read)"
    return f"{len(joint.nodes)} nodes{folded}; {kept} values, {human(total)} cross over{plan}"


# ---------------------------------------------------------------------------- boxes


def _boxes(joint: JointGraph, most_rows: int) -> tuple[list[_Box], str]:
    """Folds until the forward side fits; also says how."""
    nodes = [n for n in joint.nodes if _visible(joint, n)]
    deepest = max((location(n).module.count(".") + 1 for n in nodes), default=0)
    boxes, depth = fold(
        lambda depth: _grouped(nodes, depth), deepest, lambda boxes: _rows(boxes) <= most_rows
    )
    return boxes, "" if depth is None else f", folded to modules of depth {depth}"


def _rows(boxes: list[_Box]) -> int:
    counts = Counter(b.side for b in boxes)
    return max(counts[Side.FORWARD], counts[Side.BACKWARD] // 2)


def _visible(joint: JointGraph, node: fx.Node) -> bool:
    if node.op == "placeholder":
        return node in joint.primals and joint.input_of(node).kind == "input"
    return node.op == "call_function" and not ops.is_getitem(node)


def _module(node: fx.Node, depth: int) -> str:
    if node.op == "placeholder":
        return "inputs"
    path = location(node).module
    if not path and tag(node).accumulates:  # it belongs to what it adds, which has just been made
        path = location(max(node.all_input_nodes)).module
    return ".".join(path.split(".")[:depth]) or "the model itself"


def _grouped(nodes: list[fx.Node], depth: int | None) -> list[_Box]:
    """One box a node, or one a module of a depth on either side."""
    boxes: dict[tuple[Hashable, Side], _Box] = {}
    for node in nodes:
        side = runs_in(node)
        name = node if depth is None else _module(node, depth)
        title = name if isinstance(name, str) else _title(node)
        boxes.setdefault((name, side), _Box(side, title)).nodes.append(node)
    return list(boxes.values())


def _title(node: fx.Node) -> str:
    operator = _short(node)
    return node.name if node.name.startswith(operator) else f"{node.name} = {operator}"


def _short(node: fx.Node) -> str:
    """The operator without its namespace and overload."""
    if node.op == "placeholder":
        return "input"
    return short_operator(target_name(node))


# ---------------------------------------------------------------------------- places


def _place(joint: JointGraph, boxes: list[_Box], of: dict[fx.Node, _Box]) -> float:
    """Gives each box its row and height on the page; returns where the page ends."""
    forward = [b for b in boxes if b.side is Side.FORWARD]
    backward = [b for b in boxes if b.side is Side.BACKWARD]
    for row, box in enumerate(forward):
        box.row = row
    partners = _partners(joint, forward, of)
    row = max(0, len(forward) - 1)
    for box in backward:  # in the order they run; what has no partner stays with what ran before it
        found = [partners[k] for n in box.nodes if (k := _partner_key(n, box)) in partners]
        row = max(found) if found else row
        box.row = row
    y = float(_TOP)
    for row in range(max(1, len(forward))):
        across = [b for b in backward if b.row == row][::-1]
        column = [b for b in forward if b.row == row]
        ends = []
        for stack in (column, across):
            top = y
            for box in stack:
                box.top = top
                top += box.height + _SPACE
            ends.append(top)
        y = max(ends)
    return y + _SPACE


def _partners(
    joint: JointGraph, forward: list[_Box], of: dict[fx.Node, _Box]
) -> dict[Hashable, int]:
    """The row of each forward module and of each autograd operator."""
    rows: dict[Hashable, int] = {box.title: box.row for box in forward if len(box.nodes) > 1}
    for number, region in joint.regions().items():
        placed = [of[n].row for n in region.forward if n in of]
        if placed:
            rows[number] = max(placed)
    return rows


def _partner_key(node: fx.Node, box: _Box) -> Hashable:
    return box.title if len(box.nodes) > 1 else tag(node).region


# ---------------------------------------------------------------------------- edges


def _flows(joint: JointGraph, of: dict[fx.Node, _Box]) -> list[_Edge]:
    edges: dict[tuple[int, int], _Edge] = {}
    for target, box in of.items():
        for source in _through_getitem(target):
            start = of.get(source)
            if start is not None and start is not box and start.side is box.side:
                edge = edges.setdefault((id(start), id(box)), _Edge(start, box))
                edge.values.append(source)
    return list(edges.values())


def _residuals(joint: JointGraph, of: dict[fx.Node, _Box]) -> list[_Edge]:
    """Edges from where a kept value is made to where the backward needs it.

    With a plan, what is not kept is computed again: the need is traced back to what is kept.
    """
    kept = None if joint.cut is None else set(joint.cut)
    starts = [n for n in joint.nodes if joint.is_forward(n) and (kept is None or n in kept)]
    edges: dict[tuple[int, int], _Edge] = {}
    for value in starts:
        made = value.args[0] if ops.is_getitem(value) else value
        box = of.get(made) if isinstance(made, fx.Node) else None
        if box is None:
            continue
        for reader, direct in _needed_by(joint, value, kept):
            target = of.get(reader)
            if target is None:
                continue
            edge = edges.setdefault((id(box), id(target)), _Edge(box, target))
            if value not in edge.values:
                edge.values.append(value)
            edge.rebuilt = edge.rebuilt and not direct
    return list(edges.values())


def _needed_by(
    joint: JointGraph, value: fx.Node, kept: set[fx.Node] | None
) -> list[tuple[fx.Node, bool]]:
    found: dict[fx.Node, bool] = {}
    pending, seen = [(value, True)], {value}
    while pending:
        node, direct = pending.pop()
        for user in node.users:
            if joint.is_backward(user):
                found[user] = found.get(user, False) or direct
            elif kept is not None and user.op != "output" and user not in kept | seen:
                seen.add(user)
                pending.append((user, False))
    return list(found.items())


def _through_getitem(node: fx.Node) -> list[fx.Node]:
    found = []
    for source in node.all_input_nodes:
        origin = source.args[0] if ops.is_getitem(source) else source
        if isinstance(origin, fx.Node):
            found.append(origin)
    return found


# ---------------------------------------------------------------------------- ink


def _flow(edge: _Edge) -> str:
    a, b = edge.source, edge.target
    forward = a.side is Side.FORWARD
    tip = f'marker-end="url(#tip)"><title>{escape(edge.tooltip)}</title></path>'
    lower, upper = (a, b) if a.top > b.top else (b, a)
    if lower.top - (upper.top + upper.height) <= _SPACE + 1:  # neighbours: a straight line
        x = a.left + _BOX / 2
        start, end = (a.top + a.height, b.top) if a.top < b.top else (a.top, b.top + b.height)
        return f'<path class="flow" d="M{x} {start:.0f} V{end:.0f}" {tip}'
    side = a.left if forward else a.left + _BOX
    reach = min(_MARGIN - 12, 14 + 0.11 * abs(b.middle - a.middle))
    x = side - reach if forward else side + reach
    return (
        f'<path class="flow" d="M{side} {a.middle:.0f} C{x:.0f} {a.middle:.0f} '
        f'{x:.0f} {b.middle:.0f} {side} {b.middle:.0f}" {tip}'
    )


def _crossings(edges: list[_Edge]) -> list[str]:
    """The residuals, with ports spread over the boxes' sides."""
    out = []
    by_source: dict[int, list[_Edge]] = {}
    by_target: dict[int, list[_Edge]] = {}
    for e in sorted(edges, key=lambda e: (e.source.top, e.target.top)):
        by_source.setdefault(id(e.source), []).append(e)
        by_target.setdefault(id(e.target), []).append(e)
    largest = max((e.bytes for e in edges), default=1) or 1
    start, end = _LEFT + _BOX, _RIGHT
    for outgoing in by_source.values():
        for i, e in enumerate(outgoing):
            y1 = _port(e.source, i, len(outgoing))
            incoming = by_target[id(e.target)]
            y2 = _port(e.target, incoming.index(e), len(incoming))
            width = 1 + 4 * (e.bytes / largest) ** 0.5
            style = "rebuilt" if e.rebuilt else "kept"
            out.append(
                f'<path class="{style}" stroke-width="{width:.1f}" d="M{start} {y1:.0f} '
                f'C{start + 90} {y1:.0f} {end - 90} {y2:.0f} {end} {y2:.0f}">'
                f"<title>{escape(e.tooltip)}</title></path>"
            )
    return out


def _labels(edges: list[_Edge]) -> list[str]:
    """How much each box hands over: written above where its edges start."""
    values: dict[int, set[fx.Node]] = {}
    boxes = {id(e.source): e.source for e in edges}
    for e in edges:
        values.setdefault(id(e.source), set()).update(e.values)
    out = []
    for key, box in boxes.items():
        total = human(sum(tensor_bytes(v.meta.get("val")) for v in values[key]))
        count = len(values[key])
        label = total if count == 1 else f"{count} values, {total}"
        place = (_LEFT + _BOX + 6, box.top - 3, label)
        out += [_text(*place, "halo"), _text(*place, "bytes")]
    return out


def _port(box: _Box, index: int, count: int) -> float:
    return box.top + box.height * (index + 1) / (count + 1)


def _drawn(box: _Box) -> str:
    nodes = "\n".join(f"{n.name}: {location(n)}" for n in box.nodes[:20])
    out = [
        f'<g><title>{escape(nodes)}</title><rect class="{box.side.value}" rx="4" '
        f'x="{box.left}" y="{box.top:.0f}" width="{_BOX}" height="{box.height:.0f}"/>',
        _text(box.left + _PAD, box.top + _PAD + 10, _cut(box.title), "head"),
    ]
    for i, line in enumerate(box.lines):
        out.append(_text(box.left + _PAD, box.top + _PAD + 10 + _LINE * (i + 1), _cut(line), "dim"))
    return "".join(out) + "</g>"


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS - 4 else text[: _CHARACTERS - 5] + "…"


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x}" y="{y:.0f}" class="{style}">{escape(text)}</text>'
