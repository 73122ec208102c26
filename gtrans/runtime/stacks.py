"""Stacks of residual blocks and dense blocks, evaluated many layers at a time.

    h[i] = f[i](h[i-1])                 a stack; blocks of one structure, tied or not
    s[i] = g[i](x, s[1], .., s[i-1])    a dense block: each layer reads all before it

Both are chains in the sense of `gtrans.runtime.solve`. The backward is the exact one, layer by
layer at the states that were found, with each layer run once more for it; it never goes through the
sweeps. On one busy device sweeps cost more than they save: they are for layers that are small, or
spread over devices.

Source: Song et al., ICML 2021, arXiv:2002.03629 (Jacobi and Gauss-Seidel, DenseNets); the sum over
all branches of a residual stream is Picard's iteration.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap

from gtrans.errors import ModelError, OptionError, did_you_mean
from gtrans.runtime.batch_rules import quiet_loops
from gtrans.runtime.solve import Evaluate, Solution, solve_forward

_CARRIES = {"jacobi": 0.0, "jacobi-gs": 0.0, "gs-jacobi": 0.0, "picard": 1.0, "gauss-seidel": 0.0}


def parallel_stack(
    blocks: Sequence[nn.Module],
    x: torch.Tensor,
    *,
    method: str = "picard",
    tolerance: float = 1e-5,
    max_sweeps: int | None = None,
    block: int = 4,
) -> tuple[torch.Tensor, Solution]:
    """The output of blocks one after another, by sweeps over all of them.

    Args:
        blocks: modules from [*s] to [*s]; one module several times is a tied stack.
        x: [*s].
        method: "picard" for residual blocks, "jacobi", "jacobi-gs", "gs-jacobi", or "gauss-seidel",
            which is evaluation block by block.
        tolerance: of `solve_forward`; with 0 the output is that of evaluation block by block.
        max_sweeps: sweeps before the rest runs block by block.
        block: blocks of a part of jacobi-gs, or of the window of gs-jacobi.

    Returns:
        The output, with its gradient, and how it was found.

    Raises:
        OptionError: there is no such method.
        ModelError: the blocks cannot run side by side, as with dropout or batch statistics.
    """
    evaluate = _side_by_side(list(blocks), x)
    guess = x.detach().expand(len(blocks), *x.shape)
    solution = _solve(evaluate, guess, method, tolerance, max_sweeps, block)
    before = torch.cat([x.detach()[None], solution.states[:-1]])
    layers = [_with_one_input(f, before[i]) for i, f in enumerate(blocks)]
    return _attached(x, solution, layers, lambda i: [i]), solution


def parallel_dense(
    layers: Sequence[nn.Module],
    x: torch.Tensor,
    *,
    method: str = "jacobi-gs",
    tolerance: float = 1e-5,
    max_sweeps: int | None = None,
    block: int = 4,
) -> tuple[torch.Tensor, Solution]:
    """What the layers of a dense block add, by sweeps over all of them.

    Args:
        layers: the i-th maps the channels of x and of i layers, [B, c + i g, *s], to [B, g, *s].
        x: [B, c, *s].
        method: see `parallel_stack`; "picard" is none here.
        tolerance: see `parallel_stack`; so are max_sweeps and block.
        max_sweeps: see `parallel_stack`.
        block: see `parallel_stack`.

    Returns:
        x and all that was added, [B, c + n g, *s], with its gradient, and how it was found.

    Raises:
        OptionError: there is no such method.
    """

    def evaluate(states: torch.Tensor, part: slice) -> torch.Tensor:
        indices = range(len(layers))[part]
        return torch.stack([layers[i](torch.cat([x, *states[:i]], 1)) for i in indices])

    with torch.no_grad():
        first = layers[0](x)
    guess = torch.zeros_like(first).expand(len(layers), *first.shape)
    solution = _solve(evaluate, guess, method, tolerance, max_sweeps, block)

    def layer(i: int) -> Callable[..., torch.Tensor]:
        return lambda *parts: layers[i](torch.cat(parts, 1))

    values = [x.detach(), *solution.states]
    calls = [(layer(i), values[: i + 1], layers[i]) for i in range(len(layers))]
    outputs = _Solved.apply(  # type: ignore[no-untyped-call]
        calls, lambda i: list(range(i + 1)), solution.states, x, *_parameters(layers)
    )
    return torch.cat([x, *outputs], 1), solution


_Call = tuple[Callable[..., torch.Tensor], list[torch.Tensor], nn.Module]


def _solve(
    evaluate: Evaluate,
    guess: torch.Tensor,
    method: str,
    tolerance: float,
    max_sweeps: int | None,
    block: int,
) -> Solution:
    if method not in _CARRIES:
        raise OptionError(f"unknown method {method!r}{did_you_mean(method, _CARRIES)}")
    with torch.no_grad():
        return solve_forward(
            evaluate,
            guess,
            carry=_CARRIES[method],
            tolerance=tolerance,
            max_sweeps=max_sweeps,
            window={"gs-jacobi": block, "gauss-seidel": 1}.get(method),
            block=block if method == "jacobi-gs" else 1,
        )


def _side_by_side(blocks: list[nn.Module], x: torch.Tensor) -> Evaluate:
    """All blocks of a slice in one call: one batch if they are tied, else with stacked weights."""
    if all(b is blocks[0] for b in blocks):

        def several(h: torch.Tensor, part: slice) -> torch.Tensor:
            out: torch.Tensor = vmap(blocks[0])(h)
            return out
    elif _alike(blocks):
        named = [dict((*b.named_parameters(), *b.named_buffers())) for b in blocks]
        weights = {n: torch.stack([w[n].detach() for w in named]) for n in named[0]}
        one = vmap(lambda w, h: functional_call(blocks[0], w, (h,)))

        def several(h: torch.Tensor, part: slice) -> torch.Tensor:
            out: torch.Tensor = one({name: w[part] for name, w in weights.items()}, h)
            return out
    else:

        def several(h: torch.Tensor, part: slice) -> torch.Tensor:
            indices = range(len(blocks))[part]
            return torch.stack([blocks[i](value) for i, value in zip(indices, h, strict=True)])

    def evaluate(states: torch.Tensor, part: slice) -> torch.Tensor:
        before = torch.cat([x.detach()[None], states[:-1]])[part]
        try:
            with quiet_loops():
                return several(before, part)
        except RuntimeError as error:
            raise ModelError(
                f"the blocks cannot run side by side: {error}\n  Blocks must neither draw random "
                "numbers nor write buffers; call .eval() on those that do"
            ) from error

    return evaluate


def _alike(blocks: Sequence[nn.Module]) -> bool:
    """Whether blocks differ in nothing but the values of their weights, as their text has it."""
    shapes = [
        [(n, t.shape, t.dtype) for n, t in (*b.named_parameters(), *b.named_buffers())]
        for b in blocks
    ]
    same = all(type(b) is type(blocks[0]) and repr(b) == repr(blocks[0]) for b in blocks)
    return same and all(s == shapes[0] for s in shapes) and bool(shapes[0])


def _with_one_input(f: nn.Module, before: torch.Tensor) -> _Call:
    return f, [before], f


def _attached(
    x: torch.Tensor, solution: Solution, calls: list[_Call], reads: Callable[[int], list[int]]
) -> torch.Tensor:
    parameters = _parameters([c[2] for c in calls])
    outputs: torch.Tensor = _Solved.apply(calls, reads, solution.states, x, *parameters)  # type: ignore[no-untyped-call]
    return outputs[-1]


def _parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    found = {id(p): p for m in modules for p in m.parameters()}
    return list(found.values())


class _Solved(torch.autograd.Function):
    """States that were found somehow, with the gradient of the layers they are states of."""

    @staticmethod
    def forward(
        ctx: Any,
        calls: list[_Call],
        reads: Callable[[int], list[int]],
        states: torch.Tensor,
        x: torch.Tensor,
        *parameters: nn.Parameter,
    ) -> torch.Tensor:
        ctx.calls, ctx.reads, ctx.parameters = calls, reads, parameters
        return states.clone()

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> Any:
        (drive,) = given
        # Place 0 is x, place i + 1 the state of layer i.
        w: list[torch.Tensor | None] = [None, *drive.unbind(0)]
        sums: dict[int, torch.Tensor] = {}
        for i in reversed(range(len(ctx.calls))):
            f, inputs, module = ctx.calls[i]
            with torch.enable_grad():
                leaves = [v.detach().requires_grad_() for v in inputs]
                weights = [p for p in module.parameters() if p.requires_grad]
                found = torch.autograd.grad(
                    f(*leaves), [*leaves, *weights], w[i + 1], allow_unused=True
                )
            for place, g in zip(ctx.reads(i), found, strict=False):
                w[place] = _plus(w[place], g)
            for p, g in zip(weights, found[len(leaves) :], strict=True):
                if g is not None:
                    sums[id(p)] = g if id(p) not in sums else sums[id(p)] + g
        return None, None, None, w[0], *(sums.get(id(p)) for p in ctx.parameters)


def _plus(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b
