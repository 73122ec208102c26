"""Zero analysis: where values are provably zero once a class' producer slices are.

Weights have two kinds of dimensions. A consumer dimension is only ever summed over (the columns
of a linear layer); it is cut when a class shrinks but need not be zero. All others are producers
(rows, biases, norm scales, embedding columns): sparsifying sets exactly those to zero. For a
class, the analysis follows these zeros forward; the class is exact if every sum over its axis
finds a zero in one of its operands, and approximate otherwise.

`Z(v)` is a set of (dimension, atom): v is zero wherever the index along that dimension belongs
to an erased index of that atom. All classes are followed at once.
Source: specification of zero-invariant groups in arXiv:2312.09411 made into a static proof.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from gtrans.analysis.axes import Axis, atoms, find
from gtrans.analysis.axis_analysis import AxisAnalysis
from gtrans.analysis.axis_rules.context import Need, bind, packet_of
from gtrans.analysis.axis_rules.pointwise import COPIES, is_pointwise
from gtrans.analysis.axis_rules.recurrent import GATES, arguments
from gtrans.analysis.axis_rules.shapes import RULES as SHAPE_RULES
from gtrans.analysis.axis_rules.shapes import order, permute
from gtrans.ir import ops

aten = torch.ops.aten

Zeros = frozenset[tuple[int, Axis]]
Producer = tuple[fx.Node, int, Axis]

NONE: Zeros = frozenset()

INTERSECT = frozenset({aten.add, aten.sub, aten.subtract, aten.maximum, aten.minimum, aten.rsub})
MULTIPLY = frozenset({aten.mul, aten.multiply, aten.logical_and})
# What is left of memory that nobody has written is nobody's to read.
ZEROS = frozenset(
    {
        *(aten.zeros, aten.new_zeros, aten.zeros_like),
        *(aten.empty, aten.new_empty, aten.empty_like),
    }
)
# Of zeros these give zeros; the dimensions that they reduce or reorder are frozen.
KEEPING = frozenset(
    {
        *(aten.amax, aten.amin, aten.max, aten.min, aten.var, aten.std, aten.prod, aten.cumsum),
        *(aten.sum, aten.mean, aten.linalg_vector_norm, aten.prelu, aten._prelu_kernel),
        *(aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.avg_pool1d, aten.avg_pool2d),
        *(aten.avg_pool3d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.flip),
        *(aten.adaptive_avg_pool3d, aten.adaptive_max_pool1d, aten.adaptive_max_pool2d),
        *(aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d),
        *(aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_bicubic2d),
        *(aten._upsample_nearest_exact2d, aten.upsample_trilinear3d),
        *(aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa),
        *(aten.fft_rfft, aten.fft_irfft, aten.fft_fft, aten.fft_ifft),
    }
)
NEVER = frozenset({aten.full, aten.ones, aten.new_ones, aten.new_full})


def producers(analysis: AxisAnalysis) -> set[Producer]:
    """The (parameter, dimension, atom) that must be zero for the atom's indices to vanish."""
    found: set[Producer] = set()
    origins = _origins(analysis)
    used: set[fx.Node] = set()
    for node in analysis.program.graph.nodes:
        if node.op not in ("call_function", "output"):
            continue
        sources = [s for s in node.all_input_nodes if s in origins]
        summed = {s: analysis.context.contracted.get((node, s), {}) for s in sources}
        # A product of two weights: neither is a mere consumer.
        weights_only = len(sources) == len(ops.tensor_inputs(node))
        for source in sources:
            used.add(source)
            if node in origins:
                continue
            contracted = {} if weights_only else summed[source]
            for dim, origin in enumerate(origins[source]):
                gone = set(atoms(contracted[dim])) if dim in contracted else set()
                found |= {
                    (leaf, d, atom)
                    for leaf, d in origin
                    for atom in atoms(analysis.axes(leaf)[d])
                    if atom not in gone
                }
    for group in analysis.program.ties():
        shared = {(dim, atom) for leaf, dim, atom in found if leaf in group}
        found |= {(leaf, dim, atom) for leaf in group for dim, atom in shared}
    return found


def zeros(analysis: AxisAnalysis, made: set[Producer]) -> dict[fx.Node, Any]:
    """`Z` of every tensor value, given the producers; a list of them for several tensors."""
    state: dict[fx.Node, Any] = {}
    by_leaf: dict[fx.Node, set[tuple[int, Axis]]] = {}
    for leaf, dim, atom in made:
        by_leaf.setdefault(leaf, set()).add((dim, find(atom)))
    for node in analysis.program.graph.nodes:
        if node.op == "placeholder":
            state[node] = frozenset(by_leaf.get(node, ()))
        elif node.op == "call_function" and node in analysis.context.axes:
            state[node] = NONE if node in analysis.written else _zeros_of(analysis, node, state)
    return state


