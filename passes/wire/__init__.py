"""Passes that edit the wire: where an incoming cotangent comes from (knob G)."""
