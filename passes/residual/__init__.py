"""Passes that edit the residual: what a forward region hands to its backward (knob R)."""
