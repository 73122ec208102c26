"""The techniques, one file each, one folder a knob. The table below is the whole registry."""

if __name__ != "gtrans.passes":
    raise ImportError(f"import 'gtrans.passes', not {__name__!r}")

PASSES: dict[str, str] = {
    "relu-mask": "gtrans.passes.residual.relu_mask:ReluMask",
    "dropout-output": "gtrans.passes.residual.dropout_output:DropoutOutput",
    "norm-output": "gtrans.passes.residual.norm_output:NormOutput",
    "cut": "gtrans.passes.wire.cut:Cut",
    "reversible": "gtrans.passes.residual.reversible:Reversible",
    "few-bit": "gtrans.passes.residual.few_bit:FewBit",
    "approx-bp": "gtrans.passes.residual.approx_bp:ApproxBP",
    "memory-share": "gtrans.passes.residual.memory_share:MemoryShare",
    "compress": "gtrans.passes.residual.compress:Compress",
    "bit-masks": "gtrans.passes.residual.bit_masks:BitMasks",
    "hoist-recurrent-wgrad": "gtrans.passes.rule.hoist_recurrent_wgrad:HoistRecurrentWgrad",
    "highway-bp": "gtrans.passes.wire.highway_bp:HighwayBP",
    "hoist-recurrence": "gtrans.passes.rule.hoist_recurrence:HoistRecurrence",
    "highway-recurrence": "gtrans.passes.wire.highway_recurrence:HighwayRecurrence",
    "cut-carry": "gtrans.passes.wire.cut_carry:CutCarry",
    "sltt": "gtrans.passes.wire.sltt:Sltt",
    "ode-adjoint": "gtrans.passes.wire.ode_adjoint:OdeAdjoint",
    "deq-backward": "gtrans.passes.wire.deq_backward:DeqBackward",
    "stationary-feedback": "gtrans.passes.wire.stationary_feedback:StationaryFeedback",
    "parallel-feedforward": "gtrans.passes.operator.parallel_feedforward:ParallelFeedforward",
    "narrow-integers": "gtrans.passes.residual.narrow_integers:NarrowIntegers",
    "pool-places": "gtrans.passes.residual.pool_places:PoolPlaces",
    "guided-relu": "gtrans.passes.rule.guided_relu:GuidedRelu",
    "straight-through": "gtrans.passes.rule.straight_through:StraightThrough",
    "erase-zeros": "gtrans.passes.structure.erase_zeros:EraseZeros",
    "fused-lstm": "gtrans.passes.operator.fused_lstm:FusedLstm",
    "chunked-loss": "gtrans.passes.operator.chunked_loss:ChunkedLoss",
    "to-reversible": "gtrans.passes.operator.to_reversible:ToReversible",
    "wide-streams": "gtrans.passes.operator.wide_streams:WideStreams",
    "pareprop": "gtrans.passes.schedule.pareprop:PaReprop",
    "late-recompute": "gtrans.passes.schedule.late_recompute:LateRecompute",
}
