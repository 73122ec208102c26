"""Deep equilibrium models: the gradient at a fixed point, without the steps that led to it.

    z = f(z),    dL/dtheta = u^T df/dtheta,    u = J^T u + dL/dz,  J = df/dz at z

    implicit   the linear equation to a tolerance, so the exact gradient of the fixed point
    neumann    k terms: u = sum over m <= k of (J^T)^m dL/dz, relative error about |J|^(k+1)
    jfb        no term: u = dL/dz
    phantom    k damped steps z <- (1 - t) z + t f(z) unrolled from the fixed point; with t = 1 the
               same as k - 1 terms

Only the operators of one run of f are kept, whatever the number of steps. None of these is the
gradient of the unrolled loop unless the loop has settled, hence the check of its residual.

Sources: Bai et al., NeurIPS 2019, arXiv:1909.01377 (implicit); Fung et al., AAAI 2022,
arXiv:2103.12803 (JFB); Geng et al., NeurIPS 2021, arXiv:2111.05177 (phantom, Neumann).
"""

from collections.abc import Callable
from typing import Literal

import torch

from gtrans.errors import ModelError, OptionError

Rule = Literal["implicit", "neumann", "jfb", "phantom"]
_RULES = ("implicit", "neumann", "jfb", "phantom")


def equilibrium(
    f: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    *,
    backward: Rule = "implicit",
    terms: int = 5,
    damping: float = 1.0,
    tolerance: float = 1e-5,
    max_steps: int = 200,
) -> torch.Tensor:
    """A fixed point of f with a gradient.

    Args:
        f: from [*s] to [*s]; whatever it reads besides (inputs, weights) gets its gradient.
        start: where the iteration starts, [*s]; it gets no gradient.
        backward: see the module.
        terms: k of "neumann" and "phantom".
        damping: t of "phantom".
        tolerance: |f(z) - z| relative to |z|, and the same of the linear equation.
        max_steps: of the iteration, and of the linear equation.

    Raises:
        OptionError: an option is out of range.
        ModelError: the iteration has not settled, here or (in the backward) for the linear
            equation: f is no contraction there.
    """
    if backward not in _RULES or terms < 0 or not 0 < damping <= 1 or max_steps < 1:
        raise OptionError(
            f"backward must be one of {', '.join(_RULES)}, terms at least 0, damping within (0, 1] "
            f"and max_steps at least 1; got {backward!r}, {terms}, {damping} and {max_steps}"
        )
    with torch.no_grad():
        z = _settled(f, start, tolerance, max_steps, "the fixed point")
    if not torch.is_grad_enabled():
        return z
    if backward == "phantom":
        for _ in range(max(1, terms)):
            z = (1 - damping) * z + damping * f(z)
        return z
    leaf = z.detach().requires_grad_()
    after = f(leaf)
    if backward == "jfb" or not after.requires_grad:
        return _through_parameters(after, leaf, lambda g: g)

    def solve(g: torch.Tensor) -> torch.Tensor:
        def step(u: torch.Tensor) -> torch.Tensor:
            sent = torch.autograd.grad(after, leaf, u, retain_graph=True, allow_unused=True)[0]
            return g if sent is None else g + sent

        if backward == "implicit":
            return _settled(step, g, tolerance, max_steps, "the backward of the fixed point")
        u = g
        for _ in range(terms):
            u = step(u)
        return u

    return _through_parameters(after, leaf, solve)


def _through_parameters(
    after: torch.Tensor, leaf: torch.Tensor, solve: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """f(z) whose incoming cotangent is replaced; z itself is a leaf that nobody reads."""
    # The hook hangs on a copy: `solve` runs the graph of `after` itself.
    out = after.view_as(after)
    if out.requires_grad:
        out.register_hook(solve)
    return out


def _settled(
    step: Callable[[torch.Tensor], torch.Tensor],
    z: torch.Tensor,
    tolerance: float,
    max_steps: int,
    what: str,
) -> torch.Tensor:
    residual = float("inf")
    for _ in range(max_steps):
        after = step(z)
        residual = float((after - z).norm() / after.norm().clamp(min=1e-30))
        z = after
        if residual <= tolerance:
            return z
    raise ModelError(
        f"{what} has not settled: after {max_steps} steps it still changes by {residual:.1e} of "
        f"its size (tolerance {tolerance:.1e}). Is f a contraction? Give more max_steps or a "
        "larger tolerance, or make its weights smaller"
    )
