"""Choose how many bits each compressed value gets, by what it does to the gradient of a batch."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gtrans.debugging.recording import Recording
from gtrans.errors import OptionError
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import numel
from gtrans.passes.residual.compress import Compress
from gtrans.pipeline import Gate, Pipeline
from gtrans.plan.widths import Widths, allocate, key_of

log = logging.getLogger("gtrans")

_PROBE_BITS = 2


@dataclass(frozen=True)
class _Site:
    """A value that `compress` codes: its key, its elements, and the number of its rewrite."""

    key: str
    size: int
    number: int


def adapt(
    model: nn.Module,
    *inputs: Any,
    bits: float = 3.0,
    passes: str | Pipeline = "compress,default",
    seed: int = 0,
    **keyword_inputs: Any,
) -> Pipeline:
    """A pipeline whose `compress` spends so many bits per element on average, where they matter.

    One step is recorded. Each value is then coded alone, in two bits, and the error of all
    gradients that follows says how sensitive they are to it: two runs of the captured graph a
    value, nothing is captured again.

    Args:
        model: the model; it stays as it is.
        inputs: a batch.
        bits: the average, from 2 to 8. Derivatives of activations are not counted.
        passes: a pipeline with `compress` in it.
        seed: of the random state.
        keyword_inputs: keyword inputs of the batch.

    Returns:
        The pipeline, for `gtrans.optimize(model, passes=...)`; its text is the same everywhere.

    Raises:
        OptionError: there is no `compress` in the pipeline, or the average is below 2.
        ModelError: the model does not accept the inputs.
    """
    pipeline = Pipeline.parse(passes)
    coder = next((p for p in pipeline.passes if isinstance(p, Compress)), None)
    if coder is None:
        raise OptionError(f"there is no 'compress' in {str(pipeline)!r} whose bits could be chosen")
    probe = _with(pipeline, replace(coder, bits=_PROBE_BITS, widths=None))
    recording = Recording(model, inputs, keyword_inputs, seed=seed)
    sites = _sites(probe, [c.original for c in recording.captured if c.original is not None])
    costs = []
    for i, site in enumerate(sites):
        found = recording.compare(probe, Gate({site.number}))
        log.info("gtrans.adapt: %d of %d values measured", i + 1, len(sites))
        variance = sum(c.relative**2 for c in found if c.kind == "gradient")
        costs.append(variance * (2**_PROBE_BITS - 1) ** 2)
    chosen = allocate([s.size for s in sites], costs, bits)
    if not sites:
        return pipeline
    widths = Widths(tuple((s.key, b) for s, b in zip(sites, chosen, strict=True)))
    return _with(pipeline, replace(coder, widths=widths))


def _with(pipeline: Pipeline, coder: Compress) -> Pipeline:
    return Pipeline(tuple(coder if isinstance(p, Compress) else p for p in pipeline.passes))


def _sites(pipeline: Pipeline, graphs: Sequence[JointGraph]) -> list[_Site]:
    found: list[_Site] = []
    gate = Gate()
    for graph in graphs:
        before = len(gate.seen)
        pipeline.on(JointGraph).run(graph, gate=gate)
        nodes = {n.name: n for n in graph.nodes}
        for rewrite in gate.seen[before:]:
            node = nodes.get(rewrite.site)
            if rewrite.pass_name == Compress.name and node is not None and graph.is_forward(node):
                key = key_of(graph, node)
                found.append(_Site(key, int(numel(node.meta["val"])), rewrite.number))
    return found
