"""The derivative of an activation in a few bits, as something the plan may choose."""

from functools import partial

from gtrans.analysis.derivative_tables import Table
from gtrans.analysis.pointwise import Activation
from gtrans.plan.worth import Candidate, scales
from gtrans.rewrite.derivative_codes import DerivativeCodes


def slope_candidate(activation: Activation, codes: DerivativeCodes, table: Table) -> Candidate:
    """Codes of a derivative in place of the activation's input.

    Args:
        activation: a backward that was found in the graph.
        codes: how many bits.
        table: what they stand for.
    """
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
