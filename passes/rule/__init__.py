"""Passes that edit the rule of an operator: how its backward maps cotangents (knob B)."""
