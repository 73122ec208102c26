"""Passes that edit the order of work and never a value (knob S)."""