def unmet(analysis: AxisAnalysis, state: dict[fx.Node, Any]) -> dict[Axis, Need]:
    """For each atom the first sum over it that finds no zero; exact atoms are not listed."""
    found: dict[Axis, Need] = {}
    for need in analysis.context.needs:
        for atom in set(atoms(need.axis)):
            if atom.frozen is None and not any(
                (dim, atom) in state.get(operand, NONE) for operand, dim in need.operands
            ):
                found.setdefault(atom, need)
    return found


# ---------------------------------------------------------------------- private


def _origins(analysis: AxisAnalysis) -> dict[fx.Node, list[set[tuple[fx.Node, int]]]]:
    """For parameters and plain views of them: which parameter dimension each dimension is."""
    found: dict[fx.Node, list[set[tuple[fx.Node, int]]]] = {}
    for node in analysis.program.graph.nodes:
        leaf = analysis.program.leaves.get(node)
        if leaf is not None and leaf.kind == "parameter" and node in analysis.context.axes:
            found[node] = [{(node, d)} for d in range(len(analysis.axes(node)))]
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, fx.Node) or source not in found or packet_of(node) is None:
            continue
        if SHAPE_RULES.get(packet_of(node)) is permute:
            rank = len(found[source])
            found[node] = [found[source][d] for d in order(node, bind(node), rank)]
        elif packet_of(node) in COPIES and len(node.all_input_nodes) == 1:
            found[node] = found[source]
        elif packet_of(node) in (aten.index, aten.index_select) and node in analysis.context.axes:
            # Picking experts by their first dimension: the others stay what they are.
            first = isinstance(node.args[1], int) and node.args[1] == 0
            if first or (isinstance(node.args[1], (list, tuple)) and len(node.args[1]) == 1):
                rest = found[source][1:]
                given = len(analysis.axes(node)) - len(rest)
                found[node] = [set() for _ in range(given)] + rest
    return found


def _zeros_of(analysis: AxisAnalysis, node: fx.Node, state: dict[fx.Node, Any]) -> Any:
    if node.target is operator.getitem:
        source, position = node.args
        several: Any = state.get(source, NONE) if isinstance(source, fx.Node) else NONE
        if isinstance(several, list) and isinstance(position, int):
            return several[position]
        return NONE
    packet = packet_of(node)
    rule = _RULES.get(packet)
    if rule is not None:
        return rule(analysis, node, bind(node), state)
    moves = packet in SHAPE_RULES and packet not in NEVER
    if moves or packet in KEEPING or packet in COPIES:
        return _keep(analysis, node, state)
    if is_pointwise(node):
        return _pointwise(analysis, node, state)
    return NONE


def _keep(analysis: AxisAnalysis, node: fx.Node, state: dict[fx.Node, Any]) -> Any:
    """Moves zeros along with their atoms, where each atom stands in one dimension only."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return NONE
    given = state.get(source, NONE)
    if SHAPE_RULES.get(packet_of(node)) is permute:
        new = order(node, bind(node), len(analysis.axes(source)))
        return frozenset((new.index(dim), atom) for dim, atom in given)
    before = _places(analysis.axes(source))
    after = analysis.context.axes[node]
    several = bool(after) and isinstance(after[0], list)
    results = []
    for axes in after if several else [after]:
        places = _places(axes)
        results.append(
            frozenset(
                (places[atom][0], atom)
                for _, atom in given
                if len(before.get(atom, ())) == 1 and len(places.get(atom, ())) == 1
            )
        )
    if not several:
        return results[0]
    values_only = isinstance(node.meta["val"][-1], torch.Tensor) and (
        not node.meta["val"][-1].is_floating_point()
    )
    return [results[0], NONE] if values_only else results


def _places(axes: Iterable[Axis]) -> dict[Axis, list[int]]:
    found: dict[Axis, list[int]] = {}
    for dim, axis in enumerate(axes):
        for atom in set(atoms(axis)):
            found.setdefault(atom, []).append(dim)
    return found


def _pointwise(analysis: AxisAnalysis, node: fx.Node, state: dict[fx.Node, Any]) -> Zeros:
    packet = packet_of(node)
    operands = [n for n in node.all_input_nodes if n in analysis.context.axes]
    rank = len(analysis.axes(node))
    found = [_broadcast(state.get(n, NONE), len(analysis.axes(n)), rank) for n in operands]
    if len(operands) == 1 and node.args and node.args.count(operands[0]) == 1:
        return found[0] if maps_zero_to_zero(node, operands[0]) else NONE
    if len(operands) == 1 and packet in (INTERSECT | MULTIPLY):
        return found[0]  # x + x, x · x
    if len(operands) != 2:
        return NONE
    if packet in INTERSECT:
        return found[0] & found[1]
    if packet in MULTIPLY:
        return found[0] | found[1]
    if packet in (aten.div, aten.divide):
        return found[0] - found[1]
    return NONE


_probed: dict[tuple[Any, ...], bool] = {}


def maps_zero_to_zero(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a function of one tensor is zero at zero: computed, not looked up in a list."""
    if not node.meta["val"].is_floating_point() or ops.is_random(node):
        return False
    key = (node.target, *(repr(a) for a in node.args if a is not operand), repr(node.kwargs))
    if key not in _probed:
        zero = torch.zeros(1, dtype=torch.float64)
        args = [zero if a is operand else a for a in node.args]
        target: Any = node.target
        try:
            _probed[key] = bool((target(*args, **node.kwargs) == 0).all())
        except (RuntimeError, TypeError):
            _probed[key] = False
    return _probed[key]


