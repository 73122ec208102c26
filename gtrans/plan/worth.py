"""Keep, of the rewrites a pass could do, those that make the plan save fewer bytes.

A pass that swaps an activation for a smaller approximation gains nothing where the activation is
kept for another operator anyway, or can be computed again from values that are: the backward would
read the approximation, and the bytes would not fall. Only a plan of the rewritten graph tells.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from gtrans.core import HELD_BACK, Pass, Permission, Stats
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.ops import storage_of
from gtrans.ir.printer import target_name
from gtrans.ir.sizes import human
from gtrans.plan.cut import cut_with_substitutes, minimum_cut, recipe
from gtrans.plan.planner import Plan
from gtrans.plan.saved import saved_bytes
from gtrans.rewrite.wires import erase_taps
from gtrans.runtime.tap import TAP

aten = torch.ops.aten

NOT_KEPT = "only the backward computes it"
NOTHING_SAVED = "the plan would keep no fewer bytes"

# To choose by bytes alone, recomputation is next to free: otherwise a long activation would look
# better kept in two forms than computed again from its input.
_PRICE = 1e-6
_SHOWN = 2


Twin = Callable[[fx.Node], fx.Node]
"""The node of a copy of the graph that stands for one of the graph itself."""


@dataclass(frozen=True)
class Candidate:
    """A rewrite that lets the backward do without a forward value.

    Attributes:
        site: names the rewrite: the backward value that is computed in another way, or the value
            that is kept in another form.
        value: the forward value that is needed as long as it is not rewritten.
        bytes: what is kept in place of the value.
        let_go: edits a copy of the graph such that what is rewritten reads the value no more.
        rewrite: performs the rewrite, in the graph itself or a copy; it is given the site there.
        note: what the report says of it.
    """

    site: fx.Node
    value: fx.Node
    bytes: float
    let_go: Callable[[JointGraph, Twin], None]
    rewrite: Callable[[JointGraph, fx.Node], None]
    note: str = ""


def scales(site: fx.Node, dy: fx.Node) -> Callable[[JointGraph, Twin], None]:
    """Lets go of the forward values of a backward node that only scale a cotangent."""

    def let_go(trial: JointGraph, twin: Twin) -> None:
        old, source = twin(site), twin(dy)
        dtype = old.meta["val"].dtype
        trial.replace(old, trial.insert_before(old, aten._to_copy.default, source, dtype=dtype))

    return let_go


@dataclass
class Verdict:
    """Which rewrites pay.

    Attributes:
        chosen: the rewrites to perform, in the order given.
        refused: why each other one does not pay, by site.
        bytes_before: what the plan keeps without any of the rewrites.
        bytes_after: what it keeps with the chosen ones.
    """

    chosen: list[Candidate]
    refused: dict[fx.Node, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0


def keep_what_pays(joint: JointGraph, candidates: Sequence[Candidate]) -> Verdict:
    """Chooses by one minimum cut, then checks the outcome on a rewritten and planned copy.

    For the cut no candidate's backward reads its value; it pays the bytes of the substitute
    wherever the value is not to be had.

    Args:
        joint: the graph; it is not changed.
        candidates: the rewrites to choose from.

    Returns:
        The verdict. Either its bytes fall, or nothing is chosen.
    """
    if not candidates:
        return Verdict([])
    trial, twin = _copy(joint)
    for c in reversed(candidates):  # the cotangent of one may be the site of another before it
        c.let_go(trial, twin.__getitem__)
    values = {c.site: _unmarked(twin[c.value]) for c in candidates}
    erase_taps(trial)
    trial.eliminate_dead_code()
    left = set(trial.nodes)  # what only the backward computed is gone
    wanted = [(values[c.site], c.bytes) for c in candidates if values[c.site] in left]
    plan = Plan(price=_PRICE)
    kept, forgone = cut_with_substitutes(trial, lambda n: plan.cost(trial, n), wanted)
    verdict = Verdict([c for c in candidates if values[c.site] in forgone])
    for c in candidates:
        if values[c.site] not in left:
            verdict.refused[c.site] = NOT_KEPT
        elif values[c.site] not in forgone:
            verdict.refused[c.site] = _reason(trial, kept, values[c.site])
    _check(joint, verdict)
    return verdict


class PayingPass(Pass[JointGraph]):
    """A pass that proposes rewrites, of which those are performed that make the plan save less."""

    @abstractmethod
    def proposals(self, graph: JointGraph) -> Iterable[Candidate | str]:
        """A candidate for every place where the pattern was found, or why it must stay as it is."""

    def run(self, graph: JointGraph, permitted: Permission) -> Stats:
        """Rewrites the places that save bytes once the whole graph is planned."""
        stats = Stats()
        candidates: list[Candidate] = []
        for proposal in self.proposals(graph):
            stats.matched += 1
            if isinstance(proposal, Candidate):
                candidates.append(proposal)
            else:
                stats.skipped[proposal] += 1
        verdict = keep_what_pays(graph, candidates)
        stats.skipped += Counter(verdict.refused.values())
        notes: Counter[str] = Counter()
        for c in verdict.chosen:
            if not permitted(c.site.name):
                stats.skipped[HELD_BACK] += 1
                continue
            notes[c.note] += 1
            c.rewrite(graph, c.site)
            stats.rewritten += 1
        stats.notes += [f"{count} x {note}" for note, count in notes.items()]
        if verdict.chosen:
            change = f"{human(verdict.bytes_before)} -> {human(verdict.bytes_after)}"
            stats.notes.append(f"saved for backward, once planned: {change}")
        return stats


def _check(joint: JointGraph, verdict: Verdict) -> None:
    """Rolls all back unless the bytes of the plan fall."""
    verdict.bytes_before = verdict.bytes_after = planned_bytes(_copy(joint)[0])
    if not verdict.chosen:
        return
    rewritten, twin = _copy(joint)
    for c in verdict.chosen:
        c.rewrite(rewritten, twin[c.site])
    verdict.bytes_after = planned_bytes(rewritten)
    if verdict.bytes_after >= verdict.bytes_before:
        verdict.refused |= dict.fromkeys([c.site for c in verdict.chosen], NOTHING_SAVED)
        verdict.chosen, verdict.bytes_after = [], verdict.bytes_before


def _copy(joint: JointGraph) -> tuple[JointGraph, dict[fx.Node, fx.Node]]:
    copy = joint.copy()
    return copy, dict(zip(joint.nodes, copy.nodes, strict=True))


def _unmarked(node: fx.Node) -> fx.Node:
    while node.target is TAP:
        node = node.all_input_nodes[0]
    return node


def planned_bytes(joint: JointGraph) -> int:
    """What a plan by bytes keeps of a graph, which is used up."""
    erase_taps(joint)
    joint.eliminate_dead_code()
    return saved_bytes(joint, minimum_cut(joint, lambda node: Plan().cost(joint, node)))


def _roots(joint: JointGraph, kept: tuple[fx.Node, ...], value: fx.Node) -> set[fx.Node]:
    """The kept activations that a value is computed from, itself if it is kept."""
    roots: set[fx.Node] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if node in kept:
            roots.add(node)
        elif node.op != "placeholder":
            pending += recipe(joint, node)
    return roots


def _reason(joint: JointGraph, kept: tuple[fx.Node, ...], value: fx.Node) -> str:
    """Says which operators of the backward the value, or what it comes from, stays for."""
    roots = _roots(joint, kept, value)
    subject = (
        "x stays saved" if roots == {storage_of(value)} else "x can be had from what stays saved"
    )
    readers = _readers(joint, kept, roots)
    names = [name for name, _ in Counter(target_name(n) for n in readers).most_common(_SHOWN)]
    return f"{subject} for {' and '.join(names)}; nothing would be saved"


def _readers(joint: JointGraph, kept: tuple[fx.Node, ...], roots: set[fx.Node]) -> list[fx.Node]:
    """The backward nodes that read kept values, or what is computed from them there."""
    again = _computed_again(joint, kept)
    readers: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    pending = list(roots)
    while pending:
        for user in pending.pop().users:
            if joint.is_backward(user):
                readers[user] = None
            elif user in again and user not in seen:
                seen.add(user)
                pending.append(user)
    return sorted(readers)


def _computed_again(joint: JointGraph, kept: tuple[fx.Node, ...]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = [n for b in joint.nodes if joint.is_backward(b) for n in ops.tensor_inputs(b)]
    while pending:
        node = pending.pop()
        if joint.is_forward(node) and node not in kept and node not in found:
            found.add(node)
            pending += recipe(joint, node)
    return found
