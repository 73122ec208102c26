"""Passes that edit the rule: how a backward is computed (knob B)."""