def _broadcast(given: Zeros, own: int, rank: int) -> Zeros:
    return frozenset((dim + rank - own, atom) for dim, atom in given)


def _linear(a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]) -> Zeros:
    x, bias = b["input"], b["bias"]
    last = len(a.axes(x)) - 1
    rows = {(last, atom) for dim, atom in state.get(b["weight"], NONE) if dim == 0}
    return _with_bias(rows | _free(state.get(x, NONE), last), bias, {0: last}, state)


def _matmul(a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]) -> Zeros:
    names = [k for k in b if isinstance(b[k], fx.Node)]
    bias = b["self"] if len(names) == 3 else None
    left, right = (b[k] for k in names[-2:])
    rank, ls, rs = len(a.axes(node)), len(a.axes(left)), len(a.axes(right))
    if ls < 2 or rs < 2:
        return NONE
    found = _broadcast(_free(state.get(left, NONE), ls - 1), ls, rank)
    found |= _broadcast(_free(state.get(right, NONE), rs - 2), rs, rank)
    if bias is None:
        return found
    own = len(a.axes(bias))
    return found & _broadcast(state.get(bias, NONE), own, rank)


def _grouped_mm(
    a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]
) -> Zeros:
    return frozenset((1, atom) for dim, atom in state.get(list(b.values())[1], NONE) if dim == 2)


def _einsum(a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]) -> Zeros:
    equation = b["equation"].replace(" ", "")
    if "..." in equation or "->" not in equation:
        return NONE
    given, result = equation.split("->")
    return frozenset(
        (result.index(letters[dim]), atom)
        for operand, letters in zip(b["tensors"], given.split(","), strict=True)
        for dim, atom in state.get(operand, NONE)
        if letters[dim] in result
    )


def _convolution(
    a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]
) -> Zeros:
    x, weight = b["input"], b["weight"]
    channel = len(a.axes(x)) - len(a.axes(weight)) + 1
    transposed = "transpose" in str(node.target) or b.get("transposed")
    row = 1 if transposed else 0
    found = {(channel, atom) for dim, atom in state.get(weight, NONE) if dim == row}
    groups = a.context.edits[node].arguments.get("groups") if node in a.context.edits else None
    shared = set(atoms(groups)) if isinstance(groups, Axis) else set()
    found |= {(channel, t) for d, t in state.get(x, NONE) if d == channel and t in shared}
    found |= {(d, t) for d, t in state.get(x, NONE) if d < channel}
    if transposed:
        found |= {(channel, t) for d, t in state.get(weight, NONE) if d == 0 and t in shared}
    return _with_bias(found, b["bias"], {0: channel}, state)


def _attention(
    a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]
) -> Zeros:
    v = b["value"]
    rank, own = len(a.axes(node)), len(a.axes(v))
    return _broadcast(_free(state.get(v, NONE), own - 2), own, rank)


def _recurrent(a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]) -> Any:
    """Units start at zero and have zero rows and biases in all gates of all layers."""
    r = arguments(b)
    last = len(a.axes(r.states[0])) - 1
    rows = [w for inward, across, *biases in r.layers for w in (inward, across, *biases)]
    kept = frozenset(
        (last, atom)
        for dim, atom in state.get(r.states[0], NONE)
        if dim == last
        and all((dim, atom) in state.get(s, NONE) for s in r.states)
        and all((0, atom) in state.get(w, NONE) for w in rows)
    )
    several = isinstance(node.meta["val"], (list, tuple))
    return [kept for _ in node.meta["val"]] if several else kept


def _embedding(
    a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]
) -> Zeros:
    shift = len(a.axes(node)) - len(a.axes(b["weight"]))
    return frozenset((d + shift, t) for d, t in state.get(b["weight"], NONE) if d > 0)


def _norm(a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]) -> Zeros:
    weight = b["weight"]
    if weight is None:
        return NONE
    rank = len(a.axes(node))
    ends = "normalized_shape" in b or "divisor" in b
    shift = rank - len(a.axes(weight)) if ends else min(1, rank - 1)
    found = {(d + shift, t) for d, t in state.get(weight, NONE)}
    places = {d: d + shift for d in range(len(a.axes(weight)))}
    return _with_bias(found, b.get("bias"), places, state)


