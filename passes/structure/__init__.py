"""Knob P: which parameters and operators exist."""
