"""The layers of a model as an SVG picture, coloured by what must be erased together.

One row per layer with parameters, in the order of the forward, and one per operator that joins
several streams (`add`, `cat`, `mul`). Each parameter dimension is a chip in the colour of its
class: hollow where it is only cut, grey where it keeps its size. Lines are tensors in the colour
of the class that they carry. Large models show whole modules instead of layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape

from torch import fx

from gtrans.analysis.axes import Axis, atoms
from gtrans.analysis.erasable import ErasableClass, Structure
from gtrans.ir import ops
from gtrans.ir.printer import target_name
from gtrans.seeing.folding import fold

MOST_ROWS = 64

_LEFT, _BOX, _HEIGHT, _SPACE, _TOP = 190, 270, 24, 12, 84
_CHIP, _CHIPS = 15, 9
_LEGEND = _LEFT + _BOX + _CHIP * (_CHIPS + 7)
_WIDTH = _LEGEND + 420
_GREY = "#cbd5e1"

_STYLE = """
text { font: 11px ui-monospace, Menlo, Consolas, monospace; fill: #1f2937 }
.title { font-size: 15px; font-weight: bold } .dim { fill: #6b7280 }
.layer { fill: #f8fafc; stroke: #94a3b8 } .joint { fill: #fef3c7; stroke: #d97706 }
.flow { fill: none; stroke-width: 1.6 }
"""


@dataclass
class _Row:
    """A layer or a joint."""

    name: str
    joint: bool = False
    chips: dict[tuple[Axis, bool], str] = field(default_factory=dict)
    fixed: list[str] = field(default_factory=list)
    sources: dict["int", Axis | None] = field(default_factory=dict)


def picture(structure: Structure, title: str) -> str:
    """The picture as the text of an SVG file."""
    rows, folded = _rows(structure)
    colours = {c.atom: _colour(i, len(structure.classes)) for i, c in enumerate(structure.classes)}
    ends = [_TOP + len(rows) * (_HEIGHT + _SPACE), _TOP + 18 * (len(structure.classes) + 2)]
    exact = sum(c.exact for c in structure.classes)
    about = (
        f"{len(structure.classes)} classes, {exact} exact; filled: must be zero, hollow: only cut, "
        f"grey: keeps its size{folded}"
    )
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{max(ends) + 30}" '
        f'viewBox="0 0 {_WIDTH} {max(ends) + 30}"><style>{_STYLE}</style>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text class="title" x="24" y="32">{escape(title)}</text>',
        f'<text class="dim" x="24" y="54">{escape(about)}</text>',
        *(_flow(rows, i, colours) for i in range(len(rows))),
        *(_drawn(row, i, colours, structure) for i, row in enumerate(rows)),
        *(_legend(c, i, colours[c.atom]) for i, c in enumerate(structure.classes)),
        "</svg>",
    ]
    return "\n".join(body)


# ---------------------------------------------------------------------------- rows


def _rows(structure: Structure) -> tuple[list[_Row], str]:
    """Rows of layers, or of modules nearer to the root where that is too many."""
    names = [leaf.name.rpartition(".")[0] for leaf in structure.program.leaves.values()]
    deepest = max((n.count(".") + 1 for n in names), default=1)
    rows, depth = fold(
        lambda depth: _collected(structure, depth), deepest, lambda rows: len(rows) <= MOST_ROWS
    )
    return rows, "" if depth is None else f"; folded to modules of depth {depth}"


def _collected(structure: Structure, depth: int | None) -> list[_Row]:
    def row_of(path: str) -> str:
        return ".".join(path.split(".")[:depth])

    program = structure.program
    erasable = {c.atom for c in structure.classes}
    rows: list[_Row] = []
    by_name: dict[str, int] = {}
    origin: dict[fx.Node, int] = {}

    def at(name: str) -> int:
        if name not in by_name:
            by_name[name] = len(rows)
            rows.append(_Row(name or "the model itself"))
        return by_name[name]

    for node in program.graph.nodes:
        leaf = program.leaves.get(node)
        if leaf is not None and leaf.kind == "input":
            origin[node] = at(f"input {leaf.name}")
        if node.op not in ("call_function", "output"):
            continue
        held = [program.leaves[n].name for n in _parameters_of(structure, node)]
        before = {origin[s]: s for s in node.all_input_nodes if s in origin}
        if held:
            here = at(row_of(held[0].rpartition(".")[0]))
        elif node.op == "output":
            here = at("output")
        elif len(before) > 1:
            here = len(rows)
            rows.append(_Row(_operator(node), joint=True))
        elif before:
            origin[node] = next(iter(before))
            continue
        else:
            continue
        origin[node] = here
        for row, value in before.items():
            if row != here:
                rows[here].sources.setdefault(row, _carried(structure, value, erasable))
    _add_chips(structure, rows, by_name, row_of)
    return rows


def _parameters_of(structure: Structure, node: fx.Node) -> list[fx.Node]:
    program = structure.program
    found: list[fx.Node] = []
    pending = list(node.all_input_nodes)
    while pending:  # through casts and views of parameters, which have no row
        source = pending.pop()
        leaf = program.leaves.get(source)
        if leaf is not None and leaf.kind == "parameter":
            found.append(source)
        elif leaf is None and len(source.all_input_nodes) == 1 and ops.is_view(source):
            pending += source.all_input_nodes
    return found


def _carried(structure: Structure, node: fx.Node, erasable: set[Axis]) -> Axis | None:
    axes = structure.analysis.context.axes.get(node, [])
    flat = [a for item in axes for a in (item if isinstance(item, list) else [item])]
    here = [atom for axis in reversed(flat) for atom in atoms(axis) if atom in erasable]
    return here[0] if here else None


def _add_chips(
    structure: Structure, rows: list[_Row], by_name: dict[str, int], row_of: Callable[[str], str]
) -> None:
    for c in structure.classes:
        for m in c.members:
            row = by_name.get(row_of(m.name.rpartition(".")[0]))
            if row is not None:
                key = (c.atom, m.producer)
                rows[row].chips[key] = f"{rows[row].chips.get(key, '')}{m}\n"
    for f in structure.frozen:
        for name in f.members:
            row = by_name.get(row_of(name.rpartition(".")[0]))
            if row is not None:
                rows[row].fixed.append(f"{name} ({f.size}): {f.reason}")


def _operator(node: fx.Node) -> str:
    name = target_name(node)
    return name.split(".")[-2] if name.count(".") > 1 else name


# ---------------------------------------------------------------------------- ink


def _colour(number: int, count: int) -> str:
    # Neighbours in the list of classes are neighbours in the picture: keep their hues apart.
    hue = (number * 137.508) % 360
    light = (45, 60, 36)[number % 3] if count > 8 else 48
    return f"hsl({hue:.0f}, 70%, {light}%)"


def _y(row: int) -> int:
    return _TOP + row * (_HEIGHT + _SPACE)


def _flow(rows: list[_Row], here: int, colours: dict[Axis, str]) -> str:
    out = []
    for source, atom in rows[here].sources.items():
        colour = colours.get(atom, _GREY) if atom is not None else _GREY
        tip = f"<title>{escape(rows[source].name)} to {escape(rows[here].name)}</title></path>"
        start, end = _y(source) + _HEIGHT / 2, _y(here) + _HEIGHT / 2
        if here == source + 1:
            x = _LEFT + 24
            path = f"M{x} {_y(source) + _HEIGHT} V{_y(here)}"
        else:
            reach = min(_LEFT - 20, 18 + 9 * (abs(here - source)) ** 0.8)
            x = _LEFT - reach
            path = f"M{_LEFT} {start} C{x:.0f} {start} {x:.0f} {end} {_LEFT} {end}"
        out.append(f'<path class="flow" stroke="{colour}" d="{path}">{tip}')
    return "".join(out)


def _drawn(row: _Row, number: int, colours: dict[Axis, str], structure: Structure) -> str:
    y = _y(number)
    width, kind = (90, "joint") if row.joint else (_BOX, "layer")
    out = [
        f'<rect class="{kind}" rx="4" x="{_LEFT}" y="{y}" width="{width}" height="{_HEIGHT}"/>',
        f'<text x="{_LEFT + 9}" y="{y + 16}">{escape(_cut(row.name, width))}</text>',
    ]
    x = _LEFT + width + 10
    order = {c.atom: i for i, c in enumerate(structure.classes)}
    chips = sorted(row.chips.items(), key=lambda item: (order[item[0][0]], not item[0][1]))
    for (atom, producer), names in chips[:_CHIPS]:
        colour = colours[atom]
        fill = colour if producer else "white"
        out.append(
            f'<rect x="{x}" y="{y + 5}" width="11" height="14" rx="2" fill="{fill}" '
            f'stroke="{colour}" stroke-width="2"><title>{escape(names.strip())}</title></rect>'
        )
        x += _CHIP
    if len(chips) > _CHIPS:
        out.append(f'<text class="dim" x="{x}" y="{y + 16}">+{len(chips) - _CHIPS}</text>')
        x += 3 * _CHIP
    if row.fixed:
        tip = escape("\n".join(row.fixed[:12]))
        out.append(
            f'<rect x="{x}" y="{y + 5}" width="11" height="14" rx="2" fill="{_GREY}">'
            f"<title>{tip}</title></rect>"
        )
    return "<g>" + "".join(out) + "</g>"


def _legend(c: ErasableClass, number: int, colour: str) -> str:
    y = _TOP + 18 * number
    contract = "exact" if c.exact else "approximate"
    text = f"{c.size:>6}  {_cut(c.name, 260)}  {contract}"
    return (
        f'<g><title>{escape(c.reason or c.name)}</title><rect x="{_LEGEND}" y="{y}" width="11" '
        f'height="11" rx="2" fill="{colour}"/><text x="{_LEGEND + 18}" y="{y + 10}" '
        f'xml:space="preserve">{escape(text)}</text></g>'
    )


def _cut(text: str, width: int) -> str:
    most = width // 7 - 2
    return text if len(text) <= most else "…" + text[1 - most :]
