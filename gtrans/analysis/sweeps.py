"""How many sweeps over a chain are enough, before any is run.

With ways past blocks of norm at most one, blocks of norms rho[1..L] and a loss at the end, what k
sweeps leave out of a cotangent is at most

    |wk - w| <= |e| * sum over m > k of E_m(rho),    E_m the m-th elementary symmetric polynomial

(every way from the loss through m blocks counts once). With s = sum rho this is about
s^(k+1) / (k+1)! * exp(s): sweeps grow with the sum of the norms, not with the depth.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from gtrans.analysis.chains import Chain, Link
from gtrans.ir.joint import JointGraph


def left_out(norms: Sequence[float], sweeps: int) -> float:
    """The bound on |wk - w| / |e| after some sweeps over blocks of these norms."""
    polynomial = [1.0]
    for norm in norms:
        shifted = [0.0, *(norm * c for c in polynomial)]
        polynomial = [a + b for a, b in zip([*polynomial, 0.0], shifted, strict=True)]
    return sum(polynomial[sweeps + 1 :])


def sweeps_for(norms: Sequence[float], error: float) -> int:
    """The fewest sweeps whose bound is below an error; as many as blocks are always enough."""
    return next(k for k in range(len(norms) + 1) if left_out(norms, k) <= error)


def block_norms(
    joint: JointGraph, chain: Chain, arguments: Mapping[str, Any], rounds: int = 3
) -> list[float]:
    """Estimates how much each block of a chain can stretch a cotangent.

    A random cotangent goes through the block's cone again and again; the largest stretch that was
    seen is a norm's estimate from below.

    Args:
        joint: the graph.
        chain: one of its chains.
        arguments: values of its placeholders by name, from a real step.
        rounds: times through each cone.

    Returns:
        One number for each link that has a cone.
    """
    env: dict[fx.Node, Any] = {}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for node in joint.nodes:
            if node.op == "placeholder":
                env[node] = arguments[node.name]
            elif node.op == "get_attr":
                env[node] = getattr(joint.module, str(node.target))
            elif node.op != "output":
                env[node] = _run(node, env)
        moving = chain.moving()
        return [
            _stretch(link, chain, moving, env, rounds) for link in chain.links if not link.local
        ]


def _stretch(
    link: Link,
    chain: Chain,
    moving: frozenset[fx.Node],
    env: Mapping[fx.Node, Any],
    rounds: int,
) -> float:
    points, read = set(chain.points), set[fx.Node]()
    pending, cone = [link.addend], {link.addend}
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in points:
                read.add(source)
            elif source in moving and source not in cone:
                cone.add(source)
                pending.append(source)
    u, largest = torch.randn_like(env[link.node]), 0.0
    for _ in range(rounds):
        values = dict(env)
        values.update({point: u.reshape(env[point].shape) for point in read})
        for node in sorted(cone):
            values[node] = _run(node, values)
        after = values[link.addend]
        largest = max(largest, float(after.norm() / u.norm().clamp(min=1e-30)))
        u = after.reshape(u.shape)
    return largest


def _run(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
    target: Any = node.target
    return target(*args, **kwargs)
