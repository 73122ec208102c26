"""What a pass promises about the gradient, and what a sequence of passes promises together.

    Exact < Close < Unbiased < Iterative < Aligned < Local < Attribution < Changed

Composition (each row was checked by counter-example or enumeration in `tests/test_contract.py`):

    exact ; x                 x, for every x: a derivative followed by an exact one stays what it is
    close ; close             close, relative errors add
    close ; unbiased          aligned: the close error biases the expectation
    unbiased ; unbiased       unbiased if their noise is independent; otherwise only aligned
    iterative ; iterative     iterative, exact where both are
    iterative ; approximate   aligned: sweeps over approximate values have no exact point
    aligned ; approximate     aligned: directions of several approximate layers do not add up
    local, attribution        absorb what stands above them: nothing is known across the cut
    changed ; x               changed: x holds for the gradient of the function it was changed to
"""

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

from gtrans.errors import ContractError, did_you_mean


@dataclass(frozen=True)
class Contract:
    """Base class. `rank` orders contracts from strongest to weakest."""

    name: ClassVar[str]
    rank: ClassVar[int]

    def __str__(self) -> str:
        return self.name

    @property
    def of_gradient(self) -> "Contract":
        """What holds for the gradient of the function that is trained."""
        return self


@dataclass(frozen=True)
class Exact(Contract):
    """The same gradient.

    Attributes:
        bitwise: every bit is the same; otherwise sums may be taken in another order, which
            `gtrans.verify` holds to a bound per dtype.
    """

    name: ClassVar[str] = "exact"
    rank: ClassVar[int] = 0
    bitwise: bool = True

    def __str__(self) -> str:
        return "exact" if self.bitwise else "exact (reassociated)"


@dataclass(frozen=True)
class Close(Contract):
    """A deterministic gradient with a bounded relative error per rewritten operator."""

    name: ClassVar[str] = "close"
    rank: ClassVar[int] = 1
    rtol: float = 1e-2

    def __str__(self) -> str:
        return f"close ({self.rtol:g})"


@dataclass(frozen=True)
class Unbiased(Contract):
    """A random gradient whose expectation over the named noise is the true one.

    Attributes:
        objective: the loss it is the gradient of ("the loss", or a smoothed one).
        noise: names of the independent random draws it takes the expectation over.
    """

    name: ClassVar[str] = "unbiased"
    rank: ClassVar[int] = 2
    objective: str = "the loss"
    noise: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Iterative(Contract):
    """A truncated iteration.

    Attributes:
        iterations: sweeps that are run.
        exact_at: sweeps after which the result is exact; 0 as long as the model is not known.
    """

    name: ClassVar[str] = "iterative"
    rank: ClassVar[int] = 3
    iterations: int = 0
    exact_at: int = 0

    def __str__(self) -> str:
        exact_at = self.exact_at or "the depth of the model"
        return f"iterative ({self.iterations} sweeps, exact at {exact_at})"


@dataclass(frozen=True)
class Aligned(Contract):
    """A direction with a measured or guaranteed positive inner product with the gradient."""

    name: ClassVar[str] = "aligned"
    rank: ClassVar[int] = 4


@dataclass(frozen=True)
class Local(Contract):
    """Exact gradients of per-block objectives; nothing flows across the cuts."""

    name: ClassVar[str] = "local"
    rank: ClassVar[int] = 5


@dataclass(frozen=True)
class Attribution(Contract):
    """No gradient, but an attribution that obeys a stated law."""

    name: ClassVar[str] = "attribution"
    rank: ClassVar[int] = 6
    law: str = "conservation"


@dataclass(frozen=True)
class Changed(Contract):
    """Another function than the model's is trained.

    Attributes:
        gradient: what holds for the gradient of that function.
    """

    name: ClassVar[str] = "changed"
    rank: ClassVar[int] = 7
    gradient: Contract = Exact()

    def __str__(self) -> str:
        return f"changed forward; gradient {self.gradient}"

    @property
    def of_gradient(self) -> Contract:
        """The contract of the gradient."""
        return self.gradient


LEVELS: dict[str, type[Contract]] = {
    c.name: c for c in (Exact, Close, Unbiased, Iterative, Aligned, Local, Attribution, Changed)
}


def compose(first: Contract, second: Contract) -> Contract:
    """The contract of two rewrites of one step; symmetric. See the module's table."""
    weak, strong = (first, second) if first.rank >= second.rank else (second, first)
    match weak, strong:
        case Changed(gradient=a), Changed(gradient=b):
            return Changed(gradient=compose(a, b))
        case Changed(gradient=a), _:
            return Changed(gradient=compose(a, strong))
        case Exact(bitwise=a), Exact(bitwise=b):
            return Exact(bitwise=a and b)
        case _, Exact():
            return weak
        case Close(rtol=a), Close(rtol=b):
            return Close(rtol=(1 + a) * (1 + b) - 1)
        case Unbiased(), Close():
            return Aligned()
        case Unbiased(objective=a, noise=m), Unbiased(objective=b, noise=n):
            independent = a == b and not (m & n)
            return Unbiased(objective=a, noise=m | n) if independent else Aligned()
        case Iterative(iterations=k, exact_at=a), Iterative(iterations=m, exact_at=b):
            return Iterative(iterations=min(k, m), exact_at=max(a, b))
        case Iterative(), _:
            return Aligned()
        case _:
            return weak


def compose_all(contracts: list[Contract]) -> Contract:
    """The contract of a whole pipeline; exact if it is empty."""
    none: Contract = Exact()
    return reduce(compose, contracts, none)


def level(name: str) -> type[Contract]:
    """The contract class of a name, as given to `allow=`.

    Raises:
        ContractError: there is no such contract.
    """
    try:
        return LEVELS[name]
    except KeyError:
        raise ContractError(f"unknown contract {name!r}{did_you_mean(name, LEVELS)}") from None
