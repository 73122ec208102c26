"""The derivative of an activation in a few bits, as something the plan may choose."""

from collections.abc import Callable
from functools import partial

from gtrans.analysis.derivative_tables import Samples, Table, samples_of
from gtrans.analysis.pointwise import Activation
from gtrans.ir.sizes import numel
from gtrans.plan.worth import Candidate, scales
from gtrans.rewrite.derivative_codes import DerivativeCodes, obstacle_to_levels


def slope_proposal(
    activation: Activation, bits: int, min_numel: int, table_of: Callable[[Samples], Table | str]
) -> Candidate | str:
    """Codes of a derivative in place of the activation's input, or why not.

    Args:
        activation: a backward that was found in the graph.
        bits: per element.
        min_numel: leave activations with fewer elements alone.
        table_of: what the codes stand for, or why there is no table for this derivative.
    """
    if numel(activation.x.meta["val"]) < min_numel:
        return "fewer elements than min_numel"
    codes = DerivativeCodes(bits)
    samples = samples_of(activation)
    obstacle = codes.obstacle(activation) or obstacle_to_levels(samples)
    if obstacle is not None or samples is None:
        return str(obstacle)
    table = table_of(samples)
    if isinstance(table, str):
        return table
    return Candidate(
        site=activation.dx,
        value=activation.x,
        bytes=codes.bytes(activation),
        let_go=scales(activation.dx, activation.dy),
        rewrite=partial(codes.rewrite, table),
        note=(
            f"{codes.bits} bits for an activation; predicted error of its gradient: relative "
            f"{table.relative:.3f} for x ~ N(0, 1), at most {table.largest:.3f} |dy|"
        ),
    )