def _cat(a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]) -> Zeros:
    parts = [t for t in b["tensors"] if t in a.context.axes and a.axes(t)]
    rank = len(a.axes(node))
    dim = b["dim"] % rank
    stacked = rank != len(a.axes(parts[0]))
    found: set[tuple[int, Axis]] = set()
    for d in range(rank):
        if stacked and d == dim:
            continue
        own = d - 1 if stacked and d > dim else d
        alive = {
            atom
            for t in parts
            for atom in atoms(a.axes(t)[own])
            if (own, atom) not in state.get(t, NONE)
        }
        found |= {(d, atom) for atom in atoms(a.axes(node)[d]) if atom not in alive}
    return frozenset(found)


def _index_add(
    a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]
) -> Zeros:
    here, there = (state.get(b[name], NONE) for name in ("self", "source"))
    return frozenset(here & there)


def _copied(a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]) -> Zeros:
    return _broadcast(state.get(b["src"], NONE), len(a.axes(b["src"])), len(a.axes(node)))


def _select_scatter(
    a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]
) -> Zeros:
    dim = b["dim"] % len(a.axes(node))
    there = {(d + (d >= dim), t) for d, t in state.get(b["src"], NONE)}
    return frozenset(state.get(b["self"], NONE) & there)


def _slice_scatter(
    a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]
) -> Zeros:
    dim = b["dim"] % len(a.axes(node))
    here, there = (state.get(b[name], NONE) for name in ("self", "src"))
    whole, part = (Counter(atoms(a.axes(v)[dim])) for v in (node, b["src"]))
    covered = {(dim, t) for t, n in part.items() if n == whole[t]}  # nothing of `self` is left
    beside = {(dim, t) for t in whole if t not in part}
    return frozenset((here & there) | (there & covered) | (here & beside))


def _where(a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]) -> Zeros:
    rank = len(a.axes(node))
    found: Zeros | None = None
    for value in (b.get("self"), b.get("other")):
        if isinstance(value, fx.Node):
            here = _broadcast(state.get(value, NONE), len(a.axes(value)), rank)
            found = here if found is None else found & here
        elif value != 0:
            return NONE
    return found or NONE


def _masked_fill(
    a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]
) -> Zeros:
    given: Zeros = state.get(b["self"], NONE)
    return given if b["value"] == 0 else NONE


def _pad(a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]) -> Any:
    constant = b.get("mode", "constant") == "constant"
    return NONE if constant and b.get("value") not in (None, 0) else _keep(a, node, state)


def _zero(a: AxisAnalysis, node: fx.Node, b: dict[str, Any], state: dict[fx.Node, Any]) -> Zeros:
    return frozenset((d, t) for d, axis in enumerate(a.axes(node)) for t in atoms(axis))


def _free(given: Zeros, contracted: int) -> Zeros:
    return frozenset((d, t) for d, t in given if d != contracted)


def _with_bias(
    found: Iterable[tuple[int, Axis]],
    bias: fx.Node | None,
    places: dict[int, int],
    state: dict[fx.Node, Any],
) -> Zeros:
    """Keeps the zeros that a bias, whose dimensions stand at `places`, does not fill."""
    if bias is None:
        return frozenset(found)
    return frozenset(found) & {(places[d], t) for d, t in state.get(bias, NONE)}


_RULES: dict[Any, Callable[..., Any]] = {
    aten.linear: _linear,
    aten._grouped_mm: _grouped_mm,
    aten.einsum: _einsum,
    aten.scaled_dot_product_attention: _attention,
    aten.embedding: _embedding,
    aten.where: _where,
    aten.index_add: _index_add,
    aten.copy: _copied,
    aten.select_scatter: _select_scatter,
    aten.slice_scatter: _slice_scatter,
    aten.masked_fill: _masked_fill,
    aten.pad: _pad,
    aten.constant_pad_nd: _pad,
}
_RULES |= dict.fromkeys((aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm), _matmul)
_RULES |= dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution), _convolution)
_RULES |= dict.fromkeys(
    (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), _convolution
)
_RULES |= dict.fromkeys(
    (aten.layer_norm, aten.rms_norm, aten.batch_norm, aten.instance_norm, aten.group_norm), _norm
)
_RULES |= dict.fromkeys(
    (torch.ops.gtrans.layer_norm_of_longer, torch.ops.gtrans.rms_norm_of_longer), _norm
)
_RULES |= dict.fromkeys((aten.cat, aten.concat, aten.stack), _cat)
_RULES |= dict.fromkeys(ZEROS, _zero)
_RULES |= dict.fromkeys(GATES, _recurrent)
