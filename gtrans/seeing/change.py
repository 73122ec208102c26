"""What one pass changed in a graph, line by line; equal changes in equal layers are one."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gtrans.ir.joint import JointGraph
from gtrans.ir.printer import to_code
from gtrans.ir.sizes import shape_text
from gtrans.pipeline import Graph

# A node's own name and its arguments' names; not operators, dtypes, constants and shapes.
_NAMES = re.compile(r"(?<![\w.'])[a-z]\w*(?![\w.'(]|=\S)")


@dataclass(frozen=True)
class Hunk:
    """Changed lines with those around them.

    Attributes:
        lines: the sign ("+", "-" or " ") and the text of each.
        count: how many hunks differ from this one in the names of nodes only, itself included.
    """

    lines: tuple[tuple[str, str], ...]
    count: int = 1


def graph_lines(graph: Graph) -> list[str]:
    """A graph as lines to compare: one a node, and one for each value that is kept."""
    code = to_code(graph.graph, lines=False).splitlines()
    return [*code, *(f"keep {line}" for line in kept(graph))]


def kept(graph: Graph) -> list[str]:
    """What the plan keeps for the backward, besides parameters and buffers: one line a value."""
    if not isinstance(graph, JointGraph) or graph.cut is None:
        return []
    lines = []
    for node in graph.cut:
        info = graph.input_of(node) if node in graph.primals else None
        if info is None or info.kind not in ("parameter", "buffer"):
            lines.append(f"{node.name}  # {shape_text(node.meta.get('val'))}")
    return lines


def difference(name: str, before: Graph, after: Graph) -> str:
    """What a pass changed, as a unified diff; empty where nothing changed."""
    lines = difflib.unified_diff(
        graph_lines(before), graph_lines(after), f"before {name}", f"after {name}", lineterm=""
    )
    return "\n".join(lines)


def hunks(before: Sequence[str], after: Sequence[str], *, context: int = 1) -> list[Hunk]:
    """The changed places, equal ones folded, in the order of their first."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    folded: dict[tuple[tuple[str, str], ...], list[tuple[tuple[str, str], ...]]] = {}
    for group in matcher.get_grouped_opcodes(context):
        lines: list[tuple[str, str]] = []
        for kind, first, last, start, end in group:
            if kind == "equal":
                lines += [(" ", line) for line in before[first:last]]
            else:
                lines += [("-", line) for line in before[first:last]]
                lines += [("+", line) for line in after[start:end]]
        key = tuple((sign, _nameless(text)) for sign, text in lines)
        folded.setdefault(key, []).append(tuple(lines))
    return [Hunk(same[0], len(same)) for same in folded.values()]


def _nameless(line: str) -> str:
    code, hash_sign, comment = line.partition("  # ")
    return _NAMES.sub("", code) + hash_sign + comment
