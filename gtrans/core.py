"""What a pass is: options, a knob, a contract, and one method that rewrites a graph.

A pass neither copies, lints, logs, times, counts nor compares; the pipeline does all of that.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import ClassVar, Generic, TypeVar

from torch import fx

from gtrans.contract import Contract
from gtrans.errors import OptionError
from gtrans.ir.forward import ForwardGraph
from gtrans.ir.joint import JointGraph
from gtrans.ir.program import Program
from gtrans.ir.source import Location, location
from gtrans.listing import Listing, Shown


class Knob(Enum):
    """What of a training step a pass edits, and with it which laws must still hold."""

    RESIDUAL = "R"
    RULE = "B"
    WIRE = "G"
    SCHEDULE = "S"
    OPERATOR = "F"
    PARAMETERS = "P"

    @property
    def law(self) -> str:
        """What the harness tests of every pass of this knob, without a line by its author."""
        return _LAWS[self]


_LAWS = {
    Knob.RESIDUAL: "forward bitwise the same; gradient within the contract",
    Knob.RULE: "forward bitwise the same; gradient within the contract",
    Knob.WIRE: "forward bitwise the same; a wire fed with itself changes nothing",
    Knob.SCHEDULE: "every value bitwise the same",
    Knob.OPERATOR: "output within tolerance; gradient within the contract",
    Knob.PARAMETERS: "outputs, buffers, gradients of what stays within the contract",
}


@dataclass(frozen=True)
class Refusal:
    """One place that a pass left as it is: why, its node, and the line of the user's model."""

    reason: str
    site: str
    location: Location


@dataclass(repr=False)
class Stats(Shown):
    """What a pass did: "matched 0" must be visible, and so must every reason for not rewriting.

    Attributes:
        matched: places where its pattern was found.
        rewritten: places it rewrote.
        skipped: how often each reason kept it from rewriting.
        notes: sentences for the report, such as a figure the pass chose.
        contract: the contract of what was done to this graph, where it says more than the pass can
            promise of any graph.
        refused: the places behind `skipped`, as far as the pass named them.
    """

    matched: int = 0
    rewritten: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    contract: Contract | None = None
    refused: list[Refusal] = field(default_factory=list)

    def refuse(self, site: fx.Node, reason: str) -> None:
        """Counts a place that stays as it is, and remembers where in the user's model it is."""
        self.skipped[reason] += 1
        self.refused.append(Refusal(reason, site.name, location(site)))

    def refuse_all(self, sites: Mapping[fx.Node, str]) -> None:
        """`refuse` for several places, each with its reason."""
        for site, reason in sites.items():
            self.refuse(site, reason)

    def __str__(self) -> str:
        text = f"matched {self.matched}, rewrote {self.rewritten}"
        for reason, count in self.skipped.items():
            text += f"; skipped {count}: {reason}"
        return text

    def headline(self) -> str:
        """The counts."""
        return f"matched {self.matched}, rewrote {self.rewritten}"

    def shown(self) -> list[str | Listing]:
        """The counts, the reasons for not rewriting, and the remarks."""
        rows = [(str(count), reason) for reason, count in self.skipped.items()]
        reasons: list[str | Listing] = [Listing((">sites", "why not"), rows)] if rows else []
        return [self.headline(), *reasons, *self.notes]


GraphT = TypeVar("GraphT", JointGraph, ForwardGraph, Program)
GraphKind = type[JointGraph] | type[ForwardGraph] | type[Program]

Permission = Callable[[str], bool]
"""Asked before every rewrite with a description of it; answers whether to go on (bisection)."""

HELD_BACK = "held back by the rewrite limit"


class Pass(ABC, Generic[GraphT]):
    """Base class of all passes: a frozen dataclass whose fields are its options.

    Attributes:
        name: as it is written in pipelines; the file and the test are named after it.
        knob: what of a training step it edits.
        works_on: the kind of graph its `run` takes: joint graphs while a step is compiled, forward
            graphs before autograd, or a whole model's program, which `restructure` rewrites.
        linear: whether the rewritten backward is linear in the incoming cotangent. Accumulating
            gradients over several batches or workers is right only for passes that are.
        homogeneous: whether four times the cotangent gives four times the gradient. Scaling the
            loss, as mixed precision does, is right only for passes that are.
        reads_steps: whether it looks in the joint graph for the steps of recurrent layers, which
            are then unrolled even where one operator computes the layer.
    """

    name: ClassVar[str]
    knob: ClassVar[Knob]
    linear: ClassVar[bool] = True
    homogeneous: ClassVar[bool] = True
    works_on: ClassVar[GraphKind] = JointGraph
    reads_steps: ClassVar[bool] = False

    @property
    @abstractmethod
    def contract(self) -> Contract:
        """What this pass, with these options, promises about the gradient."""

    @property
    def indispensable(self) -> bool:
        """Whether to stop where it fails, since training on without it would break a promise."""
        return False

    @abstractmethod
    def run(self, graph: GraphT, permitted: Permission) -> Stats:
        """Rewrites the graph in place.

        Args:
            graph: a private copy; the pipeline throws it away if the pass fails.
            permitted: to be asked before each rewrite; one that is not permitted is left out.

        Returns:
            What was matched, rewritten and skipped, and why.
        """

    def mark(self, graph: ForwardGraph) -> None:
        """Puts taps on the forward values whose cotangents `run` has to find in the joint graph.

        Called on the captured forward graph before autograd; see `gtrans.rewrite.wires`. A pass
        that edits no wires need not override it.
        """

    def __str__(self) -> str:
        """The pass as pipeline text: its name, and the options that are not at their default."""
        given = [
            f"{f.name}={format_option(getattr(self, f.name))}"
            for f in fields(self)  # type: ignore[arg-type]  # every pass is a dataclass
            if getattr(self, f.name) != f.default
        ]
        return self.name + ("{" + ",".join(given) + "}" if given else "")


class SitePass(Pass[GraphT]):
    """A pass that looks at one place after another and rewrites those that fit.

    The order of calls for each site is `refuse`, then `rewrite`.
    """

    @abstractmethod
    def sites(self, graph: GraphT) -> Iterable[fx.Node]:
        """The nodes where the pattern may apply, before anything is rewritten."""

    @abstractmethod
    def refuse(self, graph: GraphT, site: fx.Node) -> str | None:
        """Why this site must stay as it is, or None if it may be rewritten."""

    @abstractmethod
    def rewrite(self, graph: GraphT, site: fx.Node) -> None:
        """Rewrites one site that was not refused."""

    def run(self, graph: GraphT, permitted: Permission) -> Stats:
        """Runs `refuse` and `rewrite` over all sites."""
        stats = Stats()
        for site in list(self.sites(graph)):
            stats.matched += 1
            reason = self.refuse(graph, site)
            if reason is None and not permitted(site.name):
                reason = HELD_BACK
            if reason is not None:
                stats.refuse(site, reason)
                continue
            self.rewrite(graph, site)
            stats.rewritten += 1
        return stats


def require(condition: bool, message: str) -> None:
    """Checks an option of a pass.

    Raises:
        OptionError: with the message, if the condition does not hold.
    """
    if not condition:
        raise OptionError(message)


def format_option(value: object) -> str:
    """An option value as pipeline text; the inverse of `gtrans.pipeline.parse_option`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
