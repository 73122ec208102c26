"""Passes that replace an operator before autograd sees it (knob F)."""
