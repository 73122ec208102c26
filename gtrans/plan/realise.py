"""Write a plan into the joint graph: what is not kept is computed again, right where it is read.

    forward:  y = gelu(x)                       forward:  y = gelu(x)
    backward: dw = mm(dz, y)            -->     backward: y' = gelu(x)      # x is kept, y is not
                                                          dw = mm(dz, y')

Every recomputed value stands just before its first reader in the backward. Torch's own split puts
all of them in front of the backward, where they are alive at once: a smaller budget then has a
higher peak (pytorch issue 197838).
"""

from collections.abc import Collection
from typing import Any

from torch import fx

from gtrans.errors import PlanError
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph, Placement
from gtrans.plan.cut import recipe


def realise(joint: JointGraph, cut: Collection[fx.Node]) -> int:
    """Rewires the backward to read kept values and recomputed ones, and records the cut.

    Args:
        joint: edited in place. Its offers are used up.
        cut: forward values to keep; with what is recomputed from them they must suffice.

    Returns:
        How many nodes run again in the backward.

    Raises:
        PlanError: the cut does not separate the halves: some value would have to be recomputed from
            itself, or from something that cannot be run again.
    """
    writer = _Writer(joint, frozenset(cut))
    for node in joint.nodes:
        if joint.is_backward(node):
            for source in ops.tensor_inputs(node):
                if joint.is_forward(source):
                    joint.replace_uses(source, writer.at(source, node), [node])
    writer.rewire_gradients()
    joint.offers = {}
    joint.eliminate_dead_code()
    joint.cut = tuple(sorted(cut))
    return writer.count


class _Writer:
    def __init__(self, joint: JointGraph, cut: frozenset[fx.Node]) -> None:
        self.joint = joint
        self.made: dict[fx.Node, fx.Node] = {n: n for n in cut}
        self.count = 0

    def at(self, value: fx.Node, reader: fx.Node) -> fx.Node:
        """The node that holds a value in the backward; made right before the reader if need be."""
        stack, waiting = [value], {value}
        while stack:
            top = stack[-1]
            missing = [n for n in recipe(self.joint, top) if n not in self.made]
            if top in self.made or not missing:
                stack.pop()
                waiting.discard(top)
                if top not in self.made:
                    self.made[top] = self._again(top, reader)
                continue
            for n in missing:
                if n in waiting and n in stack:
                    raise PlanError(f"{n.name} would have to be recomputed from itself")
                waiting.add(n)
            stack.append(missing[0])
        return self.made[value]

    def rewire_gradients(self) -> None:
        """Gradients that depend on no tangent (constants) are recomputed or kept like the rest."""
        joint = self.joint
        output = joint.output
        values: list[Any] = list(output.args[0])  # type: ignore[arg-type]  # one flat list
        for i, gradient in enumerate(joint.gradients, joint.signature.num_forward_outputs):
            if joint.is_forward(gradient):
                assert gradient is not None
                values[i] = self.at(gradient, output)
        output.args = (values,)

    def _again(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        joint, offer = self.joint, self.joint.offers.get(node)
        if offer is not None:
            first = reader.prev
            inputs = fx.map_arg(offer.inputs, lambda n: self.made[n])
            (again,) = joint.splice_before(reader, offer.function, *inputs)
            while first.next is not reader:
                first = first.next
                self._mark(first)
            return again
        if node.op != "call_function" or ops.is_effect(node) or ops.is_random(node):
            raise PlanError(f"{node.name} cannot be computed again, and the plan does not keep it")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.made.get(n, n))
        again = joint.insert_before(reader, node.target, *args, **kwargs)  # type: ignore[arg-type]
        for key in ("stack_trace", "nn_module_stack", "seq_nr", "val"):
            if key in node.meta:
                again.meta[key] = node.meta[key]
        self._mark(again)
        return again

    def _mark(self, node: fx.Node) -> None:
        self.count += 1
        self.joint.place(node, Placement.REBUILT)
